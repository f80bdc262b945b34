"""What the checkpoints of a training run hold, and what a resumed run takes from them."""

from typing import TYPE_CHECKING, Any

import torch
from torchtune import training

from layerskip_recipes.checkpoint.drafts import DRAFT
from layerskip_recipes.training.auto_settings import PER_STEP
from layerskip_recipes.training.model_setup import adapter_parameters, checkpoint_contents
from layerskip_recipes.training.parallel import parts_of
from layerskip_recipes.training.resuming import random_states, restore_random_state

if TYPE_CHECKING:
    from layerskip_recipes.training.recipe import LayerSkipFinetune


def whole_contents(run: "LayerSkipFinetune") -> dict[str, Any]:
    """A whole checkpoint in torchtune's keys, on rank 0, with a draft beside the model at DRAFT. Collective."""
    first, *beside = parts_of(run.learner)
    contents = checkpoint_contents(first, run.cfg.meta_model, run.device, run.cfg.save_adapter_weights_only)
    for draft in beside:
        contents[DRAFT] = checkpoint_contents(draft, draft, run.device).get(training.MODEL_KEY)
    return contents


def optimizer_state(run: "LayerSkipFinetune", shards: bool) -> dict[str, Any]:
    return {training.OPT_KEY: {"state": run.optimizers.state_dict(whole=not shards)}}


def learned_weights(run: "LayerSkipFinetune") -> dict[str, torch.Tensor]:
    """This rank's part of the trained weights, to write or to fill in place."""
    adapters = adapter_parameters(run.model, run.cfg.meta_model)
    if not adapters:
        return run.learner.state_dict()
    of_draft = {} if run.draft is None else run.draft.state_dict()
    return adapters | {f"{DRAFT}.{name}": value for name, value in of_draft.items()}


def run_state(run: "LayerSkipFinetune") -> dict[str, Any]:
    """The state of a run besides weights and optimizer. Data order and curriculum follow from seed and step."""
    return {
        "step": run.step,
        training.SEED_KEY: run.seed,
        "run": run.fingerprint,
        "chosen": run.cfg.values | {PER_STEP: run.data.samples_per_step},
        "layer_dropout": run.model.layer_dropout.state_dict() if run.model.layer_dropout else None,
        training.RNG_KEY: random_states(run.device),
        "loss_at_start": run.validation.loss_at_start,
        "draft_statistics": run.labels.state_dict(),  # counts of labels, under the name of earlier checkpoints
        "losses": run.losses.state_dict(),
    }


def restore(run: "LayerSkipFinetune", state: dict[str, Any]) -> None:
    """Take over the stopped run's `run_state` and shards. Whole checkpoints are loaded with the model."""
    if run.checkpoints.sharded:
        states = run.checkpoints.load_shards(learned_weights(run), run.optimizers.state_dict(whole=False))
        run.optimizers.load_state_dict(states)
    if run.model.layer_dropout and state["layer_dropout"]:
        run.model.layer_dropout.load_state_dict(state["layer_dropout"])
    run.validation.loss_at_start = state["loss_at_start"]
    run.labels.load_state_dict(state["draft_statistics"])
    run.losses.load_state_dict(state["losses"], run.device)
    restore_random_state(state[training.RNG_KEY], run.device)
