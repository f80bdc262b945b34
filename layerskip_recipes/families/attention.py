"""Attention of families for which torchtune has none.

generation/kernels/cpp_decoder.py reads what these classes and torchtune's say about themselves: `norm_first`, `scaling`
(1 / sqrt(head_dim) if missing), `softcapping` and `window` (none if missing).
"""

from typing import Any

import torch
from torchtune.modules import MultiHeadAttention, RMSNorm

from layerskip_recipes.model.windows import last_visible


class NormOfAllHeads(RMSNorm):
    """A norm of queries or keys [b, s, heads, head_dim] over all heads of a token, as in OLMo 2."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(-2)).view_as(x)


class NormFirstAttention(MultiHeadAttention):
    """Attention that normalises queries and keys, if it has norms for them, before the rotation, as in Qwen3; torchtune
    does so after it.

    Args:
        scaling: the factor of queries times keys; None is 1 / sqrt(head_dim).
        window: how many tokens a query sees, its own included; None for all before it.
        parts: the arguments of `MultiHeadAttention`.
    """

    norm_first = True

    def __init__(self, *, scaling: float | None = None, window: int | None = None, **parts: Any) -> None:
        super().__init__(**parts)
        self.scaling = self.head_dim**-0.5 if scaling is None else scaling
        self.window = window

    def forward(
        self, x: torch.Tensor, y: torch.Tensor | None = None, *, mask: Any = None, input_pos: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Self-attention of x [b, s, d]; y is x, and the other arguments are as in `MultiHeadAttention`."""
        # Project, normalise and rotate: [b, s, heads, head_dim].
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)) for linear in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.pos_embeddings is not None:
            q, k = self.pos_embeddings(q, input_pos=input_pos), self.pos_embeddings(k, input_pos=input_pos)
        if self.scaling != self.head_dim**-0.5:  # the factor of `_attention_call`
            q = q * (self.scaling * self.head_dim**0.5)
        # Attend, with the KV cache: [b, heads, s, head_dim].
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.kv_cache is not None and self.cache_enabled:
            k, v = self.kv_cache.update(k, v)
        if self.num_heads != self.num_kv_heads:
            k, v = (t.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for t in (k, v))
        if self.window is not None:
            mask = last_visible(mask, self.window, q)
        dropout = self.attn_dropout if self.training else 0.0
        causal = self.kv_cache is None and mask is None and self.is_causal
        attended = self._attention_call(q, k, v, mask=mask, dropout_p=dropout, is_causal=causal)
        return self.output_proj(attended.transpose(1, 2).flatten(-2))
