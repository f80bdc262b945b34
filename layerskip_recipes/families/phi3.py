"""Phi 3, 3.5 and 4: the files join matrices, and a part of each head's channels can be rotated."""

from collections.abc import Mapping
from typing import Any, ClassVar

from layerskip_recipes.config.schema import PositiveInt
from layerskip_recipes.families.hf_config import HFConfig
from layerskip_recipes.families.rope import Positive


class Phi3(HFConfig):
    max_position_embeddings: PositiveInt = 4096
    rms_norm_eps: Positive = 1e-5

    ROTATES_IN_PART: ClassVar[bool] = True
    JOINED: ClassVar[dict[str, tuple[str, ...]]] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }

    @classmethod
    def rope_values(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        rope = super().rope_values(raw)
        if rope["rope_type"] in ("su", "yarn"):  # older names
            rope["rope_type"] = "longrope"
        return rope
