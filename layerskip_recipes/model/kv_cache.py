"""The KV cache of generation: one buffer per layer, written at slots that the engine chooses.

torchtune's own `KVCache` counts forward only and hands the whole allocation to attention. This one goes back by
writing again: a row's slot p is valid once written, later slots are never looked at, and attention gets the filled
part only. Draft and verification share it: each layer is written by whichever pass runs that layer. The candidates of
a draft tree have slots of their own behind the text; `move` brings an accepted path to where its text belongs.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from layerskip_recipes.model.decoder import LayerSkipDecoder, is_plain_attention


class Place:
    """Where the next tokens stand; what all layers' caches share. It refers to none: caches are freed at once."""

    def __init__(self, max_len: int) -> None:
        self.max_len = max_len
        self.at: torch.Tensor | None = None
        self.end = 0


class LayerCache:
    """Keys and values of one layer; takes the place of `attn.kv_cache` in torchtune's attention."""

    def __init__(self, place: "Place") -> None:
        self.place = place
        self.k: torch.Tensor | None = None
        self.v: torch.Tensor | None = None

    def update(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k, v [b, heads, s, head_dim] at the slots of `DecodingCache.seek`; return all that is filled."""
        if self.k is None:
            # Allocated by what arrives: the number of heads differs between attention classes and under sharding.
            shape = (*k.shape[:2], self.place.max_len, k.shape[3])
            self.k, self.v = k.new_zeros(shape), v.new_zeros(shape)
            if k.is_cuda:
                # CUDA graphs write into it where it is. Unguarded: a graph takes the buffers of its call.
                torch._dynamo.mark_static_address(self.k, guard=False)
                torch._dynamo.mark_static_address(self.v, guard=False)
        self._write(self.k, self.place.at, k)
        self._write(self.v, self.place.at, v)
        return self.k[:, :, : self.place.end], self.v[:, :, : self.place.end]

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """What stands at the slots `source` [b, n] goes to the slots `target` [b, n]."""
        for buffer in (self.k, self.v):
            index = source[:, None, :, None].expand(-1, buffer.shape[1], -1, buffer.shape[3])
            self._write(buffer, target, buffer.gather(2, index))

    @staticmethod
    def _write(buffer: torch.Tensor, at: torch.Tensor, values: torch.Tensor) -> None:
        if at.shape[0] == 1:
            buffer.index_copy_(2, at[0], values)
        elif not torch.compiler.is_compiling():
            buffer.scatter_(2, at[:, None, :, None].expand_as(values), values)
        else:
            # A compiled scatter_ would be done on a copy of the whole buffer.
            rows, heads = (torch.arange(size, device=at.device) for size in buffer.shape[:2])
            buffer.index_put_((rows[:, None, None], heads[:, None], at[:, None]), values)


class DecodingCache:
    """The caches of all layers of a decoder, and the slots at which the next tokens stand.

    Args:
        model: the decoder.
        rows: b.
        max_len: slots per row.
        device: of the tensors.
    """

    def __init__(self, model: LayerSkipDecoder, rows: int, max_len: int, device: torch.device) -> None:
        self.rows = rows
        self.max_len = max_len
        self.slots = torch.arange(max_len, device=device)
        self.place = Place(max_len)
        self.layers = [LayerCache(self.place) for _ in model.layers]
        # The tokens of each row whose keys and values stand at slots 0, 1, ...: a later prompt goes on from them.
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.depth = 0  # in the first so many layers

    @contextmanager
    def used_by(self, *decoders: LayerSkipDecoder) -> Iterator[None]:
        """Inside, the decoders' attention layers use these caches; afterwards what they had before.

        Of a decoder with fewer layers, such as a draft in another precision, they are the first ones.
        """
        with (
            ExitStack() as afterwards
        ):  # backwards: a drafter may have layers of the model, which are this cache's already
            for decoder in decoders:
                afterwards.callback(setattr, decoder, "decoding", decoder.decoding)
                for layer, cache in zip(decoder.layers, self.layers[: len(decoder.layers)], strict=True):
                    afterwards.callback(_give_back, layer, _take_over(layer, cache))
                decoder.decoding = True
            yield

    def seek(self, at: torch.Tensor, end: int) -> None:
        """The next tokens stand at the slots `at` [b, s] ([1, s]: the same in all rows); attention sees slots < end."""
        self.place.at, self.place.end = at, end

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """In all layers, see `LayerCache.move`."""
        for layer in self.layers:
            layer.move(source, target)


def visible(slots: torch.Tensor, at: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask of text and chains: slot j is visible from slot p if j <= p.

    Args:
        slots: [end], 0 .. end-1.
        at: [b, s], the slots of the queries.
        dtype: of the model.

    Returns:
        [b, s, end], 0 or -inf, to be added to the scores.
    """
    return torch.where(slots <= at[:, :, None], 0.0, -torch.inf).to(dtype)


def visible_tree(slots: torch.Tensor, root: torch.Tensor, ancestors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask of a draft tree, whose node k stands at slot root + k: all before the root, and a node's ancestors.

    Args:
        slots: [end].
        root: [b].
        ancestors: [b, s, nodes] bool, for each query the nodes on its path, itself included.
        dtype: of the model.

    Returns:
        [b, s, end], as `visible`.
    """
    node = slots - root[:, None]
    last = ancestors.shape[2] - 1
    on_path = ancestors.gather(2, node.clamp(0, last)[:, None].expand(-1, ancestors.shape[1], -1))
    seen = (node < 0)[:, None] | (on_path & ((node >= 0) & (node <= last))[:, None])
    return torch.where(seen, 0.0, -torch.inf).to(dtype)


def cached_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> torch.Tensor:
    """Attention over a cache without a copy of its grouped heads: the queries that share a key head stand in one row.

    Args:
        q: [b, heads, s, head_dim].
        k, v: [b, key heads, end, head_dim]; heads is a multiple of key heads.
        mask: [b or 1, s, end], added to the scores; None: causal if there are several queries, else all is seen.
        dropout_p, is_causal: torchtune passes them; generation drops nothing and its masks say what is seen.

    Returns:
        [b, heads, s, head_dim].
    """
    b, heads, s, dim = q.shape
    group = heads // k.shape[1]
    if mask is None and s > 1:
        if group > 1 and q.is_cuda and (q.dtype == torch.float32 or dim > 256):
            # There only the kernel that holds all scores knows grouped queries.
            k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1)
    if mask is not None:
        mask = mask[:, None] if group == 1 else mask[:, None].repeat(1, 1, group, 1)
    q = q.reshape(b, k.shape[1], group * s, dim)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(b, heads, s, dim)


@contextmanager
def without_plans(device: torch.device) -> Iterator[None]:
    """On a GPU without cuDNN's attention, which newer ones prefer: it plans each length of keys anew, and while a text
    grows every step has another, tens of milliseconds each."""
    kept = torch.backends.cuda.cudnn_sdp_enabled()
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(kept)


def _take_over(layer: nn.Module, cache: LayerCache) -> dict[str, object]:
    """Put the cache into a layer's attention; returns what was there."""
    attn = layer.attn
    before = {"kv_cache": attn.kv_cache, "cache_enabled": attn.cache_enabled}
    # torchtune's KVCache is a module, and a module's slot takes no plain object.
    attn._modules.pop("kv_cache", None)
    attn.kv_cache, attn.cache_enabled = cache, True
    if is_plain_attention(layer):
        before |= {"num_kv_heads": attn.num_kv_heads, "_attention_call": attn._attention_call}
        # With as many key heads as heads torchtune does not expand the cache; the projections decide the real number.
        attn.num_kv_heads, attn._attention_call = attn.num_heads, cached_attention
    return before


def _give_back(layer: nn.Module, before: dict[str, object]) -> None:
    del layer.attn.kv_cache
    for name, value in before.items():
        setattr(layer.attn, name, value)
