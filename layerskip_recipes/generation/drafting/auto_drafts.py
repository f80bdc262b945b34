"""Where drafts are chosen: values for the `auto` keys of `self_speculation`, by prediction.py's predictions."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from layerskip_recipes.acceptance.tokens_per_round import ASSUMED, MIN_CONFIDENCE, TokensPerRound
from layerskip_recipes.acceptance.trained_exits import DESCRIPTION, TrainedExits, read_trained_exits
from layerskip_recipes.checkpoint.checkpointers import described_folder
from layerskip_recipes.checkpoint.drafts import DraftDescription, own_draft, read_description
from layerskip_recipes.config.components import Component
from layerskip_recipes.config.layer_strings import default_exit
from layerskip_recipes.config.recipe_config import RecipeConfig
from layerskip_recipes.config.schema import AUTO
from layerskip_recipes.distributed.tensor_parallel import ranks_per_matrix
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.drafting.prediction import (
    LEAST_GAIN,
    Costs,
    DraftMethod,
    Prediction,
    estimated_costs,
    known_methods,
    ranked,
    rounds_of,
)
from layerskip_recipes.generation.drafting.section import SPLITS, SelfSpeculation
from layerskip_recipes.generation.drafting.speculation import KEY, OTHER_DRAFTERS, SPECULATION_DEFAULTS, Speculation
from layerskip_recipes.model.decoder import LayerSkipDecoder, layerskip_decoder
from layerskip_recipes.processes import num_processes

LOOKUP = 3  # tokens of prompt look-up


@dataclass(frozen=True)
class DraftChoice:
    """How to draft, and the expected speed."""

    section: SelfSpeculation | None  # without `auto`, except for the exit beside a draft; None: no drafts
    why: str | None  # a log line, if something was chosen
    plain_step_s: float  # see `Costs`
    speedup: float = 1.0
    draft: DraftDescription | None = None  # the trained draft of `section.draft`
    frequent: Sequence[int] | None = None  # the checkpoint's tokens, most frequent first
    key: str = KEY  # the section's name in messages

    @property
    def token_s(self) -> float:
        return self.plain_step_s / max(self.speedup, 1.0)

    def speculation(self, prompts: Sequence[Sequence[int]]) -> Speculation | None:
        """The section with the exit of the draft, and with token ids instead of their number.

        These are the tokens of the draft, if it has as many, or the first frequent ones of the checkpoint, or
        else of the prompts.
        """
        if self.section is None:
            return None
        keys, ids = dict(self.section), self.section.draft_vocabulary
        if self.draft is not None:
            own = self.draft.vocabulary
            keys |= {"draft": self.draft, "exit_layer": self.draft.exit_layer}
            ids = own if own and ids == len(own) else ids
        if isinstance(ids, int):
            if not (self.frequent or prompts):
                key = f"{self.key}.draft_vocabulary"
                raise ConfigError(
                    f"{key}: {ids} tokens are counted in the prompts, and a conversation has none yet. Set {key}=null"
                )
            ids = list((self.frequent or most_frequent(prompts))[:ids])
        return Speculation(**keys | {"draft_vocabulary": ids})


def most_frequent(prompts: Sequence[Sequence[int]]) -> list[int]:
    return [token for token, _ in Counter(token for prompt in prompts for token in prompt).most_common()]


@dataclass
class TrainingNotes:
    """What training noted in layerskip.json, of the model's exits and of drafts. Each file is read once."""

    folder: Path | None  # of the weights or adapters; it may lack layerskip.json
    num_layers: int
    num_tokens: int
    checkpointer: Any = None  # the class that reads the weights
    no_draft: str | None = None  # the reason why a draft beside the model cannot be used
    read: dict[str, DraftDescription] = field(default_factory=dict)  # by folder

    @cached_property
    def exits(self) -> TrainedExits | None:
        return None if self.folder is None else read_trained_exits(self.folder, self.num_layers, self.num_tokens)

    def draft_for(self, section: SelfSpeculation, key: str) -> tuple[DraftDescription | None, str | None]:
        """The section's trained draft, or else the one beside the model, or why that cannot be used.

        `key` names the section's draft in messages.
        """
        folder, is_named = section.draft, section.draft != AUTO
        if not is_named:
            folder, key = own_draft(self.folder) if section.exit_layer == AUTO else None, "draft"
        if folder is None:
            return None, None
        why = None if is_named else self.no_draft
        if why is None:
            if folder not in self.read:
                self.read[folder] = read_description(folder, key)
            if is_named or self.read[folder].is_for(self.checkpointer):
                return self.read[folder], None
            why = "was trained for weights that another checkpointer reads"
        return None, f"the draft in {folder} {why}"


