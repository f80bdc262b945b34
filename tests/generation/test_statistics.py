"""What a round of drafts costs, in calls of layers, and what a generation counts: rounds, acceptance, bytes."""

from collections import Counter

import pytest
import torch
from helpers.decoding import PROMPT, L, count_calls, greedy, make_model, model_of
from helpers.speculation import PROMPTS, perturbed, run
from helpers.tiny import VOCAB

from layerskip_recipes.generation.api import generate
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.stats import GenerationStats, is_looping


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("exit_layer", "d"), [(1, 1), (2, 4), (5, 3), (6, 2)])
def test_a_round_runs_no_layer_twice_for_a_position(exit_layer, d, rows):
    """d early passes with head, one without, one late pass over d+1 positions; no layer twice for a position."""
    model, prompts = make_model(), [PROMPT[: 2 + row] for row in range(rows)]
    steps = iter(Generation(model, prompts, 50, speculation=Speculation(exit_layer, d)))
    calls = count_calls(model)
    next(steps)
    assert calls == Counter({**{(layer, 1 + rows): 1 for layer in range(L)}, ("head", 1): 1})
    layers = {(layer, 1): d + 1 for layer in range(exit_layer)}
    layers |= {(layer, d + 1): 1 for layer in range(exit_layer, L)}
    for _ in range(2):
        calls.clear()
        next(steps)
        assert calls == Counter({**layers, ("head", 1): d}) + Counter({("head", d + 1): 1})


@pytest.mark.parametrize("exit_layer", [None, 1, 4])
def test_an_exit_never_runs_the_layers_above_it(exit_layer):
    """Prefill and decoding of an exit never touch the layers above it; the head sees one position."""
    model, depth = make_model(), exit_layer or L
    calls = count_calls(model)
    generate(model, torch.tensor(PROMPT), 5, exit_layer=exit_layer)
    prefill, steps = {(layer, 4): 1 for layer in range(depth)}, {(layer, 1): 4 for layer in range(depth)}
    assert calls == Counter({**prefill, **steps, ("head", 1): 5})


# ---- acceptance ----


def rounds_of(prompt, count, exit_layer, d):
    """(slot of the root, drafted, accepted) of each round, played through with greedy decoding only."""
    full, rounds, done = greedy("llama3_2", prompt, count), [], 1
    while done < count:
        n = min(d, count - done - 1)
        draft = greedy("llama3_2", (*prompt, *full[:done]), n, exit_layer)
        accepted = next((i for i in range(n) if draft[i] != full[done + i]), n)
        rounds.append((len(prompt) + done - 1, n, accepted))
        done += accepted + 1
    return rounds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exit_layer", "d", "count"), [(1, 2, 18), (2, 4, 18), (4, 3, 18), (4, 12, 30), (5, 3, 3), (L, 5, 25)]
)
def test_the_counts_are_those_of_rounds_followed_by_hand(exit_layer, d, count):
    model, total, rounds = model_of("llama3_2"), GenerationStats(), []
    for prompt in PROMPTS:
        total += run(model, [prompt], count, speculation=Speculation(exit_layer, d)).stats
        rounds += rounds_of(prompt, count, exit_layer, d)
    drafted, accepted = [n for _, n, _ in rounds], [n for _, _, n in rounds]
    assert (total.rounds, total.drafted, total.accepted) == (len(rounds), sum(drafted), sum(accepted))
    assert total.draft_steps == sum(drafted) and total.rounds_by_kind == {"chain": len(rounds)}
    assert total.acceptance_rate == sum(accepted) / sum(drafted)
    assert total.accepted_histogram == [accepted.count(k) for k in range(1 + max(accepted))]
    # Among the drafts with a token number i + 1, those in which it was accepted.
    by_position = [[a > i for n, a in zip(drafted, accepted, strict=True) if n > i] for i in range(max(drafted))]
    assert total.acceptance_by_position == [sum(flags) / len(flags) for flags in by_position]
    assert (total.prefill_tokens, total.reused_tokens, total.first_tokens) == (sum(map(len, PROMPTS)), 0, len(PROMPTS))
    assert total.tokens == count * len(PROMPTS) and total.tokens_per_second > 0


