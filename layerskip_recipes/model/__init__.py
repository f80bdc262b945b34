"""The decoder and its parts: dropout, head, KV cache, adapters, Hugging Face folders. Imports config and below."""
