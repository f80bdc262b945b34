"""The grid of training processes (replicate x shard x tensor) and a decoder split over it: FSDP2, HSDP, TP.

Every rank runs the same layers in the same order, or a collective would wait for ever: `LayerDropout` sees to that.
"""

import math
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune import training
from torchtune.modules import TiedLinear, TransformerDecoder

from layerskip_recipes.config.checks import check_number
from layerskip_recipes.config.settings import check_device, nearest
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.parallel import check_processes, parallelize, tensor_parallel_plan
from layerskip_recipes.model.adapters import adapter_names
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.head import TENSOR_PARALLEL
from layerskip_recipes.processes import num_processes


@dataclass(frozen=True)
class Mesh:
    """replicate x shard x tensor processes. Data-parallel ranks (replicate x shard) have samples of their own.

    Attributes:
        devices: None with one process.
        replicate: copies of the sharded model (HSDP).
        shard: the ranks over which each copy's parameters are sharded (FSDP).
        tensor: the ranks that share each matrix (tensor parallelism).
    """

    devices: DeviceMesh | None = None
    replicate: int = 1
    shard: int = 1
    tensor: int = 1

    @property
    def data_size(self) -> int:
        """How many ranks have samples of their own."""
        return self.replicate * self.shard

    @property
    def data_rank(self) -> int:
        """Which of them this process is."""
        return 0 if self.devices is None else dist.get_rank() // self.tensor

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the data-parallel ranks, in place."""
        if self.devices is not None:
            dist.all_reduce(tensor)
            tensor /= self.tensor  # its ranks have the same samples
        return tensor


def mesh_sizes(cfg: DictConfig, model: TransformerDecoder) -> tuple[int, int, int]:
    """replicate, shard and tensor for the processes that torchrun started.

    Args:
        cfg: `data_parallel_replicate_dim`, `data_parallel_shard_dim` (-1: what is left), `tensor_parallel_dim`, ...
        model: of the config, on any device.

    Raises:
        ValueError: if they do not fit the number of processes, or a key needs more of them.
    """
    processes = num_processes()
    if processes > 1 and cfg.get("tensor_parallel_plan") is not None and cfg.get("tensor_parallel_dim") is None:
        raise ConfigError(
            f"tensor_parallel_plan: {cfg.tensor_parallel_plan._component_} does nothing without tensor_parallel_dim. "
            f"Set that, or leave it out: ~tensor_parallel_plan; for example tensor_parallel_dim={processes}, or 1 to "
            "shard only"
        )
    tensor = check_processes(OmegaConf.merge(cfg, {"tensor_parallel_dim": cfg.get("tensor_parallel_dim") or 1}), model)
    if tensor > 1 and adapter_names(model):
        raise ConfigError(
            f"tensor_parallel_dim: {tensor} does not go with adapters, that torchtune's plans do not split. Allowed: 1 "
            "(FSDP shards); for example tensor_parallel_dim=1"
        )
    replicate, shard = cfg.get("data_parallel_replicate_dim") or 1, cfg.get("data_parallel_shard_dim")
    shard = -1 if shard is None else shard
    check_number("data_parallel_replicate_dim", replicate, minimum=1, example=2)
    if shard != -1:
        check_number("data_parallel_shard_dim", shard, minimum=1, example=-1)
    left = processes // tensor
    if left % replicate or (shard != -1 and replicate * shard != left):
        key = "data_parallel_replicate_dim" if shard == -1 else "data_parallel_shard_dim"
        raise ConfigError(
            f"{key}: {cfg[key]} wrong: data_parallel_replicate_dim {replicate} x data_parallel_shard_dim {shard} "
            f"x tensor_parallel_dim {tensor} is not the number of processes, {processes}. Allowed: a product of "
            f"{processes}; "
            "for example data_parallel_replicate_dim=1 data_parallel_shard_dim=-1 (what is left)"
        )
    section = cfg.get("model") or {}
    builder = section.get("base") or section
    if replicate > 1 and builder.get("quantize_base", "qlora" in builder.get("_component_", "")):
        raise ConfigError(
            f"data_parallel_replicate_dim: {replicate} does not go with QLoRA, whose packed weights are sharded over "
            "all ranks. Allowed: 1; for example data_parallel_replicate_dim=1"
        )
    if processes > 1 and cfg.get("low_cpu_ram"):
        raise ConfigError(
            "low_cpu_ram: True works with one process: torchtune keeps a copy of the weights in one file, and several "
            "would write it at once. Set low_cpu_ram=false"
        )
    if processes > 1 and str((cfg.get("optimizer") or {}).get("_component_", "")).startswith("torchao."):
        raise ConfigError(
            f"optimizer: {cfg.optimizer._component_} works with one process: torch cannot gather its 8- or 4-bit state "
            "for a checkpoint. For example optimizer._component_=torch.optim.AdamW"
        )
    if cfg.get("fsdp_cpu_offload") and cfg.get("optimizer_in_bwd"):
        raise ConfigError(
            "optimizer_in_bwd: True does not go with fsdp_cpu_offload, whose gradients may still be on their way when "
            "it steps (pytorch 180666), and which keeps them off the GPU already. Set optimizer_in_bwd=false"
        )
    named = list(cfg.get("custom_sharded_layers") or [])
    if (
        processes > 1
        and cfg.get("optimizer_in_bwd")
        and "tok_embeddings" in named
        and isinstance(model.output, TiedLinear)
    ):
        raise ConfigError(
            "optimizer_in_bwd: True does not go with custom_sharded_layers: [tok_embeddings] where the head is tied to "
            "them: they would take two steps, for each of their gradients. Set optimizer_in_bwd=false, or leave "
            "tok_embeddings out"
        )
    # FSDP gathers in a forward, which a list of layers lacks. A tied head is no module; torchtune's configs name it.
    modules = {name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)} | {"output"}
    for name in named:
        if name not in modules:
            raise ConfigError(
                f"custom_sharded_layers: {name!r} is no module of the model. "
                f"{nearest(name, {m for m in modules if m and 'layers' not in m})}; for example "
                "custom_sharded_layers=[tok_embeddings,output]"
            )
    if cfg.get("fsdp_cpu_offload") and (processes == 1 or check_device(cfg).type == "cpu"):
        raise ConfigError(
            "fsdp_cpu_offload: True needs several processes with device=cuda, as in tune run --nproc_per_node 2; "
            "without them fsdp_cpu_offload=false"
        )
    for key, example in (("custom_sharded_layers", "null"), ("fsdp_reshard_after_forward", "true")):
        if processes > 1 and left == 1 and cfg.get(key) not in (None, [], True):
            shown = f"[{', '.join(cfg[key])}]" if key == "custom_sharded_layers" else cfg[key]
            raise ConfigError(
                f"{key}: {shown} does nothing where tensor_parallel_dim {tensor} takes all of {processes} "
                f"processes, and no rank is left to shard over; {key}={example}"
            )
    if cfg.get("fsdp_cpu_offload") and left == 1:
        raise ConfigError(
            f"fsdp_cpu_offload: True needs ranks to shard over, and tensor_parallel_dim {tensor} takes all of "
            f"{processes}; fsdp_cpu_offload=false"
        )
    return replicate, left // replicate, tensor


def make_mesh(cfg: DictConfig, model: TransformerDecoder, device: torch.device) -> Mesh:
    """The mesh of a config; the process group is there already. Raises as `mesh_sizes` does."""
    replicate, shard, tensor = mesh_sizes(cfg, model)
    if num_processes() == 1:
        return Mesh()
    names = ("replicate", "shard", TENSOR_PARALLEL)
    devices = init_device_mesh(device.type, (replicate, shard, tensor), mesh_dim_names=names)
    return Mesh(devices, replicate, shard, tensor)


@contextmanager
def rank_zero_first():
    """Rank 0 runs the block before the others do: what it downloads or writes is there for them."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    if not first:
        dist.barrier()
    yield
    if first and dist.is_initialized():
        dist.barrier()


