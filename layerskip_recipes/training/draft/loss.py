"""A draft for a model that stays as it is: its section and its loss.

Only the draft (model/draft.py) is trained. The model, its teacher, runs forward without activations kept for it.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.modules import TransformerDecoder

from layerskip_recipes.config.schema import Flag, Fraction, PositiveInt, Section
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.decoder import LayerSkipDecoder, on_device, take_rows
from layerskip_recipes.model.draft import Draft, Kind
from layerskip_recipes.model.head import Head
from layerskip_recipes.training.chunked_loss import ChunkLoss, ChunkTokens, compiled, exit_losses, token_loss_
from layerskip_recipes.training.draft.kept_states import KeptStates


class DraftSection(Section):
    """A draft for a model that stays as it is, in place of `layer_dropout` and `early_exit_loss`."""

    exit_layer: Annotated[PositiveInt, Field(examples=[6])]
    """E: the draft is a copy of the first E layers, or goes on from the hidden state after them."""
    kind: Kind = "adapter"
    """`adapter` trains new layers on the model's own first E ones and its last layer's state of the token before;
    `copy` a copy of the first E layers, which other programs can run as a model of its own. Both have a norm of their
    own in front of the model's head."""
    num_layers: PositiveInt | None = None
    """Layers of an adapter, 1 by default."""
    vocabulary: Annotated[PositiveInt, Field(examples=[4096])] | None = None
    """How many tokens the draft chooses among, at most: the most frequent ones of the data; null: all. Fewer train and
    draft faster where the head is a large part of the model."""
    target: Literal["distribution", "argmax", "overlap", "overlap+distribution"] = "distribution"
    """What the draft learns: the last layer's distribution, its most likely tokens, or the overlap with the
    distribution by 1 - sum(min(p, q)), the rate at which sampled drafts are rejected, alone or added to the first."""
    own_text: Fraction = 0.0
    """The part of the micro-batches that are continuations by the model itself. They are written in batches of 64 when
    they are needed, kept in own_text.jsonl in `output_dir`, and come again in each epoch."""
    own_text_temperature: Annotated[float, Field(ge=0, examples=[1.0])] = 1.0
    """The temperature of these texts; 0 is greedy."""
    keep_states: Flag = False
    """Run the model once for each text and keep its states for further epochs, which then train the draft alone: in
    bf16 in a file in `output_dir`, 4 x embed_dim bytes for each token, which goes when the run ends."""
    chunk_tokens: ChunkTokens = None
    """The most tokens whose logits exist at a time; null: 2048 on a GPU, 512 elsewhere."""

    def check_against(self, model: TransformerDecoder) -> None:
        """Raises a ConfigError if the draft does not fit a model, on any device."""
        most = len(model.layers) - 1
        if self.exit_layer > most:
            raise ConfigError(
                f"draft.exit_layer: {self.exit_layer} leaves nothing to save. Allowed: 1..{most}; for example "
                f"draft.exit_layer={max(len(model.layers) // 4, 1)}"
            )
        if self.kind == "copy" and self.num_layers is not None:
            raise ConfigError(
                f"draft.num_layers: {self.num_layers} is for draft.kind=adapter; a copy has exit_layer layers. "
                "Set draft.num_layers=null"
            )
        most = len(model.layers) - self.exit_layer
        if self.num_layers is not None and self.num_layers > most:
            raise ConfigError(
                f"draft.num_layers: {self.num_layers} is more than the model has from layer {self.exit_layer} on. "
                f"Allowed: 1..{most}; for example draft.num_layers=1"
            )

    def build(self, model: LayerSkipDecoder) -> Draft:
        """The draft; a copy has copies of the model's weights."""
        return Draft(model, self.kind, self.exit_layer, self.num_layers or 1)


class DraftLoss:
    """The loss of a draft, in place of `EarlyExitLoss`: KL(p || q) of the last layer's distribution p and the draft's
    q, both of the same head, or another target.

    If the draft has a vocabulary of its own, p is renormalised over it. `kept` holds the model's states for later
    epochs.
    """

    def __init__(self, section: DraftSection, draft: Draft, kept: KeptStates | None = None) -> None:
        self.section, self.draft, self.kept = section, draft, kept
        self.chunk_loss: ChunkLoss = token_loss_

    def compile(self) -> None:
        """Compile the computation on the logits of a chunk."""
        self.chunk_loss = compiled(token_loss_)

    def __call__(
        self,
        model: LayerSkipDecoder,
        tokens: torch.Tensor,
        labels: torch.Tensor,
        *,
        counted: torch.Tensor,
        **inputs: Any,
    ) -> torch.Tensor:
        """The mean loss over the tokens whose labels [b, s], already shifted, count; `counted` [n] has their indices in
        labels.flatten()."""

        def states_of(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
            some = on_device(rows, tokens.device)
            of_rows = take_rows(inputs, some, len(tokens))
            return self.draft.teacher_states(model, tokens[some], **of_rows)

        if self.kept is None:
            x, last = self.draft.teacher_states(model, tokens, **inputs)
        else:
            x, last = self.kept.states(tokens, labels != CROSS_ENTROPY_IGNORE_IDX, states_of, inputs)
        states = self.draft.states(x, last, **inputs)
        final = last.flatten(0, 1)
        head = Head(model, norm=nn.Identity())  # both states are normed already
        if self.draft.vocabulary is not None:
            head = head.cut(on_device(self.draft.vocabulary, labels.device))

        def teacher(rows: Any) -> Any:
            logits = head.unembed(final[rows])
            if self.section.target.startswith("overlap"):
                return logits, None if self.section.target == "overlap" else logits
            return logits if self.section.target == "distribution" else logits.argmax(-1)

        total, _ = exit_losses(
            head,
            states,
            [1 / len(states)] * len(states),
            labels.reshape(-1),
            counted,
            self.chunk_loss,
            self.section.chunk_tokens,
            teacher=teacher,
            taught=len(states),
        )
        return total
