"""Compiled decoding steps: one graph per kind of step, kept with its model for later generations. On a CPU only models
that cpp_decoder.py does not support use graphs.

Graphs have no torch guards: a step's key names all that its graph depends on. On a CPU the attended length is dynamic.
On a GPU steps are CUDA graphs. With FlexAttention they see the whole cache and read the length on the device; without
it they have masks, and one graph per power of two of the length. A whole round of a chain can be one CUDA graph
(round_graph.py), in which the compiled steps have no graphs of their own.
"""

import itertools
import os
import threading
import time
import types
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torchtune import utils

from layerskip_recipes.errors import first_line
from layerskip_recipes.generation.kernels.cpp_decoder import INDUCTOR_FOLDER, keep_inductor_files
from layerskip_recipes.generation.kernels.round_graph import RoundGraph
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.kv_cache import BLOCK_SLOTS, DecodingCache

log = utils.get_logger("INFO")
BACKEND: str | Callable = "inductor"  # of torch.compile
KEPT_BYTES = 2**30  # of the caches that are kept beside the one in use
_numbers = itertools.count()  # dynamo remembers shapes by function name, for the whole process


def rounded_length(length: int, device: torch.device) -> int:
    """Round up to a multiple of 64; on a GPU, where each length needs a graph, to a power of two of at least 256."""
    if device.type == "cuda":
        return max(256, 1 << (length - 1).bit_length())
    return -(-length // 64) * 64


def cache_length(needed: int) -> int:
    """Round a cache's slots up to one of few sizes, since graphs depend on it, and to a whole number of blocks.

    This is more than any attended length: torch would treat a length that equals the cache's as a constant.
    """
    return max(256, 1 << (needed - 1).bit_length()) + BLOCK_SLOTS


class CompiledSteps:
    """The graphs of one model by step key; `weights` has the names and kinds of the weights that they were made for."""

    # Whether a chain and its verification are one CUDA graph, and not one for each step. tools/gpu_report.py measures
    # both; the faster one will stay. A round's parts then have no times: `draft_s` is that of the whole graph.
    whole_rounds = False

    def __init__(self, device: torch.device, weights: Hashable = None) -> None:
        self.device, self.weights = device, weights
        self.graphs: dict[Hashable, Callable] = {}
        # torch keeps a CUDA graph per sequence of preceding graphs, so a graph is captured once per path: the round's
        # steps up to it. A round with a new step captures nothing, as that step first runs uncaptured.
        self.path: tuple[Hashable, ...] = ()
        self.warming = False
        self.captured: set[tuple[Hashable, ...]] = set()
        self.prepared = False  # `prepare` succeeded
        self.failed = False  # nothing can be compiled on this machine
        self.refused: dict[Hashable, str] = {}  # the names of single steps that cannot be compiled
        self.masked = set[Hashable]()  # steps that compile only without FlexAttention
        self.seconds = 0.0
        self.looked_up_before: tuple[int, int] | None = _looked_up()  # None: `say_what_was_kept` has spoken
        self.rounds: dict[Hashable, RoundGraph | None] = {}  # None: its steps are compiled
        self.in_round = False  # steps run as a part of a round's graph
        self._caches: dict[tuple[int, int], DecodingCache] = {}

    def cache(
        self, needed: int, model: LayerSkipDecoder, num_rows: int, max_len: int, draft_layers: int
    ) -> DecodingCache:
        """The cache of the last generation with as many rows if it has the `needed` slots, or a new one of max_len.

        Those used last are kept up to KEPT_BYTES, for batches of other sizes: a CUDA graph holds its cache's address,
        and with another cache it is captured again.
        """
        last_used = self._caches.pop((num_rows, draft_layers), None)
        if last_used is None or last_used.max_len < needed:
            last_used = DecodingCache(model, num_rows, max_len, draft_layers)
        kept, room = {(num_rows, draft_layers): last_used}, KEPT_BYTES
        for key, cache in reversed(self._caches.items()):
            room -= cache.num_bytes
            if room < 0:
                break
            kept[key] = cache
        self._caches = dict(reversed(kept.items()))
        return last_used

    def prepare(self, load: Callable[[], bool]) -> bool:
        """Call `load`, which returns whether it had to compile. Returns whether it worked, and warns if not."""
        if not self.failed:
            started = time.perf_counter()
            try:
                compiled_something = load() or not self.prepared
                self.prepared = True
            except Exception as e:
                compiled_something = self.failed = True
                _warn("here", e)
            self.seconds += time.perf_counter() - started if compiled_something else 0.0
        return not self.failed

    def begin_round(self) -> None:
        """Let CUDA graphs reuse the memory of the last round's results."""
        self.path, self.warming = (), False
        if self.device.type == "cuda":
            allow_cuda_graphs_in_thread()
            torch.compiler.cudagraph_mark_step_begin()

    def __call__(self, step: Any, step_key: Hashable, fits_flex: bool, slots: torch.Tensor | None, *args: Any) -> Any:
        """step.run(slots, *args) by its graph, which the first call makes; `seconds` adds up the first calls."""
        cuda = self.device.type == "cuda"
        # The graph's key, and the slots that it sees.
        seen_slots, flex = slots, False
        if slots is not None:
            cache, flex = step.context.cache, fits_flex and step_key not in self.masked
            # All slots for FlexAttention, else the attended length rounded up.
            seen_slots = cache.slots[: cache.max_len if flex else rounded_length(len(slots), self.device)]
        key = (step_key, len(seen_slots)) if cuda and seen_slots is not None else step_key
        key = (key, "in a round") if self.in_round else key
        if self.failed or key in self.refused:
            return step.run(slots, *args)
        own_graph = cuda and not self.in_round
        self.path += (key,) if own_graph else ()
        earlier_graph = self.graphs.get(key)
        # Run the graph. Its first call compiles it; the next one after the same steps captures a CUDA graph.
        captures = own_graph and earlier_graph is not None and self.path not in self.captured
        started = time.perf_counter()
        try:
            if earlier_graph is None:
                self.warming = True
                if not cuda and slots is not None:
                    torch._dynamo.mark_dynamic(seen_slots, 0)
            graph = earlier_graph or _compiled(step.function, self.device, own_graph, self._is_quantised(step))
            out = graph(step.context, *step.constants, seen_slots, *args)
            if captures:
                torch.cuda.synchronize(self.device)
                if not self.warming:
                    self.captured.add(self.path)
        except Exception as e:
            if earlier_graph is not None and not cuda:  # the graph worked before, so the error is the step's own
                raise
            # Note what cannot be compiled, and run the step again without it.
            name = step.function.__name__
            self.seconds += time.perf_counter() - started
            if flex and earlier_graph is None:
                self.masked.add(step_key)
                _warn(f"for {name} with FlexAttention", e)
            else:
                # Without a C++ compiler the first step fails, and all others would. A quantised step may be the
                # only one without a kernel.
                self.failed = not self.graphs and not self._is_quantised(step)
                self.refused[key] = name
                _warn("here" if self.failed else f"for {name}", e)
            # On a GPU the step may have run half-way. One process can repeat it, as it only wrote behind the text.
            # With several ranks the others may wait in a collective.
            if cuda and step.context.shared:
                raise RuntimeError(f"{name}: its CUDA graph failed; run without graphs by compile=false") from e
            return self(step, step_key, fits_flex, slots, *args)
        if earlier_graph is None or captures:
            self.graphs = {other: made for other, made in self.graphs.items() if not _outlived(other)}
            self.graphs[key] = graph
            self.seconds += time.perf_counter() - started
        return out

    def round(self, key: Hashable, addresses: Hashable, function: Callable, *inputs: torch.Tensor | None) -> Any:
        """function(*inputs) of steps as one CUDA graph: the first call compiles the steps, the second one captures.

        `addresses`: of all that the function reads besides its inputs; with others it is captured again.
        """
        graph, is_compiled = self.rounds.get(key), key in self.rounds
        if graph is not None and graph.addresses == addresses:
            return graph(*inputs)
        started, before = time.perf_counter(), self.seconds
        self.in_round = True
        try:
            graph = RoundGraph(function, inputs, addresses) if is_compiled else None
            out = function(*inputs) if graph is None else graph(*inputs)
            torch.cuda.synchronize(self.device)
            self.rounds = {other: made for other, made in self.rounds.items() if not _outlived(other)}
            self.rounds[key] = graph
            return out
        except Exception as e:
            self.whole_rounds = False  # the next rounds go step by step
            _warn("for a whole round", e)
        finally:
            self.in_round = False
            self.seconds = before + time.perf_counter() - started
        return function(*inputs)  # by a graph for each step; what failed wrote only behind the text

    def say_what_was_kept(self) -> None:
        """Log once how many graphs earlier runs had compiled, after the first ones were made."""
        if self.looked_up_before is None or self.seconds == 0:
            return
        kept, new = (now - before for now, before in zip(_looked_up(), self.looked_up_before, strict=True))
        self.looked_up_before = None
        if kept:
            folder = os.environ[INDUCTOR_FOLDER]
            log.info(f"compile: took {self.seconds:.0f} s, as {kept} of {kept + new} graphs were kept in {folder}")

    def _is_quantised(self, step: Any) -> bool:
        models = (step.context.model, step.context.draft_decoder)
        return any(type(weight) is not torch.nn.Parameter for model in models for weight in model.parameters())


def allow_cuda_graphs_in_thread() -> None:
    """Make this thread's table of CUDA graphs, which torch 2.6 to 2.12 makes only in its own threads.

    In any other thread, such as a server's, these versions fail with an empty AssertionError.
    """
    from torch._inductor import cudagraph_trees  # not at import: it starts threads

    tables, local = "tree_manager_containers", cudagraph_trees.local
    if not hasattr(local, tables) and not torch._C._is_key_in_tls(tables):
        local.tree_manager_containers, local.tree_manager_locks = {}, defaultdict(threading.Lock)
        for name in (tables, "tree_manager_locks"):
            torch._C._stash_obj_in_tls(name, getattr(local, name))


def _looked_up() -> tuple[int, int]:
    """How many graphs inductor found in its folder in this process, and how many it did not find."""
    counts = torch._dynamo.utils.counters["inductor"]
    return counts["fxgraph_cache_hit"], counts["fxgraph_cache_miss"]


def _outlived(key: Hashable) -> bool:
    """Whether a draft decoder in a graph's key is gone."""
    return any(isinstance(part, weakref.ref) and part() is None for part in tree_leaves(key))


def _warn(where: str, error: Exception) -> None:
    log.warning("compile: not possible %s, going on without (%s)", where, first_line(error)[:200])


def _compiled(function: Callable, device: torch.device, cuda_graph: bool, quantised: bool = False) -> Callable:
    """torch.compile on a copy of the function, since graphs are stored by code object and each key needs its own."""
    keep_inductor_files()
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    copy = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    # Slow tuning, which finds kernels that multiply a single row by int8 weights without unpacking them.
    cuda: dict[str, Any] = {"triton.cudagraphs": cuda_graph, "coordinate_descent_tuning": quantised}
    # The step's key already fixes the shapes.
    options: dict[str, Any] = {"size_asserts": False, **(cuda if device.type == "cuda" else {})}
    if hasattr(torch.compiler, "skip_all_guards_unsafe"):
        options["guard_filter_fn"] = torch.compiler.skip_all_guards_unsafe
    return torch.compile(copy, fullgraph=True, backend=BACKEND, options=options)
