"""What each model family needs beyond torchtune 0.6.1. So far only Gemma 2 needs corrections.

torchtune confuses Gemma 2's two norms around each feed-forward layer when it reads or writes a checkpoint, and caps the
final hidden state where Gemma 2 caps the logits.
"""

from copy import copy

import torch
from torch import nn
from torchtune.models.gemma2 import _convert_weights
from torchtune.models.gemma2._component_builders import Gemma2FinalNorm

BEFORE, AFTER = (f"model.layers.{{}}.{side}_feedforward_layernorm.weight" for side in ("pre", "post"))


def correct_names() -> None:
    """Correct the names with which torchtune reads and writes the norms of GEMMA2; a second call changes nothing."""
    names = _convert_weights._GEMMA2_FROM_HF
    if names[BEFORE] == "layers.{}.mlp_scale.scale":
        names[BEFORE], names[AFTER] = names[AFTER], names[BEFORE]


def norm_and_cap(norm: nn.Module) -> tuple[nn.Module, float | None]:
    """A decoder's final norm without a cap, and the cap of its logits (None for all families but Gemma 2).

    The given norm stays unchanged; the returned one has the same parameters by the same names.
    """
    if not isinstance(norm, Gemma2FinalNorm):
        return norm, None
    plain = copy(norm)
    plain._modules = dict(norm._modules) | {"logit_capping": nn.Identity()}  # copy() shares the dict of submodules
    return plain, norm.capping_value


def capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """cap tanh(logits / cap); the logits themselves if there is no cap."""
    return logits if cap is None else cap * torch.tanh(logits / cap)
