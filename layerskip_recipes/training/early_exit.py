"""Early-exit loss (paper, eq. 5-6): the weights of the exits, the curricula, and the loss itself.

`enabled[l]` and `exit_weights[l]` belong to the loss on x_{l+1}, the output of layer l, as in the paper.
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from layerskip_recipes.config.layer_strings import select_exits
from layerskip_recipes.config.schema import AUTO, Auto, Exits, PositiveInt, Section, checked_arguments
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.decoder import LayerSkipDecoder, OnExit
from layerskip_recipes.model.head import Head
from layerskip_recipes.training.chunked_loss import ChunkLoss, ChunkTokens, exit_losses, token_loss_
from layerskip_recipes.training.compiled import compiled

ScaleFn = Literal["layerskip", "uniform", "linear", "sqrt", "inverse", "inverse_sqrt"]
Curriculum = Literal["rotational", "gradual"] | None
Scale = Annotated[float, Field(ge=0, examples=[0.2])]
Interval = Annotated[int, Field(ge=1, examples=[8])]

# e(l) for l < L-1 is scale * f(l), and e(L-1) is f(L-1); the paper's "layerskip" has another e(L-1), see exit_weights.
SCALE_FNS: dict[ScaleFn, Callable[[int], float]] = {
    "layerskip": lambda layer: layer * (layer + 1) / 2,
    "uniform": lambda layer: 1.0,
    "linear": lambda layer: layer + 1.0,
    "sqrt": lambda layer: math.sqrt(layer + 1),
    "inverse": lambda layer: 1 / (layer + 1),
    "inverse_sqrt": lambda layer: 1 / math.sqrt(layer + 1),
}


@checked_arguments("early_exit_loss.")
def exit_weights(
    num_layers: PositiveInt, enabled: Sequence[bool], scale: Scale, scale_fn: ScaleFn = "layerskip"
) -> torch.Tensor:
    """The normalised weights e~(t, l) = C(t,l) e(l) / sum_i C(t,i) e(i) (paper, eq. 6).

    For scale_fn "layerskip": e(l) = scale * l(l+1)/2 for l < L-1, and e(L-1) = L-1 + scale * (L-2)(L-1)/2.

    Args:
        num_layers: L.
        enabled: C(t, l), L flags.
        scale: e_scale, 0 or more. With 0, only the last layer has a weight.
        scale_fn: the form of e(l).

    Returns:
        [L] tensor that sums to 1.

    Raises:
        ConfigError: if an argument is out of range, or no enabled exit has a weight.
    """
    f = SCALE_FNS[scale_fn]
    last = num_layers - 1
    last_weight = last + scale * f(last - 1) if scale_fn == "layerskip" else f(last)
    weights = [scale * f(layer) for layer in range(last)] + [last_weight if last else 1.0]
    e = torch.tensor([w * on for w, on in zip(weights, enabled, strict=True)], dtype=torch.float64)
    if e.sum() <= 0:
        raise ConfigError("early_exit_loss: no enabled exit has a weight above 0; the last layer must be enabled")
    return (e / e.sum()).float()


@checked_arguments("early_exit_loss.")
def enabled_exits(
    curriculum: Curriculum,
    step: int,
    total_steps: int,
    num_layers: PositiveInt,
    interval: Interval = 8,
    exits: Exits = ":",
) -> list[bool]:
    """C(t, l): whether each exit has a loss at optimizer step t. The last layer always has one.

    - "rotational": every R-th of the selected exits, ceil(L/R) of all L. The set moves by one exit at each step.
    - "gradual": from the last exit down, one more exit every T/(2L) steps, and all of them after T/2.
    - None: all selected exits at each step, as in LITE.

    Args:
        curriculum: "rotational", "gradual" or None.
        step: t, from 0.
        total_steps: T.
        num_layers: L.
        interval: R of the rotational curriculum.
        exits: the exits that may have a loss, of 1..L, as in `select_exits`.

    Returns:
        L flags.

    Raises:
        ConfigError: if an argument is out of range, or exits selects nothing.
    """
    selected = select_exits(exits, num_layers, key="early_exit_loss.exits")
    if curriculum == "rotational":
        selected = selected[step % interval :: interval]
    elif curriculum == "gradual":
        lowest = num_layers - 2 * num_layers * step // max(total_steps, 1)
        selected = [exit_layer for exit_layer in selected if exit_layer >= lowest]
    return [exit_layer in (*selected, num_layers) for exit_layer in range(1, num_layers + 1)]


class EarlyExitLossSection(Section):
    """The losses of early exits (paper, eq. 5)."""

    scale: Scale = 0.2
    """e_scale, the weight of the early exits relative to the last layer; 0 trains on the last layer's loss only."""
    curriculum: Curriculum = "rotational"
    """Which exits have a loss at a step. `rotational`: every `interval`-th exit, moving by one exit at each step.
    `gradual`: from the last exit down, reaching all of them after half of the steps. null: all at each step. The last
    layer always has a loss."""
    interval: Annotated[Interval, Auto()] = 8
    """R of the rotational curriculum; auto: 8, or half of the layers in models of more than 32."""
    exits: Annotated[Exits, Auto()] = ":"
    """The exits that may have a loss, such as ":", "4::4" or "8,12,16"; exit E comes after E layers. auto: all of them
    with a curriculum, otherwise the exit at a seventh of the depth."""
    scale_fn: ScaleFn = "layerskip"
    """How an exit's weight depends on its layer l; `layerskip` is the paper's sum 0 + 1 + ... + l."""
    label_rows_only: bool = True
    """The loss of early exits changes only those rows of the head's matrix whose tokens have been labels in an earlier
    step. false: all rows, as in the paper."""
    chunk_tokens: ChunkTokens = AUTO
    """At most this many tokens have logits at a time; auto: 2048 on a GPU, 512 elsewhere."""


