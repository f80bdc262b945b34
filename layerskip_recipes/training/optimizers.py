"""Optimizers: a config's optimizer and learning rate schedule, and their state in checkpoints."""

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.optim import Adam, AdamW, Optimizer
from torchtune import training
from torchtune.utils import get_logger

from layerskip_recipes.distributed.loading import fill_from_rank0, suppress_dcp_warnings
from layerskip_recipes.processes import from_rank_zero, is_rank_zero
from layerskip_recipes.training.auto_settings import draft_rate
from layerskip_recipes.training.config import FinetuneConfig
from layerskip_recipes.training.parallel import clean_name, group_by_mesh, parts_of
from layerskip_recipes.training.stochastic_adamw import StochasticAdamW

log = get_logger("INFO")
ROUNDED_AWAY = 1e-4  # about the distance between neighbouring bf16 numbers near 0.02


class Optimizers:
    """The optimizer (with `optimizer_in_bwd`, one per parameter) and the schedule over `steps` steps, `done` of which
    an earlier run has taken. `states` is the whole `state_dict` of that run, on rank 0."""

    def __init__(self, cfg: FinetuneConfig, model: nn.Module, states: dict | None, steps: int, done: int) -> None:
        self.model = model
        self.in_backward = cfg.optimizer_in_bwd
        parts = [[p for p in part.parameters() if p.requires_grad] for part in parts_of(model)]
        if self.in_backward:
            each = {p: cfg.optimizer.build([p]) for trained in parts for p in trained}
            training.register_optim_in_bwd_hooks(model=model, optim_dict=each)
            self.all: list[Optimizer] = list(each.values())
        else:
            self.all = [cfg.optimizer.build([{"params": same} for trained in parts for same in group_by_mesh(trained)])]
        for number, optimizer in enumerate(self.all):
            if isinstance(optimizer, StochasticAdamW):
                optimizer.first = number
        if parts[0][0].dtype is torch.bfloat16:
            # Adapters begin at zero, where bf16 is fine enough.
            _tell_of_rounding(self.all[0], whole=all(p.requires_grad for p in model.parameters()))
        of_draft = {id(p) for trained in parts[1:] for p in trained}
        for group in (group for optimizer in self.all for group in optimizer.param_groups):
            if id(group["params"][0]) in of_draft:
                group["lr"] = draft_rate(cfg.meta_model) * group["lr"]
            # Schedulers with last_epoch >= 0 need initial_lr, as a float: torchao's lr is a tensor, changed in place.
            group["initial_lr"] = float(group["lr"])
        if states is not None:
            self.load_state_dict(self._from_rank_zero(states))
        self.schedulers = [
            cfg.lr_scheduler.build(optimizer, num_training_steps=steps, last_epoch=done - 1)
            for optimizer in (self.all if cfg.lr_scheduler is not None else [])
        ]
        warmup = cfg.lr_scheduler.get("num_warmup_steps") if cfg.lr_scheduler is not None else None
        if isinstance(warmup, int) and warmup > steps // 2:
            log.warning(
                f"lr_scheduler.num_warmup_steps: {warmup} of the run's {steps} steps, so the learning rate hardly "
                f"reaches its value. For example lr_scheduler.num_warmup_steps={steps // 10}"
            )

    @property
    def lr(self) -> float:
        return float(self.all[0].param_groups[0]["lr"])

    @property
    def base_lr(self) -> float:
        """The config's learning rate, before the schedule."""
        return self.all[0].param_groups[0]["initial_lr"]

    def step(self, learns: bool = True) -> None:
        """Update the weights, unless no label counted (an optimizer in backward has stepped), and the learning rate."""
        if not self.in_backward:
            if learns:
                self.all[0].step()
            self.all[0].zero_grad(set_to_none=True)
        for scheduler in self.schedulers:
            scheduler.step()

    def state_dict(self, whole: bool) -> dict[str, dict[str, Any]]:
        """The state of each parameter by name: whole tensors on rank 0's CPU, or this rank's shards. Collective."""
        options = StateDictOptions(full_state_dict=whole, cpu_offload=whole)
        with suppress_dcp_warnings():
            state: Any = get_optimizer_state_dict(self.model, self.all, options=options)
        return state.get("state", {})

    def load_state_dict(self, states: dict[str, dict[str, Any]]) -> None:
        """Load this rank's shards of a `state_dict`.

        Learning rate, weight decay and so on stay as in the config. A parameter has no state if layer dropout has
        skipped its layer so far.
        """
        names = {parameter: clean_name(name) for name, parameter in self.model.named_parameters()}
        for optimizer in self.all:
            param_groups = optimizer.state_dict()["param_groups"]
            numbers = [number for group in param_groups for number in group["params"]]
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            learned = {
                number: states[names[parameter]]
                for number, parameter in zip(numbers, parameters, strict=True)
                if names[parameter] in states
            }
            optimizer.load_state_dict({"state": learned, "param_groups": param_groups})

    def _from_rank_zero(self, states: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """This rank's shards of rank 0's whole tensors, from any number of ranks. Collective."""
        if not torch.distributed.is_initialized():
            return states
        # Send numbers, such as Adam's steps, as objects, and the other tensors one by one.
        tensors = {
            name: {k: v for k, v in state.items() if torch.is_tensor(v) and v.dim()} for name, state in states.items()
        }
        numbers = {name: {k: v for k, v in states[name].items() if k not in by_key} for name, by_key in tensors.items()}
        local, shards = self.state_dict(whole=False), {}
        for name, (keys, rest) in from_rank_zero({n: ([*tensors[n]], numbers[n]) for n in states}).items():
            shards[name] = local.get(name, {}) | rest
            for key in (key for key in keys if key in shards[name]):  # another setting may need no such state
                fill_from_rank0(shards[name][key], tensors[name][key] if is_rank_zero() else None)
        return shards


def _tell_of_rounding(optimizer: Optimizer, whole: bool) -> None:
    """Log whether small steps move weights in bf16; `whole`: all weights of the model are trained."""
    if isinstance(optimizer, StochasticAdamW):
        log.info("StochasticAdamW rounds weights in bf16 at random, so that small steps move them.")
        return
    at_random = getattr(optimizer, "bf16_stochastic_round", None)  # torchao's optimizers have it
    rounds = isinstance(optimizer, Adam | AdamW) or at_random is False
    if whole and rounds and optimizer.defaults["lr"] < ROUNDED_AWAY:
        key = "_component_=layerskip_recipes.training.stochastic_adamw.StochasticAdamW"
        log.warning(
            f"optimizer: in bf16, {type(optimizer).__name__} loses most of its steps to rounding. For example "
            f"optimizer.{key if at_random is None else 'bf16_stochastic_round=true'}"
        )
