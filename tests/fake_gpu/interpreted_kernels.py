"""What the GPU's kernels compute: inductor writes their code for an H100, and Triton's interpreter runs it on the CPU.

`start.py` runs this program. It prints a line for each compiled function of the package that needs no model.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

import numpy as np
import torch
import torch._inductor.codegen.triton
import torch._inductor.scheduler
import torch.nn.functional as F
import torch.utils._triton
import triton
import triton.language as tl
from stand_in_gpu import CUDA
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx, config
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.interpreter import TensorHandle

from layerskip_recipes.generation.sampling import choose_tokens, gumbel, noise_keys, penalise, token_scores
from layerskip_recipes.model.kv_cache import BlockAttention, cached_attention
from layerskip_recipes.training.chunked_loss import cross_entropy_, kl_divergence_
from layerskip_recipes.training.stochastic_adamw import update_

H100 = SimpleNamespace(
    name="H100", major=9, minor=0, multi_processor_count=132, warp_size=32, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, total_memory=80 * 2**30, L2_cache_size=50 * 2**20,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    gcnArchName="",
)  # fmt: skip
# What inductor asks a GPU for, beside its properties.
ANSWERS = {
    "is_available": lambda *_: True,
    "is_initialized": lambda *_: True,
    "device_count": lambda *_: 1,
    "current_device": lambda *_: 0,
    "current_stream": lambda *_: None,
    "_exchange_device": lambda *_: 0,
    "_maybe_exchange_device": lambda *_: 0,
    "_lazy_init": lambda *_: None,
    "synchronize": lambda *_: None,
    "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": lambda *_: None,
    "get_device_properties": lambda *_: H100,
    "get_device_capability": lambda *_: (9, 0),
    "is_bf16_supported": lambda *_, **__: True,
    "is_tf32_supported": lambda *_: True,
    "raise_if_triton_unavailable": lambda *_: None,
}


class Driver:
    """Triton's driver of the H100, as far as inductor asks it."""

    utils = SimpleNamespace(
        get_device_properties=lambda _: {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


class CodeWrittenError(Exception):
    """Ends inductor's work, as nothing can compile its code here."""


@contextmanager
def inductor_for_h100(codes: list[str]) -> Iterator[None]:
    """Let inductor write code for an H100 into `codes`."""

    def keep(graph: GraphLowering) -> None:
        code, _ = graph.codegen()
        codes.append(code.value)
        raise CodeWrittenError

    triton.runtime.driver.set_active(Driver())
    with ExitStack() as patches:
        for name, answer in ANSWERS.items():
            if hasattr(torch.cuda, name):
                patches.enter_context(mock.patch.object(torch.cuda, name, answer))
            if hasattr(CudaInterface, name):
                patches.enter_context(mock.patch.object(CudaInterface, name, staticmethod(answer)))
        for module in (torch._inductor.scheduler, torch.utils._triton, torch._inductor.codegen.triton):
            if hasattr(module, "has_triton"):
                patches.enter_context(mock.patch.object(module, "has_triton", lambda *_: True))
        patches.enter_context(mock.patch.object(torch.version, "cuda", "12.8"))
        patches.enter_context(mock.patch.object(GraphLowering, "_compile_to_module", keep))
        patches.enter_context(config.patch({"fx_graph_cache": False, "compile_threads": 1, "triton.cudagraphs": False}))
        yield


def code_for_h100(function: Callable, tensors: Sequence[torch.Tensor], dynamic: Sequence[int]) -> tuple[str, list[Any]]:
    """Inductor's code of function(*tensors), and the arguments that it takes, with tensors on the CPU.

    The first dimension of the tensors at the indices `dynamic` is dynamic.
    """
    codes: list[str] = []
    arguments: list[Any] = []

    def write_code(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable:
        with inductor_for_h100(codes):
            try:
                compile_fx.compile_fx_inner(graph, inputs, is_inference=True)
            except Exception as e:
                if "CodeWrittenError" not in repr(e):
                    raise
        return graph.forward

    autograd = aot_autograd(
        fw_compiler=write_code,
        inference_compiler=write_code,
        decompositions=select_decomp_table(),
        keep_inference_input_mutations=True,
    )

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable:
        for node, value in zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True):
            number = re.fullmatch(r"L_tensors_(\d+)_", node.target)
            arguments.append(tensors[int(number[1])] if number else value.node.hint)  # a tensor or a dynamic size
        return autograd(graph, inputs)

    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fakes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=CUDA) for t in tensors]
        for index in dynamic:
            torch._dynamo.mark_dynamic(fakes[index], 0)
        torch.compile(lambda *tensors: function(*tensors), backend=backend)(*fakes)
    (code,) = codes
    return code, arguments


class Libdevice:
    """CUDA's functions of numbers by numpy, which has them under the same names."""

    def __getattr__(self, name: str) -> Callable:
        def function(x: Any) -> Any:
            with np.errstate(all="ignore"):
                return tl.tensor(TensorHandle(getattr(np, name)(x.handle.data), x.handle.dtype), x.type)

        return function


