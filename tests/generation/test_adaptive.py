"""What rounds learn: look-ups against a search, draft lengths against the best fixed one, choices by made-up rates."""

import math
import random
import statistics
from collections import Counter

import pytest
from helpers.speculation_search import search

from layerskip_recipes.generation.drafting.choice import (
    Arm,
    Chooser,
    DraftLength,
    Policy,
    Stopping,
    _Record,
    check_threshold,
)
from layerskip_recipes.generation.drafting.lookup import LookUp

# ---- drafts from the text ----


@pytest.mark.parametrize("ngram", [1, 2, 3])
def test_look_up_finds_what_a_search_finds(ngram):
    """Texts of a small alphabet that grow in pieces; the length asked for changes nothing but the length."""
    generator, found, new = random.Random(50), 0, 0
    for _ in range(100):
        look_up, text = LookUp(ngram), []
        for _ in range(8):
            piece = [generator.randrange(3) for _ in range(generator.randrange(6))]
            look_up.extend(piece)
            text += piece
            for count in (1, 3, 7):
                expected = search(text, ngram, count)
                assert look_up.find(count)[0] == expected
                assert len(expected) in (0, count)
            found += bool(expected)
            new += not expected
    assert found > 100 and new > 100


def test_look_up_by_hand():
    look_up = LookUp(2)
    look_up.extend([1, 2, 3, 4, 1, 2, 5, 6, 1, 2])
    assert look_up.find(3) == ([5, 6, 1], 0)  # the last place, not the first
    assert look_up.find(6) == ([5, 6, 1, 2, 5, 6], 0)
    look_up.extend([7])
    assert look_up.find(3) == ([], 0)
    short = LookUp(3)
    short.extend([1, 1])
    assert short.find(2) == ([], 0)


# ---- when a draft stops ----


def test_a_fixed_threshold_looks_at_the_last_confidence_of_each_row():
    length = DraftLength(0.5)
    assert length.go_on([[0.5]], 0) and length.go_on([[0.1, 0.9]], 0) and length.go_on([[0.2], [0.6]], 0)
    assert not length.go_on([[0.49]], 0) and not length.go_on([[0.9, 0.1]], 0) and not length.go_on([[0.2], [0.3]], 0)
    assert DraftLength(0.0).go_on([[0.0]], 0) and not DraftLength(1.0).go_on([[0.999]], 0)


def test_auto_calibrates_the_confidence():
    """Bins of confidence get the acceptance seen in them, however far that is from the confidence itself."""
    rates, length, generator = [0.9, 0.2, 0.5, 0.65], DraftLength("auto"), random.Random(51)
    seen = {bin: [0, 0] for bin in range(4)}
    for _ in range(4000):
        bin = generator.randrange(4)
        confidence = (3 * bin + 1.5) / 12 + generator.uniform(-0.04, 0.04)  # inside of the bin 3 bin + 1 of 12
        stands = generator.random() < rates[bin]
        length.learn([confidence], int(stands))
        seen[bin][0] += 1
        seen[bin][1] += stands
    mean = (sum(stood for _, stood in seen.values()) + 1.4) / (4000 + 2)
    assert length.mean == pytest.approx(mean)
    for bin, (count, stood) in seen.items():
        assert length.acceptance((3 * bin + 1.5) / 12) == pytest.approx((stood + 4 * mean) / (count + 4))
        assert abs(length.acceptance((3 * bin + 1.5) / 12) - rates[bin]) < 0.05
    # A bin without observations has the mean; 0 and 1 are confidences too.
    assert length.acceptance(0.0) == pytest.approx(mean) and length.acceptance(1.0) == pytest.approx(mean)


