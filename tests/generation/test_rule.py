"""The rule of when to draft, by made-up costs and acceptance."""

import random
import statistics
from collections import Counter

import pytest
from helpers.speculation import PROMPTS, run, search
from helpers.tiny import make_tiny

from layerskip_recipes.generation.drafting.drafter import PLAIN, RoundKind
from layerskip_recipes.generation.drafting.rule import DraftRule
from layerskip_recipes.generation.drafting.speculation import Speculation

pytestmark = pytest.mark.clock
CHAIN, LOOKUP = RoundKind("chain"), RoundKind("lookup", 1, untried=1.0)
# Cost of a draft step, d, cost of a verification; in plain steps.
COSTS = [(0.04, 8, 1.4), (0.13, 6, 1.3), (0.13, 8, 1.7), (0.3, 6, 1.3), (0.34, 4, 1.2), (0.5, 6, 1.3)]


def decode(rule, cost, accept, tokens, seed=0, slow=()):
    """A text decoded by a clock whose unit is a plain step, each drafted token accepted with probability `accept`.

    Rounds of the numbers `slow` take ten times as long. Returns the time and what each round did.
    """
    (step, d, verify), generator, picked, time, done = cost, random.Random(seed), [], 0.0, 0
    rule.begin_text()
    while done < tokens:
        kind, new, seconds = rule.pick([CHAIN]), 1, 1.0
        if kind != PLAIN:
            seconds = d * step + verify
            while new <= d and generator.random() < accept:
                new += 1
        seconds *= generator.uniform(0.95, 1.05) * (10 if len(picked) in slow else 1)
        rule.learn(kind, new, seconds)
        if kind != PLAIN:
            rule.observe(kind, new)
        picked.append(kind)
        time, done = time + seconds, done + new
    return time * tokens / done, picked


def always(cost, accept, tokens):
    """The expected time where each round drafts."""
    step, d, verify = cost
    return tokens * (d * step + verify) / sum(accept**k for k in range(d + 1))


