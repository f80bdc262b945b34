"""Sampling: the filters against loops, the noise against Python's integers, and choices against the distribution they
must have."""

import itertools
import math

import pytest
import torch
from helpers.sampling import filtered, p_value

from layerskip_recipes.generation.sampling import (
    Sampler,
    choose_tokens,
    copies_before,
    gumbel,
    mixed,
    noise_keys,
    token_scores,
)

V, N = 5, 60_000


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def probs_of(logits, temperature, *filters, **named):
    """The distribution that `token_scores` stands for."""
    return token_scores(logits, temperature, *filters, **named).softmax(-1)


def test_the_chi_square_test_can_tell():
    p = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0])
    wrong = torch.tensor([0.42, 0.28, 0.2, 0.1, 0.0])
    assert p_value(torch.multinomial(p, N, replacement=True, generator=rng()), p) > 1e-3
    assert p_value(torch.multinomial(wrong, N, replacement=True, generator=rng()), p) < 1e-6


# ---- noise ----


def hashed(x):
    """The 32-bit mixing function in Python's integers, which do not overflow."""
    x = (x ^ x >> 16) * 0x21F0AAAD % 2**32
    x = (x ^ x >> 15) * 0xD35A2D97 % 2**32
    return x ^ x >> 15


def test_the_noise_is_gumbels_of_hashed_numbers():
    """Against Python's integers and logarithms, and its bounds, at the ends of the range of bits too."""
    numbers = [0, 1, 2, 12345, 2**31 - 1, 2**31, 2**32 - 1]
    assert mixed(torch.tensor(numbers)).tolist() == [hashed(x) for x in numbers]
    for one, two, token in itertools.product(numbers, repeat=3):
        uniform = (hashed(hashed(one ^ token) ^ two) + 0.5) / 2**32
        noise = gumbel(*torch.tensor([one, two, token])).item()
        assert noise == pytest.approx(-math.log(-math.log1p(-uniform)), rel=1e-4, abs=1e-4)
    # 0 maps to 0, the smallest number; the number that maps to 2**32 - 1 is found by undoing the mixing.
    assert gumbel(*torch.tensor([0, 0, 0])).item() == pytest.approx(33 * math.log(2), rel=1e-6)
    assert hashed(unhashed(2**32 - 1)) == 2**32 - 1
    lowest = gumbel(*torch.tensor([0, unhashed(2**32 - 1), 0])).item()
    assert 33 * math.log(2) - lowest < 26 and lowest > -3


def unhashed(x):
    """The number that `hashed` maps to x."""
    x ^= x >> 15 ^ x >> 30
    x = x * pow(0xD35A2D97, -1, 2**32) % 2**32
    x ^= x >> 15 ^ x >> 30
    x = x * pow(0x21F0AAAD, -1, 2**32) % 2**32
    return x ^ x >> 16


def test_keys_depend_on_seed_prompt_and_number():
    prompts = [[1, 2], [1, 2, 3], [1, 2], [12], [1, 2]]
    keys = noise_keys(0, prompts)
    assert copies_before(prompts) == [0, 0, 1, 0, 2]
    assert len({tuple(pair) for pair in [*keys, *noise_keys(1, prompts)]}) == 10
    assert noise_keys(0, [(1, 2)]) == keys[:1] and noise_keys(0, [[1, 2]], [2]) == keys[4:]
    assert all(0 <= key < 2**32 for pair in keys for key in pair)


# ---- filters ----


@pytest.mark.parametrize("top_p", [None, 0.01, 0.37, 0.9, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, 11, 12, 50])
def test_filtered_probabilities_are_those_by_python_lists(top_k, top_p):
    logits = 2 * torch.randn(2, 3, 11, generator=rng(1))
    for temperature, min_p in itertools.product((0.3, 1.0, 2.0), (None, 0.0, 0.1, 0.6, 1.0)):
        min_p = None if min_p is None else torch.tensor(min_p)
        probs = probs_of(logits, temperature, top_k, top_p, min_p).flatten(0, 1)
        expected = [filtered(row, temperature, top_k, top_p, min_p) for row in logits.flatten(0, 1).tolist()]
        torch.testing.assert_close(probs, torch.tensor(expected))


