"""Generation on several processes under torchrun: late layers sharded, draft layers whole, or tensor parallelism.

A draft step runs the layers below exit E, token by token: were those sharded, each drafted token would wait for E
gathers. So embeddings, draft layers, norm and head are whole on every rank, and only the layers from E up are sharded:
a verification gathers each of them once for all the tokens it verifies. All ranks decode the same prompts.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from layerskip_recipes.checkpoint.checkpointers import reading_checkpointer
from layerskip_recipes.checkpoint.weights import check_state_dict, load_decoder, read_weights
from layerskip_recipes.config.recipe_config import RecipeConfig
from layerskip_recipes.distributed.loading import load_from_rank0
from layerskip_recipes.distributed.tensor_parallel import Plan, parallelize
from layerskip_recipes.generation.local_shards import split_locally
from layerskip_recipes.model.adapters import adapter_names, without_adapters
from layerskip_recipes.model.decoder import LayerSkipDecoder, layerskip_decoder
from layerskip_recipes.processes import is_rank_zero


def load_sharded_decoder(
    cfg: RecipeConfig,
    device: torch.device,
    kept_layers: int = 0,
    tensor_parallel_dim: int = 1,
    plan: Plan | None = None,
) -> LayerSkipDecoder:
    """`load_decoder` for several processes: rank 0 reads the checkpoint, the others get their parts only.

    The layers below `kept_layers` are whole on every rank: those below the exit that drafts, none for plain decoding.
    """
    model, state = layerskip_decoder(cfg.build_on_meta()), {}
    if is_rank_zero():
        if adapter_names(model):
            # As one process merges them: onto weights in this dtype, and with QLoRA onto what NF4 left of them.
            state = load_decoder(cfg, torch.device("cpu")).state_dict()
        else:
            state = read_weights(reading_checkpointer(cfg))
            check_state_dict(model, state)
    without_adapters(model)
    return shard_decoder(model, state, device, cfg.torch_dtype, kept_layers, tensor_parallel_dim, plan)


class _LateLayers(nn.Module):
    """The FSDP root of the sharded layers, no part of the decoder's own tree.

    The decoder cannot be the root: walks begin and end anywhere, and may call its layers directly. Layers without a
    common root would each have streams of their own, so on a GPU memory that no other layer can use.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, _: None) -> None:
        """Called once, for FSDP's hook before it, which makes this the root. Then each layer gathers itself.

        With an argument, since on a GPU the hook of torch before 2.13 looks at the first one.
        """


def shard_decoder(
    model: LayerSkipDecoder,
    state: Mapping[str, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
    kept_layers: int = 0,
    tensor_parallel_dim: int = 1,
    plan: Plan | None = None,
) -> LayerSkipDecoder:
    """Split a decoder over a grid of (ranks / T) x T, and give each rank its part of rank 0's weights.

    T = `tensor_parallel_dim` ranks share each matrix by `plan` and compute with their part of it. Over ranks / T the
    layers from `kept_layers` up are sharded, and gathered when they run. The model comes on the meta device, is changed
    in place, and leaves in eval mode.
    """
    shards = dist.get_world_size() // tensor_parallel_dim
    mesh = init_device_mesh(device.type, (shards, tensor_parallel_dim), mesh_dim_names=("shards", "parallel"))
    if tensor_parallel_dim > 1:
        assert plan is not None
        parallelize(model, mesh["parallel"], plan)
    late = _LateLayers(model.layers[kept_layers:] if shards > 1 else [])
    for module in (*late.layers, late):
        fully_shard(module, mesh=mesh["shards"], reshard_after_forward=True)
    for layer, following in pairwise(late.layers):
        # The next layer is gathered while this one runs.
        layer.set_modules_to_forward_prefetch([following])  # type: ignore[operator]
    load_from_rank0(model, state, device, dtype)
    if plan is not None and shards == 1:
        split_locally(model, mesh["parallel"], plan)
    late(None)
    for layer in late.layers:
        # The buffer for the gathered weights is made here and kept. One made in inference mode, where decoding runs,
        # could not be written outside of it.
        layer.unshard()  # type: ignore[operator]
        layer.reshard()  # type: ignore[operator]
    return model.eval()
