"""The KV cache of generation: one buffer per layer, written at slots that the engine chooses.

Attention is patched here: within `DecodingCache.used_by`, `attn.kv_cache` of each layer is a `LayerCache`, and
torchtune's own attention calls `cached_attention` (`attn._attention_call`) with unexpanded key heads
(`attn.num_kv_heads`).

torchtune's own `KVCache` counts forward only and hands the whole allocation to attention. A `LayerCache` goes back by
writing again: a row's slot p is valid once written, and later slots are hidden by masks; attention gets the filled part
only, in graphs some slots more or all. Draft and verification share the cache: each layer is written by whichever pass
runs that layer.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from layerskip_recipes.model.decoder import LayerSkipDecoder, is_plain_attention

BLOCK = 128  # slots that FlexAttention reads or leaves out together


class LayerCache:
    """Keys and values of one layer; takes the place of `attn.kv_cache` in torchtune's attention.

    Args:
        max_len: slots of each row.
        cursor: [at, end], see `DecodingCache.seek`; a list that all layers share. Without a reference to its
            `DecodingCache`, thus without a cycle, a layer's buffers are freed at once.
    """

    def __init__(self, max_len: int, cursor: list[Any]) -> None:
        self.max_len, self.cursor = max_len, cursor
        self.k: Any = None  # [b, heads, slots, head_dim] once there are keys, and as many values
        self.v: Any = None

    def update(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k, v [b, heads, s, head_dim] at the slots of `DecodingCache.seek`; return those below its `end`."""
        if self.k is None:
            # At the first call: the number of heads depends on the attention class and on sharding.
            self.allocate(k.shape[0], k.shape[1], k.shape[3], k)
        at, end = self.cursor
        self._write(self.k, at, k)
        self._write(self.v, at, v)
        return self.k[:, :, :end], self.v[:, :, :end]

    def allocate(self, rows: int, heads: int, head_dim: int, like: torch.Tensor) -> None:
        """Make the buffers, in the dtype and on the device of a tensor."""
        self.k, self.v = (like.new_zeros(rows, heads, self.max_len, head_dim) for _ in range(2))
        if like.is_cuda:
            # CUDA graphs write to fixed addresses. There is no guard, as graphs here are looked up by their keys.
            torch._dynamo.mark_static_address(self.k, guard=False)
            torch._dynamo.mark_static_address(self.v, guard=False)

    @staticmethod
    def _write(buffer: torch.Tensor, at: torch.Tensor, values: torch.Tensor) -> None:
        if at.shape[0] == 1:
            buffer.index_copy_(2, at[0], values)
        elif not torch.compiler.is_compiling():
            buffer.scatter_(2, at[:, None, :, None].expand_as(values), values)
        else:
            # A compiled scatter_ would copy the whole buffer first.
            rows, heads = (torch.arange(size, device=at.device) for size in buffer.shape[:2])
            buffer.index_put_((rows[:, None, None], heads[:, None], at[:, None]), values)


class DecodingCache:
    """The caches of all layers of a decoder, b rows of max_len slots, and the slots at which the next tokens stand.

    A draft's layers read the text themselves and have caches of their own.
    """

    def __init__(self, model: LayerSkipDecoder, rows: int, max_len: int, draft_layers: int = 0) -> None:
        self.rows, self.draft_layers = rows, draft_layers
        self.max_len = max_len
        self.slots = torch.arange(max_len, device=model.tok_embeddings.weight.device)
        # Not an attribute for each: torch 2.13 forgets attributes that a graph sets behind FlexAttention.
        self.cursor: list[Any] = [None, 0]
        # The model's, then the draft's.
        self.layers = [LayerCache(max_len, self.cursor) for _ in range(model.num_layers + draft_layers)]
        # The tokens of each row whose keys and values are at slots 0, 1, ... of the first `depth` layers: a later
        # prompt that begins with the same tokens reuses them.
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.depth = 0

    @contextmanager
    def used_by(self, *decoders: LayerSkipDecoder) -> Iterator[None]:
        """Within this context the decoders' attention layers use these caches; afterwards what they had before."""
        # Undone backwards: a drafter may share layers with the model, which have this cache already.
        with ExitStack() as afterwards:
            for decoder in decoders:
                afterwards.callback(setattr, decoder, "decoding", decoder.decoding)
                for layer, cache in zip(decoder.layers, self.of(decoder), strict=True):
                    afterwards.callback(_restore_attention, layer, _patch_attention(layer, cache))
                decoder.decoding = True
            yield

    def of(self, decoder: LayerSkipDecoder) -> list[LayerCache]:
        """The caches of a decoder's layers: the first ones, and for a draft's own layers the last ones."""
        own = decoder.own_layers
        shared = own.start if own else len(decoder.layers)
        return [*self.layers[:shared], *self.layers[len(self.layers) - len(own) :]]

    def allocate(self, decoder: LayerSkipDecoder, depth: int) -> None:
        """Make the buffers of a decoder's first layers, of one process, which their first calls would make."""
        for layer, cache in zip(decoder.layers[:depth], self.of(decoder), strict=False):
            attn = layer.attn
            heads = attn.k_proj.out_features // attn.head_dim if is_plain_attention(layer) else attn.num_heads
            if cache.k is None:
                cache.allocate(self.rows, heads, attn.head_dim, decoder.tok_embeddings.weight)

    def seek(self, at: torch.Tensor, end: int) -> None:
        """The next tokens go to the slots `at` [b, s] ([1, s]: the same in all rows); attention sees slots < end."""
        self.cursor[:] = at, end

    @contextmanager
    def only(self, row: int) -> Iterator[None]:
        """Within this context the caches are those of one row."""
        used = [(layer, layer.k, layer.v) for layer in self.layers if layer.k is not None]
        for layer, k, v in used:
            layer.k, layer.v = k[row : row + 1], v[row : row + 1]
        try:
            yield
        finally:
            for layer, k, v in used:
                layer.k, layer.v = k, v