@pytest.mark.slow
@pytest.mark.parametrize("stop", [False, True])
def test_statistics_of_a_batch_are_those_of_its_rows(stop):
    """What a row drafts beyond its own end, because others go on, counts nowhere; a round is one of the whole batch."""
    prompts = [PROMPT[:1], (30, 31, 7), PROMPT, (9, 60, 2, 41)]
    arguments = {"count": 14, "speculation": Speculation(3, 5)}
    if stop:
        arguments["stop_tokens"] = [greedy("llama3_2", PROMPT, 14)[5]]
    together = run(model_of("llama3_2"), prompts, **arguments).stats
    alone = [run(model_of("llama3_2"), [prompt], **arguments).stats for prompt in prompts]
    assert len({stats.rounds for stats in alone}) > 1
    total = sum(alone[1:], alone[0])
    for name in ("tokens", "first_tokens", "drafted", "accepted", "accepted_histogram", "acceptance_by_position"):
        assert getattr(together, name) == getattr(total, name)
    assert together.rounds == max(stats.rounds for stats in alone)


# ---- bytes ----

# Of a layer of the tiny model: q, k, v, output; three of the MLP; two norms. Four bytes each.
LAYER = 4 * (32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 64 + 2 * 32)
HEAD = 4 * VOCAB * 32
SLOT = 4 * 2 * 2 * 8  # keys and values of 2 heads of width 8


@pytest.mark.parametrize("exit_layer", [None, 2])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_plain_step_reads_its_layers_the_head_and_the_cache(exit_layer, rows):
    """The prompt's pass counts not; step i looks at the prompt and i tokens more."""
    stats = run(model_of("llama3_2"), [PROMPT] * rows, 6, exit_layer=exit_layer).stats
    depth = exit_layer or L
    assert stats.weight_bytes == 5 * (depth * LAYER + HEAD)
    assert stats.cache_bytes == rows * depth * SLOT * sum(len(PROMPT) + i for i in range(1, 6))
    assert stats.bytes_per_token == (stats.weight_bytes + stats.cache_bytes) / (5 * rows)


@pytest.mark.parametrize(
    ("tokens", "looping"),
    [
        ([1, 2, 3, 4] + [7] * 4, True),
        ([1, 2, 3, 4, 5] + [8, 9] * 3, True),
        (list(range(20, 28)) + [8, 9] * 3, False),  # less than half
        ([7, 7], False),  # no three periods
        ([8, 9] * 6 + [3], False),  # over before the end
        ([], False),
    ],
)
def test_an_end_that_repeats_three_times_is_a_loop(tokens, looping):
    assert is_looping(tokens) is looping


@pytest.mark.parametrize("perturbs", [False, True])
@pytest.mark.parametrize(("exit_layer", "d"), [(1, 2), (4, 3)])
def test_a_drafted_round_reads_the_early_layers_for_each_draft(exit_layer, d, perturbs):
    """n early passes and heads, one early pass more, a late one with the head: with other weights a whole one."""
    model = model_of("llama3_2")
    draft_weights = (perturbed(model, 0.0), None) if perturbs else None
    stats = run(model, [PROMPT], 18, speculation=Speculation(exit_layer, d), draft_weights=draft_weights).stats
    weights = cache = 0
    for root, n, _ in rounds_of(PROMPT, 18, exit_layer, d):
        layers = n * exit_layer + L  # the early pass of the last draft and the late one are L layers together
        weights += layers * LAYER + (n + 1) * HEAD
        cache += layers * SLOT * (root + n + 1)
    assert (stats.weight_bytes, stats.cache_bytes) == (weights, cache)
