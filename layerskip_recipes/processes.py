"""The processes of torchrun: joining their groups, waiting for rank 0's files, rank 0's values for all.

Two groups exist. torch's default group carries the tensors of each step; there a process that does not answer for
minutes is lost. A second one, on the CPU, carries small Python objects and barriers around file work: one rank may read
or write hundreds of gigabytes, pack a dataset, or wait for a user's next question, while the others wait for it.
"""

import logging
import os
import sys
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torchtune import training

from layerskip_recipes.errors import ConfigError

STEP_TIMEOUT = timedelta(minutes=10)
FILE_TIMEOUT = timedelta(days=1)  # if rank 0 fails meanwhile, torchrun ends the others at once

_file_group: dist.ProcessGroup | None = None


def num_processes() -> int:
    """How many processes torchrun started, known before `init_processes`; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check_one_process() -> None:
    """Raises a ConfigError under torchrun with several processes, for a recipe that runs on one device."""
    if num_processes() > 1:
        raise ConfigError(
            f"nproc_per_node: {num_processes()} processes, and this version runs on one device; start it without "
            "--nproc_per_node, or with --nproc_per_node 1"
        )


def init_processes(device_type: str, with_cpu: bool = False) -> int:
    """Join the process groups of torchrun's processes (gloo for "cpu", nccl for "cuda"), and return this one's rank.

    One process needs no group. Under `with_cpu` tensors on the CPU can be sent too.
    """
    global _file_group
    if num_processes() == 1:
        return 0
    if device_type == "cuda":
        count = torch.cuda.device_count()
        if int(os.environ["LOCAL_RANK"]) >= count:
            given = f"{os.environ.get('LOCAL_WORLD_SIZE')} processes for {count} GPUs"
            raise ConfigError(f"nproc_per_node: {given}. Allowed: 1..{count}; for example nproc_per_node={count}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = training.get_distributed_backend(device_type, offload_ops_to_cpu=with_cpu)
    dist.init_process_group(backend, timeout=STEP_TIMEOUT)
    _file_group = new_file_group()
    return dist.get_rank()


def new_file_group() -> dist.ProcessGroup:
    """A further group of all ranks for file work, such as writing in the background; call it on all ranks."""
    group: Any = dist.new_group(backend="gloo", timeout=FILE_TIMEOUT)
    return group


def file_group() -> dist.ProcessGroup | None:
    """The group for file work; None for torch's default group, where another program made that."""
    return _file_group


def end_processes() -> None:
    """Leave the process groups after a run that went well, when all ranks have come here.

    A barrier does not say that: to a rank that has not yet returned from it, gloo reports "Connection closed by peer"
    when another one closes its sockets. So the ranks tell each other through the groups' key-value store. Rank 0 may
    host the store, and must not leave before the others' last message, a `set`, to which the store sends no answer.
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
    """End this process without the interpreter's own end, as the last act of one of several processes.

    torch's groups outlive `destroy_process_group` as long as a mesh or a sharded model refers to them, and gloo's
    threads with them: all of them are still there when a training has ended. They free finished collectives, whose
    tensors are Python objects, and that can abort a process whose interpreter is being torn down (pytorch pull request
    179291, abandoned). It is the probable cause of a "free(): invalid pointer" that was seen once, after a training
    that went well.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # its reader may have ended
            stream.flush()
    os._exit(status)


def is_rank_zero() -> bool:
    """Whether this process is the one that prints and reads files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_all() -> None:
    """Wait until every rank is here, for as long as file work may take."""
    if dist.is_initialized():
        dist.barrier(group=_file_group)


def from_rank_zero(value: Any) -> Any:
    """Rank 0's value, any that can be pickled, on all ranks; they wait for it as long as for files."""
    shared = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(shared, src=0, group=_file_group)
    return shared[0]


def from_every_rank(value: Any) -> list[Any]:
    """The values of all ranks, any that can be pickled, on all ranks; they wait for them as long as for files."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_file_group)
    return values


def same_on_all(value: Any) -> bool:
    """Whether all ranks have the same value, any that can be pickled."""
    return all(other == value for other in from_every_rank(value))


def broadcast_from_rank0(tensor: torch.Tensor) -> torch.Tensor:
    """Rank 0's tensor (same shape, dtype and kind of device on all ranks), so that ranks cannot diverge."""
    if not dist.is_initialized():
        return tensor
    shared = tensor.clone(memory_format=torch.contiguous_format)
    dist.broadcast(shared, src=0)
    return shared