def checkpoint_layers(model: LayerSkipDecoder, every: int) -> None:
    """Activation checkpointing of each `every`-th layer (0: none): the backward pass computes its activations again."""
    for layer in range(every - 1, len(model.layers), every) if every else ():
        model.layers[layer] = checkpoint_wrapper(model.layers[layer])


def clean_name(name: str) -> str:
    """A parameter's name as checkpoints have it, without the wrappers of checkpointing and compilation."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def split(model: LayerSkipDecoder, cfg: DictConfig, mesh: Mesh, checkpoint_every: int) -> None:
    """Cut a decoder on the meta device into the parts of the ranks: matrices first, then what each rank keeps.

    Args:
        model: changed in place.
        cfg: `custom_sharded_layers`, `fsdp_cpu_offload`, `fsdp_reshard_after_forward`, `tensor_parallel_plan`.
        mesh: of several processes.
        checkpoint_every: as for `checkpoint_layers`; between the two, since a plan names modules without wrappers.
    """
    if mesh.tensor > 1:
        parallelize(model, mesh.devices[TENSOR_PARALLEL], tensor_parallel_plan(cfg))
    checkpoint_layers(model, checkpoint_every)
    if mesh.data_size > 1:
        named = list(cfg.get("custom_sharded_layers") or [])
        training.shard_model(
            model,
            [lambda name, module: training.get_shard_conditions(clean_name(name), module, names_to_match=named)],
            cpu_offload=bool(cfg.get("fsdp_cpu_offload")),
            reshard_after_forward=cfg.get("fsdp_reshard_after_forward", True) is not False,
            dp_mesh=mesh.devices["replicate", "shard"] if mesh.replicate > 1 else mesh.devices["shard"],
        )


def reshard(model: nn.Module) -> None:
    """Let go of gathered weights after a forward without backward: the optimizer and checkpoints want the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def load(
    model: LayerSkipDecoder, state: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype, offload: bool
) -> None:
    """Give each rank its part of rank 0's weights, tensor by tensor.

    Args:
        model: split, on the meta device.
        state: the whole state_dict on rank 0; not looked at on other ranks.
        device, dtype: of the weights.
        offload: they live on the CPU.
    """
    with training.set_default_dtype(dtype), device:
        for module in model.modules():
            if hasattr(module, "rope_init"):  # its buffers are in no checkpoint
                module.rope_init()
    if any(is_packed(parameter) for parameter in model.parameters()):
        return _load_packed(model, state, device, dtype, offload)
    weights = {name: value.to(dtype) for name, value in state.items()} if dist.get_rank() == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True, cpu_offload=offload)
    with quiet():
        set_model_state_dict(model, weights, options=options)
    training.validate_no_params_on_meta_device(model)