@dataclass
class DraftChooser:
    """Chooses how a model drafts on its device, before or after its weights are loaded."""

    model: LayerSkipDecoder
    notes: TrainingNotes
    device: str
    dtype: torch.dtype  # of the weights; int8 for a quantised model
    split: bool = False  # over several processes

    def choose(
        self,
        section: SelfSpeculation | None,
        temperature: float,
        compiled: bool,
        rows: int,
        key: str = KEY,
        asked: bool = False,
    ) -> DraftChoice:
        """`choose_drafts` for a batch of `rows` prompts."""
        on_cpu = self.device.startswith("cpu")
        costs = estimated_costs(self.model, self.dtype, not on_cpu, compiled, rows)
        ends, unpacked = on_cpu and not self.split, not self.split and self.dtype != torch.int8
        return choose_drafts(
            section,
            self.notes,
            costs,
            temperature,
            asked=asked,
            unpacked=unpacked,
            int8=ends and compiled,
            ends=ends,
            key=key,
        )


def chooser_for(cfg: RecipeConfig, quantizer: Component | None) -> DraftChooser:
    """The chooser of a config's model."""
    model = layerskip_decoder(cfg.meta_model)
    parallel = ranks_per_matrix(*(getattr(cfg, f"tensor_parallel_{what}", None) for what in ("dim", "plan")))
    no_draft = f"does not go with {SPLITS}" if parallel > 1 else None
    folder, size = described_folder(cfg.checkpointer), (model.num_layers, model.tok_embeddings.num_embeddings)
    notes = TrainingNotes(folder, *size, cfg.checkpointer.target, no_draft)
    dtype = cfg.torch_dtype if quantizer is None else torch.int8
    return DraftChooser(model, notes, cfg.device, dtype, split=num_processes() > 1)


def choose_drafts(
    section: SelfSpeculation | None,
    notes: TrainingNotes,
    costs: Costs,
    temperature: float,
    *,
    asked: bool = False,
    unpacked: bool = True,
    int8: bool = False,
    ends: bool = False,
    key: str = KEY,
) -> DraftChoice:
    """Replace `auto` in the section's keys.

    Args:
        asked: draft even if it should not pay, as a section with an exit or a draft does.
        unpacked: the model's layers and head are neither quantised nor split, so a draft can take rows of its head.
        int8: an int8 draft is faster on this machine.
        ends: drafts of one prompt can end at low confidence.
        key: the section's name in messages.
    """
    if section is None:
        return DraftChoice(None, None, costs.plain_step_s)
    given = section.given
    exit_layer, named = given.get("exit_layer"), given.get("draft")
    draft, unusable = notes.draft_for(section, f"{key}.draft")
    exits = notes.exits if named is None else None
    frequent = exits.vocabulary if exits else None

    def draft_choice(chosen: Mapping[str, Any], why: str | None = None, speedup: float = 1.0) -> DraftChoice:
        """The user's values, chosen ones for the keys that are `auto`, or else defaults."""
        values = SPECULATION_DEFAULTS | {"draft": draft and draft.folder} | dict(chosen) | given
        return DraftChoice(SelfSpeculation(**values), why, costs.plain_step_s, speedup, draft, frequent, key)

    others = exit_layer == costs.num_layers and any(map(given.get, OTHER_DRAFTERS)) and not given.get("draft_int8")
    unmeasured = exit_layer is not None and not (exits and exits.measured)
    if draft is None and (others or unmeasured):
        return draft_choice({})  # nothing to choose by
    if draft is None:
        methods = known_methods(exits, costs.num_layers, exit_layer)
    else:
        methods = {method_of(draft): (draft.measured and draft.measured.draft) or ASSUMED}
    if not methods:
        return _without_exit(given, unusable or _untrained(notes.folder, exits, costs.num_layers, key), costs)

    # Rank the vocabularies, precisions, ends and lengths that the user left open.
    if section.draft_vocabulary != AUTO:
        methods = _of_vocabulary(methods, section.draft_vocabulary)
    elif draft is None and not (unpacked and frequent):
        methods = _of_vocabulary(methods, None)
    endings = [False, True] if ends and costs.batch_rows == 1 else [False]
    if section.min_confidence != AUTO and len(endings) > 1:
        endings = [section.min_confidence > 0]
    precisions = [False, True] if int8 and (unpacked or draft is not None) else [False]
    if section.draft_int8 != AUTO:
        precisions = [section.draft_int8]
    lengths = None if section.num_speculations == AUTO else [section.num_speculations]
    best = ranked(rounds_of(methods, temperature, endings, precisions), costs, lengths)[0]

    # Draft if it should pay, or if the user asked for it.
    said = (
        f"{best.method}, {'up to ' if best.method.ends else ''}{best.num_speculations} drafted tokens per round; "
        f"expected speed-up {best.speedup:.2f}x ({best.tokens_per_round:.1f} tokens per round, which costs "
        f"{best.round_s / costs.plain_step_s:.2f} plain steps; acceptance "
        f"{'assumed' if ASSUMED in methods.values() else 'as in training'}, costs estimated)"
    )
    if best.speedup < LEAST_GAIN and not (asked or exit_layer or named):
        nothing = "no exit should pay" if draft is None else "the trained draft should not pay"
        return _without_exit(given, f"{nothing}. The best would be {said}", costs)
    # Rows of a batch rarely have a match at the same time. The whole model with look-ups would be look-ups alone.
    lookup = LOOKUP if costs.batch_rows == 1 and best.method.model_layers < costs.num_layers else None
    chosen = prediction_keys(best, lookup)
    lookup = given.get("prompt_lookup", lookup)
    also = "" if lookup is None else f"; look-ups of the last {lookup} tokens"
    return draft_choice(chosen, f"Drafts: {said}{also}" if chosen.keys() - given.keys() else None, best.speedup)


