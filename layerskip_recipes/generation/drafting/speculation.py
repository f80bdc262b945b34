"""A `Speculation`: the plan of how tokens are drafted, with nothing left to choose."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

import torch
from pydantic import Field

from layerskip_recipes.checkpoint.answers import Answers
from layerskip_recipes.checkpoint.drafts import DraftDescription
from layerskip_recipes.config.schema import Fraction, check
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.decoder import LayerSkipDecoder

SECTION_KEY = "self_speculation"  # of the section in most configs

# Shared with the section.
NumSpeculations = Annotated[int, Field(ge=1, examples=[6])]
PromptLookup = Annotated[int, Field(ge=1, examples=[3])]
Confidence = Annotated[Fraction, Field(examples=[0.4])]


@dataclass(frozen=True)
class Speculation:
    """How tokens are drafted. Everything here is lossless: the output is that of the full model.

    Args:
        exit_layer: E (1..L), the exit that drafts; for a trained draft its own. None: no layers draft, so that drafts
            are look-ups alone.
        num_speculations: the draft length, the most tokens drafted per round.
        draft_vocabulary: ids of the tokens that can be drafted; None: all.
        prompt_lookup: drafts are looked up in the text where at least so many of its last tokens occurred before, and
            where that is faster; None: not in the text.
        answers: drafts are looked up in these answers too; None: not there.
        min_confidence: end a draft after a token at which the product of `sampling.confidence` is lower; 0: always
            `num_speculations` tokens. Applies in one process on a CPU without graphs, where the host sees each token.
        draft_int8: draft with int8 copies of the layers and the head.
        draft: the trained draft that drafts instead of the model's early layers.
        tokens_per_round, speedup: what the planner expects of these settings; None: unknown.
    """

    exit_layer: int | None = None
    num_speculations: int = 6
    draft_vocabulary: torch.Tensor | Sequence[int] | None = None
    prompt_lookup: int | None = None
    min_confidence: float = 0.0
    draft_int8: bool = False
    draft: DraftDescription | None = None
    answers: Answers | None = None
    tokens_per_round: float | None = field(default=None, compare=False)
    speedup: float | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check("num_speculations", self.num_speculations, NumSpeculations)
        check("prompt_lookup", self.prompt_lookup, PromptLookup | None)
        check("min_confidence", self.min_confidence, Confidence)
        check("draft_int8", self.draft_int8, bool)
        if self.exit_layer is None and not self.looks_up:
            raise ConfigError(
                f"exit_layer: {self.exit_layer} without prompt_lookup or answers leaves nothing to draft with. "
                "Allowed: an exit, for example exit_layer=8, or look-ups, for example prompt_lookup=1"
            )

    def __str__(self) -> str:
        """The method, without its lengths."""
        if self.exit_layer is None:
            return self.lookups
        tokens = "" if self.num_draft_tokens is None else f"{self.num_draft_tokens}-token vocabulary"
        where = "trained draft" if self.draft_layers else f"exit {self.exit_layer}"
        return ", ".join(part for part in (where, tokens, "int8" if self.draft_int8 else "") if part)

    @property
    def looks_up(self) -> bool:
        return self.prompt_lookup is not None or self.answers is not None

    @property
    def lookups(self) -> str:
        """Where drafts are looked up."""
        texts = "" if self.prompt_lookup is None else "the text"
        answers = "" if self.answers is None else f"{len(self.answers.tokens)} tokens of {self.answers.source}"
        return f"look-ups in {' and '.join(filter(None, (texts, answers)))}"

    @property
    def num_draft_tokens(self) -> int | None:
        """The size of the draft vocabulary; None: all tokens."""
        return None if self.draft_vocabulary is None else len(self.draft_vocabulary)

    @property
    def weights_key(self) -> tuple:
        """Which weights draft: speculations with the same key share them."""
        tokens = None if self.draft_vocabulary is None else tuple(int(token) for token in self.draft_vocabulary)
        return self.exit_layer, tokens, self.draft_int8, self.draft and self.draft.folder

    @property
    def rule_key(self) -> tuple:
        """What the speed of a round depends on, by which rules are kept apart."""
        numbers = (self.exit_layer, self.num_speculations, self.num_draft_tokens)
        sources = (self.draft and self.draft.folder, self.answers and self.answers.source)
        return *numbers, self.prompt_lookup, self.min_confidence, self.draft_int8, *sources

    @property
    def draft_layers(self) -> int:
        """The number of a trained draft's layers, which have their own caches."""
        return 0 if self.draft is None else self.draft.num_layers

    @property
    def model_layers(self) -> int:
        """The number of the model's first layers that draft; 0 if a trained copy drafts, or no layer."""
        return (self.exit_layer or 0) if self.draft is None else self.draft.model_layers

    @property
    def shared_layers(self) -> int:
        """The layers whose states verification takes from the draft; quantised layers have other states."""
        return 0 if self.draft_int8 and not self.draft_layers else self.model_layers

    @property
    def ends_early(self) -> bool:
        """Whether drafts end at low confidence."""
        return self.min_confidence > 0

    def own_bytes(self, model: LayerSkipDecoder, dtype: torch.dtype) -> int:
        """Bytes of the weights besides the model's; int8 copies take one byte for each weight."""
        layer = sum(parameter.numel() for parameter in model.layers[0].parameters())
        num_rows = self.num_draft_tokens or 0
        count = self.draft_layers * layer + num_rows * model.tok_embeddings.embedding_dim
        quantised = 0
        if self.draft_int8:
            quantised = (self.draft_layers or self.model_layers) * layer
            quantised += 0 if num_rows else model.tok_embeddings.weight.numel()
        return count * dtype.itemsize + quantised

    def check(self, model: LayerSkipDecoder) -> None:
        """Raise a ConfigError for settings that do not fit the model."""
        if self.exit_layer is not None:
            model.check_exit(self.exit_layer)
        if self.draft_vocabulary is not None:
            check_draft_vocabulary(self.draft_vocabulary, model)


# Values of the keys of `self_speculation` that are `auto` where nothing was measured, or left out beside an exit.
SPECULATION_DEFAULTS: dict[str, Any] = {
    key.name: key.default for key in fields(Speculation) if key.compare and key.name != "exit_layer"
}


def check_draft_vocabulary(
    vocabulary: torch.Tensor | Sequence[int], model: LayerSkipDecoder, key: str = "draft_vocabulary"
) -> None:
    """Raise a ConfigError unless these are ids of the model's tokens."""
    ids, size = torch.as_tensor(vocabulary), model.tok_embeddings.num_embeddings
    is_list = ids.dim() == 1 and ids.dtype in (torch.int32, torch.int64) and len(ids) > 0
    unknown = ids[(ids < 0) | (ids >= size)].tolist() if is_list else None
    if unknown != []:
        wrong = f"{unknown[0]} is no token of the model" if unknown else "no list of token ids"
        raise ConfigError(f"{key}: {wrong}. Allowed: ids of 0..{size - 1}; {key}=null drafts any token")
