"""Clocks and bytes: how long rounds and their phases take, and what a step reads from memory."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from layerskip_recipes.generation.stats import GenerationStats
from layerskip_recipes.generation.steps import head_of
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.kv_cache import DecodingCache


class Clock:
    """Times of phases; on a GPU by events, which are read at the end, so that no phase waits for the device.

    Args:
        device: where they run.
        compile_s: seconds that compilation took so far, which count in no phase.
    """

    def __init__(self, device: torch.device, compile_s: Callable[[], float]) -> None:
        self.device, self.compile_s = device, compile_s
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] | None = [] if device.type == "cuda" else None
        self.seconds = {"draft": 0.0, "verify": 0.0}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs inside belongs to the phase."""
        if self.events is None:
            started, compiled = time.perf_counter(), self.compile_s()
            yield
            self.seconds[name] += time.perf_counter() - started - (self.compile_s() - compiled)
            return
        compiled = self.compile_s()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self.device)
        begin.record(stream)
        yield
        end.record(stream)
        if self.compile_s() == compiled:
            self.events.append((name, begin, end))

    def mark(self) -> tuple[dict[str, float], int]:
        """What there is by now, for `forget`."""
        return dict(self.seconds), len(self.events or ())

    def forget(self, mark: tuple[dict[str, float], int]) -> None:
        """The phases since then, such as those of a round that compiled."""
        self.seconds, events = dict(mark[0]), mark[1]
        if self.events:
            del self.events[events:]

    def read(self, stats: GenerationStats) -> None:
        """Add all phases so far to the statistics."""
        if self.events:
            torch.cuda.synchronize(self.device)
            for name, begin, end in self.events:
                self.seconds[name] += begin.elapsed_time(end) / 1000
            self.events.clear()
        stats.draft_s, stats.verify_s = self.seconds["draft"], self.seconds["verify"]


class Stopwatch:
    """Times by which rounds choose: by rank 0's clock, as what is chosen has to be the same on all processes.

    Args:
        device: of the model.
        compile_s: seconds that compilation took so far.
        agree: makes a tensor the same on all processes; None: there is one.
    """

    def __init__(
        self,
        device: torch.device,
        compile_s: Callable[[], float],
        agree: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.device, self.compile_s, self.agree = device, compile_s, agree

    def start(self) -> tuple[float, float]:
        """For `since`."""
        return time.perf_counter(), self.compile_s()

    def since(self, start: tuple[float, float]) -> float:
        """Seconds; 0 if something was compiled meanwhile, which says nothing about the next time."""
        seconds = time.perf_counter() - start[0] if self.compile_s() == start[1] else 0.0
        if self.agree is None:
            return seconds
        return self.agree(torch.tensor(seconds, device=self.device, dtype=torch.float32)).item()


def tensor_bytes(tensor: torch.Tensor) -> int:
    """What a tensor takes in memory here; a quantised or sharded one by its parts."""
    if hasattr(tensor, "__tensor_flatten__"):
        parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        return sum(tensor_bytes(part) for part in parts if isinstance(part, torch.Tensor))
    return tensor.numel() * tensor.element_size()


def _weight_bytes(module: object) -> int:
    """The weights of a module as its steps read them, so with what is gathered for them; of a plain function none."""
    return sum(tensor_bytes(p) * _gathered(p) for p in module.parameters()) if isinstance(module, nn.Module) else 0


def _gathered(weight: torch.Tensor) -> int:
    """From how many ranks the parts of a weight come together before a step reads it."""
    if not isinstance(weight, DTensor) or "shards" not in (weight.device_mesh.mesh_dim_names or ()):
        return 1
    return weight.device_mesh["shards"].size()


class Reads:
    """What steps read from memory: the weights of their layers and heads, and the slots of the cache.

    Args:
        model: the model; cache: its cache, allocated, in all rows.
        drafter: the model that drafts; the same one if it drafts itself.
        draft_head: the rows of the head that drafts use; None: all.
    """

    def __init__(
        self, model: LayerSkipDecoder, cache: DecodingCache, drafter: LayerSkipDecoder, draft_head: nn.Module | None
    ) -> None:
        self.full = (_weight_bytes(model.layers[0]), _weight_bytes(head_of(model)))
        of_draft = _weight_bytes(head_of(drafter)) if draft_head is None else tensor_bytes(draft_head.weight)
        self.draft = (_weight_bytes(drafter.layers[0]), of_draft)
        first = cache.layers[0]
        self.slot = 0 if first.k is None else 2 * first.k[:, :, 0].numel() * first.k.element_size()

    def count(self, stats: GenerationStats, slots: int, layers: int, times: int = 1, draft: bool = False) -> None:
        """Add `times` steps of so many layers and a head, whose attention sees so many slots."""
        layer, head = self.draft if draft else self.full
        stats.weight_bytes += times * (layers * layer + head)
        stats.cache_bytes += times * layers * slots * self.slot


@torch.inference_mode()
def memory_bandwidth(device: torch.device, megabytes: int = 512, repeats: int = 5) -> float:
    """Bytes per second that the device reads: the best of a few sums over a large tensor; 0 if memory is too full."""
    try:
        data = torch.ones(megabytes * 2**18, device=device)
    except RuntimeError:  # a CPU has no class of its own for it
        return 0.0
    best, times = float("inf"), 1 if device.type == "cpu" else 16  # so many that to launch them counts for nothing
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(times):
            total = data.sum()
        float(total)
        best = min(best, (time.perf_counter() - started) / times)
    return data.numel() * data.element_size() / best
