"""The decoder and its parts: dropout, head, KV cache, adapters, families, measures, limits. Imports config only."""
