"""Keys that may be null, which leaves the choice to the recipe."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from layerskip_recipes.config.components import Component
from layerskip_recipes.config.schema import Section

S = TypeVar("S", bound=Section)
DEVICES = ("cpu", "cuda", "mps", "xpu")


class Choices:
    """The values that a recipe chooses for the keys of a config that are null, by their dotted keys."""

    def __init__(self, cfg: Section) -> None:
        self.cfg = cfg
        self.chosen: dict[str, Any] = {}

    def value(self, key: str) -> Any:
        """The value of a dotted key in the config, or the one that was chosen."""
        if key in self.chosen:
            return self.chosen[key]
        found: Any = self.cfg
        for name in key.split("."):
            found = found.get(name) if isinstance(found, Component) else getattr(found, name)
        return found

    def pick(self, key: str, make: Callable[[], Any]) -> Any:
        """The value of a key; if it is null, the one that `make` returns is chosen."""
        if self.value(key) is None:
            self.chosen[key] = make()
        return self.value(key)

    @property
    def device(self) -> str:
        """The device, by default the best one of this machine."""
        return self.pick("device", best_device)


def with_values(section: S, values: Mapping[str, Any]) -> S:
    """The section with other values for some dotted keys, such as "optimizer.lr"."""
    for key, value in values.items():
        name, _, inner = key.partition(".")
        part = getattr(section, name)
        if inner:
            value = part.replace(**{inner: value}) if isinstance(part, Component) else with_values(part, {inner: value})
        section = section.model_copy(update={name: value})
    return section


def devices_here() -> list[str]:
    """The kinds of device that this machine has, the best one last."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ["cpu", found.type] if found is not None and found.type in DEVICES else ["cpu"]


def best_device() -> str:
    """The device that a config without one takes."""
    return devices_here()[-1]


def computes_in_bf16(device: str) -> bool:
    """Whether it is a GPU that computes in bf16."""
    return device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
