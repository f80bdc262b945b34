"""Loading a split model from rank 0: the weights are right, and rank 0 never holds a second copy of them."""

import gc
import time
import weakref

import pytest
import torch
import torch.distributed as dist
from helpers.tiny import make_tiny
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from layerskip_recipes import layerskip_decoder
from layerskip_recipes.distributed.loading import load_from_rank0


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Conversions(TorchDispatchMode):
    """The largest number of converted tensors that existed at a time.

    A broadcast's thread may hold its tensor for a moment after the broadcast: those are waited for.
    """

    most = 0

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if func is torch.ops.aten._to_copy.default:
            self.made.append(weakref.ref(result))
            self.most = max(self.most, self.alive())
        return result

    def alive(self) -> int:
        give_up = time.monotonic() + 5
        while True:
            self.made = [made for made in self.made if made() is not None]
            if len(self.made) <= 2 or time.monotonic() > give_up:
                return len(self.made)
            gc.collect()
            time.sleep(0.01)


@pytest.mark.parametrize("offload", [False, True])
def test_weights_are_converted_one_by_one(offload, one_rank):
    """In another dtype than the model's, a converted checkpoint would be as large as the model."""
    state = {name: value.bfloat16() for name, value in layerskip_decoder(make_tiny("llama3")).state_dict().items()}
    with torch.device("meta"):
        model = layerskip_decoder(make_tiny("llama3"))
    mesh = init_device_mesh("cpu", (1,))
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh)
    with Conversions() as conversions:
        load_from_rank0(model, state, torch.device("cpu"), torch.float32, offload)
    assert 1 <= conversions.most <= 2 < len(state)
    for name, value in model.state_dict().items():
        assert torch.equal(value.full_tensor(), state[name].float()), name
