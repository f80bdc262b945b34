"""The KV cache of generation: one buffer per layer, written at slots that the engine chooses.

`DecodingCache.used_by` patches attention: each layer's `attn.kv_cache` becomes a `LayerCache`, and torchtune's
attention calls `cached_attention` (`attn._attention_call`) with unexpanded key heads (`attn.num_kv_heads`).

torchtune's `KVCache` can only move forward, and passes the whole allocation to attention. A `LayerCache` goes back by
overwriting: masks hide later slots, and attention gets only the filled part (in graphs, some slots more or all).
"""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torchtune.modules import MultiHeadAttention

from layerskip_recipes.model.changes import weights_key
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.processes import from_every_rank

BLOCK_SLOTS = 128  # slots that FlexAttention reads or skips together


class LayerCache:
    """Keys and values of one layer; replaces `attn.kv_cache` in torchtune's attention.

    All layers share `cursor`, [at, end], see `DecodingCache.seek`. A reference to the `DecodingCache` would be a cycle,
    which delays freeing the buffers.
    """

    def __init__(self, max_len: int, cursor: list[Any]) -> None:
        self.max_len, self.cursor = max_len, cursor
        self.k: Any = None  # [b, heads, slots, head_dim] once allocated, like v
        self.v: Any = None

    @property
    def cache_pos(self) -> torch.Tensor:
        """The slots of the next tokens [b or 1, s], under torchtune's name for them."""
        return self.cursor[0]

    def update(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k, v [b, heads, s, head_dim] at the slots of `DecodingCache.seek`; return those below its `end`."""
        if self.k is None:
            # Only now: the number of heads depends on the attention class and on sharding.
            self.allocate(k.shape[0], k.shape[1], k.shape[3], k)
        at, end = self.cursor
        self._write(self.k, at, k)
        self._write(self.v, at, v)
        return self.k[:, :, :end], self.v[:, :, :end]

    def allocate(self, num_rows: int, heads: int, head_dim: int, like: torch.Tensor) -> None:
        """Allocate the buffers in the dtype and on the device of `like`."""
        self.k, self.v = (like.new_zeros(num_rows, heads, self.max_len, head_dim) for _ in range(2))
        if like.is_cuda:
            # CUDA graphs write to fixed addresses. No guard is needed, as graphs are looked up by their keys.
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
    """The caches of a decoder's layers and of a draft's own layers, and the slots of the next tokens."""

    def __init__(self, model: LayerSkipDecoder, num_rows: int, max_len: int, draft_layers: int = 0) -> None:
        self.num_rows, self.draft_layers = num_rows, draft_layers
        self.max_len = max_len
        # One list instead of two attributes: torch 2.13 loses attributes that a graph sets after FlexAttention.
        self.cursor: list[Any] = [None, 0]
        # Each row's tokens whose keys and values are in slots 0, 1, ... of the first `cached_layers` layers. A later
        # prompt with the same first tokens reuses them.
        self.tokens: list[list[int]] = [[] for _ in range(num_rows)]
        self.cached_layers = 0
        self.exact_splits = False  # of the backend that computed them
        self._prepare(model)

    def _prepare(self, model: LayerSkipDecoder) -> None:
        self.slots = torch.arange(self.max_len, device=model.tok_embeddings.weight.device)
        # The model's layers, then the draft's own layers.
        number = model.num_layers + self.draft_layers
        self.layers = [LayerCache(self.max_len, self.cursor) for _ in range(number)]
        # What the tokens were computed with: the model, and a key of its weights and of the draft's.
        self.model, self.weights = weakref.ref(model), tuple[Any, ...]()

    def forget_other_weights(
        self, model: LayerSkipDecoder, draft: LayerSkipDecoder, user_code: bool = False, shared: bool = False
    ) -> None:
        """Forget the tokens if another model or draft computed them, or the same one with other weights.

        User code, such as hooks, can change without a trace, so tokens from before or after it are forgotten too. With
        `shared`, all ranks forget the tokens as soon as one has to.
        """
        if self.model() is not model:
            self._prepare(model)
        modules = [model, *(draft.layers[i] for i in draft.trained_layers)]
        weights = weights_key(tensor for module in modules for tensor in chain(module.parameters(), module.buffers()))
        same = weights == self.weights and not user_code
        if shared and self.weights:  # a new cache has nothing to agree on
            same = all(from_every_rank(same))
        if not same:
            self.keep_first(0)
        self.weights = () if user_code else weights

    def fits(self, model: LayerSkipDecoder, num_rows: int, draft_layers: int, slots: int) -> bool:
        """Whether it can serve these rows, draft layers and slots in the model's dtype and on its device."""
        weight, keys = model.tok_embeddings.weight, self.layers[0].k
        same = keys is None or (keys.dtype, keys.device) == (weight.dtype, weight.device)
        return same and (self.num_rows, self.draft_layers) == (num_rows, draft_layers) and self.max_len >= slots

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers that are allocated."""
        return sum(2 * layer.k.nbytes for layer in self.layers if layer.k is not None)

    def keep_first(self, count: int) -> None:
        """Forget all but the first `count` tokens of each row."""
        self.tokens = [row[:count] for row in self.tokens]

    @contextmanager
    def used_by(self, *decoders: LayerSkipDecoder) -> Iterator[None]:
        """Within this context the decoders' attention layers use these caches."""
        # Undone in reverse order, as a draft decoder may share layers with the model.
        with ExitStack() as afterwards:
            for decoder in decoders:
                afterwards.callback(setattr, decoder, "decoding", decoder.decoding)
                for layer, cache in zip(decoder.layers, self.of(decoder), strict=True):
                    afterwards.callback(_restore_attention, layer, _patch_attention(layer, cache))
                decoder.decoding = True
            yield

    def of(self, decoder: LayerSkipDecoder) -> list[LayerCache]:
        """The caches of a decoder's layers; a draft's own layers have the last ones."""
        trained = decoder.trained_layers
        shared = trained.start if trained else len(decoder.layers)
        return [*self.layers[:shared], *self.layers[len(self.layers) - len(trained) :]]

    def allocate(self, decoder: LayerSkipDecoder, num_layers: int) -> None:
        """Allocate the buffers of a decoder's first layers before their first call; for an unsharded decoder."""
        for layer, cache in zip(decoder.layers[:num_layers], self.of(decoder), strict=False):
            attn = layer.attn
            expands = not isinstance(attn, MultiHeadAttention)  # before the cache, in torchtune's Gemma 2
            heads = attn.num_heads if expands else attn.k_proj.out_features // attn.head_dim
            if cache.k is None:
                cache.allocate(self.num_rows, heads, attn.head_dim, decoder.tok_embeddings.weight)

    def seek(self, at: torch.Tensor, end: int) -> None:
        """Write the next tokens to the slots `at` [b, s] ([1, s]: the same in all rows); attention sees slots < end."""
        self.cursor[:] = at, end

    @contextmanager
    def only(self, row: int) -> Iterator[None]:
        """Within this context the cache consists of one row."""
        used = [(layer, layer.k, layer.v) for layer in self.layers if layer.k is not None]
        for layer, k, v in used:
            layer.k, layer.v = k[row : row + 1], v[row : row + 1]
        try:
            yield
        finally:
            for layer, k, v in used:
                layer.k, layer.v = k, v


def causal_mask(at: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[b or 1, s, end]: 0 for slots up to the query's own, at [b or 1, s], else -inf."""
    return torch.where(slots <= at[..., None], 0.0, -torch.inf).to(dtype)


class BlockAttention:
    """FlexAttention over a whole cache in a compiled step; queries are at the slots `at` [b, s].

    The kernel finds the last visible block on the device and reads none behind it, so one graph serves all text
    lengths. For fewer than 128 queries it splits a row's slots over the GPU's processors. BLOCK_SLOTS divides
    `max_len`. With a `window` a query sees no more slots than that.
    """

    def __init__(self, at: torch.Tensor, max_len: int, window: int | None = None) -> None:
        self.at, self.max_len, self.window = at, max_len, window
        # Computed once for all layers. Both must be contiguous; in a graph, a vector with added dimensions is not.
        blocks = torch.arange(max_len // BLOCK_SLOTS, dtype=torch.int32, device=at.device)
        self.counts = (at.amax(1)[:, None, None] // BLOCK_SLOTS + 1).to(torch.int32)
        self.blocks = blocks.repeat(len(at), 1, 1, 1)

    def block_mask(self, grouped: int) -> BlockMask:
        """The mask for one block of `grouped` = n s queries per row, which sees the row's first blocks."""
        window = self.max_len if self.window is None else self.window

        def sees(row: Any, _: Any, query: Any, slot: Any) -> Any:
            at = self.at[row, query % self.at.shape[1]]
            return (slot <= at) & (slot > at - window)

        return BlockMask.from_kv_blocks(
            self.counts,
            self.blocks,
            BLOCK_SIZE=(-(-grouped // BLOCK_SLOTS) * BLOCK_SLOTS, BLOCK_SLOTS),
            mask_mod=sees,
            seq_lengths=(grouped, self.max_len),
        )

    def within(self, window: int) -> "BlockAttention":
        """The same attention with a window."""
        return BlockAttention(self.at, self.max_len, window)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [b, key heads, n s, head_dim] for n heads per key head; k, v [b, key heads, max_len, head_dim]."""
        return flex_attention(q, k, v, block_mask=self.block_mask(q.shape[2]))


def cached_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | BlockAttention | None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> torch.Tensor:
    """Attention over a cache without expanding its key heads: q [b, heads, s, head_dim] -> the same shape.

    k, v [b, key heads, end, head_dim]. The mask [b or 1, s, end] is added to the scores; None: causal for several
    queries, all slots for a single one. torchtune passes dropout_p and is_causal, which are unused.
    """
    b, heads, s, dim = q.shape
    group = heads // k.shape[1]
    if mask is None and s > 1:
        if group > 1 and q.is_cuda and (q.dtype == torch.float32 or dim > 256):
            # The only kernel for grouped queries in these cases holds all scores in memory.
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
    """torch's settings for decoding on a GPU.

    cuDNN attention is off: for each new length of the keys, thus at every step, it spends tens of milliseconds on a
    plan. bf16 products accumulate in fp32, so that a verification of several tokens rounds like single steps.
    """
    if device.type != "cuda":
        yield
        return
    products = torch.backends.cuda.matmul
    use_cudnn, reduce_bf16 = torch.backends.cuda.cudnn_sdp_enabled(), products.allow_bf16_reduced_precision_reduction
    torch.backends.cuda.enable_cudnn_sdp(False)
    products.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(use_cudnn)
        products.allow_bf16_reduced_precision_reduction = reduce_bf16


def _patch_attention(layer: nn.Module, cache: LayerCache) -> dict[str, object]:
    """Let a layer's attention use the cache; returns its previous attributes."""
    attn = layer.attn
    before = {"kv_cache": attn.kv_cache, "cache_enabled": attn.cache_enabled}
    # torchtune's KVCache is a submodule, and a submodule's name accepts no plain object.
    attn._modules.pop("kv_cache", None)
    attn.kv_cache, attn.cache_enabled = cache, True
    if isinstance(attn, MultiHeadAttention):
        before |= {"num_kv_heads": attn.num_kv_heads, "_attention_call": attn._attention_call}
        # torchtune expands the cache unless num_kv_heads equals num_heads. The projections keep the real number.
        attn.num_kv_heads, attn._attention_call = attn.num_heads, cached_attention
    return before


def _restore_attention(layer: nn.Module, before: dict[str, object]) -> None:
    del layer.attn.kv_cache
    for name, value in before.items():
        setattr(layer.attn, name, value)