class EarlyExitLoss:
    """J = sum_l e~(t, l) CE(g(x_{l+1}), Y) (paper, eq. 5).

    Exits are unembedded one after the other in chunks of tokens, and each chunk's gradient is computed immediately. So
    only one chunk has logits at a time, for any number of exits.

    Args:
        label_smoothing: as in torch.nn.CrossEntropyLoss.
        **settings: the fields of `EarlyExitLossSection`. With `label_rows_only`, the caller passes `head_rows`.

    Raises:
        ConfigError: if an argument is out of range (exits: once the model's depth is known).
    """

    def __init__(self, *, label_smoothing: float = 0.0, **settings: Any) -> None:
        section = EarlyExitLossSection.parse(settings, "early_exit_loss")
        self.scale, self.scale_fn = section.scale, section.scale_fn
        self.curriculum, self.interval, self.exits = section.curriculum, section.interval, section.exits
        self.chunk_tokens = section.chunk_tokens

        def chunk_loss(logits: torch.Tensor, target: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return token_loss_(logits, target, scale, label_smoothing)

        self.chunk_loss: ChunkLoss = chunk_loss

    def compile(self) -> None:
        self.chunk_loss = compiled(self.chunk_loss, "the loss", num_dynamic=2)

    def enabled(self, num_layers: int, step: int, total_steps: int) -> list[bool]:
        return enabled_exits(self.curriculum, step, total_steps, num_layers, self.interval, self.exits)

    def trained(self, num_layers: int, steps: int, total_steps: int) -> list[int]:
        """The exits that have been trained with a weight above 0 in the first `steps` steps."""
        # A rotation repeats after `interval` steps, and a gradual curriculum only adds exits.
        sets = [
            self.enabled(num_layers, t, total_steps) for t in {*range(min(steps, self.interval)), max(steps - 1, 0)}
        ]
        weights = exit_weights(num_layers, [any(on) for on in zip(*sets, strict=True)], self.scale, self.scale_fn)
        return (weights.nonzero()[:, 0] + 1).tolist()

    def __call__(
        self,
        model: LayerSkipDecoder,
        tokens: torch.Tensor,
        labels: torch.Tensor,
        *,
        step: int,
        total_steps: int,
        counted: torch.Tensor | None = None,
        head_rows: torch.Tensor | None = None,
        on_exit: OnExit | None = None,
        **inputs: Any,
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """The loss of one batch.

        Args:
            tokens: [b, s].
            labels: [b, s], already shifted: labels[:, i] follows tokens[:, i]; -100 is ignored.
            step: t, in optimizer steps.
            total_steps: T.
            counted: [n], the indices in labels.flatten() of the labels that count; only they get logits. None computes
                them here, which synchronises a GPU.
            head_rows: [v], 1 for each token whose row of the output matrix the early exits may change, else 0; None:
                all rows. The last layer's loss may always change all of them.
            on_exit: called after each layer, as the decoder's.
            **inputs: the decoder's mask, input_pos, ...

        Returns:
            J, a scalar, and {E: the detached loss of exit E}; both are means over the labels that count.
        """
        enabled = self.enabled(model.num_layers, step, total_steps)
        weights = exit_weights(model.num_layers, enabled, self.scale, self.scale_fn).tolist()
        # An exit of weight 0 (layer 0 of the paper's e(l), or scale 0) is measured without a backward pass.
        exits = [layer + 1 for layer, on in enumerate(enabled) if on]
        labels = labels.reshape(-1)
        if counted is None:
            counted = (labels != CROSS_ENTROPY_IGNORE_IDX).nonzero()[:, 0]
        hidden: dict[int, torch.Tensor] = {}
        losses: list[torch.Tensor] = []

        def keep(exit_layer: int, x: torch.Tensor) -> None:
            if on_exit is not None:
                on_exit(exit_layer, x)
            if exit_layer in exits:
                hidden[exit_layer] = x
            if exit_layer < model.num_layers:
                return
            # Compute the losses within the model's forward pass, while a sharded model's own parameters are gathered.
            head = Head(model)
            if torch.is_grad_enabled() and any(p.requires_grad for p in head.parameters):
                # FSDP reduces the head's gradients when the model's output gets its gradient. So the output needs a
                # gradient even if no layer is trained.
                x.requires_grad_()
            of_exits = [weights[e - 1] for e in exits]
            states = [hidden[e] for e in exits]
            settings = (self.chunk_loss, self.chunk_tokens)
            losses.extend(exit_losses(head, states, of_exits, labels, counted, *settings, head_rows=head_rows))

        model(tokens, on_exit=keep, unembed=False, **inputs)
        total, per_exit = losses
        return total, dict(zip(exits, per_exit.unbind(), strict=True))