class Interpreted:
    """A kernel of inductor's code, run by Triton's interpreter in blocks of `SIZES`."""

    SIZES: ClassVar = {"XBLOCK": 4, "R0_BLOCK": 16}

    def __init__(self, name: str, source: str, **_: Any) -> None:
        # Without the choice of block sizes, which times the kernel.
        source = re.sub(r"@triton_heuristics\.\w+\(.*?\n\)\n", "", source, flags=re.DOTALL)
        source = source.replace("triton_helpers.set_driver_to_gpu()", "")
        path = Path(FOLDER, f"{name}.py")
        path.write_text(source)  # Triton reads a function's source from its file
        module = ModuleType(name)
        module.__file__ = str(path)
        exec(compile(source, str(path), "exec"), module.__dict__)
        module.libdevice = Libdevice()
        self.function = getattr(module, name)

    def run(self, *arguments: Any, stream: Any, **_: Any) -> None:
        sizes = {name: size for name, size in self.SIZES.items() if name in self.function.arg_names}
        names = [name for name in self.function.arg_names if name not in sizes]
        values = dict(zip(names, arguments, strict=False))
        # A call of FlexAttention's template ends with its grid.
        grid = arguments[len(names) :] or (triton.cdiv(values["xnumel"], sizes["XBLOCK"]),)
        self.function[grid](**values, **sizes)


def interpreted(code: str) -> Callable[[list[Any]], Sequence[torch.Tensor]]:
    """The function of inductor's code, on tensors of the CPU."""
    module = ModuleType("code")
    code = code.replace("async_compile.wait(globals())", "").replace("empty_strided_cuda(", "empty_strided_cpu(")
    with (
        mock.patch("torch._inductor.async_compile.AsyncCompile", lambda: SimpleNamespace(triton=Interpreted)),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, create=True),
    ):
        exec(compile(code, "code", "exec"), module.__dict__)
    return module.call


def check(
    name: str,
    function: Callable,
    tensors: Sequence[torch.Tensor],
    dynamic: Sequence[int] = (),
    reference: Callable | None = None,
) -> None:
    """Print how far the interpreted kernels are from the reference (None: the function in torch), and their number.

    Both return a tensor or nothing, and may write into the tensors.
    """
    expected = [tensor.clone() for tensor in tensors]
    result = (reference or function)(*expected)
    code, arguments = code_for_h100(function, tensors, dynamic)
    with (
        mock.patch.object(torch.cuda, "_DeviceGuard", lambda _: nullcontext()),
        mock.patch.object(torch.cuda, "set_device", lambda _: None),
    ):
        computed = interpreted(code)(arguments)
    results = [] if result is None else [result]
    pairs = [*zip(computed, results, strict=True), *zip(tensors, expected, strict=True)]
    errors = [(ours.double() - theirs.double()).abs().max() / theirs.double().abs().max() for ours, theirs in pairs]
    print(json.dumps({"function": name, "kernels": code.count("async_compile.triton("), "error": float(max(errors))}))


# ---- what is computed ----


def sampled(logits: torch.Tensor, seen: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    scores = token_scores(penalise(logits, seen, 1.3), 0.8, top_p=0.9)
    return choose_tokens(scores, keys, positions)


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return cached_attention(q, k, v, BlockAttention(at, k.shape[2], WINDOW))


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v over the last WINDOW slots up to each query's own."""
    slots, own = torch.arange(k.shape[2]), at[:, None, :, None]
    visible = (slots <= own) & (slots > own - WINDOW)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf).softmax(-1) @ v


def loss_and_gradient(loss: Callable) -> Callable:
    """The loss of logits and a target, whose gradient, times the scale, replaces the logits."""

    def reference(logits: torch.Tensor, target: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        exact = logits.float().requires_grad_()
        value = loss(exact, target)
        logits.copy_(torch.autograd.grad(value, exact)[0] * scale)
        return value.detach()

    return reference


def kl(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return F.kl_div(logits.log_softmax(-1), teacher.softmax(-1), reduction="sum")


WINDOW = 200

if __name__ == "__main__":
    torch.manual_seed(0)
    n, v = 13, 100
    logits, labels, scale = 3 * torch.randn(n, v), torch.randint(v, (n,)), torch.tensor(0.25)
    low, keys = logits.bfloat16(), torch.tensor(noise_keys(7, [[1], [2], [1]]))
    weights = [torch.rand(1000).bfloat16() * size for size in (1, 0.1, 0.01, 0.3)]
    factors, step = torch.tensor([0.1, 0.001, 0.03, 1e-8, 0.99, 2e-3], dtype=torch.float64), torch.tensor([3, 5])
    q, k, at = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 2, 512, 16), torch.tensor([[5, 6, 7], [400, 401, 402]])
    with TemporaryDirectory() as FOLDER:
        for smoothing in (0.0, 0.1):
            reference = loss_and_gradient(partial(F.cross_entropy, reduction="sum", label_smoothing=smoothing))
            function = partial(cross_entropy_, label_smoothing=smoothing)
            check(f"cross entropy, smoothed by {smoothing}", function, [low.clone(), labels, scale], [0, 1], reference)
        check("KL divergence", kl_divergence_, [low, logits.roll(1, 0), scale], [0, 1], loss_and_gradient(kl))
        check("noise", gumbel, [keys[:, :1].clone(), keys[:, 1:].clone(), torch.arange(v)])
        check("sampling", sampled, [logits[:12].view(3, 4, v), torch.rand(3, 1, v) < 0.2, keys, torch.arange(4)[None]])
        check("StochasticAdamW", lambda *tensors: update_(*tensors, 0), [*weights, factors, step], range(4))
        check("FlexAttention", attended, [q, *k, at], reference=dense_attention)
    sys.stdout.flush()
