"""The losses of several exits and their gradients, chunk by chunk in the forward pass (used by early_exit.py).

The logits of one chunk of tokens, in one buffer, are all that exists at a time, whatever the number of exits. Each exit
keeps its hidden state and that one's gradient, [b, s, d].
"""

from typing import Any

import torch

from layerskip_recipes.model.head import Head


def cross_entropy_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    scale: torch.Tensor | float = 1.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy summed over the labels that count, in one buffer, where autograd would hold four of that size.

    CE = log sum_j exp(z_j) - sum_j t_j z_j and dCE/dz = softmax(z) - t, with the target
    t = (1 - label_smoothing) onehot(label) + label_smoothing / v.

    Args:
        logits: z [n, v] in fp32; scale * dCE/dz takes its place.
        labels: [n].
        scale: of the gradient; the sum is not scaled.
        ignore_index: the label that counts nowhere.
        label_smoothing: the part of the target that is spread evenly.
    """
    counts = (labels != ignore_index)[:, None]
    label = labels[:, None].where(counts, 0)
    scale = counts * scale
    logits -= logits.amax(-1, keepdim=True)
    of_target = (1 - label_smoothing) * logits.gather(-1, label)
    if label_smoothing:
        of_target += label_smoothing * logits.mean(-1, keepdim=True)
    total = logits.exp_().sum(-1, keepdim=True)
    logits *= scale / total
    if label_smoothing:
        logits -= scale * (label_smoothing / logits.shape[-1])
    logits.scatter_add_(-1, label, scale * (label_smoothing - 1))
    return ((total.log() - of_target) * counts).sum()


class ExitLosses(torch.autograd.Function):
    """The weighted sum of the exits' losses, with the gradients taken chunk by chunk in the forward pass.

    The weights are known beforehand, so each chunk's gradient is final as soon as its logits exist: one accumulator
    serves the head for all exits, and each exit keeps a gradient of its hidden state's size. Only the `counted` rows
    [n] of the labels and hidden states get logits.
    """

    @staticmethod
    def forward(ctx, loss, head, labels, counted, weights, grad_enabled, *tensors):
        parameters, hidden = tensors[: len(head.parameters)], tensors[len(head.parameters) :]
        every, labels = len(counted) == len(labels), labels[counted]
        count = labels.new_full((), max(len(labels), 1))
        wants_gradient = grad_enabled and any(ctx.needs_input_grad)
        # Leaves of their own: of a sharded parameter this is the gathered copy. Frozen ones stay frozen.
        leaves = [p.detach().requires_grad_(wants_gradient and p.requires_grad) for p in parameters]
        # They add up in fp32: there are as many summands as chunks of all exits, which in bf16 would vanish.
        sums = [torch.zeros_like(p, dtype=torch.float32) if p.requires_grad else None for p in leaves]
        hidden_grads, per_exit = [], []
        size = max(min(loss.chunk_tokens, len(labels)), 1)
        # The logits of all chunks in turn: memory of that size, taken anew for each, costs a CPU a tenth of the step.
        plain = head.matrix is not None
        logits = hidden[0].new_empty(size, leaves[head.matrix].shape[0]) if plain and wants_gradient else None
        # Nothing of a chunk outlives it, so hooks that offload or pack saved tensors have no business here.
        no_hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
        with head.using(leaves), no_hooks:
            for weight, x in zip(weights, hidden, strict=True):
                trains = wants_gradient and weight > 0
                x_grad = torch.zeros_like(x) if trains else None
                exit_sum = torch.zeros((), dtype=torch.float32, device=x.device)
                for start in range(0, len(labels), size):
                    part = slice(start, start + size)
                    rows = part if every else counted[part]
                    if trains:
                        chunk_sum, x_grad[rows] = _with_gradient(
                            loss, head, leaves, sums, x[rows], labels[part], weight / count, logits
                        )
                    else:
                        chunk_sum = loss.sum_of_chunk(head(x[rows]), labels[part])
                    exit_sum += chunk_sum
                per_exit.append(exit_sum / count)
                hidden_grads.append(x_grad)
        per_exit = torch.stack(per_exit)
        # Pinned: a copy that is not waits for all that was launched.
        of_exits = torch.tensor(weights, pin_memory=per_exit.is_cuda).to(per_exit.device, non_blocking=per_exit.is_cuda)
        total = (per_exit * of_exits).sum()
        head_grads = (None if g is None else g.to(p.dtype) for g, p in zip(sums, leaves, strict=True))
        ctx.grads = (*head_grads, *hidden_grads)
        ctx.mark_non_differentiable(per_exit)
        return total, per_exit

    @staticmethod
    def backward(ctx, grad_total, _):
        # In place, and then let go: there is no second backward through the same loss.
        grads, ctx.grads = ctx.grads, None
        return (None, None, None, None, None, None, *(g if g is None else g.mul_(grad_total) for g in grads))


@torch.enable_grad()
def _with_gradient(
    loss: Any,
    head: Head,
    leaves: list[torch.Tensor],
    sums: list[torch.Tensor | None],
    x: torch.Tensor,
    labels: torch.Tensor,
    scale: torch.Tensor,
    buffer: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of one chunk x [n, d], and the gradient of scale * loss by x.

    The gradient by the head's leaves is added to `sums`, which has None for the frozen ones. `buffer` [n or more, v] is
    for the logits of a head that is a plain matrix.
    """
    x = x.detach().requires_grad_()
    h = head.normed(x)
    apart = head.matrix  # a plain matrix: in fp32 its gradient adds up without a tensor of its size for each chunk
    if apart is None:
        end = head.unembed(h)
        grad = end.detach().clone()
        chunk_sum = loss.gradient_of_chunk(grad, labels, scale)
    else:
        with torch.no_grad():
            logits = head.unembed(h, out=buffer[: len(h)])
            chunk_sum = loss.gradient_of_chunk(logits, labels, scale)
            if sums[apart] is not None and sums[apart].dtype == h.dtype:
                sums[apart].addmm_(logits.T, h)
            elif sums[apart] is not None:
                sums[apart] += logits.T @ h
            end, grad = h, logits @ leaves[apart]
    others = [i for i, total in enumerate(sums) if total is not None and i != apart]
    x_grad, *grads = torch.autograd.grad(end, [x, *(leaves[i] for i in others)], grad)
    for i, of_leaf in zip(others, grads, strict=True):
        sums[i] += of_leaf
    return chunk_sum, x_grad
