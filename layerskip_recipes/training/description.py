"""The content of layerskip.json: the trained exits or the draft, frequent label tokens and measured acceptance. They
help to choose a draft."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torchtune.utils import get_logger

from layerskip_recipes.acceptance.measuring import measured_acceptance
from layerskip_recipes.acceptance.trained_exits import DESCRIPTION, MOST_TOKENS
from layerskip_recipes.checkpoint.drafts import DRAFT, describe
from layerskip_recipes.model.draft import Draft
from layerskip_recipes.processes import num_processes

if TYPE_CHECKING:
    from layerskip_recipes.training.recipe import LayerSkipFinetune

log = get_logger("INFO")


def describe_run(run: "LayerSkipFinetune") -> dict[str, Any]:
    """The content of layerskip.json: the trained exits or the draft, and how they were trained. Collective.

    A draft beside its model is described in the entry DRAFT.
    """
    of_draft = None
    if run.draft is not None:
        of_draft = describe(run.draft, run.base, run.step, _measured(run, draft=run.draft))
        if run.cfg.freezes_model:
            return of_draft
    of_exits = _describe_exits(run)
    return of_exits if of_draft is None else of_exits | {DRAFT: of_draft}


def _describe_exits(run: "LayerSkipFinetune") -> dict[str, Any]:
    cfg, loss, base = run.cfg, run.cfg.exit_loss, run.cfg.given_folder
    exits = loss.trained(cfg.num_layers, run.step, run.total_steps)
    vocabulary = run.labels.vocabulary(MOST_TOKENS)
    return {
        "num_layers": cfg.num_layers,
        "exits": exits,
        "curriculum": loss.curriculum,
        "interval": loss.interval if loss.curriculum == "rotational" else None,
        "scale": loss.scale,
        "scale_fn": loss.scale_fn,
        "layer_dropout": dict(cfg.layer_dropout) if cfg.layer_dropout else cfg.model.get("layer_dropout"),
        "steps": run.step,
        "base": Path(base).absolute().name if base and Path(base).is_dir() else base,  # no path: it is published
        "vocabulary": vocabulary,
        "measured": _measured(run, exits, vocabulary),
    }


def _measured(
    run: "LayerSkipFinetune", exits: Sequence[int] = (), vocabulary: Sequence[int] = (), draft: Draft | None = None
) -> dict[str, Any] | None:
    """The acceptance of trained exits or a draft: on the validation data, or else on the first training batches.

    None if the memory does not suffice. Collective.
    """
    validation = run.validation
    data: Literal["dataset_val", "training"] = "dataset_val" if validation.on else "training"
    batches = validation.batches if validation.on else run.data.batches(0)
    try:
        return measured_acceptance(validation.quality, data, batches, run.model, exits, vocabulary, draft)
    except torch.OutOfMemoryError:
        if num_processes() > 1:  # the other ranks wait for this one
            raise
    log.warning(
        f"{DESCRIPTION}: too little memory to measure the exits or the draft, so the checkpoint is saved without "
        "that, and generation cannot choose by it. A smaller batch needs less; for example batch_size=1"
    )
    return None
