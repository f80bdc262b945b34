"""Look-ups against a search in the text; the choice between drafts, look-ups and plain decoding by made-up rates."""

import itertools
import random
import statistics
from collections import Counter

import pytest
from helpers.speculation import search
from helpers.tiny import make_tiny

from layerskip_recipes.generation.drafting.choice import DiscountedUCB
from layerskip_recipes.generation.drafting.drafter import PLAIN, DraftStrategy
from layerskip_recipes.generation.drafting.lookup import TextIndex
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation

# ---- drafts from the text ----


@pytest.mark.parametrize("ngram", [1, 2, 3])
def test_look_up_finds_what_a_search_finds(ngram):
    """Texts of a small alphabet that grow in pieces; the length asked for changes nothing but the length."""
    generator, found, new = random.Random(50), 0, 0
    for _ in range(100):
        index, text = TextIndex(ngram), []
        for _ in range(8):
            piece = [generator.randrange(3) for _ in range(generator.randrange(6))]
            index.extend(piece)
            text += piece
            for count in (1, 3, 7):
                expected = search(text, ngram, count)
                assert index.find(count)[0] == expected
                assert len(expected) in (0, count)
            found += bool(expected)
            new += not expected
    assert found > 100 and new > 100


def test_look_up_by_hand():
    index = TextIndex(2)
    index.extend([1, 2, 3, 4, 1, 2, 5, 6, 1, 2])
    assert index.find(3) == ([5, 6, 1], 0)  # the last place, not the first
    assert index.find(6) == ([5, 6, 1, 2, 5, 6], 0)
    index.extend([7])
    assert index.find(3) == ([], 0)
    short = TextIndex(3)
    short.extend([1, 1])
    assert short.find(2) == ([], 0)


@pytest.mark.parametrize("ngram", [1, 2, 3])
def test_how_much_of_the_text_a_look_up_found_again(ngram):
    """Against a search in the whole text; what longer matches promise is learned apart from that of shorter ones."""
    generator, levels = random.Random(56), Counter()
    text, index = [], TextIndex(ngram)
    for _ in range(120):
        repeat = text[(at := generator.randrange(len(text))) : at + generator.randrange(1, 20)] if text else []
        new = repeat if generator.random() < 0.5 else [generator.randrange(6)]
        text += new
        index.extend(new)
        ends = [i for i in range(ngram, len(text)) if text[i - ngram : i] == text[-ngram:]]
        found, match = index.find(3)
        if not ends:
            assert (found, match) == ([], 0)
            continue
        same = max(n for n in range(ngram, ends[-1] + 1) if text[ends[-1] - n : ends[-1]] == text[-n:])
        assert found[0] == text[ends[-1]] and match == (0 if same < 2 * ngram else 1 if same < 4 * ngram else 2)
        levels[match] += 1
    assert min(levels[match] for match in range(3)) > 5


# ---- which way is the fastest ----

STRATEGIES = [DraftStrategy("chain"), DraftStrategy("lookup", 0), DraftStrategy("lookup", 2)]


def play(choice, strategies, rates, rounds, generator):
    """Rounds in which each strategy gives tokens at its rate, with noise; which were picked."""
    picked = []
    for _ in range(rounds):
        strategy = choice.pick(strategies)
        picked.append(strategy)
        tokens = generator.randrange(1, 6)
        choice.learn(strategy, tokens, 3 / rates[strategy] * generator.uniform(0.8, 1.2))
    return picked


@pytest.mark.parametrize("best", range(3))
def test_the_fastest_strategy_is_found(best):
    """Each is tried four times, then the fastest runs, the others now and then."""
    rates = {strategy: 150.0 if i == best else 100.0 + i for i, strategy in enumerate(STRATEGIES)}
    choice = DiscountedUCB()
    picked = play(choice, STRATEGIES, rates, 412, random.Random(53))
    assert Counter(picked[:12]) == Counter(dict.fromkeys(STRATEGIES, 4))
    counts = Counter(picked[12:])
    assert counts[STRATEGIES[best]] > 280 and all(counts[strategy] for strategy in STRATEGIES)
    assert choice.rate(STRATEGIES[best]) == pytest.approx(150, rel=0.15)


def test_an_unlucky_trial_is_no_verdict():
    """The machine was busy in the trial of the best strategy: it runs again soon, and then always."""
    generator, choice = random.Random(57), DiscountedUCB()
    rates = dict(zip(STRATEGIES, (150.0, 100.0, 100.0), strict=True))
    for strategy in STRATEGIES:
        for late in (9.0, 0.0, 0.0, 0.0):
            choice.learn(strategy, 3, 3 / rates[strategy] + late * (strategy is STRATEGIES[0]))
    assert play(choice, STRATEGIES, rates, 200, generator)[-50:].count(STRATEGIES[0]) > 40


