"""A `Speculation`: how tokens are drafted, with nothing left to choose."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

import torch
from pydantic import Field

from layerskip_recipes.checkpoint.drafts import DraftDescription
from layerskip_recipes.config.schema import Fraction, check
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.decoder import LayerSkipDecoder

KEY = "self_speculation"  # of the section in most configs
OTHER_DRAFTERS = ("prompt_lookup",)  # the settings that add a drafter to the exit's chain, or replace it at exit L

# Shared with the section.
NumSpeculations = Annotated[int, Field(ge=1, examples=[6])]
PromptLookup = Annotated[int, Field(ge=1, examples=[3])]
Confidence = Annotated[Fraction, Field(examples=[0.4])]


@dataclass(frozen=True)
class Speculation:
    """How tokens are drafted. Everything here is lossless: the output is that of the full model.

    Args:
        exit_layer: E (1..L), the exit that drafts; for a trained draft its own.
        num_speculations: the draft length, the most tokens drafted per round.
        draft_vocabulary: ids of the tokens that can be drafted; None: all.
        prompt_lookup: n-gram length for prompt look-up, which runs where it is faster; None: no look-up.
        min_confidence: end a draft after a token at which the product of `sampling.confidence` is lower; 0: always
            `num_speculations` tokens. Applies in one process on a CPU without graphs, where the host sees each token.
        draft_int8: draft with int8 copies of the layers and the head.
        draft: the trained draft that drafts instead of the model's early layers.
    """

    exit_layer: int
    num_speculations: int = 6
    draft_vocabulary: torch.Tensor | Sequence[int] | None = None
    prompt_lookup: int | None = None
    min_confidence: float = 0.0
    draft_int8: bool = False
    draft: DraftDescription | None = None

    def __post_init__(self) -> None:
        check("num_speculations", self.num_speculations, NumSpeculations)
        check("prompt_lookup", self.prompt_lookup, PromptLookup | None)
        check("min_confidence", self.min_confidence, Confidence)
        check("draft_int8", self.draft_int8, bool)

    @property
    def rule_key(self) -> tuple:
        """What the speed of a round depends on, by which rules are kept apart."""
        size = None if self.draft_vocabulary is None else len(self.draft_vocabulary)
        numbers = (self.exit_layer, self.num_speculations, size, self.prompt_lookup, self.min_confidence)
        return *numbers, self.draft_int8, self.draft and self.draft.folder

    @property
    def draft_layers(self) -> int:
        """The number of a trained draft's layers, which have their own caches."""
        return 0 if self.draft is None else self.draft.num_layers

    @property
    def model_layers(self) -> int:
        """The number of the model's first layers that draft; 0 if a trained copy drafts."""
        return self.exit_layer if self.draft is None else self.draft.model_layers

    def has_no_chain(self, num_layers: int) -> bool:
        """Whether other drafters draft alone, as the exit is the whole model."""
        own = self.draft is not None or self.draft_int8
        others = any(getattr(self, name) for name in OTHER_DRAFTERS)
        return others and self.exit_layer == num_layers and not own

    def own_bytes(self, model: LayerSkipDecoder, dtype: torch.dtype) -> int:
        """Bytes of the weights besides the model's; int8 copies take one byte for each weight."""
        layer = sum(parameter.numel() for parameter in model.layers[0].parameters())
        rows = 0 if self.draft_vocabulary is None else len(self.draft_vocabulary)
        count = self.draft_layers * layer + rows * model.tok_embeddings.embedding_dim
        quantised = 0
        if self.draft_int8:
            quantised = (self.draft_layers or self.exit_layer) * layer
            quantised += 0 if rows else model.tok_embeddings.weight.numel()
        return count * dtype.itemsize + quantised

    def check(self, model: LayerSkipDecoder) -> None:
        """Raise a ConfigError for settings that do not fit the model."""
        model.check_exit(self.exit_layer)
        if self.draft_vocabulary is not None:
            check_draft_vocabulary(self.draft_vocabulary, model)


# Values of the keys of `self_speculation` that are `auto` where nothing was measured, or left out beside an exit.
SPECULATION_DEFAULTS: dict[str, Any] = {key.name: key.default for key in fields(Speculation)[1:]}


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
