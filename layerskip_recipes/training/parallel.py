"""The mesh of training processes (replicate x shard x tensor), and sharding over it: FSDP2, HSDP, TP.

Every rank must run the same layers in the same order, or a collective would hang. `LayerDropout` guarantees that.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torchtune import training

from layerskip_recipes.distributed.tensor_parallel import check_processes, parallelize
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.draft import Draft
from layerskip_recipes.model.head import TENSOR_PARALLEL
from layerskip_recipes.processes import num_processes
from layerskip_recipes.training.config import FinetuneConfig


@dataclass(frozen=True)
class Mesh:
    """replicate x shard x tensor processes; `devices` is None for one process.

    There are `replicate` copies of the model (HSDP), each sharded over `shard` ranks (FSDP). `tensor` ranks share each
    matrix and see the same samples; data-parallel ranks see different ones.
    """

    devices: DeviceMesh | None = None
    replicate: int = 1
    shard: int = 1
    tensor: int = 1

    @property
    def data_size(self) -> int:
        """The number of data-parallel ranks."""
        return self.replicate * self.shard

    @property
    def data_rank(self) -> int:
        return 0 if self.devices is None else dist.get_rank() // self.tensor

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the data-parallel ranks, in place."""
        if self.devices is not None:
            dist.all_reduce(tensor)
            tensor /= self.tensor  # tensor-parallel ranks see the same samples: count them once
        return tensor


def mesh_sizes(cfg: FinetuneConfig) -> tuple[int, int, int]:
    """The numbers of replicate, shard and tensor ranks. Raises a ConfigError for settings that do not fit them."""
    processes = num_processes()
    tensor = check_processes(cfg.meta_model, cfg.tensor_parallel_dim or 1, cfg.tensor_parallel_plan)
    left = processes // tensor  # ranks to replicate and shard over
    replicate, shard = cfg.data_parallel_replicate_dim or 1, cfg.data_parallel_shard_dim or -1
    if left % replicate or shard not in (-1, left // replicate):
        key = "data_parallel_replicate_dim" if shard == -1 else "data_parallel_shard_dim"
        raise ConfigError(
            f"{key}: {getattr(cfg, key)} wrong: data_parallel_replicate_dim {replicate} x data_parallel_shard_dim "
            f"{shard} x tensor_parallel_dim {tensor} is not the number of processes, {processes}. Allowed: a product "
            f"of {processes}; for example data_parallel_replicate_dim=1 data_parallel_shard_dim=-1 (what is left)"
        )
    if cfg.fsdp_cpu_offload and (left == 1 or cfg.device == "cpu"):
        raise ConfigError(
            "fsdp_cpu_offload: True needs device=cuda and several processes to shard over (besides those of "
            "tensor_parallel_dim); fsdp_cpu_offload=false"
        )
    return replicate, left // replicate, tensor


def make_mesh(cfg: FinetuneConfig, device: torch.device) -> Mesh:
    """The mesh of a config; needs the process group. Raises as `mesh_sizes` does."""
    replicate, shard, tensor = mesh_sizes(cfg)
    if num_processes() == 1:
        return Mesh()
    names = ("replicate", "shard", TENSOR_PARALLEL)
    devices = init_device_mesh(device.type, (replicate, shard, tensor), mesh_dim_names=names)
    return Mesh(devices, replicate, shard, tensor)


def checkpoint_layers(model: LayerSkipDecoder | Draft, every: int) -> None:
    """Checkpoint the activations of each `every`-th layer (0: none): the backward pass recomputes them."""
    for layer in range(every - 1, len(model.layers), every) if every else ():
        model.layers[layer] = checkpoint_wrapper(model.layers[layer])


def clean_name(name: str) -> str:
    """A parameter's name in checkpoints, without the activation checkpointing wrapper."""
    return name.replace("_checkpoint_wrapped_module.", "")


def shard_model(model: LayerSkipDecoder | Draft, cfg: FinetuneConfig, mesh: Mesh, checkpoint_every: int) -> None:
    """Shard a decoder on the meta device in place, first by tensor parallelism, then by FSDP."""
    if mesh.devices is not None and mesh.tensor > 1:
        assert cfg.tensor_parallel_plan is not None  # see `check_processes`
        assert isinstance(model, LayerSkipDecoder)  # a draft is sharded only
        parallelize(model, mesh.devices[TENSOR_PARALLEL], cfg.tensor_parallel_plan.build())
    checkpoint_layers(model, checkpoint_every)  # a tensor-parallel plan names modules without wrappers
    if mesh.devices is not None and mesh.data_size > 1:
        fsdp_options: dict[str, Any] = {
            "mesh": mesh.devices["replicate", "shard"] if mesh.replicate > 1 else mesh.devices["shard"],
            "reshard_after_forward": cfg.fsdp_reshard_after_forward is not False,
        }
        if cfg.fsdp_cpu_offload:
            fsdp_options["offload_policy"] = CPUOffloadPolicy()
        if cfg.multiplies_in_bf16:  # weights are gathered in bf16, gradients summed in fp32
            fsdp_options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for name, module in reversed([*model.named_modules()]):
            if training.get_shard_conditions(clean_name(name), module, names_to_match=cfg.custom_sharded_layers or []):
                fully_shard(module, **fsdp_options)
        # The head, too, is used at the end of a forward pass and in the backward pass, so do not gather it twice.
        fully_shard(model, **fsdp_options | {"reshard_after_forward": False})


def reshard(model: nn.Module) -> None:
    """Free gathered weights after a forward pass without backward: optimizer and checkpoints need the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def parts_of(learner: nn.Module) -> list[nn.Module]:
    """The model and the draft that are trained beside each other, or the only one that is trained."""
    return [*learner.children()] if isinstance(learner, nn.ModuleDict) else [learner]


def group_by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Group parameters by mesh: fused and foreach operations cannot mix meshes."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(groups.values())


def clip_gradients(model: nn.Module, max_norm: float) -> torch.Tensor:
    """`torch.nn.utils.clip_grad_norm_` for parameters of several meshes. Returns the norm over all of them."""
    with_gradient = [p for p in model.parameters() if p.grad is not None]
    if not with_gradient:  # layer dropout skipped every layer with adapters
        return torch.zeros((), device=next(model.parameters()).device)
    groups = group_by_mesh(with_gradient)
    norms = [torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
    total = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
    if math.isfinite(max_norm):
        for group in groups:
            torch.nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return total