def test_what_follows_the_first_rejection_says_nothing():
    """Of four drafts two stood: the third was rejected, the fourth was never looked at."""
    length = DraftLength("auto")
    assert length.mean == pytest.approx(0.7)
    length.learn([0.95, 0.95, 0.5, 0.1], 2)
    assert (sum(length.drafted), sum(length.accepted)) == (3, 2)
    mean = (2 + 1.4) / (3 + 2)
    assert length.acceptance(0.95) == pytest.approx((2 + 4 * mean) / (2 + 4))
    assert length.acceptance(0.5) == pytest.approx((0 + 4 * mean) / (1 + 4))
    assert length.acceptance(0.1) == pytest.approx(mean)
    length.learn([0.2, 0.2], 2)
    assert (sum(length.drafted), sum(length.accepted)) == (5, 4)


def calibrated(acceptances):
    """A DraftLength that has seen 10,000 drafts of each of 12 bins, of which so many were accepted."""
    length = DraftLength("auto")
    for bin, acceptance in enumerate(acceptances):
        for i in range(10_000):
            length.learn([(bin + 0.5) / 12], int(i < 10_000 * acceptance))
    return length


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.8, 0.95])
def test_a_draft_ends_where_one_more_token_costs_more_than_it_brings(acceptance):
    """With a confidence that says nothing, at the rate of the best fixed length, it stops at that length."""
    length, generator = calibrated([acceptance] * 12), random.Random(52)
    for draft_cost, verify_cost in ((0.1, 1.0), (0.3, 1.0), (0.05, 0.7)):
        # n drafts bring 1 + a + ... + a^n tokens.
        rates = [sum(acceptance**i for i in range(n + 1)) / (n * draft_cost + verify_cost) for n in range(1, 80)]
        best = 1 + max(range(len(rates)), key=rates.__getitem__)
        length.step_seconds = draft_cost
        for _ in range(3):
            confidences = [generator.random()]
            while length.go_on([confidences], max(rates)):
                confidences.append(generator.random())
            assert len(confidences) == best


def test_a_draft_goes_on_where_the_confidence_promises_more():
    """High confidences are accepted, low ones are not: by them the next token is worth a step or not."""
    length = calibrated([0.1] * 6 + [0.9] * 6)
    length.step_seconds = 1.0
    # What the next token brings: 0.9 or 0.1 that all so far stand, times 0.5 on the average.
    for rate, sure, unsure in ((0.04, True, True), (0.3, True, False), (0.46, False, False)):
        assert (length.go_on([[0.9]], rate), length.go_on([[0.1]], rate)) == (sure, unsure)
    assert length.go_on([[0.9, 0.9]], 0.40) and not length.go_on([[0.9, 0.9]], 0.41)
    assert not length.go_on([[0.9, 0.1]], 0.06) and not length.go_on([[0.1, 0.9]], 0.06)
    # The rows of a batch share the step, and the rate is that of a row.
    assert length.go_on([[0.9], [0.1]], 0.24) and not length.go_on([[0.9], [0.1]], 0.26)
    # Nothing is known of the rate: draft on.
    assert length.go_on([[0.1]], 0.0)


def test_the_time_of_a_step_is_a_moving_average():
    length = DraftLength("auto")
    seconds = [2.0, 1.0, 1.0, 5.0]
    for value in seconds:
        length.timed(value)
    expected = seconds[0]
    for value in seconds[1:]:
        expected += 0.1 * (value - expected)
    assert length.step_seconds == pytest.approx(expected)


# ---- which way is the fastest ----

ARMS = [Arm("fixed", 1), Arm("fixed", 2), Arm("fixed", 4)]


def play(chooser, arms, rates, rounds, generator):
    """Rounds in which each arm gives tokens at its rate, with noise; which were picked."""
    picked = []
    for _ in range(rounds):
        arm = chooser.pick(arms)
        picked.append(arm)
        tokens = generator.randrange(1, 6)
        chooser.learn(arm, tokens, 3 / rates[arm] * generator.uniform(0.8, 1.2))
    return picked