def test_the_bound_of_a_strategy():
    """rate (1 + margin / sqrt(weight)), where the weights of all rounds fall with every round of any strategy."""
    choice = DiscountedUCB(trial=1, memory=10, margin=1.0)
    rounds = [(STRATEGIES[0], 3, 0.3), (STRATEGIES[1], 2, 0.25), (STRATEGIES[0], 1, 0.2), (STRATEGIES[0], 4, 0.3)]
    for strategy, tokens, seconds in rounds:
        choice.learn(strategy, tokens, seconds)
    kept = [0.9**age for age in (3, 2, 1, 0)]
    first, second = (3 + 1 + 4) / (0.3 + 0.2 + 0.3), 2 / 0.25
    bounds = [first * (1 + 1 / (kept[0] + kept[2] + 1) ** 0.5), second * (1 + 1 / kept[1] ** 0.5)]
    assert bounds[0] < bounds[1] and first > second  # the slower one was seen less
    assert choice.pick(STRATEGIES[:2]) == STRATEGIES[1]
    choice.margin = 0.2
    assert choice.pick(STRATEGIES[:2]) == STRATEGIES[0]


def test_a_change_of_the_rates_is_noticed():
    """The strategy in use gets slow: others take over soon. Then another gets faster than it: that takes tries."""
    generator, choice = random.Random(54), DiscountedUCB()
    rates = dict(zip(STRATEGIES, (150.0, 100.0, 50.0), strict=True))
    assert play(choice, STRATEGIES, rates, 200, generator)[-50:].count(STRATEGIES[0]) > 35
    rates[STRATEGIES[0]] = 40.0
    assert play(choice, STRATEGIES, rates, 200, generator)[-50:].count(STRATEGIES[1]) > 35
    rates[STRATEGIES[2]] = 250.0
    assert play(choice, STRATEGIES, rates, 300, generator)[-50:].count(STRATEGIES[2]) > 35


def test_a_strategy_that_is_not_offered_waits():
    """Look-ups are offered now and then only, and are the fastest where they are."""
    generator, choice, lookup = random.Random(55), DiscountedUCB(), DraftStrategy("lookup", 1)
    rates = dict(zip((*STRATEGIES[:2], lookup), (100.0, 80.0, 300.0), strict=True))
    picked = []
    for i in range(300):
        offered = [*STRATEGIES[:2], lookup] if i % 3 == 0 else STRATEGIES[:2]
        picked.append((i % 3 == 0, *play(choice, offered, rates, 1, generator)))
    late = Counter(picked[100:])
    assert late[True, lookup] > 60 and late[False, STRATEGIES[0]] > 80 and late[False, lookup] == 0


def test_the_only_strategy_is_no_choice():
    choice = DiscountedUCB()
    assert all(choice.pick(STRATEGIES[:1]) == STRATEGIES[0] for _ in range(40))
    assert choice.rate(STRATEGIES[0]) == 0


def test_the_rate_is_that_of_the_last_rounds():
    """Tokens by seconds of the last 32, of which none counts for more than three times their median."""
    choice, generator = DiscountedUCB(), random.Random(56)
    rounds = [(generator.randrange(1, 9), generator.random() ** 3) for _ in range(50)]
    for done, (tokens, seconds) in enumerate(rounds, start=1):
        choice.learn(STRATEGIES[0], tokens, seconds)
        last = rounds[max(done - 32, 0) : done]
        most = 3 * statistics.median(seconds for _, seconds in last)
        expected = sum(tokens for tokens, _ in last) / sum(min(most, seconds) for _, seconds in last)
        assert choice.rate(STRATEGIES[0]) == pytest.approx(expected)


def test_short_and_long_matches_are_judged_apart():
    choice, drafts = DiscountedUCB(), DraftStrategy("chain")
    short, long = DraftStrategy("lookup", 0), DraftStrategy("lookup", 2)
    for strategy, tokens in ((short, 1), (long, 7), (drafts, 3)) * 20:
        choice.learn(strategy, tokens, 1.0)
    assert choice.pick([drafts, short]) == drafts and choice.pick([drafts, long]) == long
    assert choice.pick([drafts]) == drafts


# ---- drafts that do not pay ----

COSTS = [
    (0.04, 8, 1.4),
    (0.13, 6, 1.3),
    (0.3, 6, 1.3),
    (0.34, 4, 1.2),
    (0.5, 6, 1.3),
]  # of a draft step, d, verification


