"""StochasticAdamW: AdamW for bf16 weights with stochastic rounding, so that small steps are not lost."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from layerskip_recipes.processes import local_part

# Weights converted to fp32 at a time: they fit into the caches of a CPU, and keep a GPU busy.
CPU_SLICE, GPU_SLICE = 2**18, 2**24


class StochasticAdamW(Optimizer):
    """AdamW (arXiv 1711.05101) on weights, gradients and averages in bf16: 8 bytes per weight instead of 16 in fp32.

    Near 0.02, bf16 numbers lie 1.2e-4 apart, so rounding to the nearest undoes a step of 2e-5. Stochastic rounding
    moves the weight by 2e-5 on average. The averages need it too: with beta2 = 0.999 the second one changes by less
    than its precision. Weights in fp32 get plain AdamW.

    The noise depends only on the step number and the parameter's number, from `first` on. So a resumed run draws the
    same noise, and so do ranks that hold copies of a weight. The arguments are those of `torch.optim.AdamW`.
    """

    first = 0  # number of the first parameter; other optimizers of `optimizer_in_bwd` have other numbers and noise

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
        with torch.enable_grad():
            loss = closure() if closure else None
        numbered = enumerate(((group, p) for group in self.param_groups for p in group["params"]), self.first)
        for number, (group, p) in numbered:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            state["step"] += 1
            step = int(state["step"])
            weight = local_part(p)
            noise = torch.Generator(weight.device).manual_seed(step * 100_003 + number)
            w, m, v = (local_part(x).view(-1) for x in (weight, state["exp_avg"], state["exp_avg_sq"]))
            grad = local_part(p.grad).reshape(-1)
            length = CPU_SLICE if weight.device.type == "cpu" else GPU_SLICE
            for start in range(0, len(grad), length):
                some = slice(start, start + length)
                _update(w[some], m[some], v[some], grad[some], step, group, noise)
        return loss


def _update(
    weight: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    grad: torch.Tensor,
    step: int,
    group: dict[str, Any],
    noise: torch.Generator,
) -> None:
    """One step of a slice, computed in fp32 (fp64 for fp64 weights)."""
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
    """Copy fp32 values to a tensor; into bf16 with unbiased stochastic rounding. Overwrites `value`."""
    if target.dtype is torch.bfloat16:
        # bf16 is the upper half of fp32's bits. Noise added to the lower half carries with the right probability.
        # Each random word of 64 bits is the noise of four values, from -2^15 to 2^15 - 1.
        bits = value.view(torch.int32).view(-1)
        words = torch.empty(-(-len(bits) // 4), dtype=torch.int64, device=bits.device)
        words.random_(-(2**63), None, generator=noise)
        bits += words.view(torch.int16)[: len(bits)].to(torch.int32)
        bits += 1 << 15
        bits &= -(1 << 16)
    target.copy_(value)
