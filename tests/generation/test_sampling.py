"""Sampling: the filters against loops, and speculative acceptance against the distribution it must have."""

import math
from itertools import product

import pytest
import torch
from helpers.sampling import N, V, filtered, p_value, penalised, rng

from layerskip_recipes.generation.sampling import (
    Sampler,
    accept_greedy,
    accept_sampled,
    exponential_race_scores,
    next_token_probs,
    penalise,
    random_bits,
    sample_exponential_race,
)


def accept(drafted, q, p, seed):
    """`accept_sampled` with noise of that seed."""
    generator = rng(seed)
    uniform = torch.rand(drafted.shape, generator=generator)
    return accept_sampled(drafted, q, p, uniform, random_bits((len(drafted), V), torch.device("cpu"), generator))


def test_the_chi_square_test_can_tell():
    """Right draws pass, draws from a distribution 2% away do not."""
    p = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0])
    wrong = torch.tensor([0.42, 0.28, 0.2, 0.1, 0.0])
    assert p_value(torch.multinomial(p, N, replacement=True, generator=rng()), p) > 1e-3
    assert p_value(torch.multinomial(wrong, N, replacement=True, generator=rng()), p) < 1e-6


def test_the_scores_of_an_exponential_race():
    """Against Python's logarithm; the ends of the range are numbers above 0, and a sure token is always drawn."""
    last = 2**31 - 1
    bits = [0, 1, 2, 1000, 2**20, 2**30, last - 2**20, last]
    drawn = (1 / exponential_race_scores(torch.ones(len(bits)), torch.tensor(bits, dtype=torch.int32))).tolist()
    for number, bit in zip(drawn[:-1], bits[:-1], strict=True):
        assert number == pytest.approx(-math.log1p(-(bit + 0.5) / 2**31), rel=1e-4)
    assert 16 < drawn[-1] < 17
    for bit in bits:
        noise = torch.tensor([0, bit, 0], dtype=torch.int32)
        assert sample_exponential_race(torch.tensor([0.0, 1.0, 0.0]), noise) == 1
    # A token of probability 1e-8 is drawn by 1e-8 of the numbers, so it has to win with the smallest ones.
    noise = torch.tensor([0, last // 2], dtype=torch.int32)
    assert sample_exponential_race(torch.tensor([1e-8, 1.0]), noise) == 0
    assert sample_exponential_race(torch.tensor([1e-11, 1.0]), noise) == 1


# ---- filters ----


@pytest.mark.parametrize("top_p", [None, 0.01, 0.37, 0.9, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, 11, 12, 50])
def test_filters(top_k, top_p):
    logits = 2 * torch.randn(2, 3, 11, generator=rng(1))
    for temperature, min_p in product((0.3, 1.0, 2.0), (None, 0.0, 0.1, 0.6, 1.0)):
        probs = next_token_probs(logits, temperature, top_k, top_p, min_p).flatten(0, 1)
        expected = [filtered(row, temperature, top_k, top_p, min_p) for row in logits.flatten(0, 1).tolist()]
        torch.testing.assert_close(probs, torch.tensor(expected))


UNEVEN, FALLING, EQUAL = (0.125, 0.5, 0.0625, 0.25, 0.0625), (0.4, 0.3, 0.2, 0.1), (0.25,) * 4


@pytest.mark.parametrize(
    ("probs", "filters", "kept"),
    [
        ((0.2, 0.3, 0.2, 0.1, 0.2), {"top_k": 2}, [0, 1, 2, 4]),  # ties with the kth token stay
        # 0.5 + 0.25 reaches 0.6 and 0.75 exactly; one token more is one too many.
        *((UNEVEN, {"top_p": top_p}, [1]) for top_p in (0.1, 0.5)),
        *((UNEVEN, {"top_p": top_p}, [1, 3]) for top_p in (0.6, 0.75)),
        (UNEVEN, {"top_p": 0.8}, [0, 1, 3]),
        # Of what top-k left, 0.4 / 0.7 is more than half.
        (FALLING, {"top_k": 2, "top_p": 0.5}, [0]),
        (FALLING, {"top_p": 0.5}, [0, 1]),
        # A part of the largest probability, of those that the temperature makes: 0.3^2 / 0.4^2 < 0.6.
        (FALLING, {"min_p": 0.74}, [0, 1]),
        (FALLING, {"min_p": 0.76}, [0]),
        (FALLING, {"min_p": 0.0}, [0, 1, 2, 3]),
        (FALLING, {"min_p": 0.6, "temperature": 0.5}, [0]),
        (EQUAL, {"min_p": 1.0}, [0, 1, 2, 3]),
        # min-p before top-p: 0.4 / 0.7 reaches 0.55 alone; after top-k, which leaves the largest.
        (FALLING, {"min_p": 0.7, "top_p": 0.55}, [0]),
        (FALLING, {"top_k": 3, "min_p": 0.2}, [0, 1, 2]),
    ],
)
def test_which_tokens_filters_keep(probs, filters, kept):
    filters = {"temperature": 1.0} | filters
    expected = torch.tensor([p if token in kept else 0.0 for token, p in enumerate(probs)])
    expected = expected ** (1 / filters["temperature"])
    torch.testing.assert_close(next_token_probs(torch.tensor(probs).log(), **filters), expected / expected.sum())


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 4.0])
def test_repetition_penalty(penalty):
    """Against a loop, for logits of both signs and 0; what was passed in stays as it was."""
    logits = torch.randn(6, 9, generator=rng(30))
    logits[0, :3] = 0
    seen = torch.rand(6, 9, generator=rng(31)) < 0.5
    before = logits.clone()
    for row, out in enumerate(penalise(logits, seen, penalty)):
        expected = penalised(before[row].tolist(), seen[row].nonzero().flatten().tolist(), penalty)
        torch.testing.assert_close(out, torch.tensor(expected))
    assert torch.equal(logits, before)


