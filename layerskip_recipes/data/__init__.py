"""Texts and tokens: tokenizer, datasets, JSONL, reference tasks, the standard library. Imports model and below."""
