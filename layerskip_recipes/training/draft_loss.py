"""The `draft` section and the loss of a draft.

The draft (model/draft.py) learns from the model and changes nothing in it. The model is frozen, and then runs forward
without keeping activations, or it is finetuned in the same step.
"""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn
from torchtune.modules import TransformerDecoder

from layerskip_recipes.config.layer_strings import default_exit
from layerskip_recipes.config.schema import AUTO, Auto, Flag, PositiveInt, Section, check
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.adapters import without_adapters
from layerskip_recipes.model.decoder import LayerSkipDecoder, on_device
from layerskip_recipes.model.draft import Draft, Kind
from layerskip_recipes.model.head import Head
from layerskip_recipes.training.chunked_loss import ChunkLoss, ChunkTokens, exit_losses, token_loss_
from layerskip_recipes.training.compiled import compiled
from layerskip_recipes.training.early_exit import EarlyExitLoss


class DraftSection(Section):
    """Train a draft, in place of `layer_dropout` and `early_exit_loss`."""

    exit_layer: Annotated[PositiveInt, Field(examples=[6]), Auto()]
    """E: the draft copies the model's first E layers, or continues from the hidden state after them; auto: a seventh of
    the depth."""
    kind: Kind = "adapter"
    """`adapter` trains a new layer on top of the model's first E layers; it also sees the last layer's state of the
    previous token. `copy` trains a copy of the first E layers, which other programs can run as a model of its own. Both
    have their own norm before the model's head."""
    finetune_model: Flag = False
    """Finetune the model, or its adapters, in the same run, on its last layer's loss; the draft changes nothing in it.
    false: the model is frozen."""
    vocabulary: Annotated[PositiveInt, Field(examples=[4096])] | None = None
    """The draft chooses among this many tokens, the most frequent ones of the data; null: among all. A smaller
    vocabulary trains and drafts faster if the head is a large part of the model."""
    chunk_tokens: ChunkTokens = AUTO
    """At most this many tokens have logits at a time; auto: 2048 on a GPU, 512 elsewhere."""

    def check_against(self, model: TransformerDecoder) -> None:
        num_layers = len(model.layers)
        if num_layers == 1:
            raise ConfigError("draft: needs a model of 2 layers or more, and this one has 1. Set draft=null")
        exits = Field(
            ge=1, le=num_layers - 1, examples=[default_exit(num_layers)]
        )  # the draft must have something to skip
        check("draft.exit_layer", self.exit_layer, Annotated[int, exits])

    def build(self, model: LayerSkipDecoder) -> Draft:
        """A new draft. A copy starts with the model's weights. All of its own are trained, also beside adapters."""
        return without_adapters(Draft(model, self.kind, self.exit_layer)).requires_grad_(True)


class DraftLoss:
    """The loss of a draft: KL(p || q) of the last layer's distribution p and the draft's q.

    Both use the model's head. If the draft has its own vocabulary, p is renormalised over it. `model_loss` is the loss
    of a model that is finetuned as well; without it the model is frozen.
    """

    def __init__(self, section: DraftSection, draft: Draft, model_loss: EarlyExitLoss | None = None) -> None:
        self.section, self.draft, self.model_loss = section, draft, model_loss
        self.chunk_loss: ChunkLoss = token_loss_

    def compile(self) -> None:
        self.chunk_loss = compiled(self.chunk_loss, "the loss", num_dynamic=2)
        if self.model_loss is not None:
            self.model_loss.compile()

    def __call__(
        self,
        model: LayerSkipDecoder,
        tokens: torch.Tensor,
        labels: torch.Tensor,
        *,
        counted: torch.Tensor,
        step: int = 0,
        total_steps: int = 1,
        **inputs: Any,
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """The sum of the draft's loss and the model's, means over the labels that count, and the model's by exit.

        labels [b, s] are already shifted; `counted` [n] indexes labels.flatten().
        """
        # The model's states, and the draft's states computed from them.
        total_of_model: torch.Tensor | float = 0.0
        by_exit: dict[int, torch.Tensor] = {}
        if self.model_loss is not None:
            by_layer: dict[int, torch.Tensor] = {}
            keep = self.draft.keeper(model, tokens, by_layer)
            total_of_model, by_exit = self.model_loss(
                model, tokens, labels, step=step, total_steps=total_steps, counted=counted, on_exit=keep, **inputs
            )
            x, last = by_layer[self.draft.start], by_layer[model.num_layers]
        else:
            x, last = self.draft.teacher_states(model, tokens, **inputs)
        states = self.draft.states(x, last, **inputs)
        final = last.flatten(0, 1)
        head = Head(model, norm=nn.Identity())  # the states are already normed
        vocabulary = self.draft.vocabulary
        head = head.cut(slice(None) if vocabulary is None else on_device(vocabulary, labels.device))

        total, _ = exit_losses(
            head,
            states,
            [1 / len(states)] * len(states),
            labels.reshape(-1),
            counted,
            self.chunk_loss,
            self.section.chunk_tokens,
            teacher=lambda rows: head.unembed(final[rows]),
        )
        return total_of_model + total, by_exit
