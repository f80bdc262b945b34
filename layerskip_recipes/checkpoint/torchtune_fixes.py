"""Corrections of torchtune 0.6.1's checkpointers."""

from typing import Any

from torchtune.models.gemma2 import _convert_weights

BEFORE, AFTER = (f"model.layers.{{}}.{side}_feedforward_layernorm.weight" for side in ("pre", "post"))


def corrected(checkpointer: Any) -> Any:
    """The same checkpointer, without two bugs of torchtune."""
    # torchtune swaps the names of the two norms around each feed-forward layer of GEMMA2.
    names = _convert_weights._GEMMA2_FROM_HF
    if names[BEFORE] == "layers.{}.mlp_scale.scale":
        names[BEFORE], names[AFTER] = names[AFTER], names[BEFORE]
    # torchtune requires num_key_value_heads, which Llama 1's config.json does not have.
    described = getattr(checkpointer, "_config", None) or {}
    if "num_attention_heads" in described:
        described.setdefault("num_key_value_heads", described["num_attention_heads"])
    return checkpointer
