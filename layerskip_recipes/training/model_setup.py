"""The model of a training run: built, loaded and sharded at the start; gathered for a checkpoint."""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torchtune import training

from layerskip_recipes.checkpoint.weights import check_state_dict, initialise
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
from layerskip_recipes.processes import is_rank_zero
from layerskip_recipes.training.checkpoints import Weights
from layerskip_recipes.training.config import FinetuneConfig
from layerskip_recipes.training.parallel import Mesh, checkpoint_layers, clean_name, load_from_rank0, shard_model


def build_model(
    cfg: FinetuneConfig,
    device: torch.device,
    mesh: Mesh,
    weights: Weights | None,
    adapters: Weights | None,
    seed: int,
) -> LayerSkipDecoder:
    """The model of a config with its weights, compiled, checkpointed and sharded as the config says, ready to train.

    Args:
        cfg: the config.
        device: of the weights.
        mesh: the ranks to shard it over.
        weights: on rank 0 the state_dict of the plain model; None on all ranks: from scratch.
        adapters: on rank 0 that of the adapters; None: fresh ones, if the model has any.
        seed: of fresh adapters.

    Raises:
        ConfigError: on rank 0, if the weights are not this model's.
    """
    several = mesh.devices is not None
    with training.set_default_dtype(cfg.torch_dtype), torch.device("meta") if several else device:
        model = layerskip_decoder(cfg.model.build())
    freeze_base(model)
    state = None if weights is None else dict(weights)
    if is_rank_zero():
        if state is None and several:
            with training.set_default_dtype(cfg.torch_dtype):
                state = _initialised(layerskip_decoder(cfg.model.build()), cfg).state_dict()
        elif state is not None:
            if adapter_names(cfg.meta_model):
                state |= fresh_adapters(model, state, seed) if adapters is None else adapters
            check_state_dict(cfg.meta_model, state)
    if cfg.compile:
        training.compile_model(model, verbose=False)
    if several:
        shard_model(model, cfg, mesh)
        load_from_rank0(model, state or {}, device, cfg.torch_dtype, offload=bool(cfg.fsdp_cpu_offload))
    else:
        checkpoint_layers(model, cfg.checkpoint_every_layers)
        if state is None:
            _initialised(model, cfg)
        else:
            model.load_state_dict(state)
    return model.train()


def _initialised(model: LayerSkipDecoder, cfg: FinetuneConfig) -> LayerSkipDecoder:
    """The model with weights to start from scratch with."""
    initialise(model, 0.02 if cfg.init_std is None else cfg.init_std)
    return model


def adapter_parameters(model: nn.Module, meta: nn.Module) -> dict[str, torch.Tensor]:
    """This rank's part of the adapters, by the names of checkpoints; empty for a model without any.

    They are the parameters themselves: a state_dict would unpack NF4 weights, and copy all with low_cpu_ram.

    Args:
        model: as it is trained.
        meta: the same model before it was sharded or wrapped.
    """
    names = set(adapter_names(meta))
    return {name: p.detach() for n, p in model.named_parameters() if (name := clean_name(n)) in names}


def checkpoint_contents(
    model: LayerSkipDecoder, meta: nn.Module, device: torch.device, adapters_only: bool = False
) -> dict[str, Any]:
    """The content of a whole checkpoint in torchtune's keys, on rank 0; gathered on all ranks.

    Args:
        model: as it is trained.
        meta: the same model before it was sharded or wrapped.
        device: for the gathering.
        adapters_only: leave out the merged model.
    """
    adapters = adapter_names(meta)
    names = set(meta.state_dict())
    biases = any(name.endswith(".magnitude") and name.replace(".magnitude", ".bias") in names for name in adapters)
    state: dict[str, torch.Tensor] = {}
    if adapters_only and not biases:  # DoRA's biases are computed from the base weights
        for name, part in adapter_parameters(model, meta).items():
            part = part.to(device)  # offloaded parts are gathered there
            value = part.full_tensor() if isinstance(part, DTensor) else part
            if is_rank_zero():
                state[name] = value.cpu()
    elif torch.distributed.is_initialized():
        state = training.gather_cpu_state_dict(model, is_rank_zero(), device)
    else:
        # QLoRA's weights arrive on the CPU, unpacked; the adapters that they merge with have to be there too.
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
    # Weights that came from a GPU are a copy already.
    plain = (
        {} if adapters_only else {training.MODEL_KEY: merge_adapters(state, described, in_place=device.type != "cpu")}
    )
    return contents | plain
