"""The expected number of tokens per round, for drafts of at most n tokens: the equation, and its stored values.

A round drafts tokens and verifies them in one forward pass of the model. It writes the accepted tokens, and after them
one token of the model's own.
"""

from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

MIN_CONFIDENCE = 0.4  # the `self_speculation.min_confidence` that is measured and chosen
ALL_TOKENS = "all"  # the name of the draft vocabulary with all tokens

Rates = Annotated[list[Annotated[float, Field(ge=1)]], Field(min_length=1)]
Pairs = list[tuple[Annotated[float, Field(ge=1)], Annotated[float, Field(ge=0)]]]


class FirstAndLater(NamedTuple):
    """A value for each token [.., s], if it is the first token of a draft and if it is a later one.

    The two differ for an adapter, which drafts later tokens from its own hidden states.
    """

    first: torch.Tensor
    later: torch.Tensor


def expected_rounds(
    accept_rate: FirstAndLater, text: torch.Tensor, longest: int, confidence: FirstAndLater | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The expected number of rounds in which the model writes given texts, and of the tokens that these rounds draft.

    Both are [.., n] for drafts of at most n = 1 .. `longest` tokens, and summed over the texts of a row. The rounds are
    teacher-forced: draft and model read the text, whatever was drafted before.

    A round that starts at token i drafts l(i) <= n tokens. a_1(i) is the probability that the model accepts token i as
    the first drafted token, and a_2(i) as a later one. It accepts the first k drafted tokens with probability

        S_k(i) = a_1(i) a_2(i+1) .. a_2(i+k-1)   for 1 <= k <= l(i),   S_0(i) = 1,   S_k(i) = 0 for k > l(i)

    and exactly k with probability S_k(i) - S_(k+1)(i). The next round then starts at token i+k+1. So the probability
    that a round starts at token j is

        u(j) = 1                                                        at the first token of a text
        u(j) = sum over i < j of u(i) (S_k(i) - S_(k+1)(i)), k = j-i-1  at its other tokens

    A text of T tokens takes R = sum_j u(j) rounds, which draft D = sum_j u(j) l(j) tokens. So a round writes m = T / R
    tokens, and drafts D / R.

    Without an end at low confidence, l(i) = n. With it, a draft ends after its first token k for which the product of
    the confidences, c_1(i) c_2(i+1) .. c_2(i+k-1), is below MIN_CONFIDENCE.

    Args:
        accept_rate: a_1 and a_2: 0 or 1 for greedy decoding, sum_v min(p_v, q_v) for sampling.
        text: [.., s], True for the tokens of a text; other tokens separate texts.
        longest: the largest n.
        confidence: c_1 and c_2, the largest probability of the draft, max_v q_v. None: drafts do not end early.
    """

    def running_products(values: FirstAndLater) -> torch.Tensor:
        """[.., s, k]: the product over the first k tokens of a draft at token i."""
        first, later = (torch.where(text, value, 0.0).double() for value in values)
        factors = F.pad(later, (0, longest)).unfold(-1, longest, 1)[..., :-1, :].clone()
        factors[..., 0] = first
        return factors.cumprod(-1)

    accepted = running_products(accept_rate)
    is_drafted = torch.ones_like(accepted)  # [.., s, k]: whether a draft at token i has a k-th token
    if confidence is not None:
        is_drafted = (F.pad(running_products(confidence)[..., :-1], (1, 0), value=1.0) >= MIN_CONFIDENCE).double()
    within = torch.ones(longest, longest, dtype=torch.float64).triu()  # [k, n]: k <= n
    num_drafted = is_drafted @ within  # [.., s, n]: l(i)
    accepted = accepted * is_drafted
    text_starts = text & ~F.pad(text[..., :-1], (1, 0))
    *batch, length, _ = accepted.shape
    starts = accepted.new_zeros(*batch, length + longest + 1, longest)  # [.., j, n]: u(j)
    for i in range(length):
        start = torch.where(text_starts[..., i, None], 1.0, torch.where(text[..., i, None], starts[..., i, :], 0.0))
        starts[..., i, :] = start
        at_least = F.pad(
            accepted[..., i, :, None] * within, (0, 0, 1, 1)
        )  # [.., k, n]: S_k(i) for k = 0 .. longest + 1
        at_least[..., 0, :] = 1.0
        exactly = at_least[..., :-1, :] - at_least[..., 1:, :]
        starts[..., i + 1 : i + longest + 2, :] += start[..., None, :] * exactly
    starts = starts[..., :length, :]
    return starts.sum(-2), (starts * num_drafted).sum(-2)


class Round(NamedTuple):
    """The expected tokens of a round, and how many tokens it drafts."""

    tokens: float
    num_drafted: float


class StoredPart(BaseModel):
    """A part of layerskip.json. Reading checks all that its users rely on."""

    model_config = ConfigDict(allow_inf_nan=False)


class EndedDrafts(StoredPart):
    """Tokens per round, and drafted tokens, for drafts of at most 1, 2, .. tokens that end at low confidence."""

    greedy: Pairs
    sampled: Pairs


class TokensPerRound(StoredPart):
    """m of `expected_rounds`, for drafts of 1, 2, .. tokens."""

    greedy: Rates
    sampled: Rates
    """At temperature 1."""
    ended: EndedDrafts | None = None
    """None: not measured."""

    @model_validator(mode="after")
    def _same_lengths(self) -> Self:
        ended = [] if self.ended is None else [self.ended.greedy, self.ended.sampled]
        if {len(self.sampled), *map(len, ended)} != {len(self.greedy)}:
            raise ValueError("its lists have different lengths")
        return self

    def rounds(self, temperature: float, ends: bool = False) -> list[Round]:
        """The rounds of drafts of at most 1, 2, .. tokens, interpolated between temperatures 0 and 1.

        `ends`: drafts end at low confidence, if this was measured.
        """
        if ends and self.ended is not None:
            greedy, sampled = self.ended.greedy, self.ended.sampled
        else:
            greedy = [(tokens, float(n)) for n, tokens in enumerate(self.greedy, 1)]
            sampled = [(tokens, float(n)) for n, tokens in enumerate(self.sampled, 1)]
        weight = min(temperature, 1.0)
        return [
            Round(
                (1 - weight) * greedy_tokens + weight * sampled_tokens,
                (1 - weight) * greedy_drafted + weight * sampled_drafted,
            )
            for (greedy_tokens, greedy_drafted), (sampled_tokens, sampled_drafted) in zip(greedy, sampled, strict=True)
        ]


def with_accept_rate(rate: float, longest: int) -> TokensPerRound:
    """m = 1 + a + a^2 + .. + a^n, if each drafted token is accepted with the same probability a."""
    tokens = [sum(rate**k for k in range(n + 1)) for n in range(1, longest + 1)]
    return TokensPerRound(greedy=tokens, sampled=tokens)


ASSUMED = with_accept_rate(0.7, longest=8)  # of a trained exit without a measurement