@pytest.mark.parametrize("best", range(3))
def test_the_fastest_arm_is_found(best):
    """Each is tried four times, then the fastest runs, the others now and then."""
    rates = {arm: 150.0 if i == best else 100.0 + i for i, arm in enumerate(ARMS)}
    chooser = Chooser()
    picked = play(chooser, ARMS, rates, 412, random.Random(53))
    assert Counter(picked[:12]) == Counter(dict.fromkeys(ARMS, 4))
    counts = Counter(picked[12:])
    assert counts[ARMS[best]] > 280 and all(counts[arm] for arm in ARMS)
    assert chooser.rate(ARMS[best]) == pytest.approx(150, rel=0.15)


def test_an_unlucky_trial_is_no_verdict():
    """The machine was busy in the trial of the best arm: it runs again soon, and then always."""
    generator, chooser = random.Random(57), Chooser()
    rates = dict(zip(ARMS, (150.0, 100.0, 100.0), strict=True))
    for arm in ARMS:
        for late in (9.0, 0.0, 0.0, 0.0):
            chooser.learn(arm, 3, 3 / rates[arm] + late * (arm is ARMS[0]))
    assert play(chooser, ARMS, rates, 200, generator)[-50:].count(ARMS[0]) > 40


def test_what_arms_promise():
    """rate (1 + margin / sqrt(weight)), where the weights of all rounds fall with every round of any arm."""
    chooser = Chooser(trial=1, memory=10, margin=1.0)
    rounds = [(ARMS[0], 3, 0.3), (ARMS[1], 2, 0.25), (ARMS[0], 1, 0.2), (ARMS[0], 4, 0.3)]
    for arm, tokens, seconds in rounds:
        chooser.learn(arm, tokens, seconds)
    kept = [0.9**age for age in (3, 2, 1, 0)]
    first, second = (3 + 1 + 4) / (0.3 + 0.2 + 0.3), 2 / 0.25
    promises = [first * (1 + 1 / (kept[0] + kept[2] + 1) ** 0.5), second * (1 + 1 / kept[1] ** 0.5)]
    assert promises[0] < promises[1] and first > second  # the slower one was seen less
    assert chooser.pick(ARMS[:2]) == ARMS[1]
    chooser.margin = 0.2
    assert chooser.pick(ARMS[:2]) == ARMS[0]


def test_a_change_of_the_rates_is_noticed():
    """The arm in use gets slow: others take over soon. Then another gets faster than it: that takes tries."""
    generator, chooser = random.Random(54), Chooser()
    rates = dict(zip(ARMS, (150.0, 100.0, 50.0), strict=True))
    assert play(chooser, ARMS, rates, 200, generator)[-50:].count(ARMS[0]) > 35
    rates[ARMS[0]] = 40.0
    assert play(chooser, ARMS, rates, 200, generator)[-50:].count(ARMS[1]) > 35
    rates[ARMS[2]] = 250.0
    assert play(chooser, ARMS, rates, 300, generator)[-50:].count(ARMS[2]) > 35


def test_an_arm_that_is_not_offered_waits():
    """Look-ups are offered now and then only, and are the fastest where they are."""
    generator, chooser, lookup = random.Random(55), Chooser(), Arm("lookup", 1)
    rates = dict(zip((*ARMS[:2], lookup), (100.0, 80.0, 300.0), strict=True))
    picked = []
    for i in range(300):
        offered = [*ARMS[:2], lookup] if i % 3 == 0 else ARMS[:2]
        picked.append((i % 3 == 0, *play(chooser, offered, rates, 1, generator)))
    late = Counter(picked[100:])
    assert late[True, lookup] > 60 and late[False, ARMS[0]] > 80 and late[False, lookup] == 0


def test_the_only_arm_is_no_choice():
    chooser = Chooser()
    assert all(chooser.pick(ARMS[:1]) == ARMS[0] for _ in range(40))
    assert chooser.rate(ARMS[0]) == 0


