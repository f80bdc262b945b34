"""Modules that multiply by a number of the config, as Granite's models do."""

import torch
from torch import nn
from torchtune.modules import RMSNorm


class ScaledEmbedding(nn.Embedding):
    def __init__(self, num_embeddings: int, embedding_dim: int, factor: float) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.factor = factor

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens) * self.factor


class Scale(nn.Module):
    """Multiplies what attention or MLP add to the hidden state; in place of a norm there."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class DividedNorm(RMSNorm):
    """A last norm that divides the logits, since the head is linear: exits and drafts have the same norm."""

    def __init__(self, dim: int, eps: float, divisor: float) -> None:
        super().__init__(dim, eps=eps)
        self.divisor = divisor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / self.divisor
