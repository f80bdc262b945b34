"""What a round of drafts costs, in calls of layers, and the statistics of a generation."""

import time
from collections import Counter

import pytest
import torch
from helpers.decoding import PROMPT, L, greedy, make_model, model_of

from layerskip_recipes.generation import engine
from layerskip_recipes.generation.api import generate
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.stats import is_looping


def count_calls(model):
    """A Counter of (layer number or "head", positions) for every call from now on."""
    calls = Counter()
    for name, module in [*enumerate(model.layers), ("head", model.norm)]:
        module.register_forward_pre_hook(lambda _, args, name=name: calls.update([(name, args[0].shape[1])]))
    return calls


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("exit_layer", "d"), [(1, 1), (2, 4), (5, 3), (6, 2)])
def test_cost_of_a_round(exit_layer, d, rows):
    """d early passes with head, one without, one late pass over d+1 positions; no layer twice for a position."""
    model = make_model()
    steps = iter(
        Generation(model, [PROMPT[: 2 + row] for row in range(rows)], 50, speculation=Speculation(exit_layer, d))
    )
    calls = count_calls(model)
    next(steps)
    assert calls == Counter({**{(layer, 1 + rows): 1 for layer in range(L)}, ("head", 1): 1})
    for _ in range(2):
        calls.clear()
        next(steps)
        assert calls == Counter(
            {
                **{(layer, 1): d + 1 for layer in range(exit_layer)},
                **{(layer, d + 1): 1 for layer in range(exit_layer, L)},
                ("head", 1): d,
            }
        ) + Counter({("head", d + 1): 1})


def test_nothing_is_drafted_beyond_the_limit():
    """With room for one more token a round is one pass; with room for three it drafts two."""
    model = make_model()
    for count, drafts in ((2, 0), (4, 2)):
        steps = iter(Generation(model, [PROMPT], count, speculation=Speculation(2, 5)))
        next(steps)
        calls = count_calls(model)
        next(steps)
        assert (calls[0, 1], calls[L - 1, drafts + 1], calls["head", drafts + 1]) == (drafts + 1, 1, 1)
        assert calls["head", 1] == drafts or drafts == 0


def test_the_first_token_is_timed_from_the_call_on(monkeypatch):
    """With what the construction of a `Generation` takes, but not what its caller does before the first step."""
    monkeypatch.setattr(engine, "check_prompt_tokens", lambda *_: time.sleep(0.2))
    called = time.perf_counter()
    generation = Generation(model_of("llama3_2"), [PROMPT], 2)
    time.sleep(0.2)
    next(iter(generation))
    assert 0.2 < generation.stats.prefill_s < time.perf_counter() - called - 0.2


@pytest.mark.parametrize("exit_layer", [None, 1, 4])
def test_cost_of_a_step(exit_layer):
    """Prefill and decoding of an exit never touch the layers above it; the head sees one position."""
    model = make_model()
    depth = exit_layer or L
    calls = count_calls(model)
    generate(model, torch.tensor(PROMPT), 5, exit_layer=exit_layer)
    prefill, steps = {(layer, 4): 1 for layer in range(depth)}, {(layer, 1): 4 for layer in range(depth)}
    assert calls == Counter({**prefill, **steps, ("head", 1): 5})


