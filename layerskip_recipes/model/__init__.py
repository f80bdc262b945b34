"""The decoder and its parts: dropout, head, KV cache, adapters, trained drafts. Imports config and below."""
