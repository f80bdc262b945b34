"""The processes of torchrun: joining their group, rank 0's values for all, the same tensors on all."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torchtune import training

from layerskip_recipes.errors import ConfigError


def num_processes() -> int:
    """How many processes torchrun started, known before `init_processes`; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


# One rank may pack a dataset, or read or write hundreds of gigabytes, for hours while the others wait. If it fails
# torchrun ends them at once.
TIMEOUT = timedelta(days=1)


def init_processes(device_type: str, with_cpu: bool = False) -> int:
    """Join the process group of torchrun's processes (gloo for "cpu", nccl for "cuda"); one process needs none.

    Args:
        device_type: of the tensors that are sent.
        with_cpu: tensors on the CPU are sent too.

    Returns:
        This process's rank.

    Raises:
        ValueError: if this machine has fewer GPUs than processes.
    """
    if num_processes() == 1:
        return 0
    if device_type == "cuda":
        count = torch.cuda.device_count()
        if int(os.environ["LOCAL_RANK"]) >= count:
            given = f"{os.environ.get('LOCAL_WORLD_SIZE')} processes for {count} GPUs"
            raise ConfigError(f"nproc_per_node: {given}. Allowed: 1..{count}; for example nproc_per_node={count}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = training.get_distributed_backend(device_type, offload_ops_to_cpu=with_cpu)
    dist.init_process_group(backend, timeout=TIMEOUT)
    return dist.get_rank()


def end_processes() -> None:
    """Leave the process group after a run that went well."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_rank_zero() -> bool:
    """Whether this process is the one that prints and reads files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def from_rank_zero(value: Any) -> Any:
    """Rank 0's value, any that can be pickled, on all ranks."""
    shared = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(shared, src=0)
    return shared[0]


def same_on_all(value: Any) -> bool:
    """Whether all ranks have the same value, any that can be pickled."""
    if not dist.is_initialized():
        return True
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return all(other == value for other in values)


def broadcast_from_rank0(tensor: torch.Tensor) -> torch.Tensor:
    """Rank 0's tensor (same shape, dtype and kind of device on all ranks): ranks that take it cannot diverge."""
    if not dist.is_initialized():
        return tensor
    received = tensor.clone(memory_format=torch.contiguous_format)
    dist.broadcast(received, src=0)
    return received
