"""A gated causal convolution over a few tokens, in the place of a layer's attention (LFM2, arXiv 2511.23404)."""

from typing import Any

import torch
from torch import nn
from torchtune.modules import KVCache


class ShortConvolution(nn.Module):
    """y = W (C * conv(B * x)) with B, C, x = V h; conv mixes the last `kernel` tokens of each channel on its own.

    In decoding, the products B * x of every token lie in the KV cache: the first half of the channels where an
    attention has its keys, the second half where it has its values. So a rejected draft is overwritten, and a prompt
    that goes on from cached tokens finds theirs.

    Args:
        in_proj: V, [d] -> [3 d].
        out_proj: W, [d] -> [d].
    """

    pos_embeddings = None
    num_heads = num_kv_heads = 1  # of the cache

    def __init__(self, in_proj: nn.Module, out_proj: nn.Module, width: int, kernel: int) -> None:
        super().__init__()
        self.in_proj, self.out_proj = in_proj, out_proj
        self.conv = nn.Conv1d(width, width, kernel, groups=width, bias=False)
        self.head_dim, self.attn_dropout = width // 2, 0.0
        self.kv_cache: Any = None
        self.cache_enabled = False

    def setup_cache(self, batch_size: int, dtype: torch.dtype, max_seq_len: int) -> None:
        """torchtune's cache, for torchtune's `generate`."""
        self.kv_cache = KVCache(batch_size, max_seq_len, self.num_kv_heads, self.head_dim, dtype)
        self.cache_enabled = True

    def reset_cache(self) -> None:
        self.kv_cache.reset()

    def forward(
        self, x: torch.Tensor, y: torch.Tensor | None = None, *, mask: Any = None, input_pos: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [b, s, d] -> [b, s, d]; y and the mask are attention's. Positions [b or 1, s] say where a text begins."""
        s = x.shape[1]
        gate, gate_of_output, x = self.in_proj(x).chunk(3, -1)
        products = gate * x
        exact = torch.promote_types(products.dtype, torch.float32)
        halves: Any = None
        if self.kv_cache is not None and self.cache_enabled:
            at = self.kv_cache.cache_pos[..., :s].reshape(-1, 1, s, 1).clone()  # torchtune's moves on
            halves = self.kv_cache.update(*(half.unsqueeze(1) for half in products.chunk(2, -1)))
        mixed: Any = 0
        taps = self.conv.weight.squeeze(1).to(exact).flip(-1).unbind(-1)
        for before, tap in enumerate(taps):  # `before`: how many tokens before its own
            if halves is None:
                past = nn.functional.pad(products, (0, 0, before, 0))[:, :s]
            else:
                places = (at - before).clamp(min=0)
                past = torch.cat([half.take_along_dim(places, 2) for half in halves], -1).squeeze(1)
            if input_pos is not None:
                past = past * (input_pos.view(-1, s, 1) >= before)
            mixed = mixed + past.to(exact) * tap
        return self.out_proj(gate_of_output * mixed.to(products.dtype))
