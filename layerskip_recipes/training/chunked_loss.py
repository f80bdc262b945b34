"""The losses of several exits and their gradients, computed chunk by chunk in the forward pass.

Only one chunk of tokens has logits at a time, in one buffer shared by all exits. Each exit keeps its hidden state and
that state's gradient, [b, s, d].
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field

from layerskip_recipes.config.schema import AUTO, Auto
from layerskip_recipes.model.head import Head, at_least_fp32, compute_dtype
from layerskip_recipes.model.head import chunk_tokens as fast_chunk

# (logits [n, v], target as in `token_loss_`, scale) -> summed loss. The gradient of scale * loss replaces the logits.
ChunkLoss = Callable[[torch.Tensor, Any, torch.Tensor], torch.Tensor]
Teacher = Callable[[Any], Any]
ChunkTokens = Annotated[int, Field(ge=1, examples=[512]), Auto()]


def cross_entropy_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    scale: torch.Tensor | float = 1.0,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy summed over labels, in one buffer; autograd would hold four of its size.

    CE = log sum_j exp(z_j) - sum_j t_j z_j and dCE/dz = softmax(z) - t, with the target
    t = (1 - label_smoothing) onehot(label) + label_smoothing / v. Computed in fp32 or better. scale * dCE/dz replaces
    the logits z [n, v]. The returned sum is not scaled.
    """
    label = labels[:, None]
    if torch.compiler.is_compiling():  # compiled, the plain formula reads the logits twice and needs no buffer
        log_q = logits.log_softmax(-1, dtype=at_least_fp32(logits))
        total = (1 - label_smoothing) * log_q.gather(-1, label).sum()
        if label_smoothing:
            total += label_smoothing * log_q.mean(-1).sum()
        onehot = (torch.arange(logits.shape[-1], device=logits.device) == label).to(log_q.dtype)
        logits.copy_(scale * (log_q.exp() - (1 - label_smoothing) * onehot - label_smoothing / logits.shape[-1]))
        return -total
    z = logits.to(at_least_fp32(logits))
    z -= z.amax(-1, keepdim=True)
    target_score = (1 - label_smoothing) * z.gather(-1, label)
    if label_smoothing:
        target_score += label_smoothing * z.mean(-1, keepdim=True)
    total = z.exp_().sum(-1, keepdim=True)
    z *= scale / total
    if label_smoothing:
        z -= scale * label_smoothing / z.shape[-1]
    z.scatter_add_(-1, label, torch.full_like(total, label_smoothing - 1) * scale)
    if z is not logits:
        logits.copy_(z)
    return (total.log() - target_score).sum()


def kl_divergence_(logits: torch.Tensor, teacher: torch.Tensor, scale: torch.Tensor | float = 1.0) -> torch.Tensor:
    """KL(p || q) summed over tokens, with the teacher's p = softmax(teacher) and q = softmax(z).

    KL = sum_j p_j (log p_j - log q_j) and dKL/dz = q - p. scale * dKL/dz replaces the logits z [n, v].
    """
    exact = at_least_fp32(logits)
    log_p, log_q = (scores.log_softmax(-1, dtype=exact) for scores in (teacher, logits))
    p = log_p.exp()
    total = torch.linalg.vecdot(p, log_p.sub_(log_q)).sum()
    logits.copy_(log_q.exp_().sub_(p).mul_(scale))
    return total


def token_loss_(
    logits: torch.Tensor, target: torch.Tensor, scale: torch.Tensor | float = 1.0, label_smoothing: float = 0.0
) -> torch.Tensor:
    """`cross_entropy_` for labels [n], `kl_divergence_` for a teacher's logits [n, v]."""
    if target.dim() == 2:
        return kl_divergence_(logits, target, scale)
    return cross_entropy_(logits, target, scale, label_smoothing)


