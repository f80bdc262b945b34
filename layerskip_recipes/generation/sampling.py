"""From logits to tokens: the filters, and the acceptance of drafted tokens, greedy and sampled.

p is the full model's distribution, q the draft's; both use the same penalty, temperature, top-k, top-p and min-p.
Random numbers are input tensors ("noise"), which keeps compiled steps reproducible.
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
    """softmax(logits / temperature) in fp32, [..., v] -> [..., v], restricted by top_k, then min_p, then top_p.

    top_k keeps the k likeliest tokens and ties, min_p the tokens of at least min_p times the largest probability, top_p
    the smallest set of tokens with this mass. All but top_k may be tensors [], so that one graph serves all values.
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
        # Keep a token while the mass of likelier tokens is below top_p; the first one always stays.
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0)
        probs = torch.zeros_like(probs).scatter_(-1, order, ranked)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: float | torch.Tensor) -> torch.Tensor:
    """Make `seen` tokens (bool [..., v]) less likely: divide positive logits by the penalty, multiply negative ones.

    Keskar et al., CTRL, arXiv 1909.05858, section 4.1, extended to negative logits. A penalty of 1 changes nothing.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def random_bits(shape: tuple[int, ...], device: torch.device, rng: torch.Generator | None) -> torch.Tensor:
    """31 random bits in int32, the noise of an exponential race. A CPU draws them nine times as fast as Exp(1)."""
    return torch.empty(shape, dtype=torch.int32, device=device).random_(generator=rng)


def exponential_race_scores(probs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """probs / Exp(1), [..., v]: the token with the largest score is a draw from probs. The noise is `random_bits`.

    Exp(1) is computed as -log(1 - u), which is most precise near 0, where draws win.
    """
    uniform = ((noise.float() + 0.5) * 2**-31).clamp(max=1 - 2**-24)
    return probs / -torch.log1p(-uniform)


def sample_exponential_race(probs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draw a token from each distribution, [..., v] -> [...], without synchronising host and device."""
    return exponential_race_scores(probs, noise).argmax(-1)


def accept_greedy(drafted: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept the longest prefix of drafted [b, n] that the full model would have chosen; its logits [b, n + 1, v].

    Returns the number of accepted tokens [b], and the full model's next token [b].
    """
    chosen = logits.argmax(-1)
    accepted = (drafted == chosen[:, :-1]).long().cumprod(1).sum(1)
    return accepted, chosen.gather(1, accepted[:, None])[:, 0]


def accept_sampled(
    drafted: torch.Tensor, q: torch.Tensor, p: torch.Tensor, uniform: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Speculative sampling: accept x with probability min(1, p(x)/q(x)), else draw from norm(max(0, p - q)).

    The result has the distribution of sampling from p (Leviathan et al., arXiv 2211.17192, appendix A.1).
    drafted [b, n] is drawn from q [b, n, v]; p [b, n + 1, v]; uniform [b, n] from U(0, 1); noise [b, v]: `random_bits`.
    Returns the number of accepted tokens [b] and the next token [b].
    """
    n = drafted.shape[1]
    p_x = p[:, :n].gather(-1, drafted[..., None])[..., 0]
    q_x = q.gather(-1, drafted[..., None])[..., 0]
    accepted = (uniform * q_x < p_x).long().cumprod(1).sum(1)
    # If all n are accepted, the next token is drawn from p itself, as if q were 0.
    q = torch.cat([q, torch.zeros_like(p[:, :1])], dim=1)
    row = accepted[:, None, None].expand(-1, 1, p.shape[-1])
    p_row, q_row = p.gather(1, row)[:, 0], q.gather(1, row)[:, 0]
    return accepted, sample_exponential_race(residual(p_row, q_row), noise)


def residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """norm(max(0, p - q)), the distribution of the token that replaces a rejected one; p, q [..., v]."""
    rest = (p - q).clamp(min=0)
    total = rest.sum(-1, keepdim=True)
    # If p and q differ only by rounding, p - q can vanish everywhere.
    return torch.where(total > 0, rest / total, p)


def confidence(scores: torch.Tensor, greedy: bool) -> torch.Tensor:
    """The probability of the draft's likeliest token, [b, v'] -> [b]; the product over a draft is its confidence.

    An exit trained on labels is roughly calibrated: the model accepts the token with about this probability. Ending a
    draft does not change the output's distribution, because the decision uses only tokens drafted so far.
    """
    return (scores.softmax(-1) if greedy else scores).amax(-1)


class SamplerTensors(NamedTuple):
    """A `Sampler`'s numbers as tensors [], inputs of a graph rather than constants in it; None: the filter is off."""

    temperature: torch.Tensor
    top_p: torch.Tensor | None
    min_p: torch.Tensor | None
    repetition_penalty: torch.Tensor


@dataclass  # not frozen: torch 2.6 would treat its numbers as constants of each graph
class Sampler:
    """How to choose tokens: greedily at temperature 0, else from the filtered distribution, see `next_token_probs`.

    `rng` is a generator on the model's device; None: torch's global one. Raises a ConfigError for a setting out of
    range.
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
        # Stored: a compiled graph that read the temperature would be valid for one temperature only.
        self.greedy = self.temperature == 0
        self.top_p = None if self.top_p == 1 else self.top_p
        self.min_p = self.min_p or None

    @property
    def penalises(self) -> bool:
        """Whether choices depend on the tokens so far (`seen`)."""
        return self.repetition_penalty != 1

    @property
    def only_temperature(self) -> bool:
        """Whether choices depend on logits and temperature only."""
        unfiltered = self.top_k is None and self.top_p is None and self.min_p is None
        return not self.penalises and (self.greedy or unfiltered)

    def settings(self, device: torch.device) -> SamplerTensors:

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
        """What a graph of `scores` depends on besides `settings`."""
        if self.greedy:
            return True, self.penalises
        return False, self.penalises, self.top_k, self.top_p is None, self.min_p is None

    def scores(self, logits: torch.Tensor, seen: torch.Tensor | None, settings: SamplerTensors) -> torch.Tensor:
        """Penalised logits if greedy, else the filtered distribution; [..., v] -> [..., v]."""
        if seen is not None:
            logits = penalise(logits, seen, settings.repetition_penalty)
        if self.greedy:
            return logits
        return next_token_probs(logits, settings.temperature, self.top_k, settings.top_p, settings.min_p)

    def choose(self, scores: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Tokens from `scores`, [..., v] -> [...]."""
        return scores.argmax(-1) if noise is None else sample_exponential_race(scores, noise)

    def noise(self, shape: tuple[int, ...], device: torch.device) -> torch.Tensor | None:
        """`random_bits`, None if greedy."""
        return None if self.greedy else random_bits(shape, device, self.rng)

    def uniform(self, shape: tuple[int, ...], device: torch.device) -> torch.Tensor | None:
        """U(0, 1) draws, None if greedy."""
        return None if self.greedy else torch.rand(shape, device=device, generator=self.rng)
