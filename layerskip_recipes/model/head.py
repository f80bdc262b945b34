"""The head g = final norm + output projection, for callers that unembed many chunks of many exits.

A sharded model gathers its head's weights at every call of the head. `Head` gathers them once for all chunks.

Gemma 2 caps the logits, but torchtune 0.6.1 caps the final hidden state: `norm_and_cap` and `capped` correct that.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torchao.utils import TorchAOBaseTensor
from torchtune.models.gemma2._component_builders import Gemma2FinalNorm
from torchtune.modules import TiedLinear

TENSOR_PARALLEL = "tensor"  # the name of the tensor-parallel mesh dimension


class Head:
    """g of a decoder, called without the hooks of its modules; `norm` replaces the model's norm.

    Use it within the decoder's forward (`on_exit=`), where FSDP has gathered the root's parameters. `parameters` are
    the gathered parameters of norm and output (tied: the embedding's); their gradients reach the sharded parameters.
    """

    def __init__(self, model: Any, norm: nn.Module | None = None) -> None:
        self.tied = isinstance(model.output, TiedLinear)
        self.norm: Any = model.norm if norm is None else norm
        self.cap = getattr(model, "logit_cap", None)
        self.output = head_of(model)
        self._places: list[tuple[Any, str]] = [
            (module, name)
            for part in (self.norm, self.output)
            for module in part.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        self.parameters = [gather_parameter(module._parameters[name]) for module, name in self._places]

    def cut(self, vocabulary: torch.Tensor | slice) -> "Head":
        """A frozen head with only the rows of the tokens `vocabulary` [v']: a copy, or a view for a slice."""
        places = zip(self._places, self.parameters, strict=True)
        output = linear_of_rows({name: value for (module, name), value in places if module is self.output}, vocabulary)
        return Head(SimpleNamespace(output=output, norm=self.norm, logit_cap=self.cap))

    @contextmanager
    def using(self, parameters: Sequence[torch.Tensor]) -> Iterator[None]:
        """A context in which the head uses these tensors, in the order of `self.parameters`."""
        before = [module._parameters[name] for module, name in self._places]
        try:
            for (module, name), value in zip(self._places, parameters, strict=True):
                module._parameters[name] = value
            yield
        finally:
            for (module, name), value in zip(self._places, before, strict=True):
                module._parameters[name] = value

    @property
    def matrix(self) -> int | None:
        """The index in `parameters` of the output's matrix, if the logits are only a product with this matrix."""
        # Compare the method, not the class: FSDP changes the class of a module that it shards separately.
        linear = isinstance(self.output, nn.Linear) and type(self.output).forward is nn.Linear.forward
        plain = self.cap is None and (self.tied or (linear and self.output.bias is None))
        plain = plain and not isinstance(self.output.weight, TorchAOBaseTensor)  # `mm` takes no quantised tensor
        return self._places.index((self.output, "weight")) if plain else None

    def is_in_norm(self, i: int) -> bool:
        return any(self._places[i][0] is module for module in self.norm.modules())

    def has_token_rows(self, i: int) -> bool:
        """Whether `parameters[i]` is the output's own matrix or bias, with one row per token; adapters are not."""
        return self._places[i][0] is self.output

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [n, v] of hidden states [n, d], in fp32 (in fp64 if the model is)."""
        logits = self.unembed(self.normed(x))
        return logits.to(at_least_fp32(logits))

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm.forward(x.unsqueeze(0)).squeeze(0)  # some heads need a batch dimension

    def unembed(self, h: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [n, v] of normed states h [n, d]; written to `out`, without autograd, if the head has a `matrix`."""
        if out is not None:
            return torch.mm(h, self.output.weight.T, out=out)
        product = F.linear(h, self.output.weight) if self.tied else self.output.forward(h.unsqueeze(0)).squeeze(0)
        return capped(product, self.cap)


def linear_of_rows(parameters: Mapping[str, torch.Tensor], rows: torch.Tensor | slice = slice(None)) -> nn.Linear:
    """A frozen linear layer of some rows of a weight and its bias, if any; a slice of rows is a view, not a copy."""
    linear = nn.Linear(1, 1, bias=False, device="meta")
    for name, value in parameters.items():
        linear.register_parameter(name, nn.Parameter(value.detach()[rows], requires_grad=False))
    linear.out_features, linear.in_features = linear.weight.shape
    return linear


def head_of(model: Any) -> Any:
    """The module with the head's matrix: the embedding if tied, unless a quantised copy replaced the head."""
    return model.output.tied_module if isinstance(model.output, TiedLinear) else model.output


def at_least_fp32(tensor: torch.Tensor) -> torch.dtype:
    """The dtype for sums over many tokens: fp32, or fp64 for an fp64 tensor."""
    return torch.promote_types(tensor.dtype, torch.float32)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of matrix products with x: autocast's if enabled, or x's own."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def chunk_tokens(device: str) -> int:
    """The number of tokens whose logits are in memory at a time.

    For each chunk of n tokens, a GPU adds a product to an fp32 sum: 8 bytes of memory traffic per weight of the head
    (12 before torch 2.10) beside 6 n operations. At 200 operations per byte, this traffic adds half to the time of the
    operations for n = 512, and an eighth for n = 2048. A CPU does fewer operations per byte.
    """
    return 2048 if device.startswith("cuda") else 512


def gather_parameter(parameter: torch.Tensor) -> torch.Tensor:
    """Gather a sharded parameter. As in FSDP, its gradient is averaged over data-parallel ranks and scattered.

    Tensor-parallel ranks see the same samples, so each has the same gradient of the whole parameter.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    # With fsdp_cpu_offload the parameter is on the CPU, and only FSDP's own hooks would move it to the device.
    parameter = parameter.to(mesh.device_type)
    shared = [name == TENSOR_PARALLEL for name in mesh.mesh_dim_names]
    gathered = parameter.full_tensor(grad_placements=[Replicate() if same else Partial() for same in shared])
    if gathered.requires_grad:
        ranks = math.prod(mesh.size(dim) for dim, same in enumerate(shared) if not same)
        gathered.register_hook(lambda grad: grad / ranks)
    return gathered


def norm_and_cap(norm: nn.Module) -> tuple[nn.Module, float | None]:
    """A decoder's final norm without a cap, with the same parameters, and the logit cap (None except for Gemma 2)."""
    if not isinstance(norm, Gemma2FinalNorm):
        return norm, None
    plain = copy(norm)
    plain._modules = dict(norm._modules) | {"logit_capping": nn.Identity()}  # copy() shares this dict
    return plain, norm.capping_value


def capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """cap tanh(logits / cap), or the logits without a cap."""
    return logits if cap is None else cap * torch.tanh(logits / cap)
