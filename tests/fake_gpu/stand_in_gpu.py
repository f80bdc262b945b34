"""A GPU that computes nothing, for programs that tests/fake_gpu/start.py runs.

Tensors on the GPU are torch's fake tensors: devices, shapes, dtypes and aliases are real, numbers are not. The host's
tensors are real. What the host reads from the GPU is made up.
"""

import json
import shutil
import subprocess
import sys
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda:0")
needs_fake_gpu = pytest.mark.skipif(
    not torch.__version__.startswith("2.13.") or torch.cuda.is_available() or shutil.which("g++") is None,
    reason="fake GPUs need torch 2.13 for a CPU (the objects in fake_gpu/start.py differ between versions) and g++",
)
# Operations whose result's shape, or whose result itself, the host needs.
READ_BY_HOST = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}

# One kernel on a GPU. Without any kernel for the device, autograd takes the operation apart, which needs more memory.
SILU_BACKWARD = torch.ops.aten.silu_backward.default
ONE_KERNEL = torch.library.Library("aten", "IMPL")


def run(program: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run a program of tests/fake_gpu in its own process; returns the JSON objects that it prints, one a line."""
    command = [sys.executable, str(program.with_name("start.py")), str(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def line_of_package() -> str:
    """The innermost running line of the package, else of torchtune."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(None)]
    for name in ("layerskip_recipes", "torchtune"):
        for file, line in frames:
            if f"/{name}/" in file:
                return f"{name}/{file.split(f'/{name}/')[-1]}:{line}"
    return "?"


def on_gpu(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cuda"


class LiveBytes:
    """The bytes of all storages on the GPU that are alive, as torch's allocator counts them: `now`, and `peak` since
    the last `restart`."""

    BLOCK = 512  # the allocator rounds up to whole blocks

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}  # by address of the storage

    def see(self, value: Any) -> None:
        """Count the tensors of an operation's result, or of a model, that are not known yet."""
        for tensor in filter(on_gpu, tree_leaves(value)):
            storage = tensor.untyped_storage()
            if (address := storage._cdata) not in self.sizes:
                self.sizes[address] = -(-storage.nbytes() // self.BLOCK) * self.BLOCK
                self.now += self.sizes[address]
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, address)

    def forget(self, address: int) -> None:
        self.now -= self.sizes.pop(address)

    def restart(self) -> int:
        """The peak so far; a new one begins."""
        peak, self.peak = self.peak, self.now
        return peak


class FakeGPU(TorchDispatchMode):
    """`waits` counts where the host waits for the GPU, `launches` the operations on the GPU, and `memory` its bytes.

    `read(shape, dtype)` makes up what the host reads: a nested list, or a number for the shape ().
    """

    def __init__(self, fake: FakeTensorMode, read: Callable[[tuple[int, ...], torch.dtype], Any]) -> None:
        super().__init__()
        self.fake, self.read = fake, read
        self.waits: Counter[str] = Counter()
        self.launches = 0
        self.memory = LiveBytes()

    def wait(self, what: str) -> None:
        self.waits[f"{what} at {line_of_package()}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self._run(func, args, kwargs or {})
        self.memory.see(result)
        return result

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if (
            func.namespace != "prim" and func is not SILU_BACKWARD
        ):  # inference mode does not take composite operations apart
            with self:
                if (out := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return out
        name, tensors = (
            func._schema.name.removeprefix("aten::"),
            [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)],
        )
        target = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        if any(map(on_gpu, tensors)):
            self.launches += 1
            self._note_reads(name, args)
            if name == "_local_scalar_dense":
                return self.read((), args[0].dtype)
            if name == "equal":
                return True
            if name == "_unique2":
                return (args[0].clone(), *(torch.empty(0, dtype=torch.long, device=CUDA) for _ in range(2)))
            if name == "nonzero":  # the number of rows is made up
                return torch.empty(max(args[0].numel() // 2, 1), args[0].dim(), dtype=torch.long, device=CUDA)
        # Copies between host and GPU. Only a copy from pinned memory does not wait.
        if name == "_to_copy" and target is not None and target != args[0].device.type:
            if not (kwargs.get("non_blocking") and (target == "cpu" or getattr(args[0], "is_pinned_here", False))):
                self.wait("copy")
            dtype = kwargs.get("dtype") or args[0].dtype
            if target == "cuda":
                return torch.empty(args[0].shape, dtype=dtype, device=CUDA)
            with unset_fake_temporarily():
                return torch.tensor(self.read(tuple(args[0].shape), dtype), dtype=dtype).expand(args[0].shape).clone()
        if name == "copy_" and on_gpu(args[0]) != on_gpu(args[1]):
            self.wait("copy")
            return args[0]
        if any(isinstance(tensor, FakeTensor) for tensor in tensors) or (not tensors and target == "cuda"):
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def _note_reads(self, name: str, args: Any) -> None:
        if name in READ_BY_HOST:
            self.wait(name)
        if name in ("index", "index_put", "index_put_"):
            if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
                self.wait(f"{name} by a mask")
            if name != "index" and not on_gpu(args[2]):
                self.wait(f"{name} of a number on the host")


@contextmanager
def fake_gpu(read: Callable[[tuple[int, ...], torch.dtype], Any]) -> Iterator[FakeGPU]:
    """Within this context tensors on "cuda" can be made, and are fake."""
    if not SILU_BACKWARD.has_kernel_for_dispatch_key(torch._C.DispatchKey.CUDA):
        ONE_KERNEL.impl("silu_backward", lambda grad, x: torch.empty_like(x), "CUDA")
    make, fake = torch.tensor, FakeTensorMode(allow_non_fake_inputs=True)
    gpu = FakeGPU(fake, read)

    def tensor(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        made = make(*args, **kwargs)
        made.is_pinned_here = pin_memory
        return made

    def pinned(self: torch.Tensor, *_: Any) -> torch.Tensor:
        copy = self.clone()
        copy.is_pinned_here = True
        return copy

    def tolist(self: torch.Tensor) -> Any:
        gpu.wait("tolist")
        return read(tuple(self.shape), self.dtype)

    stand_ins = {
        torch.cuda: {
            "Event": mock.MagicMock(),
            "current_stream": lambda *_: None,
            "synchronize": lambda *_: gpu.wait("synchronize"),
            "current_device": lambda: 0,
            "is_bf16_supported": lambda *_, **__: True,
            "mem_get_info": lambda *_: (2**36, 2**36),
            "memory_allocated": lambda *_: 0,
            "memory_reserved": lambda *_: 0,
        },
        torch.cuda.amp.common: {"amp_definitely_not_available": lambda: False},
        torch: {"tensor": tensor},
        torch.Tensor: {"pin_memory": pinned},
        FakeTensor: {"tolist": tolist},
        torch.compiler: {"cudagraph_mark_step_begin": lambda: None},
    }
    with ExitStack() as stack:
        for where, names in stand_ins.items():
            for name, stand_in in names.items():
                stack.enter_context(mock.patch.object(where, name, stand_in))
        stack.enter_context(fake)
        yield stack.enter_context(gpu)


def to_fake_gpu(*modules: torch.nn.Module) -> None:
    """Replace all parameters and buffers by fake ones on the GPU; shared ones stay shared."""
    moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # with the old one, which keeps its id

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in moved:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            moved[id(tensor)] = tensor, torch.nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy
        return moved[id(tensor)][1]

    for module in (part for outer in modules for part in outer.modules()):
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: fake(tensor) for name, tensor in tensors.items() if tensor is not None})
