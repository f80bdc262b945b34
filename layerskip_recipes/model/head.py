"""The head g = final norm + output projection, for callers that unembed many chunks of many exits.

A sharded model gathers its head's weights whenever the head is called. `Head` gathers them once, for all chunks.

torchtune 0.6.1 caps the final hidden state where Gemma 2 caps the logits: `norm_and_cap` and `capped` correct that.
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

TENSOR_PARALLEL = "tensor"  # the name of that dimension in our meshes


class Head:
    """g of a decoder, called past the hooks of its modules.

    Use it within the decoder's forward (`on_exit=`), where the parameters that FSDP keeps with the root are whole. The
    output is a linear layer, a LoRA layer, or tied to the embedding; `norm` replaces the model's.

    Attributes:
        parameters: of norm and output (tied: the embedding's), gathered, differentiable towards the sharded ones.
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

    def cut(self, vocabulary: torch.Tensor) -> "Head":
        """A frozen copy of the head's rows for some tokens, `vocabulary` [v']."""
        places = zip(self._places, self.parameters, strict=True)
        output = linear_of_rows({name: value for (module, name), value in places if module is self.output}, vocabulary)
        return Head(SimpleNamespace(output=output, norm=self.norm, logit_cap=self.cap))

    @contextmanager
    def using(self, parameters: Sequence[torch.Tensor]) -> Iterator[None]:
        """Within this context the head computes with these tensors, given in the order of `self.parameters`."""
        own = [module._parameters[name] for module, name in self._places]
        try:
            for (module, name), value in zip(self._places, parameters, strict=True):
                module._parameters[name] = value
            yield
        finally:
            for (module, name), value in zip(self._places, own, strict=True):
                module._parameters[name] = value

    @property
    def matrix(self) -> int | None:
        """The index in `parameters` of the output's matrix, if the logits are just the product with this matrix."""
        # By the method, not the class: FSDP changes the class of a module that is sharded on its own.
        linear = isinstance(self.output, nn.Linear) and type(self.output).forward is nn.Linear.forward
        plain = self.cap is None and (self.tied or (linear and self.output.bias is None))
        plain = plain and not isinstance(self.output.weight, TorchAOBaseTensor)  # which no `mm` takes
        return self._places.index((self.output, "weight")) if plain else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [n, v] of hidden states [n, d], in fp32 (in fp64 if the model is)."""
        logits = self.unembed(self.normed(x))
        return logits.to(at_least_fp32(logits))

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """The final norm of x [n, d]."""
        return self.norm.forward(x.unsqueeze(0)).squeeze(0)  # a batch of one: some heads want [b, s, d]

    def unembed(self, h: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [n, v] of normed states h [n, d]; in `out`, without autograd, if the output has a `matrix`."""
        if out is not None:
            return torch.mm(h, self.output.weight.T, out=out)
        product = F.linear(h, self.output.weight) if self.tied else self.output.forward(h.unsqueeze(0)).squeeze(0)
        return capped(product, self.cap)


def linear_of_rows(parameters: Mapping[str, torch.Tensor], rows: torch.Tensor | slice = slice(None)) -> nn.Linear:
    """A frozen linear layer with some rows of another one's weight, and of its bias if there is one.

    Rows by their numbers are copies; all of them, or a slice, are the other one's own.
    """
    linear = nn.Linear(1, 1, bias=False, device="meta")
    for name, value in parameters.items():
        linear.register_parameter(name, nn.Parameter(value.detach()[rows], requires_grad=False))
    linear.out_features, linear.in_features = linear.weight.shape
    return linear


def head_of(model: Any) -> Any:
    """The module that holds the head's matrix: of a tied head the embedding, unless a quantised copy multiplies."""
    return model.output.tied_module if isinstance(model.output, TiedLinear) else model.output


def at_least_fp32(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which sums over many tokens are taken: fp32, or fp64 if the tensor is."""
    return torch.promote_types(tensor.dtype, torch.float32)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which products with x are computed: autocast's, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def chunk_tokens(device: str) -> int:
    """For how many tokens logits exist at a time.

    With each chunk of n tokens a GPU adds a product to a sum in fp32: 8 bytes for each weight of the head (12 with a
    torch before 2.8) beside 6 n operations. A GPU that does 200 operations in the time of a byte needs half of the
    operations' time for that with 512 tokens, and an eighth with 2048. A CPU does fewer operations in that time.
    """
    return 2048 if device.startswith("cuda") else 512


def gather_parameter(parameter: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded parameter; its gradient is scattered and averaged over the data-parallel ranks as by FSDP.

    Tensor-parallel ranks see the same samples and have the same gradient of the whole parameter.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    # With fsdp_cpu_offload the parameter lies on the CPU; only FSDP's own hooks bring it to the device.
    parameter = parameter.to(mesh.device_type)
    shared = [name == TENSOR_PARALLEL for name in mesh.mesh_dim_names]
    gathered = parameter.full_tensor(grad_placements=[Replicate() if same else Partial() for same in shared])
    if gathered.requires_grad:
        ranks = math.prod(mesh.size(dim) for dim, same in enumerate(shared) if not same)
        gathered.register_hook(lambda grad: grad / ranks)
    return gathered


def norm_and_cap(norm: nn.Module) -> tuple[nn.Module, float | None]:
    """A decoder's final norm without a cap, and the cap of its logits (None for all families but Gemma 2).

    The given norm stays unchanged; the returned one has the same parameters by the same names.
    """
    if not isinstance(norm, Gemma2FinalNorm):
        return norm, None
    plain = copy(norm)
    plain._modules = dict(norm._modules) | {"logit_capping": nn.Identity()}  # copy() shares the dict of submodules
    return plain, norm.capping_value


def capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """cap tanh(logits / cap); the logits themselves if there is no cap."""
    return logits if cap is None else cap * torch.tanh(logits / cap)
