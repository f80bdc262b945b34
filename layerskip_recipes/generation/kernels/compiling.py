"""Compiled decoding steps: a graph for each kind of step, kept for its model and used by later generations. On a CPU
only steps of models that cpp_decoder.py does not know become graphs.

torch's guards are left out: the key of a step names all that its graph depends on (rows, cache length, exit,
sampler), so a call costs no walk through the model's thousands of attributes. On a CPU the length that attention sees
is dynamic, one graph for all of them. On a GPU steps are CUDA graphs: with FlexAttention they see the whole cache and
find the length on the device; without it they have masks, and a graph for each power of two of the length.
"""

import itertools
import time
import types
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torchtune import utils

from layerskip_recipes.errors import first_line
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.kv_cache import BLOCK, DecodingCache

log = utils.get_logger("INFO")
_numbers = itertools.count()  # dynamo remembers shapes by a function's name, for all models of the process


def rounded_length(length: int, device: torch.device) -> int:
    """Round up to a power of two of at least 256 on a GPU, where masks need a graph per length; elsewhere to 64s."""
    if device.type == "cuda":
        return max(256, 1 << (length - 1).bit_length())
    return -(-length // 64) * 64


def cache_length(needed: int) -> int:
    """The slots of a cache for compiled steps, one of few sizes, as graphs depend on it.

    More than any length that attention sees, as torch takes one that equals the cache's for a constant; and a whole
    number of blocks.
    """
    return max(256, 1 << (needed - 1).bit_length()) + BLOCK


class CompiledSteps:
    """The graphs of one model, by the keys of their steps.

    Args:
        weights: names and kinds of its weights, for which the graphs hold.
    """

    def __init__(self, device: torch.device, weights: Hashable = None) -> None:
        self.device, self.weights = device, weights
        self.graphs: dict[Hashable, Callable] = {}
        # torch keeps a CUDA graph for each sequence of graphs that ran before it. So a graph is captured once for each
        # path, the steps of the round up to it; not in a round with a new step, which runs its first time uncaptured.
        self.path: tuple[Hashable, ...] = ()
        self.warming = False
        self.captured: set[tuple[Hashable, ...]] = set()
        self.prepared = False  # `prepare` went well
        self.failed = False  # nothing can be compiled here
        self.refused: dict[Hashable, str] = {}  # steps that cannot be compiled where others can, and their names
        self.masked = set[Hashable]()  # steps that cannot be compiled with FlexAttention
        self.seconds = 0.0
        self._caches: dict[tuple[int, int], DecodingCache] = {}

    def cache(self, model: LayerSkipDecoder, rows: int, max_len: int, draft_layers: int = 0) -> DecodingCache:
        """A cache of at least max_len slots: the last one of as many rows and layers if it is large enough.

        Two sizes are kept, such as those of full batches and of the last one; on a GPU eight, as CUDA graphs depend on
        their memory and would be made again for others.
        """
        kept = self._caches.pop((rows, draft_layers), None)
        if kept is None or kept.max_len < max_len:
            kept = DecodingCache(model, rows, max_len, draft_layers)
        others = [*self._caches.items()]
        self._caches = dict(others[-7 if self.device.type == "cuda" else -1 :]) | {(rows, draft_layers): kept}
        kept.tokens = [[] for _ in range(rows)]
        return kept

    def prepare(self, load: Callable[[], bool]) -> bool:
        """Call `load`, which compiles and returns whether it had to; False, and a line, if that is not possible."""
        if not self.failed:
            started = time.perf_counter()
            try:
                worked = load() or not self.prepared
                self.prepared = True
            except Exception as e:
                worked = self.failed = True
                _warn("here", e)
            self.seconds += time.perf_counter() - started if worked else 0.0
        return not self.failed

    def begin_round(self) -> None:
        """CUDA graphs may use the memory of the last round's results again."""
        self.path, self.warming = (), False
        if self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()

    def __call__(self, step: Any, slots: torch.Tensor | None, *args: Any) -> Any:
        """step.run(slots, *args) by its graph, made at the first call; `seconds` counts what first calls took."""
        cuda = self.device.type == "cuda"
        step_key, given, flex = step.key(*args), slots, False
        if slots is not None:
            cache, flex = step.context.cache, step.context.fits_flex and step_key not in self.masked
            # All slots for FlexAttention, else a few more than attention sees.
            given = cache.slots[: cache.max_len if flex else rounded_length(len(slots), self.device)]
        key = (step_key, len(given)) if cuda and given is not None else step_key
        if self.failed or key in self.refused:
            return step.run(slots, *args)
        self.path += (key,)
        known = self.graphs.get(key)
        # The first call of a graph runs it; the next one after the same steps makes a CUDA graph of it.
        captures = cuda and known is not None and self.path not in self.captured
        started = time.perf_counter()
        try:
            if known is None:
                self.warming = True
                if not cuda and slots is not None:
                    torch._dynamo.mark_dynamic(given, 0)
            graph = known or _compiled(step.function, self.device, self._is_quantised(step))
            out = graph(step.context, *step.settings, given, *args)
            if captures:
                torch.cuda.synchronize(self.device)
                if not self.warming:
                    self.captured.add(self.path)
        except Exception as e:
            if known is not None and not cuda:  # a graph that worked before: the step itself is wrong
                raise
            name = step.function.__name__
            self.seconds += time.perf_counter() - started
            if flex and known is None:
                self.masked.add(step_key)
                _warn(f"for {name} with FlexAttention", e)
            else:
                # A machine without a C++ compiler fails at its first step. If other steps were compiled they go on; a
                # quantised step may be the only one without a kernel.
                self.failed = not self.graphs and not self._is_quantised(step)
                self.refused[key] = name
                _warn("here" if self.failed else f"for {name}", e)
            # On a GPU the step may have run half-way. One process can run it again, as it writes behind the text only;
            # of several, the others may wait in a collective.
            if cuda and step.context.shared:
                raise RuntimeError(f"{name}: its graph failed; compile=false goes without graphs") from e
            return self(step, slots, *args)
        if known is None or captures:
            self.graphs[key] = graph
            self.seconds += time.perf_counter() - started
        return out

    def _is_quantised(self, step: Any) -> bool:
        """Whether the model or its draft has quantised weights."""
        models = (step.context.model, step.context.draft_model)
        return any(type(weight) is not torch.nn.Parameter for model in models for weight in model.parameters())


_COMPILED: WeakKeyDictionary[LayerSkipDecoder, CompiledSteps] = WeakKeyDictionary()


def compiled_steps(model: LayerSkipDecoder) -> CompiledSteps:
    """The graphs of a model, kept as long as the model lives and its weights are of the same kinds."""
    device = model.tok_embeddings.weight.device
    kept = _COMPILED.get(model)
    weights = tuple((name, type(p), p.dtype, p.shape) for name, p in model.named_parameters())
    if kept is None or (kept.device, kept.weights) != (device, weights):
        kept = _COMPILED[model] = CompiledSteps(device, weights)
    return kept


def find_compiled_steps(model: LayerSkipDecoder) -> CompiledSteps | None:
    """The graphs of a model, for reports; None if no generation of the model was compiled."""
    return _COMPILED.get(model)


def _warn(where: str, error: Exception) -> None:
    log.warning("compile: not possible %s, going on without (%s)", where, first_line(error)[:200])


def _compiled(function: Callable, device: torch.device, quantised: bool = False) -> Callable:
    """torch.compile on a copy of the function: graphs are looked up by code object, and each key needs its own."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    copy = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    # Tuning makes kernels that multiply a single row by int8 weights as they are stored; it takes long.
    cuda: dict[str, Any] = {"triton.cudagraphs": True, "coordinate_descent_tuning": quantised}
    # Without a check of each tensor: the key of the step ensures the shapes.
    options: dict[str, Any] = {"size_asserts": False, **(cuda if device.type == "cuda" else {})}
    if hasattr(torch.compiler, "skip_all_guards_unsafe"):
        options["guard_filter_fn"] = torch.compiler.skip_all_guards_unsafe
    return torch.compile(copy, fullgraph=True, options=options)
