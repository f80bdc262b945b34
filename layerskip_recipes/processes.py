"""The processes of torchrun: joining their groups, waiting for rank 0's files, and sharing values.

torch's default group carries the tensors of each step, with a timeout of minutes. A second group, on the CPU, carries
small Python objects and barriers around file work. One rank may read or write hundreds of gigabytes, pack a dataset, or
wait for a user's next question, while the others wait for it.
"""

import logging
import os
import sys
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torchtune import training

from layerskip_recipes.errors import ConfigError

STEP_TIMEOUT = timedelta(minutes=10)
FILE_TIMEOUT = timedelta(days=1)  # torchrun ends waiting ranks at once if rank 0 fails

_file_group: dist.ProcessGroup | None = None


def num_processes() -> int:
    """How many processes torchrun started, also before `init_processes`; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def num_local_processes() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", num_processes()))


def check_one_process() -> None:
    """Raise a ConfigError in a recipe for one device if torchrun started several processes."""
    if num_processes() > 1:
        raise ConfigError(
            f"nproc_per_node: {num_processes()} processes, and this recipe runs on one device; leave out "
            "--nproc_per_node"
        )


def init_processes(device_type: str, with_cpu: bool = False) -> int:
    """Join torchrun's process groups (gloo for "cpu", nccl for "cuda") if it started several; returns the rank.

    With `with_cpu`, collectives also work on CPU tensors.
    """
    global _file_group
    if num_processes() == 1:
        return 0
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = training.get_distributed_backend(device_type, offload_ops_to_cpu=with_cpu)
    dist.init_process_group(backend, timeout=STEP_TIMEOUT)
    _file_group = new_file_group()
    return dist.get_rank()


def new_file_group() -> dist.ProcessGroup:
    """Another group of all ranks for file work, such as background writing; every rank must call this."""
    group: Any = dist.new_group(backend="gloo", timeout=FILE_TIMEOUT)
    return group


def file_group() -> dist.ProcessGroup | None:
    """The group for file work; None stands for torch's default group, if another program created that."""
    return _file_group


def end_processes() -> None:
    """Leave the process groups after a successful run, once all ranks are here.

    A barrier is not enough: gloo reports "Connection closed by peer" to a rank that has not yet returned from it when
    another rank closes its sockets. So the ranks tell each other through the key-value store. Rank 0 may host the store
    and must not leave before the others' last `set`, which the store does not answer.
    """
    global _file_group
    _file_group = None
    if not dist.is_initialized():
        return
    store, ranks = dist.distributed_c10d._get_default_store(), range(dist.get_world_size())
    store.set(f"rank {dist.get_rank()} ends", "")
    store.wait([f"rank {rank} ends" for rank in ranks], FILE_TIMEOUT)
    store.set(f"rank {dist.get_rank()} leaves", "")
    if dist.get_rank() == 0:
        store.wait([f"rank {rank} leaves" for rank in ranks], FILE_TIMEOUT)
    dist.destroy_process_group()


def exit_at_once(status: int) -> NoReturn:
    """End one of several processes without tearing down the interpreter.

    torch's groups and gloo's threads outlive `destroy_process_group` while a mesh or a sharded model refers to them.
    The threads free finished collectives, whose tensors are Python objects, and can abort a process that is being torn
    down (pytorch issue 190489, open). This probably caused a "free(): invalid pointer" after a training.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # its reader may have ended
            stream.flush()
    os._exit(status)


def is_rank_zero() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_all() -> None:
    """Wait until every rank is here, up to the file timeout."""
    if dist.is_initialized():
        dist.barrier(group=_file_group)


def from_rank_zero(value: Any) -> Any:
    """Rank 0's value (picklable) on all ranks; they wait for it up to the file timeout."""
    shared = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(shared, src=0, group=_file_group)
    return shared[0]


def from_every_rank(value: Any) -> list[Any]:
    """The (picklable) values of all ranks on all ranks, with the file timeout."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_file_group)
    return values


def same_on_all(value: Any) -> bool:
    return all(other == value for other in from_every_rank(value))


def broadcast_from_rank0(tensor: torch.Tensor) -> torch.Tensor:
    """Rank 0's tensor on all ranks; shape, dtype and device type must be equal."""
    if not dist.is_initialized():
        return tensor
    shared = tensor.clone(memory_format=torch.contiguous_format)
    dist.broadcast(shared, src=0)
    return shared


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
