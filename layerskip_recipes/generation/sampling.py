"""From logits to tokens: the filters, and the acceptance of drafted tokens, greedy and by speculative sampling.

p is the full model's distribution, q the draft's; both after the same temperature, top-k and top-p.
"""

from dataclasses import dataclass

import torch

from layerskip_recipes.checks import check_number


def next_token_probs(
    logits: torch.Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> torch.Tensor:
    """softmax(logits / temperature) restricted to the top-k tokens, then to the smallest set of mass top_p.

    Args:
        logits: [..., v].
        temperature: above 0.
        top_k: tokens to keep; ties with the k-th stay.
        top_p: probability mass to keep, in (0, 1].

    Returns:
        [..., v] probabilities in fp32.
    """
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ranked, order = probs.sort(dim=-1, descending=True, stable=True)
        # A token stays while the mass before it is below top_p: the first one always does.
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0)
        probs = torch.zeros_like(probs).scatter_(-1, order, ranked)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw(probs: torch.Tensor, rng: torch.Generator | None = None) -> torch.Tensor:
    """One token of each distribution [..., v] -> [...]: argmax of probs / Exp(1), which needs no synchronisation."""
    return (probs / torch.empty_like(probs).exponential_(1, generator=rng)).argmax(-1)


def accept_greedy(drafted: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The longest prefix of the draft that the full model would have chosen, and its own next token.

    Args:
        drafted: [b, n] tokens.
        logits: [b, n+1, v] of the full model: row i belongs to the token after i drafted ones.

    Returns:
        accepted [b], how many drafted tokens stand; next token [b].
    """
    chosen = logits.argmax(-1)
    accepted = (drafted == chosen[:, :-1]).long().cumprod(1).sum(1)
    return accepted, chosen.gather(1, accepted[:, None])[:, 0]


def accept_sampled(
    drafted: torch.Tensor, q: torch.Tensor, p: torch.Tensor, rng: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Speculative sampling: accept x with probability min(1, p(x)/q(x)), else draw from norm(max(0, p - q)).

    The result has the distribution of sampling from p (Leviathan et al., arXiv 2211.17192, appendix A.1).

    Args:
        drafted: [b, n] tokens drawn from q.
        q: [b, n, v] the draft's distributions.
        p: [b, n+1, v] the full model's.
        rng: for reproducible draws, on the tensors' device.

    Returns:
        accepted [b] and next token [b], as `accept_greedy`.
    """
    n = drafted.shape[1]
    p_x = p[:, :n].gather(-1, drafted[..., None])[..., 0]
    q_x = q.gather(-1, drafted[..., None])[..., 0]
    u = torch.rand(p_x.shape, device=p.device, dtype=p.dtype, generator=rng)
    accepted = (u * q_x < p_x).long().cumprod(1).sum(1)
    # After all n the next token comes from p itself: as if q were 0 there.
    q = torch.cat([q, torch.zeros_like(p[:, :1])], dim=1)
    row = accepted[:, None, None].expand(-1, 1, p.shape[-1])
    p_row, q_row = p.gather(1, row)[:, 0], q.gather(1, row)[:, 0]
    rest = (p_row - q_row).clamp(min=0)
    # Equal up to rounding, p - q can vanish: a rejection there is rounding too.
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p_row)
    return accepted, draw(rest, rng)


@dataclass(frozen=True)
class Sampler:
    """How tokens are chosen: greedy at temperature 0, else by the filtered distribution.

    Raises:
        ValueError: if temperature, top_k or top_p is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    rng: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, minimum=0, integer=False, example=0.8)
        check_number("top_k", self.top_k, minimum=1, optional=True, example=50)
        check_number("top_p", self.top_p, minimum=0, above=True, maximum=1, integer=False, optional=True, example=0.9)

    def probs(self, logits: torch.Tensor) -> torch.Tensor | None:
        """[..., v] filtered distribution, or None when greedy, where nobody needs it."""
        return None if self.temperature == 0 else next_token_probs(logits, self.temperature, self.top_k, self.top_p)

    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One token of logits [b, v] -> tokens [b], and the distribution it came from (None when greedy)."""
        probs = self.probs(logits)
        return (logits.argmax(-1) if probs is None else draw(probs, self.rng)), probs

    def accept(
        self, drafted: torch.Tensor, q: list[torch.Tensor | None], logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which drafted tokens stand; see `accept_greedy`. q holds the [b, v] distribution of each drafted token."""
        if self.temperature == 0:
            return accept_greedy(drafted, logits)
        p = self.probs(logits)
        return accept_sampled(drafted, torch.stack(q, 1) if q else p[:, :0], p, self.rng)
