"""Decodes on a fake GPU and prints, for each case, what the host waited for and what became of the graphs.

Dynamo and AOTAutograd make the graphs that inductor would compile, which takes six seconds a case.
"""

import json
import random
from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from stand_in_gpu import FakeGPU, fake_gpu, line_of_package, on_gpu, to_fake_gpu
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import get_first_incompatible_cudagraph_node
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torchtune.models.llama3_2._component_builders import llama3_2

from layerskip_recipes import Generation, Speculation, layerskip_decoder
from layerskip_recipes.generation.drafting import draft_weights
from layerskip_recipes.generation.kernels import round_graph
from layerskip_recipes.generation.kernels.compiling import CompiledSteps
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.state import state_of
from layerskip_recipes.model.draft import Draft

VOCAB, NEW_TOKENS = 31, 6
SIZES = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64, "intermediate_dim": 64}
METHODS: dict[str, Any] = {
    "plain": None,
    "chain": Speculation(1, 2),
    "look-ups": Speculation(1, 3, prompt_lookup=1),
    "draft vocabulary": Speculation(1, 2, draft_vocabulary=range(0, VOCAB, 2)),
    "copy": Speculation(1, 2),
    "adapter": Speculation(1, 2),
}
SAMPLERS = {
    "greedy": Sampler(),
    "sampled": Sampler(0.8, seed=1),
    "filtered": Sampler(0.8, 5, 0.9, 0.1, seed=1),
    "penalised": Sampler(0.8, repetition_penalty=1.2, seed=1),
}
PROMPT = [5, 6, 7, 5, 6]
ROWS: dict[str, Any] = {
    "one row": {"prompts": [PROMPT]},
    "continuous batching": {"prompts": [PROMPT, [9, 3, 8, 9, 3, 8, 9], PROMPT[::-1]], "rows": 2},
}
COMPILED = [
    ("plain", "greedy", "continuous batching"),
    ("chain", "penalised", "continuous batching"),
    ("look-ups", "sampled", "one row"),
    ("draft vocabulary", "filtered", "one row"),
    ("copy", "greedy", "one row"),
    ("adapter", "filtered", "continuous batching"),
]
WHOLE_ROUNDS = [
    ("chain", "greedy", "continuous batching"),
    ("look-ups", "sampled", "one row"),
    ("draft vocabulary", "penalised", "one row"),
    ("copy", "sampled", "continuous batching"),
    ("adapter", "filtered", "continuous batching"),
]
EAGER = [(method, "penalised", "one row") for method in METHODS if method != "chain"]
EAGER += [("chain", sampler, "one row") for sampler in SAMPLERS]


