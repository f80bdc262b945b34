"""The mesh of training processes (replicate x shard x tensor), and sharding over it: FSDP2, HSDP, TP.

Every rank must run the same layers in the same order, or a collective would hang. `LayerDropout` guarantees that.
"""

import math
from collections.abc import Iterable
from contextlib import contextmanager
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
from torchtune.modules import TiedLinear

from layerskip_recipes.distributed.tensor_parallel import check_processes, parallelize, read_plan
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.adapters import adapter_names
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.draft import Draft
from layerskip_recipes.model.head import TENSOR_PARALLEL
from layerskip_recipes.model.nf4 import packs_weights
from layerskip_recipes.processes import is_rank_zero, num_processes, wait_for_all
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
        """This process's data-parallel rank."""
        return 0 if self.devices is None else dist.get_rank() // self.tensor

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the data-parallel ranks, in place."""
        if self.devices is not None:
            dist.all_reduce(tensor)
            tensor /= self.tensor  # tensor-parallel ranks see the same samples: count them once
        return tensor


def mesh_sizes(cfg: FinetuneConfig) -> tuple[int, int, int]:
    """The numbers of replicate, shard and tensor ranks; a ConfigError if their product is not the process count."""
    processes = num_processes()
    plan, model = cfg.tensor_parallel_plan, cfg.meta_model
    if processes > 1 and plan is not None and cfg.tensor_parallel_dim is None:
        raise ConfigError(
            f"tensor_parallel_plan: {plan.path} does nothing without tensor_parallel_dim. Set that, or leave it out: "
            f"~tensor_parallel_plan; for example tensor_parallel_dim={processes}, or 1 to shard only"
        )
    tensor = check_processes(model, cfg.tensor_parallel_dim or 1, plan, device=cfg.device)
    if tensor > 1 and adapter_names(model):
        raise ConfigError(
            f"tensor_parallel_dim: {tensor} does not go with adapters, which torchtune's plans do not split. "
            "Allowed: 1 (FSDP shards); for example tensor_parallel_dim=1"
        )
    left = processes // tensor  # ranks to replicate and shard over
    replicate = cfg.data_parallel_replicate_dim or 1
    shard = -1 if cfg.data_parallel_shard_dim is None else cfg.data_parallel_shard_dim
    if left % replicate or (shard != -1 and replicate * shard != left):
        key = "data_parallel_replicate_dim" if shard == -1 else "data_parallel_shard_dim"
        raise ConfigError(
            f"{key}: {getattr(cfg, key)} wrong: data_parallel_replicate_dim {replicate} x data_parallel_shard_dim "
            f"{shard} x tensor_parallel_dim {tensor} is not the number of processes, {processes}. Allowed: a product "
            f"of {processes}; for example data_parallel_replicate_dim=1 data_parallel_shard_dim=-1 (what is left)"
        )
    if processes > 1:
        _check_several_processes(cfg, replicate)
    # Offloading is a feature of FSDP.
    if cfg.fsdp_cpu_offload and processes > 1 and left == 1:
        raise ConfigError(
            f"fsdp_cpu_offload: True needs processes to shard over, and tensor_parallel_dim {tensor} takes all "
            f"{processes}; fsdp_cpu_offload=false"
        )
    if cfg.fsdp_cpu_offload and (left == 1 or cfg.find_device().type == "cpu"):
        raise ConfigError(
            "fsdp_cpu_offload: True needs several processes with device=cuda, as in tune run --nproc_per_node 2; "
            "without them fsdp_cpu_offload=false"
        )
    return replicate, left // replicate, tensor


def _check_several_processes(cfg: FinetuneConfig, replicate: int) -> None:
    """Raises a ConfigError for settings that need one process."""
    draft, in_backward = cfg.draft, cfg.optimizer_in_bwd
    apart = "tok_embeddings" in (cfg.custom_sharded_layers or ()) and isinstance(cfg.meta_model.output, TiedLinear)
    mistakes = {
        "draft.keep_states: True works with one process. Set draft.keep_states=false": draft and draft.keep_states,
        "optimizer_in_bwd: True works with one process if draft.kind is adapter, whose layers run twice in a step. Set "
        "optimizer_in_bwd=false": draft and draft.kind == "adapter" and in_backward,
        f"data_parallel_replicate_dim: {replicate} does not go with QLoRA, whose packed weights are sharded over all "
        "ranks. Allowed: 1; for example data_parallel_replicate_dim=1": replicate > 1 and packs_weights(cfg.model),
        "low_cpu_ram: True works with one process: torchtune keeps a copy of the weights in one file, and several "
        "processes would write it at once. Set low_cpu_ram=false": cfg.low_cpu_ram,
        f"optimizer: {cfg.optimizer.path} works with one process: torch cannot gather its 8- or 4-bit state for a "
        "checkpoint. For example optimizer._component_=torch.optim.AdamW": cfg.optimizer.path.startswith("torchao."),
        "optimizer_in_bwd: True does not go with custom_sharded_layers: [tok_embeddings] and a tied head: the shared "
        "weight would step once for each of its two gradients. Set optimizer_in_bwd=false, or leave tok_embeddings "
        "out": in_backward and apart,
    }
    if found := [mistake for mistake, applies in mistakes.items() if applies]:
        raise ConfigError(*found)


def make_mesh(cfg: FinetuneConfig, device: torch.device) -> Mesh:
    """The mesh of a config; needs the process group. Raises as `mesh_sizes` does."""
    replicate, shard, tensor = mesh_sizes(cfg)
    if num_processes() == 1:
        return Mesh()
    names = ("replicate", "shard", TENSOR_PARALLEL)
    devices = init_device_mesh(device.type, (replicate, shard, tensor), mesh_dim_names=names)
    return Mesh(devices, replicate, shard, tensor)


@contextmanager
def rank_zero_first():
    """Rank 0 runs the block first, so that the others find the files that it downloads or writes."""
    if not is_rank_zero():
        wait_for_all()
    yield
    if is_rank_zero():
        wait_for_all()
    wait_for_all()  # the others may take as long


def checkpoint_layers(model: LayerSkipDecoder | Draft, every: int) -> None:
    """Checkpoint the activations of each `every`-th layer (0: none): the backward pass recomputes them."""
    for layer in range(every - 1, len(model.layers), every) if every else ():
        model.layers[layer] = checkpoint_wrapper(model.layers[layer])


def clean_name(name: str) -> str:
    """A parameter's name in checkpoints, without the activation checkpointing wrapper."""
    return name.replace("_checkpoint_wrapped_module.", "")


def shard_model(model: LayerSkipDecoder | Draft, cfg: FinetuneConfig, mesh: Mesh, checkpoint_every: int) -> None:
    """Shard a decoder on the meta device in place, first by tensor parallelism, then by FSDP.

    Activation checkpointing comes in between, since a tensor-parallel plan names modules without wrappers.
    """
    if mesh.devices is not None and mesh.tensor > 1:
        plan = read_plan(cfg.tensor_parallel_plan)
        assert plan is not None  # see `check_processes`
        assert isinstance(model, LayerSkipDecoder)  # a draft is sharded only
        parallelize(model, mesh.devices[TENSOR_PARALLEL], plan)
    checkpoint_layers(model, checkpoint_every)
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
        fully_shard(model, **fsdp_options)


def reshard(model: nn.Module) -> None:
    """Free gathered weights after a forward pass without backward: optimizer and checkpoints need the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


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
