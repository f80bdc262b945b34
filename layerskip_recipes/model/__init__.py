"""The decoder and its parts: walk, dropout, head, KV cache, adapters, families. Imports config only."""
