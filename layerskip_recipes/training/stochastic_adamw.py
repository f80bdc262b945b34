"""StochasticAdamW: AdamW for bf16 weights with stochastic rounding, so that small steps are not lost."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from layerskip_recipes.generation.sampling import mixed
from layerskip_recipes.processes import local_part
from layerskip_recipes.training.compiled import compiled

CPU_SLICE = 2**18  # weights that a CPU converts to fp32 at a time, which fit into its caches
GPU_SLICE = 2**25  # weights per kernel, so that little memory is needed where it cannot be compiled


class StochasticAdamW(Optimizer):
    """AdamW (arXiv 1711.05101) on weights, gradients and averages in bf16: 8 bytes per weight instead of 16 in fp32.

    Near 0.02, bf16 numbers lie 1.2e-4 apart, so rounding to the nearest undoes a step of 2e-5. Stochastic rounding
    moves the weight by 2e-5 on average. The averages need it too: with beta2 = 0.999 the second one changes by less
    than its precision. Weights in fp32 get plain AdamW.

    The noise is a hash of the step number, the parameter's number, from `first` on, and the weight's index in this
    process. So a run resumed on as many processes draws the same noise, and so do ranks that hold copies of a weight.
    The arguments are those of `torch.optim.AdamW`. On a GPU one compiled kernel updates a weight, and reads and writes
    14 bytes for each number.
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
        trained = [(number, group, p) for number, (group, p) in numbered if p.grad is not None]
        factors, keys = [], []
        for number, group, p in trained:
            state = self.state[p]
            if not state:
                state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            state["step"] += 1
            step = int(state["step"])
            (beta1, beta2), lr = group["betas"], group["lr"]
            decay, eps = 1 - lr * group["weight_decay"], group["eps"]
            factors.append([1 - beta1, 1 - beta2, 1 - beta2**step, eps, decay, lr / (1 - beta1**step)])
            keys.append([step, number])
        # The numbers of all weights in two copies for which the host does not wait.
        device = local_part(trained[0][2]).device if trained else torch.device("cpu")
        cuda = device.type == "cuda"
        exact = torch.float32 if device.type == "mps" else torch.float64
        of_weights = [
            torch.tensor(numbers, dtype=dtype, pin_memory=cuda).to(device, non_blocking=cuda)
            for numbers, dtype in ((factors, exact), (keys, torch.int64))
        ]
        run: Callable[..., None] = update_on_gpu if cuda else update_
        for (_, _, p), *numbers in zip(trained, *of_weights, strict=True):
            state, size = self.state[p], local_part(p).numel()
            # A view, and not a copy: the update writes into all but the gradient.
            parts = [local_part(x).view(-1) for x in (p, state["exp_avg"], state["exp_avg_sq"])]
            parts.append(local_part(p.grad).reshape(-1))
            length = GPU_SLICE if cuda else CPU_SLICE
            for start in range(0, size, length):
                run(*(part[start : start + length] for part in parts), *numbers, start)
        return loss


def update_(
    weight: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    grad: torch.Tensor,
    factors: torch.Tensor,
    keys: torch.Tensor,
    start: int,
) -> None:
    """One step of the weights from index `start` on, in place, computed in fp32 (fp64 for fp64 weights).

    factors [6]: 1 - beta1, 1 - beta2, 1 - beta2^t, eps, 1 - lr weight_decay, lr / (1 - beta1^t). keys [2]: t and the
    parameter's number.
    """
    exact = torch.promote_types(weight.dtype, torch.float32)
    new_mean, new_square, correction, eps, decay, rate = factors.to(exact).unbind()
    grad = grad.to(exact)
    m = mean.to(exact)
    m = m + new_mean * (grad - m)
    v = square.to(exact)
    v = v + new_square * (grad * grad - v)
    w = weight.to(exact) * decay - rate * m / ((v / correction).sqrt() + eps)
    if weight.dtype is torch.bfloat16:
        # 16 random bits for each of the three numbers.
        index = torch.arange(start, start + weight.shape[0], device=weight.device)
        bits = mixed(mixed(index ^ mixed(keys[0])) ^ mixed(keys[1]))
        w, m, v = rounded(w, bits & 0xFFFF), rounded(m, bits >> 16), rounded(v, mixed(bits ^ 1) & 0xFFFF)
    weight.copy_(w)
    mean.copy_(m)
    square.copy_(v)


def rounded(value: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """fp32 values as bf16, rounded at random without bias; `noise` is uniform in 0 .. 2^16 - 1."""
    # bf16 is the upper half of fp32's bits. Noise added to the lower half carries with the right probability.
    bits = value.view(torch.int32) + noise.to(torch.int32)
    return (bits & -(1 << 16)).view(torch.float32).bfloat16()


update_on_gpu = compiled(update_, "the optimizer's step", num_dynamic=4)
