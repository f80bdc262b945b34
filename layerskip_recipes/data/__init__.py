"""Texts and tokens: tokenizer, datasets, JSON lines, reference tasks, the standard library. Imports model and below."""
