"""The settings of a speculation, and their checks against a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated
from weakref import ref

import torch
from pydantic import Field

from layerskip_recipes.config.schema import Fraction, check
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.drafting.draft_head import DraftHead
from layerskip_recipes.model.decoder import LayerSkipDecoder, as_layerskip_decoder

# Shared with the `self_speculation` section.
NumSpeculations = Annotated[int, Field(ge=1, examples=[6])]
PromptLookup = Annotated[int, Field(ge=1, examples=[3])]
Confidence = Annotated[Fraction, Field(examples=[0.4])]


@dataclass
class Speculation:
    """How tokens are drafted. Everything here is lossless: the output is that of the full model.

    Args:
        exit_layer: E (1..L), the exit that drafts.
        num_speculations: d, the most tokens drafted per round.
        draft_vocabulary: ids of the tokens that can be drafted; None: all.
        prompt_lookup: n-gram length for prompt look-up, which runs where it is faster; None: no look-up.
        min_confidence: end a draft after a token at which the product of `sampling.confidence` is lower; 0: always d
            tokens. Applies in one process on a CPU without graphs, where the host sees each token.
        drafter: a decoder whose early layers and head draft instead of the model's, such as a quantised copy.
        draft_head: the head of `draft_vocabulary`, such as a quantised one; None: rows of the model's head, or of a
            trained draft's.

    Raises:
        ConfigError: if a number is out of range. `Generation` raises it for settings that do not fit its model.
    """

    exit_layer: int
    num_speculations: int
    draft_vocabulary: torch.Tensor | Sequence[int] | None = None
    prompt_lookup: int | None = None
    min_confidence: float = 0.0
    drafter: LayerSkipDecoder | None = None
    draft_head: DraftHead | None = None

    def __post_init__(self) -> None:
        check("num_speculations", self.num_speculations, NumSpeculations)
        check("prompt_lookup", self.prompt_lookup, PromptLookup | None)
        check("min_confidence", self.min_confidence, Confidence)

    @property
    def settings(self) -> tuple:
        """What the speed of a round depends on."""
        size = None if self.draft_vocabulary is None else len(self.draft_vocabulary)
        drafter = None if self.drafter is None else ref(self.drafter)
        return self.exit_layer, self.num_speculations, size, self.prompt_lookup, self.min_confidence, drafter

    def check(self, model: LayerSkipDecoder) -> None:
        """Raise a ConfigError for settings that do not fit the model."""
        model.check_exit(self.exit_layer)
        if self.draft_vocabulary is not None:
            check_draft_vocabulary(self.draft_vocabulary, model)
        if self.drafter is not None:
            check_drafter(self.drafter, model, self.exit_layer)


def check_drafter(drafter: LayerSkipDecoder, model: LayerSkipDecoder, exit_layer: int) -> None:
    """Raise a ConfigError unless the drafter has this exit, and the model's cache shapes, vocabulary and dtype."""
    own, layers = as_layerskip_decoder(drafter).own_layers, len(drafter.layers)
    if own and exit_layer != (own.start or own.stop):
        raise ConfigError(f"exit_layer: {exit_layer} is not the drafter's. Allowed: {own.start or own.stop}")
    if not exit_layer <= layers <= model.num_layers:
        raise ConfigError(f"drafter: it has {layers} layers. Allowed: {exit_layer} (exit_layer) to {model.num_layers}")

    def shape(decoder: LayerSkipDecoder) -> tuple:
        attn, embedding = decoder.layers[0].attn, decoder.tok_embeddings
        return attn.num_kv_heads, attn.head_dim, embedding.num_embeddings, embedding.weight.dtype

    if shape(drafter) != shape(model):
        raise ConfigError(
            f"drafter: its key heads, head_dim, vocabulary and dtype are {shape(drafter)}, and the model's "
            f"{shape(model)}. Allowed: a decoder that shares cache and vocabulary, such as a quantised copy"
        )


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