def _without_exit(given: Mapping[str, Any], why: str, costs: Costs) -> DraftChoice:
    """Drafts by other drafters alone if the user asked for one, else no drafts."""
    others = ", ".join(f"{name}={given[name]}" for name in OTHER_DRAFTERS if given.get(name))
    if not others:
        return DraftChoice(None, f"No drafts: {why}", costs.plain_step_s)
    alone = {"exit_layer": costs.num_layers, "draft": None, "draft_vocabulary": None, "draft_int8": False}
    said = f"Drafts: by {others} alone, because {why}"
    return DraftChoice(SelfSpeculation(**SPECULATION_DEFAULTS | dict(given) | alone), said, costs.plain_step_s)


def prediction_keys(best: Prediction, lookup: int | None) -> dict[str, Any]:
    """A prediction as keys of the section."""
    keys = {
        "num_speculations": best.num_speculations,
        "min_confidence": MIN_CONFIDENCE if best.method.ends else 0.0,
        "draft_vocabulary": best.method.vocabulary,
        "draft_int8": best.method.int8,
        "prompt_lookup": lookup,
    }
    return keys if best.method.draft_layers else keys | {"exit_layer": best.method.model_layers}


def method_of(draft: DraftDescription) -> DraftMethod:
    rows = draft.vocabulary and len(draft.vocabulary)
    return DraftMethod(draft.model_layers, rows or None, draft_layers=draft.num_layers)


def _of_vocabulary(
    methods: Mapping[DraftMethod, TokensPerRound], given: int | list[int] | None
) -> dict[DraftMethod, TokensPerRound]:
    """Each exit with the user's vocabulary, and the acceptance measured for the next smaller vocabulary."""
    if given is None:
        whole = {method: rates for method, rates in methods.items() if method.vocabulary is None or method.draft_layers}
        return {method._replace(vocabulary=None): rates for method, rates in whole.items()}
    size = given if isinstance(given, int) else len(given)
    found: dict[DraftMethod, TokensPerRound] = {}
    by_size = sorted(methods.items(), key=lambda item: item[0].vocabulary or math.inf)
    for method, rates in by_size:
        wanted = method._replace(vocabulary=size)
        if (method.vocabulary or math.inf) <= size or wanted not in found:
            found[wanted] = rates
    return found


def _untrained(folder: Path | None, exits: TrainedExits | None, num_layers: int, key: str) -> str:
    if exits is None:
        why = f"{folder or 'the model'} has no {DESCRIPTION}, so no exit is known to be trained"
    else:
        why = f"{DESCRIPTION} in {folder} names no trained exit before the last one"
    return f"{why}. To draft anyway: {key}.exit_layer={default_exit(num_layers)}"
