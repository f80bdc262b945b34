"""From logits to tokens: the filters, and the acceptance of drafted tokens, greedy and speculative.

p is the full model's distribution, q the draft's; both after the same penalty, temperature, top-k, top-p and min-p.
Random numbers come in as tensors ("noise"), so that compiled steps stay reproducible.
"""

from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import torch
from pydantic import Field

from layerskip_recipes.config.schema import Fraction, PositiveInt, check

# Types that configs share.
Temperature = Annotated[float, Field(ge=0, examples=[0.8])]
TopP = Annotated[float, Field(gt=0, le=1, examples=[0.9])]
MinP = Annotated[Fraction, Field(examples=[0.05])]
Penalty = Annotated[float, Field(gt=0, examples=[1.1])]


def next_token_probs(
    logits: torch.Tensor,
    temperature: float | torch.Tensor,
    top_k: int | None = None,
    top_p: float | torch.Tensor | None = None,
    min_p: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(logits / temperature), restricted to the top-k tokens, to those of at least min_p times the largest
    probability, then to the smallest set of mass top_p.

    Args:
        logits: [..., v].
        temperature: above 0.
        top_k: tokens to keep; ties with the k-th stay.
        top_p: probability mass to keep, in (0, 1].
        min_p: the least probability to keep, as a part of the largest one, in [0, 1].
        All but top_k may be tensors [], so that one compiled graph serves other values too.

    Returns:
        [..., v] probabilities in fp32.
    """
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs = logits.softmax(-1)
    if min_p is not None:
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0)
        probs = probs / probs.sum(-1, keepdim=True)
    if top_p is not None:
        ranked, order = probs.sort(dim=-1, descending=True, stable=True)
        # A token stays while the mass before it is below top_p: the first one always does.
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0)
        probs = torch.zeros_like(probs).scatter_(-1, order, ranked)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: float | torch.Tensor) -> torch.Tensor:
    """Make tokens that were there before less likely: their logit is divided by the penalty, or multiplied if negative.

    Keskar et al., CTRL, arXiv 1909.05858, section 4.1, in the form that does not depend on the logits' sign.

    Args:
        logits: [..., v].
        seen: [..., v] bool, the tokens of prompt and output so far.
        penalty: above 0; 1 changes nothing.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def random_bits(shape: tuple[int, ...], device: torch.device, rng: torch.Generator | None) -> torch.Tensor:
    """31 random bits in each int32, the noise of an exponential race; a CPU makes them nine times as fast as Exp(1)."""
    return torch.empty(shape, dtype=torch.int32, device=device).random_(generator=rng)


def exponential_race_scores(probs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """probs / Exp(1), [..., v]: the token with the largest score is a draw from probs.

    Noise is `random_bits`. They give u in (0, 1) and -log(1 - u), which is finest near 0, where draws win.
    """
    uniform = ((noise.float() + 0.5) * 2**-31).clamp(max=1 - 2**-24)
    return probs / -torch.log1p(-uniform)


def sample_exponential_race(probs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """One token of each distribution [..., v] -> [...], without a synchronisation of host and device."""
    return exponential_race_scores(probs, noise).argmax(-1)


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
    drafted: torch.Tensor, q: torch.Tensor, p: torch.Tensor, uniform: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Speculative sampling: accept x with probability min(1, p(x)/q(x)), else draw from norm(max(0, p - q)).

    The result has the distribution of sampling from p (Leviathan et al., arXiv 2211.17192, appendix A.1).

    Args:
        drafted: [b, n] tokens drawn from q.
        q: [b, n, v] the draft's distributions.
        p: [b, n+1, v] the full model's.
        uniform: [b, n] draws of U(0, 1).
        noise: [b, v] `random_bits`.

    Returns:
        accepted [b] and next token [b], as `accept_greedy`.
    """
    n = drafted.shape[1]
    p_x = p[:, :n].gather(-1, drafted[..., None])[..., 0]
    q_x = q.gather(-1, drafted[..., None])[..., 0]
    accepted = (uniform * q_x < p_x).long().cumprod(1).sum(1)
    # After all n the next token comes from p itself: as if q were 0 there.
    q = torch.cat([q, torch.zeros_like(p[:, :1])], dim=1)
    row = accepted[:, None, None].expand(-1, 1, p.shape[-1])
    p_row, q_row = p.gather(1, row)[:, 0], q.gather(1, row)[:, 0]
    return accepted, sample_exponential_race(residual(p_row, q_row), noise)


def residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """norm(max(0, p - q)), what a rejection leaves of p; p, q [..., v]."""
    rest = (p - q).clamp(min=0)
    total = rest.sum(-1, keepdim=True)
    # Equal up to rounding, p - q can vanish: a rejection there is rounding too.
    return torch.where(total > 0, rest / total, p)


class SamplerTensors(NamedTuple):
    """The numbers of a `Sampler` as tensors [], None for a filter that is off: inputs of a graph, not a part of it."""

    temperature: torch.Tensor
    top_p: torch.Tensor | None
    min_p: torch.Tensor | None
    repetition_penalty: torch.Tensor


@dataclass  # not frozen: torch 2.6 would take all of its numbers for a part of each graph
class Sampler:
    """How tokens are chosen: greedy at temperature 0, else by the filtered distribution.

    Args:
        temperature: 0 is greedy.
        top_k, top_p, min_p: see `next_token_probs`.
        repetition_penalty: see `penalise`; 1 is none.
        rng: of the random numbers, on their device; None: torch's global one.

    Raises:
        ConfigError: if a setting is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    rng: torch.Generator | None = None
    greedy: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check("temperature", self.temperature, Temperature)
        check("top_k", self.top_k, PositiveInt | None)
        check("top_p", self.top_p, TopP | None)
        check("min_p", self.min_p, MinP | None)
        check("repetition_penalty", self.repetition_penalty, Penalty)
        # Stored: a compiled graph that read the temperature would hold for one temperature only.
        self.greedy = self.temperature == 0
        self.top_p = None if self.top_p == 1 else self.top_p
        self.min_p = self.min_p or None

    @property
    def penalises(self) -> bool:
        """Whether the tokens so far count, so that `seen` is needed."""
        return self.repetition_penalty != 1

    @property
    def only_temperature(self) -> bool:
        """Whether tokens are chosen by logits and temperature alone, or greedily by logits alone."""
        unfiltered = self.top_k is None and self.top_p is None and self.min_p is None
        return not self.penalises and (self.greedy or unfiltered)

    def settings(self, device: torch.device) -> SamplerTensors:
        """The numbers on a device."""

        def tensor(number: float) -> torch.Tensor:
            return torch.tensor(number, dtype=torch.float32, device=device)

        return SamplerTensors(
            tensor(self.temperature),
            None if self.top_p is None else tensor(self.top_p),
            None if self.min_p is None else tensor(self.min_p),
            tensor(self.repetition_penalty),
        )

    @property
    def kind(self) -> tuple:
        """All that a graph of `scores` depends on beside the `settings`."""
        if self.greedy:
            return True, self.penalises
        return False, self.penalises, self.top_k, self.top_p is None, self.min_p is None

    def scores(self, logits: torch.Tensor, seen: torch.Tensor | None, settings: SamplerTensors) -> torch.Tensor:
        """What to choose by: penalised logits when greedy, else the filtered distribution; [..., v] -> [..., v]."""
        if seen is not None:
            logits = penalise(logits, seen, settings.repetition_penalty)
        if self.greedy:
            return logits
        return next_token_probs(logits, settings.temperature, self.top_k, settings.top_p, settings.min_p)

    def choose(self, scores: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """A token by each row of `scores` [..., v] -> [...], with the noise of `noise`."""
        return scores.argmax(-1) if noise is None else sample_exponential_race(scores, noise)

    def noise(self, shape: tuple[int, ...], device: torch.device) -> torch.Tensor | None:
        """`random_bits` for so many tokens, None when greedy."""
        return None if self.greedy else random_bits(shape, device, self.rng)

    def uniform(self, shape: tuple[int, ...], device: torch.device) -> torch.Tensor | None:
        """U(0, 1) draws, None when greedy."""
        return None if self.greedy else torch.rand(shape, device=device, generator=self.rng)
