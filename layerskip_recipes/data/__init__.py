"""Texts and tokens: tokenizer, JSON lines, reference tasks, the standard library. Imports model and what lies below."""
