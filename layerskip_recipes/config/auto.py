"""Config keys that may be `auto`: the recipe chooses their values."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torchtune.utils import get_logger
from torchtune.utils._logging import log_once

from layerskip_recipes.config.components import Component
from layerskip_recipes.config.schema import AUTO, Section

log = get_logger("INFO")
NVIDIA = Path("/dev/nvidia0")  # the driver makes it for the first GPU


class Choices:
    """A config whose `auto` keys a recipe replaces; `chosen` has the new values by dotted key.

    `stored` has values that were chosen before, which are taken again. `asked` are all keys that may be `auto`.
    """

    def __init__(self, cfg: Section, stored: Mapping[str, Any] | None = None) -> None:
        self.cfg: Any = cfg
        self.stored = dict(stored or {})
        self.chosen: dict[str, Any] = {}
        self.asked: list[str] = []

    def value(self, key: str) -> Any:
        part = self.cfg
        for name in key.split("."):
            part = part.get(name) if isinstance(part, Component) else getattr(part, name)
        return part

    def set(self, key: str, value: Any) -> Any:
        if value != self.value(key):
            self.chosen[key] = value
            self.cfg = _with_value(self.cfg, key, value)
        return value

    def pick(self, key: str, make: Callable[[], Any]) -> Any:
        """The value of a key. If it is `auto`, take the stored one, or choose `make()`."""
        self.asked.append(key)
        value = self.value(key)
        if isinstance(value, str) and value == AUTO:
            return self.set(key, self.stored[key] if key in self.stored else make())
        return value


def _with_value(section: Section, key: str, value: Any) -> Section:
    name, _, inner = key.partition(".")
    part = getattr(section, name)
    if inner:
        value = part.replace(**{inner: value}) if isinstance(part, Component) else _with_value(part, inner, value)
    return section.model_copy(update={name: value})


def devices_here() -> list[str]:
    """The device types of this machine, the best one last."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    is_usable = accelerator is not None and accelerator.type in ("cuda", "mps", "xpu")
    return ["cpu", accelerator.type] if is_usable else ["cpu"]


def unusable_gpu() -> str | None:
    """Why torch cannot use this machine's NVIDIA GPU; None if it can, or if there is none."""
    if devices_here()[-1] != "cpu" or not NVIDIA.exists():
        return None
    built = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "was built without CUDA"
    return (
        f"this machine has an NVIDIA GPU that torch {torch.__version__} cannot use. It {built}, and the driver may be "
        "too old for that. `nvidia-smi` shows which CUDA the driver supports"
    )


def best_device() -> str:
    if (reason := unusable_gpu()) is not None:
        log_once(log, f"device: cpu, although {reason}", level=logging.WARNING)
    return devices_here()[-1]


def computes_in_bf16(device: str) -> bool:
    """Whether the device is a CUDA GPU with native bf16."""
    return device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)


def has_bf16_products(device: str) -> bool:
    """Whether the device has instructions for products in bf16, which are then faster than in fp32."""
    if device == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return computes_in_bf16(device)
