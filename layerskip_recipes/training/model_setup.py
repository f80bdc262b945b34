"""Builds, loads and shards the model of a training run, and gathers it for a checkpoint."""

import re
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torchtune import training

from layerskip_recipes.checkpoint.weights import check_state_dict, initialise
from layerskip_recipes.distributed.loading import load_from_rank0
from layerskip_recipes.model.adapters import (
    BIASES,
    adapter_config,
    adapter_names,
    freeze_base,
    fresh_adapters,
    merge_adapters,
    scaled_biases,
)
from layerskip_recipes.model.decoder import LayerSkipDecoder, layerskip_decoder
from layerskip_recipes.model.draft import Draft
from layerskip_recipes.processes import is_rank_zero
from layerskip_recipes.training.checkpoints import Weights
from layerskip_recipes.training.config import FinetuneConfig
from layerskip_recipes.training.parallel import Mesh, checkpoint_layers, clean_name, shard_model

P = TypeVar("P", LayerSkipDecoder, Draft)


def build_model(
    cfg: FinetuneConfig,
    device: torch.device,
    mesh: Mesh,
    weights: Weights | None,
    adapters: Weights | None,
    of_draft: Weights | None,
    seed: int,
) -> tuple[LayerSkipDecoder, Draft | None]:
    """The model, and the draft if one is trained: compiled, checkpointed, sharded.

    On rank 0, `weights` is the plain model's state_dict (None: train from scratch), and `adapters` and `of_draft` those
    of its adapters and its draft (None: fresh ones). The seed decides all fresh weights.
    """
    several = mesh.devices is not None
    with training.set_default_dtype(cfg.torch_dtype), torch.device("meta") if several else device:
        model = layerskip_decoder(cfg.model.build())
        # Always in fp32: bf16 would round small steps away.
        draft = None if cfg.draft is None else cfg.draft.build(model).float()
    freeze_base(model)
    if cfg.freezes_model:
        model.requires_grad_(False)
    state = None if weights is None else dict(weights)
    if is_rank_zero():
        if state is None and several:
            with training.set_default_dtype(cfg.torch_dtype):
                fresh = layerskip_decoder(cfg.model.build())
                initialise(fresh, seed)
                state = fresh.state_dict()
        elif state is not None:
            if adapter_names(cfg.meta_model):
                state |= fresh_adapters(model, state, seed) if adapters is None else adapters
            check_state_dict(cfg.meta_model, state)
    every = cfg.checkpoint_every_layers
    if draft is None:
        return _place(model, state, cfg, device, mesh, every, seed).train(), None
    if is_rank_zero() and of_draft is None:
        of_draft = fresh_draft(draft, state or {})
    _place(model, state, cfg, device, mesh, 0 if cfg.freezes_model else every, seed).train(not cfg.freezes_model)
    return model, _place(draft, of_draft, cfg, device, mesh, every, seed).train()


def _place(
    part: P,
    state: Weights | None,
    cfg: FinetuneConfig,
    device: torch.device,
    mesh: Mesh,
    checkpoint_every: int,
    seed: int,
) -> P:
    """Compile, checkpoint, shard and load the model or the draft."""
    if cfg.compile:
        training.compile_model(part, verbose=False)
    if mesh.devices is not None:
        shard_model(part, cfg, mesh, checkpoint_every)
        dtype = torch.float32 if isinstance(part, Draft) else cfg.torch_dtype
        load_from_rank0(part, state or {}, device, dtype, offload=cfg.fsdp_cpu_offload)
        return part
    checkpoint_layers(part, checkpoint_every)
    if isinstance(part, LayerSkipDecoder) and state is None:
        initialise(part, seed)
    else:
        part.load_state_dict(state or {})
    return part


def fresh_draft(draft: Draft, base: Weights) -> Weights:
    """A draft's first weights: the model's layers from `draft.start` on, and its norm.

    An adapter's first layer begins with the sum of its two input states. Random layers needed twice the tokens to learn
    as much.
    """
    of_layer = re.compile(r"^layers\.(\d+)(\.layer(?=\.))?")

    def fresh(name: str, like: torch.Tensor) -> torch.Tensor:
        if name == "layers.0.join.weight":
            return torch.eye(like.shape[0]).repeat(1, 2)
        return base[of_layer.sub(lambda m: f"layers.{int(m[1]) + draft.start}", name)]

    return {name: fresh(name, like) for name, like in draft.state_dict().items()}


def adapter_parameters(model: nn.Module, meta: nn.Module) -> dict[str, torch.Tensor]:
    """This rank's part of the adapters, by checkpoint name; empty for a model without adapters.

    `meta` is the model before sharding or wrapping. There is no state_dict, which would unpack all NF4 weights.
    """
    names = set(adapter_names(meta))
    return {name: p.detach() for n, p in model.named_parameters() if (name := clean_name(n)) in names}


def checkpoint_contents(
    model: nn.Module, meta: nn.Module, device: torch.device, adapters_only: bool = False
) -> dict[str, Any]:
    """A whole checkpoint in torchtune's keys, on rank 0; collective. `adapters_only` omits the merged model."""
    adapters = adapter_names(meta)
    names = set(meta.state_dict())
    biases = any(name.endswith(".magnitude") and name.replace(".magnitude", ".bias") in names for name in adapters)
    state: dict[str, torch.Tensor] = {}
    # Gather the weights on rank 0's CPU. DoRA's biases are computed from the base weights, so they need all weights.
    if adapters_only and not biases:
        for name, part in adapter_parameters(model, meta).items():
            part = part.to(device)  # gathering needs offloaded parts on the device
            value = part.full_tensor() if isinstance(part, DTensor) else part
            if is_rank_zero():
                state[name] = value.cpu()
    elif torch.distributed.is_initialized():
        state = training.gather_cpu_state_dict(model, is_rank_zero(), device)
    else:
        # QLoRA's weights arrive unpacked on the CPU, and the adapters to merge must be there too.
        state = {name: value.cpu() for name, value in model.state_dict().items()}
    if not is_rank_zero():
        return {}
    if not adapters:
        return {training.MODEL_KEY: state}
    described = adapter_config(meta)
    contents = {
        training.ADAPTER_KEY: {name: state[name] for name in adapters},
        training.ADAPTER_CONFIG: described,
        BIASES: scaled_biases(state, described) if biases else {},
    }
    # A GPU model's `state` is a copy, so adapters may be merged in place; a CPU model's `state` is the model itself.
    plain = (
        {} if adapters_only else {training.MODEL_KEY: merge_adapters(state, described, in_place=device.type != "cpu")}
    )
    return contents | plain
