"""The content of layerskip.json: the trained exits or the draft, frequent label tokens and measured acceptance. They
help to choose a draft."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerskip_recipes.checkpoint.drafts import DRAFT, describe
from layerskip_recipes.checkpoint.trained_exits import DRAFT_VOCABULARIES, LONGEST_DRAFT, MOST_TOKENS, exits_to_measure
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.draft import Draft
from layerskip_recipes.processes import from_every_rank
from layerskip_recipes.training.batches import TrainingData
from layerskip_recipes.training.config import FinetuneConfig
from layerskip_recipes.training.label_counts import LabelCounts
from layerskip_recipes.training.validation import Validation

# Each process stops measuring after this many samples or tokens.
ENOUGH_SAMPLES, ENOUGH_TOKENS = 64, 8192


class DraftStatistics:
    """Describes what a checkpoint can draft with, and measures its acceptance: on the validation data, or else on the
    first training batches."""

    def __init__(self, validation: Validation, data: TrainingData, labels: LabelCounts) -> None:
        self.validation, self.data, self.labels = validation, data, labels

    def describe(
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
            of_draft = describe(draft, base, steps, self.measure(model, [], [], draft))
            if cfg.freezes_model:
                return of_draft
        described = self._describe_exits(cfg, model, cfg.exit_loss.trained(cfg.num_layers, steps, total_steps), steps)
        return described | ({} if of_draft is None else {DRAFT: of_draft})

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
            "measured": self.measure(model, exits, vocabulary),
        }

    def measure(
        self, model: LayerSkipDecoder, exits: Sequence[int], vocabulary: Sequence[int], draft: Draft | None = None
    ) -> dict[str, Any] | None:
        """layerskip.json's section "measured", for exits or a draft; None if nothing can be measured. Collective."""
        # The exits and batches to measure.
        early = [0] if draft is not None else exits_to_measure(exits, model.num_layers)
        if not early:  # on all ranks
            return None
        batches = _first(self.validation.batches if self.validation.on else self.data.batches(0))
        count = min(from_every_rank(len(batches)))  # all ranks take part in each forward pass
        if not count:
            return None
        sizes = [n for n in DRAFT_VOCABULARIES if n < self.labels.num_tokens and n < 2 * len(vocabulary)]
        try:
            quality = self.validation.quality(
                model,
                batches[:count],
                [*early, model.num_layers],
                draft,
                num_speculations=LONGEST_DRAFT,
                vocabulary=vocabulary,
                sizes=sizes if draft is None else (),
            )
        except ConfigError:  # no label counts
            return None
        if not all(quality[e].overlap >= 0 and quality[e].tokens_per_round for e in early):
            return None  # the last step ruined the weights, or there is no text of two tokens
        measured = {"on": "dataset_val" if self.validation.on else "training", "labels": quality[early[0]].generated}
        by_exit = {e: _rounded(quality[e].tokens_per_round) for e in early}
        return measured | ({"exits": by_exit} if draft is None else {"draft": by_exit[0]["all"]})


def _rounded(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: _rounded(value) for key, value in found.items()}
    return [_rounded(value) for value in found] if isinstance(found, list) else round(found, 4)


def _first(batches: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first batches that are enough to measure."""
    some: list[dict[str, Any]] = []
    samples = tokens = 0
    for batch in batches:
        some.append(batch)
        samples, tokens = samples + len(batch["tokens"]), tokens + batch["tokens"].numel()
        if samples >= ENOUGH_SAMPLES or tokens >= ENOUGH_TOKENS:
            break
    return some
