"""The KV cache of generation: one buffer per layer, written at positions that the engine chooses.

torchtune's own `KVCache` counts forward only and hands the whole allocation to attention. This one goes back by
writing again: a row's position p is valid once written, later positions are never looked at, and attention gets the
filled part only. Draft and verification share it: each layer is written by whichever pass runs that layer.
"""

import torch

from layerskip_recipes.decoder import LayerSkipDecoder


class LayerCache:
    """Keys and values of one layer; takes the place of `attn.kv_cache` in torchtune's attention."""

    def __init__(self, cache: "DecodingCache") -> None:
        self.cache = cache
        self.k: torch.Tensor | None = None
        self.v: torch.Tensor | None = None

    def update(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k, v [b, heads, s, head_dim] at the positions of `DecodingCache.seek`; return all that is filled."""
        if self.k is None:
            # Allocated by what arrives: the number of heads differs between attention classes and under sharding.
            shape = (*k.shape[:2], self.cache.max_len, k.shape[3])
            self.k, self.v = k.new_zeros(shape), v.new_zeros(shape)
        start, end = self.cache.start, self.cache.end
        if start is not None:
            self.k[:, :, start : start + k.shape[2]] = k
            self.v[:, :, start : start + k.shape[2]] = v
        else:
            index = self.cache.positions[:, None, :, None].expand_as(k)
            self.k.scatter_(2, index, k)
            self.v.scatter_(2, index, v)
        return self.k[:, :, :end], self.v[:, :, :end]


class DecodingCache:
    """The caches of all layers of a decoder, and the positions at which the next tokens stand.

    A context manager: inside it the decoder's attention layers use these caches, afterwards what they had before.

    Args:
        model: the decoder.
        max_len: positions per row.
        device: of the position tensors.
    """

    def __init__(self, model: LayerSkipDecoder, max_len: int, device: torch.device) -> None:
        self.model = model
        self.max_len = max_len
        self.slots = torch.arange(max_len, device=device)
        self.layers = [LayerCache(self) for _ in model.layers]

    def __enter__(self) -> "DecodingCache":
        self._before = [(layer.attn.kv_cache, layer.attn.cache_enabled) for layer in self.model.layers]
        for layer, cache in zip(self.model.layers, self.layers, strict=True):
            # torchtune's KVCache is a module, and a module's slot takes no plain object.
            layer.attn._modules.pop("kv_cache", None)
            layer.attn.kv_cache, layer.attn.cache_enabled = cache, True
        self.model.decoding = True
        return self

    def __exit__(self, *_: object) -> None:
        for layer, (cache, enabled) in zip(self.model.layers, self._before, strict=True):
            del layer.attn.kv_cache
            layer.attn.kv_cache, layer.attn.cache_enabled = cache, enabled
        self.model.decoding = False

    def seek(self, positions: torch.Tensor, start: int | None, end: int) -> dict[str, torch.Tensor | None]:
        """The next tokens stand at `positions`; returns the decoder's inputs for them.

        Args:
            positions: [b, s] (or [1, s] for all rows), each row's positions in order.
            start: the first position if it is the same in all rows, else None.
            end: one more than the largest position: what attention has to look at.

        Returns:
            {"input_pos": positions, "mask": [b, s, end] or None}: slot j is visible from position p if j <= p.
        """
        self.positions, self.start, self.end = positions, start, end
        one_token_sees_all = start is not None and positions.shape[1] == 1
        mask = None if one_token_sees_all else self.slots[:end] <= positions[:, :, None]
        return {"input_pos": positions, "mask": mask}
