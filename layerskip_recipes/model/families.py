"""Gemma 2 as its authors and transformers have it, where torchtune 0.6.1 has not.

torchtune takes the two norms around each feed-forward layer for one another when it reads or writes a checkpoint, and
caps the final hidden state where Gemma 2 caps the logits.
"""

from copy import copy

import torch
from torch import nn
from torchtune.models.gemma2 import _convert_weights
from torchtune.models.gemma2._component_builders import Gemma2FinalNorm

BEFORE, AFTER = (f"model.layers.{{}}.{side}_feedforward_layernorm.weight" for side in ("pre", "post"))


def correct_names() -> None:
    """Let torchtune read and write GEMMA2 checkpoints with each norm in its place."""
    names = _convert_weights._GEMMA2_FROM_HF
    if names[BEFORE] == "layers.{}.mlp_scale.scale":
        names[BEFORE], names[AFTER] = names[AFTER], names[BEFORE]


def norm_and_cap(norm: nn.Module) -> tuple[nn.Module, float | None]:
    """A decoder's final norm without a cap, of the same parameters by the same names, and the cap of its logits.

    Args:
        norm: any; left as it is.
    """
    if not isinstance(norm, Gemma2FinalNorm):
        return norm, None
    plain = copy(norm)
    plain._modules = dict(norm._modules) | {"logit_capping": nn.Identity()}  # a plain copy shares the dict
    return plain, norm.capping_value


def capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """cap tanh(logits / cap); the logits themselves if there is no cap."""
    return logits if cap is None else cap * torch.tanh(logits / cap)
