"""StochasticAdamW: AdamW for weights in bf16, whose small steps are rounded at random in place of to the nearest."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

SLICE = 2**24  # weights that are in fp32 at a time


class StochasticAdamW(Optimizer):
    """AdamW (arXiv 1711.05101) on weights, gradients and averages in bf16: 8 bytes per weight, where fp32 takes 16.

    Near 0.02 numbers in bf16 lie 1.2e-4 apart. Rounding to the nearest undoes a step of 2e-5; rounding up with a
    probability of the fraction that is cut off moves the weight by 2e-5 on average. The averages are rounded alike:
    with beta2 = 0.999 the second one changes by less than its precision. Weights in fp32 get plain AdamW.

    The noise follows from the number of the step and of the weight: a resumed run draws the same, and so do the
    processes that hold copies of a weight.

    Args:
        params: parameters, sharded or not, or groups of them.
        lr: the learning rate.
        betas: of the averages of the gradient and of its square.
        eps: added to the root of the second average.
        weight_decay: decoupled from the gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the weights that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        numbered = enumerate((group, p) for group in self.param_groups for p in group["params"])
        for number, (group, p) in numbered:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            state["step"] += 1
            step = int(state["step"])
            weight = _local(p)
            noise = torch.Generator(weight.device).manual_seed(step * 100_003 + number)
            w, m, v = (_local(x).view(-1) for x in (weight, state["exp_avg"], state["exp_avg_sq"]))
            grad = _local(p.grad).reshape(-1)
            for start in range(0, len(grad), SLICE):
                some = slice(start, start + SLICE)
                _update(w[some], m[some], v[some], grad[some], step, group, noise)
        return loss


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _update(
    weight: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    grad: torch.Tensor,
    step: int,
    group: dict[str, Any],
    noise: torch.Generator,
) -> None:
    """One step of a slice, in fp32 (fp64 for weights in fp64)."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    (beta1, beta2), lr = group["betas"], group["lr"]
    grad = grad.to(exact)
    m = mean.to(exact).lerp(grad, 1 - beta1)
    v = square.to(exact).lerp(grad.square(), 1 - beta2)
    denominator = (v / (1 - beta2**step)).sqrt_().add_(group["eps"])
    w = weight.to(exact) * (1 - lr * group["weight_decay"])
    w -= lr / (1 - beta1**step) * m / denominator
    for target, value in ((weight, w), (mean, m), (square, v)):
        round_into(target, value, noise)


def round_into(target: torch.Tensor, value: torch.Tensor, noise: torch.Generator) -> None:
    """Write values in fp32, which are overwritten, to a tensor in bf16, rounded at random without a bias."""
    if target.dtype is torch.bfloat16:
        # bf16 is the upper half of fp32's bits: the noise carries into it with the probability of the lower half.
        bits = value.view(torch.int32)
        bits += torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=noise)
        bits &= -(1 << 16)
    target.copy_(value)
