"""Tensor parallelism for decoding on plain tensors: each rank multiplies by its part of a matrix, then sums or gathers.

torch's `parallelize_module` turns each weight into a DTensor. The host then needs 60 to 120 us per linear layer, longer
than a GPU takes to multiply one token by it, and milliseconds for every new text length.
"""

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torchtune.modules import TiedLinear

from layerskip_recipes.model.decoder import LayerSkipDecoder

WHOLE, LAST = (Replicate(),), (Shard(-1),)  # layouts: replicated, or split along the last dimension


class Ranks:
    """A mesh's process group, looked up once, and its collectives as torch operations that compiled steps may hold."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.count, self.group = mesh.size(), mesh.get_group().group_name

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        collectives = torch.ops._c10d_functional
        return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", self.group))

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n] -> [..., ranks n]."""
        collectives = torch.ops._c10d_functional
        parts = collectives.all_gather_into_tensor(x.contiguous(), self.count, self.group)
        return torch.cat(collectives.wait_tensor(parts).chunk(self.count), -1)


class SplitLinear(nn.Module):
    """This rank's part of a linear layer: some of its inputs (the ranks' products are summed), or some of its outputs.

    With `gathers` every rank gets all outputs. Otherwise it keeps its own for a next layer that is split by inputs.
    """

    def __init__(self, linear: Any, ranks: Ranks, gathers: bool) -> None:
        super().__init__()
        self.by_inputs = linear.weight.placements[0] == Shard(1)
        self.ranks, self.gathers = ranks, gathers
        self.weight, self.bias = local(linear.weight), None if linear.bias is None else local(linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.by_inputs:
            summed = self.ranks.all_reduce(F.linear(x, self.weight))
            return summed if self.bias is None else summed + self.bias
        columns = F.linear(x, self.weight, self.bias)
        return self.ranks.gather(columns) if self.gathers else columns


class SplitEmbedding(nn.Module):
    """An embedding whose rows are split evenly over the ranks."""

    def __init__(self, embedding: nn.Embedding, ranks: Ranks, rank: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.ranks, self.weight = ranks, local(embedding.weight)
        self.first = rank * len(self.weight)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        row = tokens - self.first
        here = (row >= 0) & (row < len(self.weight))
        return self.ranks.all_reduce(F.embedding(row * here, self.weight) * here[..., None])


def local(weight: Any) -> nn.Parameter:
    return nn.Parameter(weight.to_local(), requires_grad=False)


def split_locally(model: LayerSkipDecoder, mesh: DeviceMesh, plan: Mapping[str, ParallelStyle]) -> None:
    """Replace the DTensor modules that `parallelize` made by modules with plain tensors.

    Modules with layouts unknown to torchtune's plans, Gemma's embeddings, and heads or embeddings whose vocabulary does
    not divide evenly stay DTensors.
    """
    ranks = Ranks(mesh)
    for name, module in [*model.named_modules()]:
        style = next((style for pattern, style in plan.items() if fnmatch(name, pattern)), None)
        weight = getattr(module, "weight", None)
        if not isinstance(weight, DTensor):
            continue
        evenly = weight.shape[0] % ranks.count == 0
        layouts = getattr(style, "input_layouts", None), getattr(style, "output_layouts", None)
        by_inputs = type(style) is RowwiseParallel and layouts == (LAST, WHOLE)
        by_outputs = type(style) is ColwiseParallel and layouts in ((WHOLE, LAST), (WHOLE, WHOLE))
        if type(module) is nn.Linear and (by_inputs or (by_outputs and (evenly or layouts[1] == LAST))):
            split: nn.Module = SplitLinear(module, ranks, gathers=layouts[1] == WHOLE)
        elif type(module) is nn.Embedding and type(style) is RowwiseParallel and layouts == (WHOLE, WHOLE) and evenly:
            split = SplitEmbedding(module, ranks, mesh.get_local_rank())
        else:
            continue
        model.set_submodule(name, split)
        if isinstance(split, SplitEmbedding) and isinstance(model.output, TiedLinear):
            model.output = TiedLinear(split)
            model.output.linear.register_forward_hook(lambda _, inputs, logits: ranks.gather(logits))


def is_split(model: nn.Module) -> bool:
    """Whether several ranks share the weights of a model."""
    if not dist.is_initialized():
        return False
    return any(isinstance(module, SplitLinear | SplitEmbedding) for module in model.modules()) or any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )
