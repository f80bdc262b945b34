"""What a finetune config trains: the model over the ranks, its optimizer and schedule, and their states."""

from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torchtune import config, training

from layerskip_recipes.checkpoint.weights import check_state_dict, initialise
from layerskip_recipes.model.adapters import (
    BIASES,
    adapter_config,
    adapter_names,
    freeze_base,
    fresh_adapters,
    merged,
    scaled_biases,
)
from layerskip_recipes.model.decoder import LayerSkipDecoder, layerskip_decoder
from layerskip_recipes.processes import from_rank_zero, is_rank_zero
from layerskip_recipes.training import parallel as meshes
from layerskip_recipes.training.checkpoints import Weights
from layerskip_recipes.training.parallel import Mesh, clean_name


def build_model(
    cfg: DictConfig,
    device: torch.device,
    dtype: torch.dtype,
    mesh: Mesh,
    meta: nn.Module,
    weights: Weights | None,
    adapters: Weights | None,
    seed: int,
) -> LayerSkipDecoder:
    """The model of a config with its weights, compiled, checkpointed and split as the config says, ready to train.

    Args:
        cfg: the config.
        device, dtype: of the weights.
        mesh: the ranks to split it over.
        meta: the plain model on the meta device, see `build_on_meta`.
        weights: on rank 0 the state_dict of the plain model; None on all ranks: from scratch.
        adapters: on rank 0 that of the adapters; None: fresh ones, if the model has any.
        seed: of fresh adapters.

    Raises:
        ValueError: on rank 0, if the weights are not this model's.
    """
    several = mesh.devices is not None
    with training.set_default_dtype(dtype), torch.device("meta") if several else device:
        model = layerskip_decoder(config.instantiate(cfg.model))
    freeze_base(model)
    state = None if weights is None else dict(weights)
    if is_rank_zero():
        if state is None and several:
            with training.set_default_dtype(dtype):
                state = initialised(cfg, layerskip_decoder(config.instantiate(cfg.model))).state_dict()
        elif state is not None:
            if adapter_names(meta):
                state |= fresh_adapters(model, state, seed) if adapters is None else adapters
            check_state_dict(meta, state)
    if cfg.get("compile"):
        training.compile_model(model, verbose=False)
    if several:
        meshes.split(model, cfg, mesh, layers_to_checkpoint(cfg))
        meshes.load(model, state or {}, device, dtype, offload=bool(cfg.get("fsdp_cpu_offload")))
    else:
        meshes.checkpoint_layers(model, layers_to_checkpoint(cfg))
        if state is None:
            initialised(cfg, model)
        else:
            model.load_state_dict(state)
    return model.train()


def initialised(cfg: DictConfig, model: LayerSkipDecoder) -> LayerSkipDecoder:
    """The model with weights to start from scratch with."""
    initialise(model, 0.02 if cfg.get("init_std") is None else cfg.init_std)
    return model


def layers_to_checkpoint(cfg: DictConfig) -> int:
    """Every how many layers one is checkpointed, 0 for none: torchtune's two ways to ask for it."""
    if cfg.get("ac_mode") == "selective":
        return int(cfg.ac_option)
    return int(cfg.get("ac_mode") == "full" or bool(cfg.get("enable_activation_checkpointing")))


class Optimizers:
    """The optimizer of a config or, with `optimizer_in_bwd`, one for each parameter; and the lr schedule.

    Args:
        cfg: `optimizer`, `optimizer_in_bwd` and `lr_scheduler` are read.
        model: its trainable parameters are optimised.
        state: of `state_dict`, on rank 0; None for a start.
        steps: optimizer steps in all.
        done: steps before this run.
    """

    def __init__(self, cfg: DictConfig, model: nn.Module, state: dict | None, steps: int, done: int) -> None:
        self.model = model
        self.in_backward = bool(cfg.get("optimizer_in_bwd"))
        trained = [p for p in model.parameters() if p.requires_grad]
        if self.in_backward:
            each = {p: config.instantiate(cfg.optimizer, [p]) for p in trained}
            training.register_optim_in_bwd_hooks(model=model, optim_dict=each)
            self.all: list[Optimizer] = list(each.values())
        else:
            # Parameters of one kind in a group: fused and foreach steps do not mix meshes.
            groups = [{"params": kind} for kind in meshes.alike(trained)]
            self.all = [config.instantiate(cfg.optimizer, groups if len(groups) > 1 else trained)]
        for group in (group for one in self.all for group in one.param_groups):
            # What a schedule that begins in the middle wants. A number: torchao's rate is a tensor, and changes.
            group["initial_lr"] = float(group["lr"])
        if state is not None:
            self.load_state_dict(state)
        self.schedulers = [
            config.instantiate(cfg.lr_scheduler, one, num_training_steps=steps, last_epoch=done - 1)
            for one in (self.all if cfg.get("lr_scheduler") is not None else [])
        ]

    @property
    def lr(self) -> float:
        """The learning rate now."""
        return float(self.all[0].param_groups[0]["lr"])

    @property
    def base_lr(self) -> float:
        """The learning rate of the config, which a schedule scales."""
        return self.all[0].param_groups[0]["initial_lr"]

    def step(self) -> None:
        """Update the weights; in backward they are already."""
        if not self.in_backward:
            self.all[0].step()
            self.all[0].zero_grad(set_to_none=True)

    def step_schedule(self) -> None:
        """Move the learning rate to the next step."""
        for scheduler in self.schedulers:
            scheduler.step()

    def state_dict(self, whole: bool) -> dict[str, Any]:
        """By parameter name: whole tensors on rank 0's CPU, or this rank's shards. On all ranks."""
        # Flattened, shards do not depend on how the parameters are grouped.
        options = StateDictOptions(full_state_dict=whole, cpu_offload=whole, flatten_optimizer_state_dict=not whole)
        with meshes.quiet():
            state = get_optimizer_state_dict(self.model, self.all, options=options)
        if whole:
            return state
        # torchao's learning rate is a tensor, and what is read into this must not change the optimizer's own.
        return {
            name: value.clone() if name.startswith("param_groups.") and isinstance(value, torch.Tensor) else value
            for name, value in state.items()
        }

    def load_state_dict(self, state: dict[str, Any], whole: bool = True, never_stepped: Sequence[str] = ()) -> None:
        """Take up what `state_dict` gave, however many ranks it came from. On all ranks.

        Only what the optimizer learned: the learning rate and its like stay the config's.

        Args:
            state: whole tensors on rank 0, or this rank's shards.
            whole: which of them.
            never_stepped: of shards, the parameters that had no state when they were written. For whole tensors that
                is seen here. Layers that were dropped in each step so far have none, and get none.
        """
        learned = from_rank_zero(bool(state.get("state"))) if whole else any(n.startswith("state.") for n in state)
        if not learned:  # as of SGD without momentum, which torch does not load
            return
        trained = {clean_name(name): p for name, p in self.model.named_parameters() if p.requires_grad}
        if whole and not torch.distributed.is_initialized():
            return self._take_up(state["state"], trained)
        if whole:
            never_stepped = from_rank_zero([name for name in trained if name not in state.get("state", {})])
            if never_stepped:
                # torch wants a state of each, or it refuses all.
                fresh = self.state_dict(whole=True)
                if is_rank_zero():
                    state["state"] |= {name: fresh["state"][name] for name in never_stepped}
        groups = [group for one in self.all for group in one.param_groups]
        own = [
            {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in group.items() if k != "params"}
            for group in groups
        ]
        options = StateDictOptions(
            full_state_dict=whole,
            broadcast_from_rank0=whole and torch.distributed.is_initialized(),
            flatten_optimizer_state_dict=not whole,
        )
        with meshes.quiet():
            set_optimizer_state_dict(self.model, self.all, state, options=options)
        groups = [group for one in self.all for group in one.param_groups]
        for group, settings in zip(groups, own, strict=True):
            group.update(settings)
        for one in self.all:
            for name in never_stepped:
                one.state.pop(trained[name], None)

    def _take_up(self, states: dict[str, Any], trained: dict[str, nn.Parameter]) -> None:
        """As `load_state_dict`, in one process: each optimizer reads its own state, wherever it keeps it.

        torch's way wants all of it on one device, where bitsandbytes pages a part of it.
        """
        names = {parameter: name for name, parameter in trained.items()}
        for one in self.all:
            own = one.state_dict()["param_groups"]
            numbers = [number for group in own for number in group["params"]]
            parameters = [parameter for group in one.param_groups for parameter in group["params"]]
            learned = {
                number: states[names[parameter]]
                for number, parameter in zip(numbers, parameters, strict=True)
                if names[parameter] in states
            }
            one.load_state_dict({"state": learned, "param_groups": own})


def adapter_parameters(model: nn.Module, meta: nn.Module) -> dict[str, torch.Tensor]:
    """This rank's part of the adapters, by the names that checkpoints have; empty for a model without any.

    The parameters themselves. A state_dict unpacks NF4 weights, and with low_cpu_ram all of it is a copy.

    Args:
        model: as it is trained.
        meta: the same model before it was split or wrapped.
    """
    names = set(adapter_names(meta))
    return {name: p.detach() for n, p in model.named_parameters() if (name := clean_name(n)) in names}


def checkpoint_contents(cfg: DictConfig, model: LayerSkipDecoder, meta: nn.Module, device: torch.device) -> dict:
    """What a checkpoint of the whole model holds, in torchtune's keys, on rank 0; gathered on all ranks.

    Args:
        cfg: `save_adapter_weights_only` is read.
        model: as it is trained.
        meta: the same model before it was split or wrapped.
        device: for the gathering.
    """
    adapters = adapter_names(meta)
    only = bool(cfg.get("save_adapter_weights_only"))
    names = set(meta.state_dict())
    biases = any(name.endswith(".magnitude") and name.replace(".magnitude", ".bias") in names for name in adapters)
    adapters_only = only and not biases
    state: dict[str, torch.Tensor] = {}
    if adapters_only:
        for name, part in adapter_parameters(model, meta).items():
            part = part.to(device)  # where offloaded parts are gathered
            value = part.full_tensor() if isinstance(part, DTensor) else part
            if is_rank_zero():
                state[name] = value.cpu()
    elif torch.distributed.is_initialized():
        state = training.gather_cpu_state_dict(model, is_rank_zero(), device)
    else:
        # QLoRA's weights arrive on the CPU, unpacked; what they merge with has to be there too.
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
    # What came from a GPU is a copy already.
    plain = {} if only else {training.MODEL_KEY: merged(state, described, in_place=device.type != "cpu")}
    return contents | plain
