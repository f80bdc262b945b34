"""torchtune's profiler, which also records the GPU's allocations while it is active."""

from typing import Any

import torch
from torchtune.training import DummyProfiler

from layerskip_recipes.config.components import Component


class Profiling:
    """Profiles a run that begins with step `step`, if the config's section says so."""

    def __init__(self, section: Component | None, device: torch.device, step: int) -> None:
        self.profiler: Any = DummyProfiler()
        self.recorded = range(0)  # the steps whose allocations are recorded
        if section is None or not section.get("enabled"):
            return
        self.profiler, schedule = section.build()
        if section.get("profile_memory") and device.type == "cuda":
            first = step + schedule["wait_steps"] + schedule["warmup_steps"]
            self.recorded = range(first, first + schedule["active_steps"])

    def begin_step(self, step: int) -> None:
        if self.recorded and step == self.recorded.start:
            torch.cuda.memory._record_memory_history()

    def end_step(self, step: int) -> None:
        """`step` steps are done."""
        self.profiler.step()
        if self.recorded and step == self.recorded.stop:
            torch.cuda.memory._record_memory_history(enabled=None)
