"""Generation on several processes under torchrun: sharded late layers, or tensor parallelism.

Only the layers from exit E up are sharded: a verification pass gathers each of them once for all its tokens, and drafts
need no communication. All layers are sharded if a trained copy drafts. All ranks decode the same prompts.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from layerskip_recipes.checkpoint.checkpointers import reading_checkpointer
from layerskip_recipes.checkpoint.drafts import DraftDescription, read_draft
from layerskip_recipes.checkpoint.weights import check_state_dict, load_decoder, read_weights
from layerskip_recipes.config.recipe_config import RecipeConfig
from layerskip_recipes.distributed.loading import load_from_rank0, make_position_tables
from layerskip_recipes.distributed.local_shards import split_locally
from layerskip_recipes.distributed.tensor_parallel import Plan, parallelize
from layerskip_recipes.model.adapters import adapter_names, without_adapters
from layerskip_recipes.model.decoder import LayerSkipDecoder, layerskip_decoder
from layerskip_recipes.model.draft import Draft, weights_hash
from layerskip_recipes.processes import from_rank_zero, is_rank_zero


def load_sharded_decoder(
    cfg: RecipeConfig,
    device: torch.device,
    kept_layers: int = 0,
    tensor_parallel_dim: int = 1,
    plan: Plan | None = None,
    draft: DraftDescription | None = None,
) -> tuple[LayerSkipDecoder, Draft | None]:
    """`load_decoder` for several processes, see `shard_decoder`: only rank 0 reads the checkpoint.

    Every rank has the whole trained draft, if one is given.
    """
    model, state = layerskip_decoder(cfg.build_on_meta()), {}
    if is_rank_zero():
        if adapter_names(model):
            # Merge them as a single process does: in this dtype, and with QLoRA into weights rounded by NF4.
            state = load_decoder(cfg, torch.device("cpu")).state_dict()
        else:
            state = read_weights(reading_checkpointer(cfg))
            check_state_dict(model, state)
    without_adapters(model)
    trained_draft = None
    if draft is not None:  # a copy of the model's layers before they are sharded
        own_hash = from_rank_zero(weights_hash(state) if is_rank_zero() else None)
        trained_draft = read_draft(draft, model, "self_speculation.draft", own_hash)
        make_position_tables(trained_draft, device, cfg.torch_dtype)
        trained_draft.to(device, cfg.torch_dtype)
    return shard_decoder(model, state, device, cfg.torch_dtype, kept_layers, tensor_parallel_dim, plan), trained_draft


class _LateLayers(nn.Module):
    """The FSDP root of the sharded layers, outside of the decoder's module tree.

    The decoder cannot be the root, because the draft decoder, another module, runs some of its layers. Without a common
    root, each layer would have its own streams, and thus GPU memory that no other layer can use.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, _: None) -> None:
        """Called once, so that FSDP's pre-forward hook makes this the root. Before torch 2.13 it needs an argument."""


def shard_decoder(
    model: LayerSkipDecoder,
    state: Mapping[str, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
    kept_layers: int = 0,
    tensor_parallel_dim: int = 1,
    plan: Plan | None = None,
) -> LayerSkipDecoder:
    """Split a decoder on the meta device over a grid of (ranks / T) x T, in place, with rank 0's weights; in eval mode.

    T = `tensor_parallel_dim` ranks share each matrix by `plan`. The layers from `kept_layers` up (the exit of the
    draft, 0 for plain decoding) are sharded over ranks / T and gathered when they run.
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
        # Gather the next layer while this one runs.
        layer.set_modules_to_forward_prefetch([following])  # type: ignore[operator]
    load_from_rank0(model, state, device, dtype)
    if plan is not None and shards == 1:
        split_locally(model, mesh["parallel"], plan)
    late(None)
    for layer in late.layers:
        # Allocate the buffer of the gathered weights now: one allocated in inference mode, where decoding runs, could
        # not be written outside of it.
        layer.unshard()  # type: ignore[operator]
        layer.reshard()  # type: ignore[operator]
    return model.eval()