@pytest.mark.parametrize("accept", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("cost", COSTS)
def test_bad_drafts_cost_a_twentieth_at_most(cost, accept):
    """Of 128 tokens on average, or two rounds if they cost more; of a longer text less."""
    step, d, verify = cost
    times = [decode(DraftRule(), cost, accept, 128, seed)[0] for seed in range(20)]
    assert statistics.mean(times) < max(1.05 * 128, 128 + 2.1 * (d * step + verify - 1)) and max(times) < 1.1 * 128
    assert decode(DraftRule(), cost, 0.0, 3000)[0] < 1.02 * 3000


@pytest.mark.parametrize("cost", COSTS[:5])
def test_good_drafts_are_kept(cost):
    times = [decode(DraftRule(), cost, 0.9, 256, seed)[0] for seed in range(40)]
    assert statistics.mean(times) < 1.07 * always(cost, 0.9, 256)
    _, picked = decode(DraftRule(), cost, 0.9, 256, slow=(3, 7, 20))
    assert picked.count(PLAIN) == 2  # a machine that was busy now and then changes nothing


def test_a_slow_first_step_is_no_measure():
    """Bad drafts end soon even if the first plain step was ten times as slow as others."""
    assert decode(DraftRule(), COSTS[1], 0.0, 256, slow=(0,))[1].count(CHAIN) < 20


def test_drafts_are_tried_again():
    """A useless draft becomes a good one, as in another text: it is found within some rounds, and the reverse."""
    rule, cost = DraftRule(), COSTS[1]
    _, picked = decode(rule, cost, 0.0, 600)
    assert picked[-100:].count(PLAIN) > 95
    time, picked = decode(rule, cost, 0.9, 600)
    assert picked[-40:].count(PLAIN) == 0 and time < 0.7 * 600
    _, picked = decode(rule, cost, 0.0, 300)
    assert picked[-100:].count(PLAIN) > 95


def test_a_cold_first_draft_is_no_measure():
    assert decode(DraftRule(), COSTS[1], 0.9, 256, slow=(1,))[1].count(PLAIN) == 2


def test_a_busy_moment_is_forgotten():
    """The first drafts took ten times as long, as when a server starts beside other work: the next try finds out."""
    rule = DraftRule()
    _, picked = decode(rule, COSTS[1], 0.9, 60, slow=(1, 2))
    assert picked[-30:].count(CHAIN) == 0
    _, picked = decode(rule, COSTS[1], 0.9, 400, seed=1)
    assert CHAIN in picked[:140] and PLAIN not in picked[140:]


@pytest.mark.parametrize("better", [CHAIN, LOOKUP])
def test_look_ups_run_where_they_are_better(better):
    """Both are observed in every round. Look-ups are offered in each third round, and cost less."""
    rule, generator, picked = DraftRule(), random.Random(3), Counter()
    for number in range(300):
        offered = [CHAIN, LOOKUP] if number % 3 == 0 else [CHAIN]
        kind = rule.pick(offered)
        tokens = {CHAIN: generator.randrange(2, 6), LOOKUP: 7 if better == LOOKUP else 1, PLAIN: 1}
        rule.learn(kind, tokens[kind], {CHAIN: 2.0, LOOKUP: 1.4, PLAIN: 1.0}[kind])
        if kind == CHAIN:
            rule.observe(CHAIN, tokens[CHAIN])
        if LOOKUP in offered:
            rule.observe(LOOKUP, tokens[LOOKUP])
        picked[kind] += 1
    assert picked[LOOKUP] > 90 if better == LOOKUP else picked[LOOKUP] == 0


def test_a_draft_that_does_not_pay_spends_little_of_what_another_gains():
    """Look-ups gain 3 steps in each third round. A chain gives one token for 2 steps in the others."""
    rule, picked, time, done = DraftRule(), Counter(), 0.0, 0
    tokens, seconds = {CHAIN: 1, LOOKUP: 5, PLAIN: 1}, {CHAIN: 2.0, LOOKUP: 2.0, PLAIN: 1.0}
    for number in range(300):
        offered = [CHAIN, LOOKUP] if number % 3 == 0 else [CHAIN]
        kind = rule.pick(offered)
        rule.learn(kind, tokens[kind], seconds[kind])
        for observed in offered if kind == LOOKUP else [kind] if kind == CHAIN else []:
            rule.observe(observed, tokens[observed])
        picked[kind] += 1
        time, done = time + seconds[kind], done + tokens[kind]
    assert picked[LOOKUP] > 95 and picked[CHAIN] <= 0.25 * 3 * picked[LOOKUP]
    assert done > 1.5 * time


def test_what_was_observed_counts_for_all_look_ups_of_a_class():
    """Not for one with the same estimate alone: estimates differ in each round."""
    rule = DraftRule()
    for estimate in (4.1, 4.2, 4.3):
        rule.observe(RoundKind("lookup", 2, untried=estimate), 1.0)
    assert rule.tokens(RoundKind("lookup", 2, untried=4.4)) == pytest.approx(1.0)


def test_without_measures_each_round_drafts():
    rule = DraftRule(measure=False)
    _, picked = decode(rule, COSTS[3], 0.0, 50)
    assert set(picked) == {CHAIN} and rule.pick([]) == PLAIN
    rule.observe(LOOKUP, 3.0)  # more tokens than the useless chain
    assert rule.pick([CHAIN, LOOKUP]) == LOOKUP


def test_the_text_tells_how_good_a_look_up_would_have_been():
    """The engine observes look-ups in rounds of other drafts: against a search in the final text."""
    observed = []

    class Watching(DraftRule):
        def pick(self, offered):
            return CHAIN

        def observe(self, kind, tokens):
            observed.append((kind, tokens))

    model, d = make_tiny("llama3_2"), 3
    speculation = Speculation(2, d, prompt_lookup=1)
    for prompt in PROMPTS:
        observed.clear()
        generation = run(model, [prompt], 24, speculation=speculation, rule=Watching())
        text, at, expected = [*prompt, *generation.generated[0]], len(prompt) + 1, []
        chains = [tokens for kind, tokens in observed if kind == CHAIN]
        for new in chains:
            found, after, matches = search(text[:at], 1, d)[: len(text) - at - 1], text[at : at + int(new)], 0
            while matches < min(len(found), len(after)) and found[matches] == after[matches]:
                matches += 1
            expected += [1 + matches] if found else []
            at += int(new)
        assert [tokens for kind, tokens in observed if kind != CHAIN] == expected
