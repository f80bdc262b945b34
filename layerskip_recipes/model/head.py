"""The head g = final norm + output projection, for those who unembed many chunks of many exits: losses, measurements.

A sharded model gathers its head's weights whenever the head is called. Here they are gathered once, for all chunks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torchtune.modules import TiedLinear

from layerskip_recipes.model.families import capped

TENSOR_PARALLEL = "tensor"  # the name of that dimension in our meshes


class Head:
    """g of a decoder, called past the hooks of its modules. Use it inside of the decoder's forward (`then=`), where
    the parameters that FSDP keeps with the root are whole already.

    Args:
        model: a decoder with `norm` and `output` (a linear layer, a LoRA layer, or tied to the embedding).

    Attributes:
        parameters: of norm and output (tied: the embedding's), whole, differentiable towards the sharded ones.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tied = isinstance(model.output, TiedLinear)
        self.norm = model.norm
        self.cap = getattr(model, "logit_cap", None)
        self.output = model.output.tied_module if self.tied else model.output
        self._places = [
            (module, name)
            for part in (self.norm, self.output)
            for module in part.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        self.parameters = [whole(module._parameters[name]) for module, name in self._places]

    @contextmanager
    def using(self, parameters: Sequence[torch.Tensor]) -> Iterator[None]:
        """Within it the head computes with these tensors, in the order of `self.parameters`."""
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
        """Where in `parameters` the output's matrix is, if the logits are nothing but a product with it."""
        # FSDP gives a module that is sharded on its own a class of its own.
        linear = isinstance(self.output, nn.Linear) and type(self.output).forward is nn.Linear.forward
        plain = self.cap is None and (self.tied or (linear and self.output.bias is None))
        return self._places.index((self.output, "weight")) if plain else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [n, v] in fp32 of hidden states [n, d]."""
        return self.unembed(self.normed(x)).float()

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """The final norm of x [n, d]."""
        return self.norm.forward(x.unsqueeze(0)).squeeze(0)  # a batch of one: some heads want [b, s, d]

    def unembed(self, h: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [n, v] of normed states h [n, d]; in `out`, without autograd, if the output has a `matrix`."""
        if out is not None:
            return torch.mm(h, self.output.weight.T, out=out)
        product = F.linear(h, self.output.weight) if self.tied else self.output.forward(h.unsqueeze(0)).squeeze(0)
        return capped(product, self.cap)


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A sharded parameter gathered, its gradient scattered and averaged over the data-parallel ranks as FSDP does it.

    Ranks that share a matrix (tensor parallelism) see the same samples and have the same gradient of all of it.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    # With fsdp_cpu_offload it lies on the CPU, but where FSDP's own hook brings it.
    parameter = parameter.to(mesh.device_type)
    shared = [name == TENSOR_PARALLEL for name in mesh.mesh_dim_names]
    gathered = parameter.full_tensor(grad_placements=[Replicate() if same else Partial() for same in shared])
    if gathered.requires_grad:
        ranks = 1
        for dim, same in enumerate(shared):
            ranks *= 1 if same else mesh.size(dim)
        gathered.register_hook(lambda grad: grad / ranks)
    return gathered