def is_packed(parameter: torch.Tensor) -> bool:
    """Whether a parameter, or this rank's part of it, is NF4, as in QLoRA."""
    return isinstance(parameter, NF4Tensor) or isinstance(getattr(parameter, "_local_tensor", None), NF4Tensor)


def _load_packed(model: LayerSkipDecoder, state: Mapping[str, torch.Tensor], device, dtype, offload: bool) -> None:
    """`load` where weights are NF4: every rank packs the whole tensor and keeps its part."""
    for name, own in model.state_dict().items():
        value = state[name].to(device=device, dtype=dtype) if dist.get_rank() == 0 else None
        value = torch.empty(own.shape, device=device, dtype=dtype) if value is None else value.contiguous()
        dist.broadcast(value, src=0)
        training.load_from_full_model_state_dict(model, {name: value}, device, cpu_offload=offload)
    training.validate_no_params_on_meta_device(model)


@contextmanager
def quiet():
    """Without what torch's distributed checkpointing says about its own calls."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(_get_pg_default_device|Multiple backends)")
        yield


def alike(parameters: Any) -> list[list[nn.Parameter]]:
    """The parameters by the mesh that they live on: operations over many tensors at once take one kind."""
    kinds: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(kinds.values())


def clip_gradients(model: nn.Module, max_norm: float) -> torch.Tensor:
    """`torch.nn.utils.clip_grad_norm_` for parameters of several meshes. Returns the norm over all of them."""
    with_gradient = [p for p in model.parameters() if p.grad is not None]
    if not with_gradient:  # all layers with adapters were dropped
        return torch.zeros((), device=next(model.parameters()).device)
    norms = [torch.nn.utils.get_total_norm([p.grad for p in kind]) for kind in alike(with_gradient)]
    total = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
    if math.isfinite(max_norm):
        for kind in alike(with_gradient):
            torch.nn.utils.clip_grads_with_norm_(kind, max_norm, total)
    return total