UNEVEN = (0.125, 0.5, 0.0625, 0.25, 0.0625)


@pytest.mark.parametrize(
    ("probs", "filters", "kept"),
    [
        ((0.2, 0.3, 0.2, 0.1, 0.2), {"top_k": 2}, [0, 1, 2, 4]),  # ties with the kth token stay
        # 0.5 + 0.25 reaches 0.6 and 0.75 exactly; one token more is one too many.
        *((UNEVEN, {"top_p": top_p}, [1]) for top_p in (0.1, 0.5)),
        *((UNEVEN, {"top_p": top_p}, [1, 3]) for top_p in (0.6, 0.75)),
        (UNEVEN, {"top_p": 0.8}, [0, 1, 3]),
        ((0.25,) * 4, {"min_p": 1.0}, [0, 1, 2, 3]),
        # min-p before top-p: 0.4 / 0.7 reaches 0.55 alone.
        ((0.4, 0.3, 0.2, 0.1), {"min_p": 0.7, "top_p": 0.55}, [0]),
    ],
)
def test_filters_keep_the_expected_tokens_at_ties_and_exact_sums(probs, filters, kept):
    """Ties and exact sums, which random numbers do not have."""
    expected = torch.tensor([p if token in kept else 0.0 for token, p in enumerate(probs)])
    filters = filters | {"min_p": torch.tensor(filters["min_p"])} if "min_p" in filters else filters
    torch.testing.assert_close(probs_of(torch.tensor(probs).log(), 1.0, **filters), expected / expected.sum())


def test_half_precision_logits_are_filtered_in_fp32():
    logits = torch.randn(3, 11, generator=rng(2)).bfloat16()
    scores = token_scores(logits, 0.7, 5, 0.9)
    assert scores.dtype == torch.float32 and torch.equal(scores, token_scores(logits.float(), 0.7, 5, 0.9))


# ---- choosing ----


def draws(p, seed):
    """Tokens [20, N / 20] that are chosen from scores log p."""
    rows, steps = 20, N // 20
    keys = torch.tensor(noise_keys(seed, [[7]] * rows))
    return choose_tokens(p.log().expand(rows, steps, len(p)), keys, torch.arange(5, 5 + steps)[None])


@pytest.mark.parametrize("seed", range(3))
def test_choices_are_independent_draws(seed):
    """Each token has the distribution p. So have pairs: neighbours in a text, copies of a prompt, two seeds."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    tokens, other = draws(p, seed), draws(p, seed + 10)
    assert p_value(tokens.flatten(), p) > 1e-3
    pairs = torch.outer(p, p).flatten()
    for one, two in ((tokens[:, ::2], tokens[:, 1::2]), (tokens[::2], tokens[1::2]), (tokens, other)):
        assert p_value((V * one + two).flatten(), pairs) > 1e-3


def test_a_token_of_the_draft_vocabulary_has_the_noise_of_its_id():
    scores, keys, at = torch.randn(2, 3, 50, generator=rng(4)), torch.tensor(noise_keys(1, [[1], [2]])), torch.arange(3)
    ids = torch.tensor([3, 7, 8, 20, 49])
    expected = scores.clone()
    expected[..., [i for i in range(50) if i not in ids]] = -torch.inf
    assert torch.equal(
        ids[choose_tokens(scores[..., ids], keys, at[None], ids)], choose_tokens(expected, keys, at[None])
    )


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-30])
def test_tiny_temperatures_are_greedy(temperature):
    logits, sampler = 5 * torch.randn(3, 1, 40, generator=rng(6)), Sampler(temperature)
    keys = None if sampler.greedy else torch.tensor(noise_keys(0, [[1]] * 3))
    scores = sampler.scores(logits, None, sampler.tensors(logits.device))
    assert torch.equal(choose_tokens(scores, keys, torch.ones(1, 1, dtype=torch.long)), logits.argmax(-1))


def test_greedy_samplers_are_equal_for_graphs_whatever_their_filters():
    plain, filtered = Sampler(), Sampler(top_k=3, top_p=0.9, min_p=0.1)
    assert plain.constants == filtered.constants and plain.tensors("cpu").keys() == filtered.tensors("cpu").keys()
    assert filtered.only_temperature


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
