"""The expected rounds of a text, by hand, and their interpolation between temperatures."""

import pytest
import torch

from layerskip_recipes.acceptance.tokens_per_round import (
    ASSUMED,
    EndedDrafts,
    FirstAndLater,
    TokensPerRound,
    expected_rounds,
)


def constant(value: float, text: torch.Tensor) -> FirstAndLater:
    return FirstAndLater(torch.full(text.shape, value), torch.full(text.shape, value))


def test_expected_rounds_of_a_text_of_three_tokens_are_those_by_hand():
    """A round starts at the first token, and at the second one if the first drafted token is wrong (1 - a). One starts
    at the third token if that round fails too, or if exactly one token of the first draft is accepted."""
    a, text = 0.6, torch.tensor([True, True, True])
    rounds, drafted = expected_rounds(constant(a, text), text, longest=3)
    second = 1 - a
    third = [second * (1 - a) + a, *[second * (1 - a) + a * (1 - a)] * 2]
    assert rounds.tolist() == pytest.approx([1 + second + start for start in third])
    assert drafted.tolist() == pytest.approx([n * (1 + second + start) for n, start in enumerate(third, 1)])


def test_texts_of_a_row_are_written_one_after_the_other():
    a = torch.rand(9)
    text = torch.tensor([True, True, False, True, True, True, False, False, True])
    together, _ = expected_rounds(FirstAndLater(a, a), text, longest=4)
    apart = 0
    for part in (slice(0, 2), slice(3, 6), slice(8, 9)):
        apart = apart + expected_rounds(FirstAndLater(a[part], a[part]), text[part], longest=4)[0]
    torch.testing.assert_close(together, apart)


def test_a_draft_ends_with_the_first_token_below_the_least_confidence():
    """Confidences of .7 and .5 give .35, so a draft has at most two tokens, and one if its first token has .3."""
    accept = FirstAndLater(torch.ones(4), torch.ones(4))
    text = torch.ones(4, dtype=torch.bool)
    confidence = FirstAndLater(torch.tensor([0.7, 0.5, 0.7, 0.3]), torch.full((4,), 0.5))
    rounds, drafted = expected_rounds(accept, text, 3, confidence)
    # Rounds start at the tokens 0 and 2 for drafts of one token, and at 0 and 3 for longer ones.
    assert rounds.tolist() == [2, 2, 2] and drafted.tolist() == [2, 3, 3]


def test_in_a_long_text_a_constant_accept_rate_gives_a_geometric_series():
    text = torch.ones(4000, dtype=torch.bool)
    rounds, _ = expected_rounds(constant(0.7, text), text, longest=8)
    assert (4000 / rounds).tolist() == pytest.approx(ASSUMED.greedy, rel=1e-3)
    assert ASSUMED.greedy[1] == pytest.approx(1 + 0.7 + 0.49)


def test_rounds_are_linear_between_temperatures_0_and_1():
    ended = EndedDrafts(greedy=[(1.8, 1.0), (2.3, 1.7)], sampled=[(1.5, 1.0), (1.9, 1.6)])
    measured = TokensPerRound(greedy=[1.8, 2.5], sampled=[1.5, 2.0], ended=ended)
    assert measured.rounds(0.0) == [(1.8, 1), (2.5, 2)] and measured.rounds(2.0)[1] == (2.0, 2)
    assert measured.rounds(0.8)[1] == pytest.approx((0.2 * 2.5 + 0.8 * 2.0, 2))
    assert measured.rounds(0.0, True) == [(1.8, 1.0), (2.3, 1.7)]
    assert measured.rounds(0.8, True)[1] == pytest.approx((0.2 * 2.3 + 0.8 * 1.9, 0.2 * 1.7 + 0.8 * 1.6))
