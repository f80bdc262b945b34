"""Layer dropout (paper, eq. 1-4): the rates D(l) and S(t), and the random draw, which decoder.py applies."""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from layerskip_recipes.config.layer_strings import select_layers
from layerskip_recipes.config.schema import Fraction, Layers, PositiveInt, Section, checked_arguments

LayerScale = Literal["exp", "uniform", "linear", "log", "sin", "sigmoid", "step"]
Schedule = Literal["constant", "exp", "progressive", "linear_decay"]
Probability = Annotated[Fraction, Field(examples=[0.1])]

# D(l) over the relative depth u = l / (L-1) and the number of steps n = L-1.
LAYER_SCALES: dict[LayerScale, Callable[[float, int], float]] = {
    "exp": lambda u, n: math.exp(u * math.log(2)) - 1,
    "uniform": lambda u, n: 1.0,
    "linear": lambda u, n: u,
    "log": lambda u, n: math.log(u * n + 1) / math.log(n + 1),
    "sin": lambda u, n: math.sin(0.5 * math.pi * u),
    "sigmoid": lambda u, n: 1 / (1 + math.exp(-10 * (u - 0.5))),
    "step": lambda u, n: 0.0 if u < 1 else 1.0,
}

KeptRows = list[int] | None  # the batch rows that a layer runs on; None for all


@checked_arguments("layer_dropout.")
def dropout_rates(
    num_layers: PositiveInt, prob: Probability, layers_scale: LayerScale = "exp", layers: Layers = ":"
) -> list[float]:
    """The probability p_l = D(l) p_max that a sample skips layer l, at S(t) = 1 (paper, eq. 2-3).

    D(l) = exp(l ln2 / (L-1)) - 1 for the scale "exp": 0 in the first layer, 1 in the last.

    Args:
        num_layers: L.
        prob: p_max, in [0, 1].
        layers_scale: the form of D.
        layers: the layers that may be skipped, as in `select_layers`. D(l) still depends on l in the whole model.

    Returns:
        L probabilities.

    Raises:
        ConfigError: if an argument is out of range.
    """
    selected = select_layers(layers, num_layers, key="layer_dropout.layers")
    steps = max(num_layers - 1, 1)
    # The only layer of a one-layer model counts as the last layer.
    depth = [layer / steps if num_layers > 1 else 1.0 for layer in range(num_layers)]
    return [prob * LAYER_SCALES[layers_scale](depth[layer], steps) * selected[layer] for layer in range(num_layers)]


@checked_arguments("layer_dropout.")
def schedule_scale(step: int, total_steps: int, schedule: Schedule = "constant") -> float:
    """S(t) (paper, eq. 4): 1 for "constant"; exp(t ln2 / (T-1)) - 1 for "exp", from 0 at t = 0 to 1 at t = T-1.

    "progressive" is 1 - exp(-100 t / T), the schedule of Progressive Layer Dropping (arXiv 2010.13369); it approaches 1
    quickly. "linear_decay" is 1 - t / (T-1), the schedule of Don't Drop Dropout (arXiv 2609.05275): from 1 in the first
    step to 0 in the last.

    Raises:
        ConfigError: if the schedule is unknown.
    """
    if schedule == "constant" or total_steps <= 1:
        return 1.0
    if schedule == "progressive":
        return 1 - math.exp(-100 * step / total_steps)
    done = min(step, total_steps - 1) / (total_steps - 1)
    return 1 - done if schedule == "linear_decay" else math.exp(done * math.log(2)) - 1


class LayerDropoutSection(Section):
    """Layer dropout (paper, eq. 1 to 4)."""

    prob: Probability
    """p_max, the largest probability that a sample skips a layer."""
    layers_scale: LayerScale = "exp"
    """D(l), how the probability grows with the depth; `exp` is the paper's."""
    layers: Layers = ":"
    """The layers that may be skipped, such as ":", "0::4" or "8,12,16"."""
    schedule: Schedule = "constant"
    """S(t), how the probabilities change during the training; `exp` grows from 0 to 1, `linear_decay` falls to 0."""
    inverted: bool = True
    """Divide what a kept layer adds by its keep probability, as in inverted dropout; false: LayerSkip's plain sum."""


class LayerDropout:
    """Draws the samples that stay in each layer: M(p_{l,t}) of eq. 1, with p_{l,t} = S(t) D(l) p_max.

    A kept sample gets x_{l+1} = x_l + r f_l(x_l) with r = 1 / (1 - p_{l,t}), as in Don't Drop Dropout (arXiv
    2609.05275): for a given x_l, the mean of x_{l+1} is that of evaluation, which runs every layer. With
    `inverted=False`, r = 1 as in LayerSkip and torchtune: evaluation then adds more to the residual stream than
    training did on average.

    The draw has its own random generator on the CPU: other random numbers do not affect it, and a GPU need not wait.
    Ranks with the same seed and batch size draw the same rows, so they run the same layers. `settings` are the keys of
    `LayerDropoutSection`.
    """

    def __init__(self, num_layers: int, *, seed: int = 0, **settings: Any) -> None:
        section = LayerDropoutSection.parse(settings, "layer_dropout")
        self.rates = dropout_rates(num_layers, section.prob, section.layers_scale, section.layers)
        self.schedule: Schedule = section.schedule
        self.inverted = section.inverted
        self.scale = schedule_scale(0, 1, self.schedule)
        self.generator = torch.Generator().manual_seed(seed)

    def set_step(self, step: int, total_steps: int) -> None:
        """Move to optimizer step `step` of `total_steps` (from 0)."""
        self.scale = schedule_scale(step, total_steps, self.schedule)

    @property
    def max_rate(self) -> float:
        """The largest p_{l,t} of any layer at the current step."""
        return self.scale * max(self.rates)

    def factors(self) -> list[float]:
        """For each layer the factor r of what it adds to a kept sample; 1 also where no sample is kept."""
        rates = [self.scale * rate if self.inverted else 0.0 for rate in self.rates]
        return [1 / (1 - rate) if rate < 1 else 1.0 for rate in rates]

    def draw(self, batch_size: int) -> list[KeptRows]:
        """For each layer the kept batch rows in order, or None if it keeps all."""
        if self.max_rate == 0:
            return [None] * len(self.rates)
        uniform = torch.rand(len(self.rates), batch_size, generator=self.generator)
        keep = (uniform >= self.scale * torch.tensor(self.rates)[:, None]).tolist()
        return [None if all(stays) else [row for row in range(batch_size) if stays[row]] for stays in keep]

    def state_dict(self) -> dict[str, Any]:
        """The generator's state, so that a resumed run continues with the same draws."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