def test_the_penalty_comes_before_temperature_and_filters():
    logits, seen = 2 * torch.randn(4, 9, generator=rng(32)), torch.rand(4, 9, generator=rng(33)) < 0.5
    settings = {"temperature": 0.6, "top_k": 6, "top_p": 0.9, "min_p": 0.05}
    for sampler in (Sampler(**settings, repetition_penalty=1.7), Sampler(repetition_penalty=1.7)):
        scores = sampler.scores(logits, seen, sampler.settings(logits.device))
        for row in range(4):
            expected = penalised(logits[row].tolist(), seen[row].nonzero().flatten().tolist(), 1.7)
            if not sampler.greedy:
                expected = filtered(expected, **settings)
            torch.testing.assert_close(scores[row], torch.tensor(expected))
    assert not Sampler(temperature=0.5).penalises and Sampler(repetition_penalty=0.9).penalises


def test_half_precision_logits_are_filtered_in_fp32():
    logits = torch.randn(3, 11, generator=rng(2)).bfloat16()
    probs = next_token_probs(logits, 0.7, 5, 0.9)
    assert probs.dtype == torch.float32 and torch.equal(probs, next_token_probs(logits.float(), 0.7, 5, 0.9))


# ---- drawing ----


@pytest.mark.parametrize("similar", [False, True])
@pytest.mark.parametrize("top_k", [None, 3])
def test_draft_then_accept_has_the_distribution_of_the_full_model(top_k, similar):
    """Three tokens of a Markov chain, drafted by q and accepted by p: each has p's distribution given those before it.

    A position counts where it is reached: its token is the drafted one if that stands, else the replacement; after
    two accepted tokens the third is the bonus token.
    """
    p_logits, q_logits = 2 * torch.randn(2, V + 1, V, generator=rng(9))  # row V: the first token
    if similar:
        q_logits = p_logits + 0.3 * q_logits
    p, q = (next_token_probs(logits, 1.0, top_k) for logits in (p_logits, q_logits))
    start = torch.full((N,), V)
    first = torch.multinomial(q[start], 1, generator=rng(10))[:, 0]
    second = torch.multinomial(q[first], 1, generator=rng(11))[:, 0]
    accepted, token = accept(
        torch.stack([first, second], 1),
        torch.stack([q[start], q[first]], 1),
        torch.stack([p[start], p[first], p[second]], 1),
        12,
    )
    values = [p_value(torch.where(accepted >= 1, first, token), p[V])]
    for before in range(V):
        reached = (accepted >= 1) & (first == before)
        if reached.sum() > 1000:
            values.append(p_value(torch.where(accepted == 2, second, token)[reached], p[before]))
        bonus = (accepted == 2) & (second == before)
        if bonus.sum() > 1000:
            values.append(p_value(token[bonus], p[before]))
    assert len(values) >= 4
    assert min(values) > 1e-3 / len(values), values
    # The share of accepted first drafts is sum_x min(p, q), the most that any such scheme can reach.
    rate = torch.minimum(p[V], q[V]).sum().item()
    assert abs((accepted >= 1).double().mean().item() - rate) < 4.5 * math.sqrt(rate * (1 - rate) / N) + 1e-9


def test_without_drafts_the_token_comes_from_p():
    """A round that has room for one token only."""
    p = torch.randn(V, generator=rng(25)).softmax(-1)
    nothing = torch.empty(N, 0, dtype=torch.long)
    accepted, token = accept(nothing, torch.empty(N, 0, V), p.expand(N, 1, V), 26)
    assert not accepted.any() and p_value(token, p) > 1e-3
    accepted, token = accept_greedy(nothing[:3], p.expand(3, 1, V))
    assert accepted.tolist() == [0] * 3 and token.tolist() == [p.argmax()] * 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("temperature", value) for value in (-0.1, True, "1", None, math.nan)),
        *(("top_k", value) for value in (0, 2.5, True)),
        *(("top_p", value) for value in (0, 1.01, math.nan)),
        *(("min_p", value) for value in (-0.1, 1.01, math.nan)),
        *(("repetition_penalty", value) for value in (0, math.nan)),
    ],
)
def test_wrong_arguments_are_named(key, value):
    with pytest.raises(ValueError, match=rf"^{key}: "):
        Sampler(**{key: value})
