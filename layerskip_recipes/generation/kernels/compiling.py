"""Compiled decoding steps: each kind of step is one graph, kept with the model for later calls.

Guards are left out: the key of a graph names all that it depends on (rows, cache length, exit, tree, sampler), so a
call costs no walk through the model's thousands of attributes. On a CPU the length that attention sees is dynamic, one
graph for all of them; on a GPU steps are CUDA graphs, whose lengths are rounded to powers of two.
"""

import itertools
import time
import types
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torchtune import utils

from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.kv_cache import DecodingCache

log = utils.get_logger("INFO")
_numbers = itertools.count()  # dynamo remembers shapes by a function's name, beyond the model that it was made for


def rounded(length: int, device: torch.device, least: int = 256) -> int:
    """A length that few graphs serve: a power of two on a GPU, at least `least`; elsewhere lengths are dynamic."""
    if device.type == "cuda":
        return max(least, 1 << (length - 1).bit_length())
    return -(-length // 64) * 64


def cache_length(needed: int) -> int:
    """The slots of a cache for compiled steps, which know its size: those of few sizes.

    More than any length that attention sees: one that is the cache's own would not be dynamic.
    """
    return max(256, 1 << (needed - 1).bit_length()) + 64


class CompiledSteps:
    """The graphs of one model, by what they depend on.

    Args:
        device: of the model.
        weights: names and kinds of its weights, for which the graphs hold.
    """

    def __init__(self, device: torch.device, weights: Hashable = None) -> None:
        self.device, self.weights = device, weights
        self.graphs: dict[Hashable, Callable] = {}
        self.path: tuple[Hashable, ...] = ()  # the steps of this round so far: a CUDA graph belongs to those before it
        self.warming = False  # whether one of them was new: then the rest of the path is captured in the next round
        self.captured: set[tuple[Hashable, ...]] = set()
        self.bound: dict[Hashable, Callable] = {}  # the graphs with the inputs of this generation
        self.failed = False  # nothing can be compiled here
        self.refused: dict[Hashable, str] = {}  # steps that cannot be compiled where others can, by their names
        self.seconds = 0.0
        self._caches: dict[int, DecodingCache] = {}

    def cache(self, model: LayerSkipDecoder, rows: int, max_len: int) -> DecodingCache:
        """A cache of at least max_len slots: that of as many rows again if it is large enough, as graphs know it.

        Two sizes are kept, such as those of full batches and of the last one; on a GPU eight, as CUDA graphs know where
        they are, and would be made again for others.
        """
        kept = self._caches.pop(rows, None)
        if kept is None or kept.max_len < max_len:
            kept = DecodingCache(model, rows, max_len, self.device)
        others = [*self._caches.items()]
        self._caches = dict(others[-7 if self.device.type == "cuda" else -1 :]) | {rows: kept}
        kept.tokens = [[] for _ in range(rows)]
        return kept

    def release(self) -> None:
        """A generation ended: its weights and caches are needed no more."""
        self.bound.clear()

    def begin_round(self) -> None:
        """CUDA graphs may use the memory of the last round's results again."""
        self.path, self.warming = (), False
        if self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()

    def __call__(self, key: Hashable, step: Callable, slots: torch.Tensor | None, *args: Any) -> Any:
        """step(*args) by its graph, made at the first call; `seconds` counts what the first calls took.

        Args:
            key: all that the graph depends on but the values in tensors and the length of slots.
            step: a bound method of `Steps`.
            slots: the one of args whose length is dynamic, None if there is none.
            args: of the step.
        """
        cuda = self.device.type == "cuda"
        if cuda and slots is not None:
            key = (key, slots.shape[0])
        if self.failed or key in self.refused:
            return step(*args)
        length = None if slots is None else slots.shape[0]
        self.path += (key,)
        graph = self.graphs.get(key)
        # The first call of a graph runs it; the next one after the same steps makes a CUDA graph of it.
        captures = cuda and graph is not None and self.path not in self.captured
        if key in self.bound and not captures:
            return self.bound[key](args, length)
        if graph is not None and not captures:
            return self._bind(key, graph, args, length, graph(step.__self__, *args))
        started = time.perf_counter()
        try:
            if graph is None:
                self.warming = True
                if not cuda and slots is not None:
                    torch._dynamo.mark_dynamic(slots, 0)
                graph = _compiled(step.__func__, self.device, self._quantised(step.__self__))
            out = graph(step.__self__, *args)
            if captures:
                torch.cuda.synchronize(self.device)
                if not self.warming:
                    self.captured.add(self.path)
        except Exception as e:
            # Compilation and capture come before the step runs. A machine without a C++ compiler ends here, at its
            # first step. Where others were compiled they go on; so they do where a quantised one has no kernel.
            self.failed = not self.graphs and not self._quantised(step.__self__)
            self.refused[key] = name = step.__name__
            self.seconds += time.perf_counter() - started
            log.warning(
                "compile: not possible %s, going on without (%s)",
                "here" if self.failed else f"for {name}",
                (str(e).strip() or repr(e)).splitlines()[0][:200],
            )
            return step(*args)
        self.graphs[key] = graph
        self.seconds += time.perf_counter() - started
        return self._bind(key, graph, args, length, out)

    def _quantised(self, steps: Any) -> bool:
        """Whether a step reads quantised weights: those of a draft, or of the whole model."""
        kinds = [kind for _, kind, *_ in self.weights or ()]
        return not getattr(steps, "shares", True) or any(kind is not torch.nn.Parameter for kind in kinds)

    def _bind(self, key: Hashable, graph: Callable, args: tuple[Any, ...], length: int | None, out: Any) -> Any:
        """Keep what the graph was called with for this generation's next calls; returns `out`."""
        last = getattr(graph, "last", None)
        bound = None if last is None else last.bind(args, length, out)
        if bound is not None:
            self.bound[key] = bound
        return out


def compiled_steps(model: LayerSkipDecoder, device: torch.device) -> CompiledSteps:
    """The graphs of a model, kept with it as long as its weights are of the same kinds."""
    kept = getattr(model, "compiled_steps", None)
    weights = tuple((name, type(p), p.dtype, p.shape) for name, p in model.named_parameters())
    if kept is None or (kept.device, kept.weights) != (device, weights):
        model.compiled_steps = CompiledSteps(device, weights)
    return model.compiled_steps


def _compiled(function: Callable, device: torch.device, quantised: bool = False) -> Callable:
    """torch.compile on a copy of the function: graphs are looked up by code object, and each key needs its own."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    copy = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    options: dict[str, Any] = {}
    if device.type == "cuda":
        # The latter multiplies a single row in kernels that read int8 as it is stored, and takes long to tune them.
        options |= {"triton.cudagraphs": True, "coordinate_descent_tuning": quantised}
    elif device.type == "cpu":
        options |= {"cpp_wrapper": True, "cpp_wrapper_build_separate": True}
        from layerskip_recipes.generation.kernels.few_rows import FewRows, load_kernel

        load_kernel()
        # The shapes hold by the key of the graph; to check each tensor again takes 5% of a small model's step.
        options |= {"post_grad_custom_pre_pass": FewRows(), "size_asserts": False}
    # Older versions of torch do not know all of them (2.6 drops passes over the graph), and are slower.
    options = {name: value for name, value in options.items() if name in torch._inductor.list_options()}
    guards = {}
    if hasattr(torch.compiler, "skip_all_guards_unsafe"):
        guards = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    from layerskip_recipes.generation.kernels.bound_graph import Backend, LastCall

    last = LastCall()
    compiled = torch.compile(copy, fullgraph=True, backend=Backend(options, last), options=guards)
    compiled.last = last
    return compiled
