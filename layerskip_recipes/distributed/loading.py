"""Loading a sharded model: rank 0 reads the weights, and each rank receives its shard."""

import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune import training

from layerskip_recipes.processes import is_rank_zero, local_part, wait_for_all


def load_from_rank0(
    model: nn.Module, state: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype, offload: bool = False
) -> None:
    """Broadcast rank 0's full state_dict tensor by tensor into a sharded model on the meta device.

    A tensor is converted to `dtype` when it is sent, so no rank holds a second copy of the model. Other ranks' `state`
    is ignored. `offload` keeps the weights on the CPU.
    """
    make_position_tables(model, device, dtype)
    wait_for_all()  # rank 0 may read its files for longer than a collective's timeout
    for name, parameter in model.state_dict().items():
        if is_rank_zero():
            value = state[name].to(device=device, dtype=dtype).contiguous()
        else:
            value = torch.empty(parameter.shape, device=device, dtype=dtype)
        dist.broadcast(value, src=0)
        if isinstance(getattr(parameter, "_local_tensor", parameter), NF4Tensor):  # every rank packs the whole tensor
            training.load_from_full_model_state_dict(model, {name: value}, device, cpu_offload=offload)
            continue
        part = _part_of(value, parameter)
        model.load_state_dict({name: part.cpu() if offload else part}, strict=False, assign=True)
    training.validate_no_params_on_meta_device(model)


def fill_from_rank0(tensor: torch.Tensor, whole: torch.Tensor | None) -> None:
    """Copy rank 0's whole tensor into each rank's shard of it."""
    device = tensor.device_mesh.device_type if isinstance(tensor, DTensor) else tensor.device
    shared = torch.empty(tensor.shape, device=device, dtype=tensor.dtype)
    if whole is not None:
        shared.copy_(whole)
    dist.broadcast(shared, src=0)
    local_part(tensor).copy_(local_part(_part_of(shared, tensor)))


def _part_of(whole: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor, laid out as `tensor`; all of it if that is not sharded."""
    if not isinstance(tensor, DTensor):
        return whole
    shape, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    part = whole[tuple(slice(at, at + length) for at, length in zip(start, shape, strict=True))].clone()
    return DTensor.from_local(part, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride())


def make_position_tables(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Compute the position tables of a model on the meta device, which no checkpoint has."""
    with training.set_default_dtype(dtype), device:
        for module in model.modules():
            rope_init: Any = getattr(module, "rope_init", None)
            if rope_init is not None:
                rope_init()


@contextmanager
def suppress_dcp_warnings():
    """Hide warnings of torch's distributed checkpointing about its own calls."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(_get_pg_default_device|Multiple backends)")
        yield
