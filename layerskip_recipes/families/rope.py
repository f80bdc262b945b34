"""Rotary positions as in transformers: the settings of a config.json, and the module that rotates."""

import math
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field
from torch import nn

from layerskip_recipes.config.schema import PositiveInt, Section

Positive = Annotated[float, Field(gt=0)]


class Rope(Section):
    """The rotary position settings of a config.json."""

    model_config = ConfigDict(extra="ignore")

    rope_type: Literal["default", "linear", "llama3", "longrope", "yarn"] = "default"
    rope_theta: Positive = 10_000.0
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    factor: Positive = 1.0
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    original_max_position_embeddings: PositiveInt = 8192
    short_factor: list[float] | None = None
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    truncate: bool = True
    attention_factor: Positive | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def missing(self) -> list[str]:
        """The keys that this rope_type needs and the config.json lacks."""
        needed = {
            "linear": ("factor",),
            "llama3": ("factor", "original_max_position_embeddings"),
            "longrope": ("short_factor", "original_max_position_embeddings"),
            "yarn": ("factor", "original_max_position_embeddings"),
        }
        return [key for key in needed.get(self.rope_type, ()) if key not in self.model_fields_set]

    def width(self, head_dim: int) -> int:
        """The number of rotated channels per head."""
        return int(head_dim * self.partial_rotary_factor)

    def frequencies(self, dim: int) -> torch.Tensor:
        """The rotation angle of each channel pair per position, [dim / 2] in fp32."""
        plain = 1.0 / self.rope_theta ** (torch.arange(0, dim, 2).float() / dim)
        if self.rope_type == "linear":
            return plain / self.factor
        if self.rope_type == "longrope":
            return plain / torch.tensor(self.short_factor, dtype=plain.dtype, device=plain.device)
        # Keep short wavelengths, stretch long ones by `factor`, and interpolate in between. `waves` is the number of
        # wavelengths that fit into the original context.
        waves = self.original_max_position_embeddings * plain / (2 * math.pi)
        if self.rope_type == "llama3":
            unscaled = ((waves - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        elif self.rope_type == "yarn":  # interpolates over the numbers of channel pairs
            first, last = (self._pair(count, dim) for count in (self.beta_fast, self.beta_slow))
            if self.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, dim - 1)
            unscaled = 1 - ((torch.arange(dim // 2) - first) / max(last - first, 1e-3)).clamp(0, 1)
        else:
            return plain
        return unscaled * plain + (1 - unscaled) * plain / self.factor

    def _pair(self, waves: float, dim: int) -> float:
        """The channel pair, as a fraction, of which `waves` wavelengths fit into the original context."""
        frequency = waves * 2 * math.pi / self.original_max_position_embeddings
        return -dim * math.log(frequency) / (2 * math.log(self.rope_theta))

    def scale(self, max_positions: int) -> float:
        """The factor of the rotated queries and keys."""
        if self.rope_type not in ("longrope", "yarn"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.rope_type == "yarn":
            stretch = 0.1 * math.log(max(self.factor, 1))
            if self.mscale and self.mscale_all_dim:
                return (1 + self.mscale * stretch) / (1 + self.mscale_all_dim * stretch)
            return 1 + stretch
        original = self.original_max_position_embeddings
        longer = self.factor if "factor" in self.model_fields_set else max_positions / original
        return math.sqrt(1 + math.log(longer) / math.log(original)) if longer > 1 else 1.0


class RotaryPositions(nn.Module):
    """RoPE (arXiv 2104.09864) as in transformers: rotates channels i and i + dim / 2 of a head, i < dim / 2.

    Channels from `dim` on are not rotated.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, dim: int, max_seq_len: int, rope: Rope, max_positions: int) -> None:
        super().__init__()
        self.dim, self.max_seq_len, self.rope, self.max_positions = dim, max_seq_len, rope, max_positions
        self.rope_init()

    def rope_init(self) -> None:
        """Compute the tables [max_seq_len, dim / 2] on torch's default device; checkpoints do not contain them."""
        angles = torch.outer(torch.arange(self.max_seq_len).float(), self.rope.frequencies(self.dim))
        scale = self.rope.scale(self.max_positions)
        self.register_buffer("cos", angles.cos() * scale, persistent=False)
        self.register_buffer("sin", angles.sin() * scale, persistent=False)

    def forward(self, x: torch.Tensor, input_pos: torch.Tensor | None = None) -> torch.Tensor:
        """Rotate queries or keys [b, s, heads, head_dim]; input_pos is [b or 1, s], or None for 0 .. s-1.

        torchtune's `generate` drops a dimension of size 1, so input_pos may also be [s], or [b] if s is 1.
        """
        at = slice(0, x.shape[1]) if input_pos is None else input_pos.view(-1, x.shape[1])
        cos, sin = (table[at].to(x.dtype).unsqueeze(-2) for table in (self.cos, self.sin))
        first, second = x[..., : self.dim].chunk(2, dim=-1)
        rotated = [first * cos - second * sin, second * cos + first * sin]
        return torch.cat([*rotated, x[..., self.dim :]] if self.dim < x.shape[-1] else rotated, dim=-1)