@pytest.mark.parametrize(("exit_layer", "d", "count"), [(1, 2, 25), (2, 4, 30), (4, 12, 30), (5, 3, 2), (5, 3, 3)])
def test_statistics(exit_layer, d, count):
    """Rounds, drafted and accepted tokens as the algorithm gives them, played through with greedy decoding only."""
    full = greedy("llama3_2", PROMPT, 30)
    rounds, done = [], 1
    while done < count:
        n = min(d, count - done - 1)
        draft = greedy("llama3_2", (*PROMPT, *full[:done]), n, exit_layer)
        accepted = next((i for i in range(n) if draft[i] != full[done + i]), n)
        rounds.append((n, accepted))
        done += accepted + 1
    stats = generate(model_of("llama3_2"), torch.tensor(PROMPT), count, exit_layer=exit_layer, num_speculations=d).stats
    assert (stats.rounds, stats.drafted, stats.accepted) == (
        len(rounds),
        sum(n for n, _ in rounds),
        sum(accepted for _, accepted in rounds),
    )
    histogram = Counter(accepted for _, accepted in rounds)
    assert stats.accepted_histogram == [histogram[k] for k in range(max(histogram) + 1)]
    assert sum(stats.accepted_histogram) == stats.rounds
    assert stats.acceptance_rate == (stats.accepted / stats.drafted if stats.drafted else None)
    assert stats.tokens == count and stats.tokens_per_second > 0


@pytest.mark.parametrize("stop", [False, True])
def test_statistics_of_a_batch_are_those_of_its_rows(stop):
    """What a row drafts beyond its own end, because others go on, counts nowhere; a round is one of the whole batch."""
    prompts = [torch.tensor(prompt) for prompt in (PROMPT[:1], (30, 31, 7), PROMPT, (9, 60, 2, 41))]
    arguments = {"max_generated_tokens": 14, "exit_layer": 3, "num_speculations": 5}
    if stop:
        arguments["stop_tokens"] = [greedy("llama3_2", PROMPT, 14)[5]]
    together = generate(model_of("llama3_2"), prompts, **arguments).stats
    alone = [generate(model_of("llama3_2"), prompt, **arguments).stats for prompt in prompts]
    assert len({stats.rounds for stats in alone}) > 1
    total = sum(alone[1:], alone[0])
    for name in ("tokens", "first_tokens", "drafted", "accepted", "accepted_histogram"):
        assert getattr(together, name) == getattr(total, name)
    assert together.rounds == max(stats.rounds for stats in alone)


def test_statistics_of_two_runs_add_up():
    runs = [
        generate(model_of("llama3_2"), torch.tensor(PROMPT), n, exit_layer=2, num_speculations=n).stats for n in (3, 20)
    ]
    for both in (runs[0] + runs[1], runs[1] + runs[0]):
        for name in ("tokens", "first_tokens", "rounds", "drafted", "accepted", "prefill_s", "decode_s"):
            assert getattr(both, name) == getattr(runs[0], name) + getattr(runs[1], name)
        assert sum(both.accepted_histogram) == both.rounds
        assert sum(k * n for k, n in enumerate(both.accepted_histogram)) == both.accepted


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_last_exit_accepts_everything(temperature):
    """q and p are the same model: 24 tokens after the first are 4 full rounds of 5 + 1."""
    out = generate(
        model_of("llama3_2"),
        torch.tensor(PROMPT),
        25,
        exit_layer=L,
        num_speculations=5,
        temperature=temperature,
        rng=torch.Generator().manual_seed(0),
    )
    assert (out.stats.rounds, out.stats.drafted, out.stats.accepted) == (4, 20, 20)
    assert out.stats.acceptance_rate == 1 and out.stats.accepted_histogram == [0, 0, 0, 0, 0, 4]


def test_without_drafts_there_is_no_acceptance_rate():
    stats = generate(model_of("llama3_2"), torch.tensor(PROMPT), 5).stats
    assert (stats.acceptance_rate, stats.drafted, stats.accepted_histogram, stats.rounds) == (None, 0, [], 4)


@pytest.mark.parametrize(
    ("tokens", "looping"),
    [
        ([1, 2, 3, 4] + [7] * 4, True),
        ([1, 2, 3, 4, 5] + [8, 9] * 3, True),
        (list(range(20, 28)) + [8, 9] * 3, False),  # less than half
        (list(range(50)), False),
        ([7, 7], False),  # no three periods
        ([8, 9] * 6 + [3], False),  # over before the end
        ([], False),
    ],
)
def test_is_looping(tokens, looping):
    assert is_looping(tokens) is looping