def test_the_rate_is_that_of_the_last_rounds():
    """Tokens by seconds of the last 32, of which none counts for more than three times their median."""
    chooser, generator = Chooser(), random.Random(56)
    rounds = [(generator.randrange(1, 9), generator.random() ** 3) for _ in range(50)]
    for done, (tokens, seconds) in enumerate(rounds, start=1):
        chooser.learn(ARMS[0], tokens, seconds)
        last = rounds[max(done - 32, 0) : done]
        most = 3 * statistics.median(seconds for _, seconds in last)
        expected = sum(tokens for tokens, _ in last) / sum(min(most, seconds) for _, seconds in last)
        assert chooser.rate(ARMS[0]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "kinds", "choice"),
    [
        (([3],), ["fixed 3"], False),
        (([1, 4],), ["fixed 1", "fixed 4"], True),
        (([3], 0.4), ["adaptive 3"], True),
        (([3], 0), ["adaptive 3"], True),
        (([3], "auto"), ["fixed 3", "adaptive 3", "plain 3"], True),
        (([2, 3], "auto"), ["fixed 2", "adaptive 2", "fixed 3", "adaptive 3", "plain 2"], True),
        (([2, 3], None, True), ["fixed 2", "fixed 3", "lookup 2"], True),
        (([2], None, True), ["fixed 2", "lookup 2"], True),
    ],
    ids=str,
)
def test_what_there_is_to_choose_from(arguments, kinds, choice):
    looks_up = any(kind.startswith("lookup") for kind in kinds)
    for match in (None, 0, 1, 2) if looks_up else (None,):
        policy, offered = Policy(*arguments), set()
        assert policy.has_choice == choice
        for _ in range(40):
            arm = policy.pick(match)
            policy.learn(arm, 1, 1.0)
            offered.add(f"{arm.kind} {arm.exit_layer}")
            assert arm.kind != "lookup" or arm.match == match
        assert offered == {kind for kind in kinds if match is not None or not kind.startswith("lookup")}


def test_that_no_draft_gives_one_token_needs_few_tries():
    """So an unlucky trial of the drafts costs them a few rounds: what they promise has eight times the margin."""
    for margin, kind in ((0.8, "fixed"), (0.1, "plain")):
        chooser, arm = Chooser(trial=1, memory=10, margin=0.8), Arm(kind, 3)
        chooser.learn(arm, 1, 0.5)
        for rate, picked in ((2 * (1 + margin) - 0.01, arm), (2 * (1 + margin) + 0.01, ARMS[0])):
            chooser.records.pop(ARMS[0], None)
            chooser.records[arm].weight = 1.0
            chooser.records[ARMS[0]] = record = _Record(rounds=1, weight=1e12)
            record.recent.append((1.0, rate))
            assert chooser.pick([arm, ARMS[0]]) == picked


# ---- whole drafts, or drafts that stop ----


