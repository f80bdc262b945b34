"""The decoder and its parts: dropout, head, KV cache, adapters, Hugging Face folders, measures, limits. Imports config only."""
