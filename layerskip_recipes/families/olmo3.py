"""OLMo 3: OLMo 2 with a window in three of four layers, whose positions are not stretched."""

from collections.abc import Mapping
from typing import Any, ClassVar

from layerskip_recipes.config.schema import PositiveInt
from layerskip_recipes.families.olmo2 import Olmo2

BASE = 5e5  # of the rotation


class Olmo3(Olmo2):
    sliding_window: PositiveInt | None = 4096

    BUILDS_WINDOWS: ClassVar[bool] = True

    @classmethod
    def values(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        values = super().values(raw)
        base = raw.get("rope_theta") or BASE
        return values | {"sliding_rope": {"rope_theta": base} | (values["sliding_rope"] or {})}

    @classmethod
    def rope_values(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        return {"rope_theta": BASE} | super().rope_values(raw)

    def slides(self, layer: int) -> bool:
        return (layer + 1) % 4 != 0