def loops_and_prose(generator, rounds):
    """What whole drafts of 6 would bring, in turns of 40 rounds: all of it in a loop, else 0 to 2."""
    return [6 if i // 40 % 2 else generator.randrange(3) for i in range(rounds)]


@pytest.mark.parametrize(("step", "whole_step", "pays"), [(0.1, 0.1, True), (0.25, 0.11, False)])
def test_drafts_that_stop_are_chosen_where_they_pay(step, whole_step, pays):
    """A round takes 1 and its steps. A stop after 2 saves steps in prose, but separate steps may take longer."""
    stopping, ways = Stopping(), []
    for right in loops_and_prose(random.Random(58), 600):
        may_stop = stopping.next()
        drafted = 6 if right == 6 or not may_stop else 2
        seconds = 1 + drafted * (step if may_stop else whole_step)
        ways.append(may_stop)
        stopping.learn(may_stop, min(right, drafted) + 1, 0.0, seconds)
    assert ways[:8] == [False] * 4 + [True] * 4  # both are tried first
    late = ways[100:]
    assert stopping.pays == pays and (late.count(pays), late.count(not pays)) == pytest.approx((484, 16), abs=2)


def test_what_a_whole_draft_would_have_brought():
    """Drafts stop after 2, all of which stand: m + m^2 tokens more in a whole one decide, at what it costs more."""
    mean = 0.75
    more = mean + mean**2  # of a draft of 4
    for seconds, pays in ((1.0 / (3 + more) * 3 * 0.99, True), (1.0 / (3 + more) * 3 * 1.01, False)):
        policy = Policy([3], "auto")
        policy.lengths[3].drafted[0], policy.lengths[3].accepted[0] = 3998.0, 2998.6  # so that the mean is .75
        assert policy.lengths[3].mean == pytest.approx(mean)
        for _ in range(4):
            policy.learn(Arm("fixed", 3), 3.0, 1.0)
        for _ in range(4):
            policy.learn(Arm("adaptive", 3), 3.0, seconds, stood=1.0, left=2)
        assert policy.stopping[3].pays == pays
        # The chooser sees one way, whatever its drafts do.
        assert set(policy.chooser.records) == {Arm("fixed", 3)}
        assert policy.rate(Arm("adaptive", 3)) == pytest.approx(24 / (4 + 4 * seconds))


def test_a_hiccup_does_not_decide_how_drafts_end():
    """One round of a hundred times the usual length counts as three times as long."""
    stopping = Stopping()
    for _ in range(4):
        stopping.learn(False, 3, 0.0, 1.0)
    for seconds in (0.5, 0.5, 100.0, *[0.5] * 8):
        stopping.learn(True, 3, 0.0, seconds)
    assert stopping.pays


@pytest.mark.parametrize("ngram", [1, 2, 3])
def test_how_much_of_the_text_a_look_up_found_again(ngram):
    """Against a search in the whole text; what longer matches promise is learned apart from that of shorter ones."""
    generator, levels = random.Random(56), Counter()
    text, look_up = [], LookUp(ngram)
    for _ in range(400):
        repeat = text[(at := generator.randrange(len(text))) : at + generator.randrange(1, 20)] if text else []
        new = repeat if generator.random() < 0.5 else [generator.randrange(6)]
        text += new
        look_up.extend(new)
        ends = [i for i in range(ngram, len(text)) if text[i - ngram : i] == text[-ngram:]]
        found, match = look_up.find(3)
        if not ends:
            assert (found, match) == ([], 0)
            continue
        same = max(n for n in range(ngram, ends[-1] + 1) if text[ends[-1] - n : ends[-1]] == text[-n:])
        assert found[0] == text[ends[-1]] and match == (0 if same < 2 * ngram else 1 if same < 4 * ngram else 2)
        levels[match] += 1
    assert min(levels[match] for match in range(3)) > 5
    policy = Policy([2], None, True)
    for match, tokens in ((0, 1), (2, 7), (None, 3)) * 20:
        policy.chooser.learn(policy.lookups[match] if match is not None else policy.arms[0], tokens, 1.0)
    assert (policy.pick(0).kind, policy.pick(2).kind, policy.pick().kind) == ("fixed", "lookup", "fixed")


# ---- the setting ----


@pytest.mark.parametrize("value", [None, "auto", 0, 0.0, 0.4, 1, 1.0])
def test_thresholds(value):
    assert check_threshold(value) == value


@pytest.mark.parametrize("value", ["x", "0.4", "", -0.1, 1.5, math.nan, True, [0.4]])
def test_wrong_thresholds_are_named(value):
    for check in (check_threshold, lambda value: Policy([1], value), DraftLength):
        with pytest.raises(ValueError, match=r"^threshold: .*Allowed: .*(\[0, 1\]|0 to 1).*threshold="):
            check(value)
    with pytest.raises(ValueError, match=r"^self_speculation.threshold: "):
        check_threshold(value, "self_speculation.threshold")
