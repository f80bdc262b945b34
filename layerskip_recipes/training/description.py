"""The content of layerskip.json: the trained exits or the draft, frequent label tokens and measured acceptance. They
help to choose a draft."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torchtune.utils import get_logger

from layerskip_recipes.acceptance.measuring import measured_acceptance
from layerskip_recipes.acceptance.trained_exits import DESCRIPTION, MOST_TOKENS
from layerskip_recipes.checkpoint.drafts import DRAFT, describe
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.draft import Draft
from layerskip_recipes.processes import num_processes
from layerskip_recipes.training.batches import TrainingData
from layerskip_recipes.training.config import FinetuneConfig
from layerskip_recipes.training.label_counts import LabelCounts
from layerskip_recipes.training.validation import Validation

log = get_logger("INFO")


class Description:
    """Describes what a checkpoint can draft with, and measures its acceptance: on the validation data, or else on the
    first training batches."""

    def __init__(self, validation: Validation, data: TrainingData, labels: LabelCounts) -> None:
        self.validation, self.data, self.labels = validation, data, labels

    def content(
        self,
        cfg: FinetuneConfig,
        model: LayerSkipDecoder,
        draft: Draft | None,
        base: Mapping[str, Any],
        steps: int,
        total_steps: int,
    ) -> dict[str, Any]:
        """The content of layerskip.json: the trained exits or the draft, and how they were trained. Collective.

        A draft beside its model is described in the entry DRAFT.
        """
        of_draft = None
        if draft is not None:
            of_draft = describe(draft, base, steps, self.measured(model, draft=draft))
            if cfg.freezes_model:
                return of_draft
        exits = cfg.exit_loss.trained(cfg.num_layers, steps, total_steps)
        of_exits = self._describe_exits(cfg, model, exits, steps)
        return of_exits if of_draft is None else of_exits | {DRAFT: of_draft}

    def _describe_exits(
        self, cfg: FinetuneConfig, model: LayerSkipDecoder, exits: Sequence[int], steps: int
    ) -> dict[str, Any]:
        loss, base, vocabulary = cfg.exit_loss, cfg.given_folder, self.labels.vocabulary(MOST_TOKENS)
        return {
            "num_layers": cfg.num_layers,
            "exits": exits,
            "curriculum": loss.curriculum,
            "interval": loss.interval if loss.curriculum == "rotational" else None,
            "scale": loss.scale,
            "scale_fn": loss.scale_fn,
            "layer_dropout": dict(cfg.layer_dropout) if cfg.layer_dropout else cfg.model.get("layer_dropout"),
            "steps": steps,
            "base": Path(base).absolute().name if base and Path(base).is_dir() else base,  # no path: it is published
            "vocabulary": vocabulary,
            "measured": self.measured(model, exits, vocabulary),
        }

    def measured(
        self,
        model: LayerSkipDecoder,
        exits: Sequence[int] = (),
        vocabulary: Sequence[int] = (),
        draft: Draft | None = None,
    ) -> dict[str, Any] | None:
        """`measured_acceptance` of trained exits or a draft; None if the memory does not suffice. Collective."""
        on_validation = self.validation.on
        try:
            return measured_acceptance(
                self.validation.quality,
                "dataset_val" if on_validation else "training",
                self.validation.batches if on_validation else self.data.batches(0),
                model,
                exits,
                vocabulary,
                draft,
            )
        except torch.OutOfMemoryError:
            if num_processes() > 1:  # the other ranks wait for this one
                raise
        log.warning(
            f"{DESCRIPTION}: too little memory to measure the exits or the draft, so the checkpoint is saved without "
            "that, and generation cannot choose by it. A smaller batch needs less; for example batch_size=1"
        )
        return None
