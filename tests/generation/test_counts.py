"""What a generation counts: rounds, acceptance, bytes."""

import pytest
from helpers.decoding import PROMPT, L, greedy, model_of
from helpers.speculation import PROMPTS, perturbed, run
from helpers.tiny import VOCAB

from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.stats import GenerationStats

# ---- what a generation counts ----


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


@pytest.mark.parametrize(("exit_layer", "d"), [(1, 2), (2, 4), (4, 3)])
def test_acceptance_by_position(exit_layer, d):
    model, total, rounds = model_of("llama3_2"), GenerationStats(), []
    for prompt in PROMPTS:
        total += run(model, [prompt], 18, speculation=Speculation(exit_layer, d)).stats
        rounds += rounds_of(prompt, 18, exit_layer, d)
    assert total.acceptance_by_position == [
        sum(accepted > i for _, _, accepted in rounds) / sum(n > i for _, n, _ in rounds) for i in range(d)
    ]
    assert total.rounds == len(rounds) and total.draft_steps == sum(n for _, n, _ in rounds)
    assert total.accepted_histogram == [
        sum(accepted == k for _, _, accepted in rounds) for k in range(1 + max(r[2] for r in rounds))
    ]
    assert total.rounds_by_kind == {"chain": len(rounds)}
    assert (total.prefill_tokens, total.reused_tokens, total.first_tokens) == (sum(map(len, PROMPTS)), 0, len(PROMPTS))
    assert total.acceptance_rate == sum(r[2] for r in rounds) / sum(r[1] for r in rounds)


# Of a layer of the tiny model: q, k, v, output; three of the MLP; two norms. Four bytes each.
LAYER = 4 * (32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 64 + 2 * 32)
HEAD = 4 * VOCAB * 32
SLOT = 4 * 2 * 2 * 8  # keys and values of 2 heads of width 8


@pytest.mark.parametrize("exit_layer", [None, 2])
@pytest.mark.parametrize("rows", [1, 3])
def test_bytes_of_plain_steps(exit_layer, rows):
    """The prompt's pass counts not; step i looks at the prompt and i tokens more."""
    stats = run(model_of("llama3_2"), [PROMPT] * rows, 6, exit_layer=exit_layer).stats
    depth = exit_layer or L
    assert stats.weight_bytes == 5 * (depth * LAYER + HEAD)
    assert stats.cache_bytes == rows * depth * SLOT * sum(len(PROMPT) + i for i in range(1, 6))
    assert stats.bytes_per_token == (stats.weight_bytes + stats.cache_bytes) / (5 * rows)


@pytest.mark.parametrize("drafter", [False, True])
@pytest.mark.parametrize(("exit_layer", "d"), [(1, 2), (4, 3)])
def test_bytes_of_drafts(exit_layer, d, drafter):
    """n early passes and heads, one early pass more, a late one with the head: with a drafter a whole one."""
    model = model_of("llama3_2")
    speculation = Speculation(exit_layer, d, drafter=perturbed(model, 0.0) if drafter else None)
    stats = run(model, [PROMPT], 18, speculation=speculation).stats
    weights = cache = 0
    for root, n, _ in rounds_of(PROMPT, 18, exit_layer, d):
        layers = n * exit_layer + L  # the early pass of the last draft and the late one are L layers together
        weights += layers * LAYER + (n + 1) * HEAD
        cache += layers * SLOT * (root + n + 1)
    assert (stats.weight_bytes, stats.cache_bytes) == (weights, cache)


def test_statistics_add_up():
    a = GenerationStats(5, first_tokens=1, rounds=3, weight_bytes=7, reused_tokens=2, compile_s=1.5, draft_steps=4)
    b = GenerationStats(3, first_tokens=2, rounds=1, weight_bytes=1, cache_bytes=9, prefill_tokens=6, compile_s=0.5)
    a.count_round(3, 1)
    a.count_round(2, 2)
    b.count_round(4, 0)
    a.rounds_by_kind.update(["chain", "lookup"])
    b.rounds_by_kind.update(["lookup"])
    both = a + b
    assert (both.tokens, both.first_tokens, both.rounds, both.weight_bytes, both.cache_bytes) == (8, 3, 4, 8, 9)
    assert (both.reused_tokens, both.prefill_tokens, both.compile_s, both.draft_steps) == (2, 6, 2.0, 4)
    assert (both.drafted, both.accepted, both.rounds_by_kind) == (9, 3, {"chain": 1, "lookup": 2})
    assert both.accepted_histogram == [1, 1, 1]
    assert both.acceptance_by_position == [2 / 3, 1 / 3, 0, 0]
    assert both.bytes_per_token == 17 / 5
    assert a.rounds == 3 and a.drafted == 5  # neither changes
    assert GenerationStats().acceptance_by_position == [] and GenerationStats().bytes_per_token is None
