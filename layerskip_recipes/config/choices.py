"""Config keys that may be null: the recipe chooses their values."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from layerskip_recipes.config.components import Component
from layerskip_recipes.config.schema import Section

S = TypeVar("S", bound=Section)
DEVICES = ("cpu", "cuda", "mps", "xpu")


class Choices:
    """The values that a recipe chooses for null keys, by dotted key."""

    def __init__(self, cfg: Section) -> None:
        self.cfg = cfg
        self.chosen: dict[str, Any] = {}

    def value(self, key: str) -> Any:
        """The chosen value of a dotted key, or else the config's."""
        if key in self.chosen:
            return self.chosen[key]
        found: Any = self.cfg
        for name in key.split("."):
            found = found.get(name) if isinstance(found, Component) else getattr(found, name)
        return found

    def pick(self, key: str, make: Callable[[], Any]) -> Any:
        """The value of a key. If it is null, choose `make()`."""
        if self.value(key) is None:
            self.chosen[key] = make()
        return self.value(key)

    @property
    def device(self) -> str:
        return self.pick("device", best_device)


def with_values(section: S, values: Mapping[str, Any]) -> S:
    """A copy of the section with new values for some dotted keys, such as "optimizer.lr"."""
    for key, value in values.items():
        name, _, inner = key.partition(".")
        part = getattr(section, name)
        if inner:
            value = part.replace(**{inner: value}) if isinstance(part, Component) else with_values(part, {inner: value})
        section = section.model_copy(update={name: value})
    return section


def devices_here() -> list[str]:
    """The device types of this machine, the best one last."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ["cpu", found.type] if found is not None and found.type in DEVICES else ["cpu"]


def best_device() -> str:
    return devices_here()[-1]


def computes_in_bf16(device: str) -> bool:
    """Whether the device is a CUDA GPU with native bf16."""
    return device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