def exit_losses(
    head: Head,
    hidden: Sequence[torch.Tensor],
    weights: Sequence[float],
    labels: torch.Tensor,
    counted: torch.Tensor,
    chunk_loss: ChunkLoss,
    chunk_tokens: int,
    teacher: Teacher | None = None,
    head_rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted sum of the exits' losses, a scalar, and the detached mean loss of each exit.

    `hidden` has x_E [b, s, d] of each exit. `chunk_tokens` may be "auto". Of labels [b * s] only the rows `counted` [n]
    get logits. `teacher` maps row indices to a target that replaces the labels. All exits but the last change only
    those rows of the output's matrix and bias that are 1 in `head_rows` [v]; None: all rows. The weights are known
    beforehand, so each chunk's gradient is final once its logits exist. The head computes in the hidden states' dtype,
    or autocast's; gradients are summed in fp32.
    """
    tensors = (*head.parameters, *(x.flatten(0, 1) for x in hidden))
    wants_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    with torch.no_grad():
        states = tensors[len(head.parameters) :]
        all_count, labels = len(counted) == len(labels), labels[counted]
        exact = at_least_fp32(states[0])
        count = torch.full((), max(len(labels), 1), dtype=exact, device=labels.device)
        size = fast_chunk(states[0].device.type) if chunk_tokens == AUTO else chunk_tokens
        size = max(min(size, len(labels)), 1)
        chunks = _ChunkGradients(head, chunk_loss, size, states[0], wants_gradient)
        trained = [wants_gradient and weight > 0 for weight in weights]
        grads = [torch.zeros_like(x) if trains else None for x, trains in zip(states, trained, strict=True)]
        exit_sums = torch.zeros(len(states), dtype=exact, device=labels.device)
        # Activation offloading must not see a chunk's tensors, which are freed after the chunk.
        no_hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
        with head.using(chunks.leaves), no_hooks:
            for start in range(0, len(labels), size):
                part = slice(start, start + size)
                rows = part if all_count else counted[part]
                target = labels[part] if teacher is None else teacher(rows)
                for i, (x, grad) in enumerate(zip(states, grads, strict=True)):
                    if grad is None:
                        exit_sums[i] += chunks.loss(x[rows], target)
                    else:
                        changed = head_rows if i < len(states) - 1 else None
                        exit_sum, grad_rows = chunks.add(x[rows], target, weights[i] / count, changed)
                        exit_sums[i] += exit_sum
                        grad[rows] = grad_rows.to(x.dtype)
        per_exit = exit_sums / count
        # The weighted sum. Pinned memory avoids a device synchronisation.
        cuda = per_exit.is_cuda
        factors = torch.tensor(weights, dtype=exact, pin_memory=cuda).to(per_exit.device, non_blocking=cuda)
        total = (per_exit * factors).sum()
        head_grads = chunks.head_gradients()
    return _WithGradients.apply(total, [*head_grads, *grads], *tensors), per_exit


class _WithGradients(torch.autograd.Function):
    """`total` as a function of tensors, whose gradients are known already."""

    @staticmethod
    def forward(ctx, total, grads, *tensors):
        ctx.grads = grads
        return total.clone()

    @staticmethod
    def backward(ctx, grad_total):
        # In place, then freed: backward runs only once per loss.
        grads, ctx.grads = ctx.grads, None
        return None, None, *(g if g is None else g.mul_(grad_total) for g in grads)


class _ChunkGradients:
    """The loss of a chunk and its gradient by the hidden states; sums the head's gradients over all chunks.

    The head computes with `leaves`, which `head.using` must put in the place of its parameters.
    """

    def __init__(self, head: Head, chunk_loss: ChunkLoss, size: int, states: torch.Tensor, wants_gradient: bool):
        self.head, self.chunk_loss, self.compute = head, chunk_loss, compute_dtype(states)
        self.exact = at_least_fp32(states)
        # New leaves (for a sharded parameter, its gathered copy). Frozen parameters stay frozen.
        # The norm stays in its dtype, since it computes in fp32.
        dtypes = [p.dtype if head.is_in_norm(i) else self.compute for i, p in enumerate(head.parameters)]
        self.leaves = [
            p.detach().to(dtype).requires_grad_(wants_gradient and p.requires_grad)
            for p, dtype in zip(head.parameters, dtypes, strict=True)
        ]
        # Sum gradients in fp32. Each chunk of each exit adds one term, and bf16 would round most of them away.
        self.sums: list[Any] = [torch.zeros_like(p, dtype=self.exact) if p.requires_grad else None for p in self.leaves]
        # One logits buffer for all chunks: allocating one per chunk costs a CPU a tenth of the step.
        self.buffer: Any = None
        if head.matrix is not None:
            self.buffer = states.new_empty(size, self.leaves[head.matrix].shape[0], dtype=self.compute)

    def loss(self, x: torch.Tensor, target: Any) -> torch.Tensor:
        """The loss of a chunk x [n, d], without a gradient."""
        h = self.head.normed(x.to(self.compute))
        logits = self.head.unembed(h, out=None if self.buffer is None else self.buffer[: len(h)])
        return self.chunk_loss(logits, target, torch.zeros((), dtype=self.exact, device=x.device))

    @torch.enable_grad()
    def add(
        self, x: torch.Tensor, target: Any, scale: torch.Tensor, head_rows: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a chunk x [n, d] and the gradient of scale * loss by x. Adds the leaves' gradients to `sums`,
        those of the output only for `head_rows`."""
        x = x.to(self.compute).detach().requires_grad_()
        head, matrix, sums = self.head, self.head.matrix, self.sums
        h = head.normed(x)
        if matrix is None:
            end = head.unembed(h)
            grad = end.detach().clone()
            chunk_sum = self.chunk_loss(grad, target, scale)
        else:
            # Not by autograd: it would allocate a gradient of the matrix's size per chunk, and sum in its dtype.
            with torch.no_grad():
                grad_logits = head.unembed(h, out=self.buffer[: len(h)])
                chunk_sum = self.chunk_loss(grad_logits, target, scale)
                end, grad = h, grad_logits @ self.leaves[matrix]
                if sums[matrix] is not None:
                    if head_rows is not None:
                        grad_logits *= head_rows
                    add_product_(sums[matrix], grad_logits.T, h.to(grad_logits.dtype))
        others = [i for i, total in enumerate(sums) if total is not None and i != matrix]
        x_grad, *grads = torch.autograd.grad(end, [x, *(self.leaves[i] for i in others)], grad)
        for i, leaf_grad in zip(others, grads, strict=True):
            if head_rows is not None and head.has_token_rows(i):
                leaf_grad.mul_(head_rows.view(-1, *[1] * (leaf_grad.dim() - 1)))
            sums[i] += leaf_grad
        return chunk_sum, x_grad

    def head_gradients(self) -> list[torch.Tensor | None]:
        """The sums, in the dtype of the head's parameters."""
        return [None if g is None else g.to(p.dtype) for g, p in zip(self.sums, self.head.parameters, strict=True)]


def add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total [v, d] += a [v, n] b [n, d]. On a CPU or before torch 2.10, the product is first rounded to a's dtype."""
    if total.dtype == b.dtype:
        total.addmm_(a, b)
    elif total.is_cuda and torch.__version__ >= "2.10":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b