def causal_mask(at: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where a query, at the slots `at` [b or 1, s], sees a slot, those up to its own, else -inf; [b or 1, s, end]."""
    return torch.where(slots <= at[..., None], 0.0, -torch.inf).to(dtype)


class BlockAttention:
    """Attention over a whole cache in a compiled step, by FlexAttention.

    Its kernel reads no block of slots behind the last visible one, which it finds on the device, so that one graph
    serves all lengths of a text. For fewer than 128 queries it splits a row's slots among the processors of a GPU.

    Args:
        at: [b, s], the slots of the queries, each of which sees the slots up to its own.
        max_len: slots of the cache, a whole number of blocks.
    """

    def __init__(self, at: torch.Tensor, max_len: int) -> None:
        self.at, self.max_len = at, max_len
        # Made once for all layers. Both have to be contiguous, which a vector with new dimensions is not in a graph.
        blocks = torch.arange(max_len // BLOCK, dtype=torch.int32, device=at.device)
        self.counts = (at.amax(1)[:, None, None] // BLOCK + 1).to(torch.int32)
        self.blocks = blocks.repeat(len(at), 1, 1, 1)

    def block_mask(self, grouped: int) -> BlockMask:
        """What the kernel reads: one block of n s grouped queries for each row, which sees the row's first blocks."""
        return BlockMask.from_kv_blocks(
            self.counts,
            self.blocks,
            BLOCK_SIZE=(-(-grouped // BLOCK) * BLOCK, BLOCK),
            mask_mod=lambda row, _, query, slot: slot <= self.at[row, query % self.at.shape[1]],
            seq_lengths=(grouped, self.max_len),
        )

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [b, key heads, n s, head_dim], the queries of n heads that share a key head behind one another; k, v
        [b, key heads, max_len, head_dim] -> the shape of q."""
        return flex_attention(q, k, v, block_mask=self.block_mask(q.shape[2]))


def cached_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | BlockAttention | None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> torch.Tensor:
    """Attention over a cache without a copy of its grouped heads: queries that share a key head become one row.

    Args:
        q: [b, heads, s, head_dim].
        k, v: [b, key heads, end, head_dim]; heads is a multiple of key heads.
        mask: [b or 1, s, end], added to the scores, or attention over a whole cache; None: causal for several
            queries, all slots for a single one.
        dropout_p, is_causal: passed by torchtune, and unused: generation has no dropout, and its own masks.

    Returns:
        [b, heads, s, head_dim].
    """
    b, heads, s, dim = q.shape
    group = heads // k.shape[1]
    if mask is None and s > 1:
        if group > 1 and q.is_cuda and (q.dtype == torch.float32 or dim > 256):
            # In these cases the only kernel for grouped queries is the one that holds all scores.
            k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1)
    q = q.reshape(b, k.shape[1], group * s, dim)
    if isinstance(mask, BlockAttention):
        return mask(q, k, v).reshape(b, heads, s, dim)
    if mask is not None:
        mask = mask[:, None] if group == 1 else mask[:, None].repeat(1, 1, group, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(b, heads, s, dim)


@contextmanager
def decoding_kernels(device: torch.device) -> Iterator[None]:
    """torch's settings for decoding on a GPU; afterwards as before.

    cuDNN's attention is off: it makes a plan for each new length of the keys, tens of milliseconds each, and a growing
    text has a new length at every step. Products of bf16 add up in fp32 throughout, so that a verification of several
    tokens rounds like steps of one.
    """
    if device.type != "cuda":
        yield
        return
    products = torch.backends.cuda.matmul
    plans, in_bf16 = torch.backends.cuda.cudnn_sdp_enabled(), products.allow_bf16_reduced_precision_reduction
    torch.backends.cuda.enable_cudnn_sdp(False)
    products.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(plans)
        products.allow_bf16_reduced_precision_reduction = in_bf16


def _patch_attention(layer: nn.Module, cache: LayerCache) -> dict[str, object]:
    """Let a layer's attention use the cache; returns the attributes that it had before."""
    attn = layer.attn
    before = {"kv_cache": attn.kv_cache, "cache_enabled": attn.cache_enabled}
    # torchtune's KVCache is a submodule, whose name takes no plain object.
    attn._modules.pop("kv_cache", None)
    attn.kv_cache, attn.cache_enabled = cache, True
    if is_plain_attention(layer):
        before |= {"num_kv_heads": attn.num_kv_heads, "_attention_call": attn._attention_call}
        # With as many key heads as heads torchtune does not expand the cache. The projections keep the real number.
        attn.num_kv_heads, attn._attention_call = attn.num_heads, cached_attention
    return before


def _restore_attention(layer: nn.Module, before: dict[str, object]) -> None:
    del layer.attn.kv_cache
    for name, value in before.items():
        setattr(layer.attn, name, value)