def read(shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """Tokens [b], or the outcome of a round [b, 2 + n]: accepted tokens, the next token, drafted tokens."""
    if len(shape) < 2:
        return [random.randrange(3, VOCAB) for _ in range(*shape)] if shape else 1
    drafted = shape[1] - 2
    return [[random.randint(0, drafted), *read((drafted + 1,), dtype)] for _ in range(shape[0])]


class Graphs:
    """Stands in for inductor: `made` counts the graphs by step, and `problems` says what prevents a CUDA graph."""

    def __init__(self, fake: Any) -> None:
        self.fake, self.compile = fake, torch.compile
        self.made: Counter[str] = Counter()
        self.problems: list[str] = []

    def __call__(self, function: Any, *, fullgraph: bool, backend: str, options: Any) -> Any:
        name = function.__name__.rsplit("_", 1)[0]

        def made(graph: Any, _: Any) -> Any:
            self.made[name] += 1
            self._check(name, graph)
            return graph.forward

        autograd = aot_autograd(fw_compiler=made, inference_compiler=made, keep_inference_input_mutations=True)
        guards = {name: value for name, value in options.items() if name == "guard_filter_fn"}
        compiled = self.compile(function, fullgraph=fullgraph, dynamic=False, backend=autograd, options=guards)

        def run(*args: Any) -> Any:
            with _disable_current_modes(), self.fake:  # Dynamo traces below no other mode
                return compiled(*args)

        return run

    def _check(self, name: str, graph: Any) -> None:
        nodes = list(graph.graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        tensors = [node for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]
        self.problems += [f"{name}: {node} is on the host" for node in tensors if not on_gpu(node.meta["val"])]
        static = torch._guards.TracingContext.get().fw_metadata.static_input_indices
        copies = [node.args[0] for node in nodes if node.target is torch.ops.aten.copy_.default]
        moving = {inputs.index(target) for target in copies if target in inputs} - set(static)
        self.problems += [f"{name}: writes to input {number}, which is no static one" for number in sorted(moving)]
        if (node := get_first_incompatible_cudagraph_node(graph)) is not None:
            self.problems.append(f"{name}: {node} prevents a CUDA graph")


class Captures(TorchDispatchMode):
    """Stands in for `capture`: `problems` says what a replay would find changed, or would have to wait for."""

    def __init__(self, gpu: FakeGPU) -> None:
        super().__init__()
        self.gpu = gpu
        self.made: Counter[str] = Counter()
        self.problems: list[str] = []
        self.static: list[torch.Tensor] = []  # whose addresses a generation's rounds depend on
        self.inside: list[torch.Tensor] = []  # made by a round, or its inputs

    def __call__(self, function: Any, inputs: Any) -> Any:
        self.made["round"] += 1
        self.inside = [value for value in inputs if value is not None]
        before = self.gpu.waits.copy()
        with self:
            outputs = function(*inputs)
        self.problems += [f"a wait in a round: {wait}" for wait in self.gpu.waits - before]
        return lambda: None, outputs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {tensor.untyped_storage()._cdata for tensor in (*self.static, *self.inside)}
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in known:
                self.problems.append(f"{func} reads {tuple(tensor.shape)} from outside at {line_of_package()}")
        out = func(*args, **(kwargs or {}))
        made = [tensor for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor)]
        self.problems += [f"{func} makes {tuple(tensor.shape)} on the host" for tensor in made if not on_gpu(tensor)]
        self.inside += made
        return out


def decode(method: str, sampler: str, rows: str, way: str) -> dict[str, Any]:
    """Decode once, or compiled twice: the second generation must not make a graph. Counts the waits of the last one.

    Steps in whole rounds are left uncompiled, so that all operations are seen.
    """
    random.seed(0)
    model = layerskip_decoder(llama3_2(vocab_size=VOCAB, max_seq_len=512, **SIZES)).bfloat16().eval()
    model.requires_grad_(False)
    arguments: dict[str, Any] = ROWS[rows] | {"speculation": METHODS[method], "sampler": SAMPLERS[sampler]}
    draft = Draft(model, method, 1).requires_grad_(False).bfloat16().eval() if method in ("copy", "adapter") else None
    with fake_gpu(read) as gpu, ExitStack() as patches:
        graphs: Any = Graphs(gpu.fake)
        stand_in = graphs
        if way == "whole rounds":
            graphs, stand_in = Captures(gpu), lambda function, **_: function
            patches.enter_context(mock.patch.object(round_graph, "capture", graphs))
            patches.enter_context(mock.patch.object(CompiledSteps, "whole_rounds", True))
        patches.enter_context(mock.patch.object(torch, "compile", stand_in))
        to_fake_gpu(model, *([] if draft is None else [draft]))
        if draft is not None:
            arguments["draft_weights"] = draft.decoder(model), None
        made: list[dict[str, int]] = []
        for _ in range(1 if way == "eager" else 2):
            generation = Generation(model, max_generated_tokens=NEW_TOKENS, compile=way != "eager", **arguments)
            iterator, waits = iter(generation), []
            next(iterator)  # the prefill
            if way == "whole rounds":
                graphs.static = generation.context.backend.read_by_steps
            while not all(generation.finished):
                gpu.waits.clear()
                next(iterator)
                waits.append(sorted(gpu.waits.elements()))
            iterator.close()
            made.append(dict(graphs.made))
        steps = state_of(model).compiled
        missing = {} if steps is None else {"refused": [*steps.refused.values()], "masked": len(steps.masked)}
    return {"rounds": generation.stats.rounds, "waits": waits, "graphs": made, "problems": graphs.problems} | missing


def main() -> None:
    # A fake weight of a head is not of the class nn.Parameter.
    kind = {"type": lambda value: torch.nn.Parameter if isinstance(value, FakeTensor) else type(value)}
    with mock.patch.multiple(draft_weights, create=True, **kind):
        for way, cases in {"compiled": COMPILED, "whole rounds": WHOLE_ROUNDS, "eager": EAGER}.items():
            for case in cases:
                try:
                    found = decode(*case, way)
                except Exception as e:
                    found = {"error": f"{type(e).__name__}: {e}"}
                print(json.dumps({"case": [*case, way], **found}), flush=True)


if __name__ == "__main__":
    main()
