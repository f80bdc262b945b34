"""Layer dropout (paper, eq. 1-4): the rates D(l) and S(t), and the draw of the samples that stay in each layer.

Applying the draw is the decoder's business (`decoder.py`): here is only the arithmetic and the generator.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch

from layerskip_recipes.config.checks import check_choice, check_number
from layerskip_recipes.config.layer_strings import select_layers

# D(l) over the relative depth u = l / (L-1) and the number of steps n = L-1.
LAYER_SCALES: dict[str, Callable[[float, int], float]] = {
    "exp": lambda u, n: math.exp(u * math.log(2)) - 1,
    "uniform": lambda u, n: 1.0,
    "linear": lambda u, n: u,
    "log": lambda u, n: math.log(u * n + 1) / math.log(n + 1),
    "sin": lambda u, n: math.sin(0.5 * math.pi * u),
    "sigmoid": lambda u, n: 1 / (1 + math.exp(-10 * (u - 0.5))),
    "step": lambda u, n: 0.0 if u < 1 else 1.0,
}
SCHEDULES = ("constant", "exp", "progressive")

# The rows of a batch that stay in a layer: None for all; IDLE where none of this rank's stays, and other ranks run it.
IDLE: Literal["idle"] = "idle"
Kept = list[int] | None | Literal["idle"]


def dropout_rates(num_layers: int, prob: float, layers_scale: str = "exp", layers: str = ":") -> list[float]:
    """The probability p_l = D(l) p_max that a sample skips layer l, at S(t) = 1 (paper, eq. 2-3).

    D(l) = exp(l ln2 / (L-1)) - 1 for the scale "exp": 0 in the first layer, 1 in the last.

    Args:
        num_layers: L.
        prob: p_max, in [0, 1].
        layers_scale: the form of D, one of `LAYER_SCALES`.
        layers: the layers that drop at all; D(l) stays a function of l in the whole model.

    Returns:
        L probabilities.

    Raises:
        ValueError: if prob or layers is out of range, or the scale is unknown.
    """
    check_number("layer_dropout.prob", prob, minimum=0, maximum=1, integer=False, example=0.1)
    check_choice("layer_dropout.layers_scale", layers_scale, LAYER_SCALES)
    selected = select_layers(layers, num_layers, key="layer_dropout.layers")
    steps = max(num_layers - 1, 1)
    # A model of one layer has no depth to scale over: its only layer is the last one.
    depth = [layer / steps if num_layers > 1 else 1.0 for layer in range(num_layers)]
    return [prob * LAYER_SCALES[layers_scale](depth[layer], steps) * selected[layer] for layer in range(num_layers)]


def schedule_scale(step: int, total_steps: int, schedule: str = "constant") -> float:
    """S(t) (paper, eq. 4): 1 for "constant"; exp(t ln2 / (T-1)) - 1 for "exp", from 0 at t = 0 to 1 at t = T-1.

    "progressive" is 1 - exp(-100 t / T), the schedule of Progressive Layer Dropping (arXiv 2010.13369): near 1 soon.

    Raises:
        ValueError: if the schedule is unknown.
    """
    check_choice("layer_dropout.schedule", schedule, SCHEDULES)
    if schedule == "constant" or total_steps <= 1:
        return 1.0
    if schedule == "progressive":
        return 1 - math.exp(-100 * step / total_steps)
    return math.exp(min(step, total_steps - 1) * math.log(2) / (total_steps - 1)) - 1


class LayerDropout:
    """Draws, per layer and sample, who stays: M(p_{l,t}) of eq. 1, with p_{l,t} = S(t) D(l) p_max.

    The generator is its own and lives on the CPU: no other random number moves it, every rank that seeds it alike
    makes the same draw, and a GPU never waits for it.

    Args:
        num_layers: L.
        prob, layers_scale, layers: see `dropout_rates`.
        schedule: S(t), see `schedule_scale`; `set_step` moves t.
        seed: of the generator. The same on every rank.
        batch_size: the most rows of a batch on any rank. So many are drawn for, however many this rank's batch has:
            the generators of all ranks stay alike, and each rank knows which layers run anywhere.

    Raises:
        ValueError: as `dropout_rates` and `schedule_scale` do.
    """

    def __init__(
        self,
        num_layers: int,
        prob: float,
        layers_scale: str = "exp",
        layers: str = ":",
        schedule: str = "constant",
        seed: int = 0,
        batch_size: int = 1,
    ) -> None:
        self.batch_size = batch_size
        self.rates = dropout_rates(num_layers, prob, layers_scale, layers)
        self.schedule = schedule
        self.scale = schedule_scale(0, 1, schedule)
        self.generator = torch.Generator().manual_seed(seed)

    def set_step(self, step: int, total_steps: int) -> None:
        """Move to optimizer step `step` of `total_steps` (from 0)."""
        self.scale = schedule_scale(step, total_steps, self.schedule)

    @property
    def max_rate(self) -> float:
        """The largest p_{l,t} of any layer now."""
        return self.scale * max(self.rates)

    def draw(self, batch_size: int) -> list[Kept]:
        """Who stays in each layer at this forward pass.

        Args:
            batch_size: b, the rows of this rank's batch.

        Returns:
            For each layer the kept row numbers in order, None when all stay, or `IDLE`.
        """
        if self.max_rate == 0:
            return [None] * len(self.rates)
        uniform = torch.rand(len(self.rates), max(batch_size, self.batch_size), generator=self.generator)
        keep = (uniform >= self.scale * torch.tensor(self.rates)[:, None]).tolist()
        kept: list[Kept] = []
        for everyone in keep:
            mine = [row for row, stays in enumerate(everyone[:batch_size]) if stays]
            kept.append(None if len(mine) == batch_size else IDLE if not mine and any(everyone) else mine)
        return kept

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same draws."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