def decode(choice, cost, accept, tokens, seed=0, slow=()):
    """A text decoded by a clock whose unit is a plain step, each drafted token accepted with probability `accept`.

    Rounds of the numbers `slow` take ten times as long. Returns the time and what each round did.
    """
    (step, d, verify), generator, picked, time, done = cost, random.Random(seed), [], 0.0, 0
    choice.begin_text()
    while done < tokens:
        strategy, new, seconds = choice.pick(STRATEGIES[:1]), 1, 1.0
        if strategy != PLAIN:
            seconds = d * step + verify
            while new <= d and generator.random() < accept:
                new += 1
        seconds *= generator.uniform(0.95, 1.05) * (10 if len(picked) in slow else 1)
        choice.learn(strategy, new, seconds)
        picked.append(strategy)
        time, done = time + seconds, done + new
    return time * tokens / done, picked


def always(cost, accept, tokens):
    """The expected time where each round drafts."""
    step, d, verify = cost
    return tokens * (d * step + verify) / sum(accept**k for k in range(d + 1))


@pytest.mark.parametrize("accept", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("cost", COSTS)
def test_bad_drafts_cost_a_twentieth_at_most(cost, accept):
    """Of 128 tokens; drafting stops after a few rounds, and is tried again more and more seldom."""
    for seed in range(20):
        time, _ = decode(DiscountedUCB(plain=True), cost, accept, 128, seed)
        assert time < 1.05 * 128
    _, picked = decode(DiscountedUCB(plain=True), cost, 0.0, 3000)
    drafted = [number for number, strategy in enumerate(picked) if strategy != PLAIN]
    first = next(i for i, number in enumerate(drafted) if number > i + 1)  # the first round is plain
    gaps = [later - earlier for earlier, later in itertools.pairwise(drafted[first - 1 :])]
    assert first <= 8 and 1 <= len(gaps) <= 10
    assert gaps[0] > 10 and max(gaps) > 400


def test_useless_look_ups_do_not_keep_the_exit_from_drafting():
    """Look-ups that are never accepted, in each second round, beside drafts that pay after 200 rounds."""
    for seed in range(10):
        generator, choice, lookup = random.Random(seed), DiscountedUCB(plain=True), DraftStrategy("lookup", 1)
        seconds, time, tokens = {"plain": 1.0, "chain": 2.5, "lookup": 1.4}, [], []
        for number in range(1200):
            picked = choice.pick([STRATEGIES[0], *([lookup] if generator.random() < 0.5 else [])])
            tokens.append(7 if picked == STRATEGIES[0] and number >= 200 else 1)
            time.append(seconds[picked.name] * generator.uniform(0.95, 1.05))
            choice.learn(picked, tokens[-1], time[-1])
        assert sum(time[:128]) < 1.06 * 128
        assert sum(tokens[600:]) / sum(time[600:]) > 0.9 * 7 / 2.5


def test_each_prompt_of_a_row_tries_drafts_anew():
    """Also in continuous batching: a new prompt ends the long waits that a hard one has earned."""
    choice = DiscountedUCB(plain=True)
    for _ in range(400):
        picked = choice.pick(STRATEGIES[:1])
        choice.learn(picked, 1, 1.0 if picked == PLAIN else 3.0)
    budget = choice.budgets["chain"]
    assert budget.repaid < DiscountedUCB(plain=True).budgets["chain"].repaid
    model = make_tiny()
    arguments = {"speculation": Speculation(2, 3), "rows": 1, "choice": choice}
    rounds = iter(Generation(model, [[1, 2], [3, 4]], 3, **arguments))
    next(rounds)
    budget.repaid = 0.0
    assert any(budget.repaid for _ in rounds)


@pytest.mark.parametrize("cost", COSTS[:4])
def test_good_drafts_are_kept(cost):
    times = [decode(DiscountedUCB(plain=True), cost, 0.9, 256, seed)[0] for seed in range(40)]
    assert statistics.mean(times) < 1.05 * always(cost, 0.9, 256)
    _, picked = decode(DiscountedUCB(plain=True), cost, 0.9, 256, slow=(0, 7, 20))
    assert picked[-20:].count(PLAIN) <= 2  # a machine that was busy now and then changes nothing


def test_drafts_are_tried_again_where_the_text_changes():
    """Another text gets its try as early as the first one; in the same text it comes, too."""
    choice, cost = DiscountedUCB(plain=True), COSTS[1]
    _, picked = decode(choice, cost, 0.0, 600)
    assert picked[-100:].count(PLAIN) > 98
    time, picked = decode(choice, cost, 0.9, 600)
    assert PLAIN in picked[:20] and PLAIN not in picked[-40:-20] and time < 0.7 * 600
    _, picked = decode(choice, cost, 0.0, 300)
    assert picked[-100:].count(PLAIN) > 95


def test_without_plain_decoding_bad_drafts_go_on():
    _, picked = decode(DiscountedUCB(plain=False), COSTS[2], 0.0, 50)
    assert set(picked) == {STRATEGIES[0]}
