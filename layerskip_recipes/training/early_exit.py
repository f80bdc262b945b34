"""Early-exit loss (paper, eq. 5-6): the weights of the exits, the curricula, and the loss itself.

`enabled[l]` and `exit_weights[l]` belong to the loss on x_{l+1}, the output of layer l, as in the paper.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from layerskip_recipes.config.checks import check_choice, check_number
from layerskip_recipes.config.layer_strings import select_layers
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.head import Head
from layerskip_recipes.training.chunked_loss import ExitLosses, cross_entropy_

# e(l) for l < L-1 is scale * f(l); the last layer's is f(L-1), but for the paper's own function below.
SCALE_FNS: dict[str, Callable[[int], float]] = {
    "layerskip": lambda layer: layer * (layer + 1) / 2,
    "uniform": lambda layer: 1.0,
    "linear": lambda layer: layer + 1.0,
    "sqrt": lambda layer: math.sqrt(layer + 1),
    "inverse": lambda layer: 1 / (layer + 1),
    "inverse_sqrt": lambda layer: 1 / math.sqrt(layer + 1),
}
CURRICULA = ("rotational", "gradual", None)


def exit_weights(num_layers: int, enabled: list[bool], scale: float, scale_fn: str = "layerskip") -> torch.Tensor:
    """The normalised weights e~(t, l) = C(t,l) e(l) / sum_i C(t,i) e(i) (paper, eq. 6).

    For scale_fn "layerskip": e(l) = scale * l(l+1)/2 for l < L-1, and e(L-1) = L-1 + scale * (L-2)(L-1)/2.

    Args:
        num_layers: L.
        enabled: C(t, l), L flags.
        scale: e_scale, 0 or more. 0 leaves the ordinary loss.
        scale_fn: one of `SCALE_FNS`.

    Returns:
        [L] tensor that sums to 1.

    Raises:
        ValueError: if the scale function is unknown, the scale negative, or no enabled exit has a weight.
    """
    check_choice("early_exit_loss.scale_fn", scale_fn, SCALE_FNS)
    check_number("early_exit_loss.scale", scale, minimum=0, integer=False, example=0.2)
    f = SCALE_FNS[scale_fn]
    last = num_layers - 1
    last_weight = last + scale * f(last - 1) if scale_fn == "layerskip" else f(last)
    weights = [scale * f(layer) for layer in range(last)] + [last_weight if last else 1.0]
    weights = torch.tensor([w * on for w, on in zip(weights, enabled, strict=True)], dtype=torch.float64)
    if weights.sum() <= 0:
        raise ConfigError("early_exit_loss: no enabled exit has a weight above 0; the last layer must be enabled")
    return (weights / weights.sum()).float()


def enabled_exits(
    curriculum: str | None,
    step: int,
    total_steps: int,
    num_layers: int,
    interval: int = 8,
    layers: str = ":",
) -> list[bool]:
    """C(t, l): the exits whose loss is on at an optimizer step. The last layer always is.

    - "rotational": every interval-th of the selected layers, and the set rotates by one at each step: ceil(L/R) exits.
    - "gradual": from the last layer down, one layer more every T/(2L) steps, all on at T/2.
    - None: all the selected layers, at each step (as in LITE).

    Args:
        curriculum: "rotational", "gradual" or None.
        step: t, from 0.
        total_steps: T.
        num_layers: L.
        interval: R of the rotational curriculum.
        layers: the layers that may have a loss, as in `select_layers`.

    Returns:
        L flags.

    Raises:
        ValueError: if the curriculum is unknown, interval is below 1, or layers selects nothing.
    """
    check_choice("early_exit_loss.curriculum", curriculum, CURRICULA)
    check_number("early_exit_loss.interval", interval, minimum=1, example=8)
    enabled = select_layers(layers, num_layers, key="early_exit_loss.layers")
    if curriculum == "rotational":
        for place, layer in enumerate([layer for layer in range(num_layers) if enabled[layer]]):
            enabled[layer] = place % interval == step % interval
    elif curriculum == "gradual":
        lowest = num_layers - 1 - 2 * num_layers * step // max(total_steps, 1)
        enabled = [on and layer >= lowest for layer, on in enumerate(enabled)]
    enabled[-1] = True
    return enabled


class EarlyExitLoss:
    """J = sum_l e~(t, l) CE(g(x_{l+1}), Y) (paper, eq. 5).

    The exits are unembedded one after the other, in chunks of tokens, and the gradient of each chunk is taken at
    once: the logits of one chunk are all that exists at a time, whatever the number of exits.

    Args:
        scale: e_scale.
        curriculum: "rotational", "gradual" or None, see `enabled_exits`.
        interval: R of the rotational curriculum.
        layers: the layers that may have a loss.
        scale_fn: see `exit_weights`.
        ignore_index: the label that counts nowhere.
        label_smoothing: of the cross-entropy.
        chunk_tokens: the most tokens whose logits exist at a time.

    Raises:
        ValueError: if an argument is out of range (layers once the depth of the model is known).
    """

    def __init__(
        self,
        scale: float = 0.2,
        curriculum: str | None = "rotational",
        interval: int = 8,
        layers: str = ":",
        scale_fn: str = "layerskip",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        chunk_tokens: int = 512,
    ) -> None:
        self.scale, self.scale_fn = scale, scale_fn
        self.curriculum, self.interval, self.layers = curriculum, interval, layers
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        check_number("early_exit_loss.chunk_tokens", chunk_tokens, minimum=1, example=512)
        self.chunk_tokens = chunk_tokens
        enabled_exits(curriculum, 0, 1, 1, interval)
        exit_weights(1, [True], scale, scale_fn)

    def enabled(self, num_layers: int, step: int, total_steps: int) -> list[bool]:
        """C(t, l) of this loss, see `enabled_exits`."""
        return enabled_exits(self.curriculum, step, total_steps, num_layers, self.interval, self.layers)

    def __call__(
        self,
        model: LayerSkipDecoder,
        tokens: torch.Tensor,
        labels: torch.Tensor,
        *,
        step: int,
        total_steps: int,
        counted: torch.Tensor | None = None,
        **inputs: Any,
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """The loss of one batch.

        Args:
            model: the decoder.
            tokens: [b, s].
            labels: [b, s], already shifted: labels[:, i] follows tokens[:, i]; `ignore_index` where there is none.
            step, total_steps: t and T, in optimizer steps.
            counted: [n], the places of the labels that count in labels.flatten(), which alone get logits. None: they
                are looked for, and on a GPU the host waits for the answer.
            **inputs: mask, input_pos, ... of the decoder.

        Returns:
            J, a scalar, and {E: the cross-entropy at exit E, detached}; both are means over the labels that count.
        """
        on = self.enabled(model.num_layers, step, total_steps)
        weights = exit_weights(model.num_layers, on, self.scale, self.scale_fn).tolist()
        # An exit of weight 0 (layer 0 in the paper's e(l), or scale 0) is still measured, and costs no backward.
        exits = [layer + 1 for layer, enabled in enumerate(on) if enabled]
        labels = labels.reshape(-1)
        if counted is None:
            counted = (labels != self.ignore_index).nonzero()[:, 0]

        def losses(_: torch.Tensor, hidden: dict[int, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            head = Head(model)
            return ExitLosses.apply(
                self,
                head,
                labels,
                counted,
                [weights[e - 1] for e in exits],
                torch.is_grad_enabled(),
                *head.parameters,
                *(hidden[e].flatten(0, 1) for e in exits),
            )

        # Inside of the walk, where a sharded model's own parameters are whole.
        total, per_exit = model(tokens, exits=exits, then=losses, **inputs)
        return total, dict(zip(exits, per_exit.unbind(), strict=True))

    def compile(self) -> None:
        """Compile what is done to the logits of a chunk."""
        for name in ("sum_of_chunk", "gradient_of_chunk"):
            setattr(self, name, torch.compile(getattr(self, name), dynamic=True))

    def sum_of_chunk(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy in fp32, summed over the labels that count. logits [n, v], labels [n]."""
        return F.cross_entropy(
            logits.float(),
            labels,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )

    def gradient_of_chunk(self, logits: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """As `sum_of_chunk`; besides, the gradient of scale times it takes the logits' place."""
        wide = logits.float()
        chunk_sum = cross_entropy_(wide, labels, scale, self.ignore_index, self.label_smoothing)
        if wide is not logits:
            logits.copy_(wide)
        return chunk_sum
