"""What each drafter proposes, against walks and searches in the text; and decoding without drafts that do not pay."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from helpers.decoding import PROMPT, L, greedy, make_model, model_of, small_model
from helpers.speculation import (
    KINDS,
    PROMPTS,
    VARIANTS,
    AlwaysLookUp,
    PlainBetween,
    drafting,
    noisy,
    perturbed,
    plain,
    run,
    search,
)
from helpers.tiny import SIZE, slow_except, walk

from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation import accounts
from layerskip_recipes.generation.drafting.rule import DraftRule
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.stats import GenerationStats
from layerskip_recipes.model.draft import Draft

pytestmark = pytest.mark.clock


def drafts_of(model, prompts, count, speculation, sampler=None, rule=None, predictions=None):
    """A generation at its end, and its rounds: the rows' texts before it (None of a row at its end), their drafts."""
    rounds = []

    def on_draft(tokens):
        rows = zip(prompts, generation.generated, generation.finished, strict=True)
        rounds.append(([None if finished else [*p, *g] for p, g, finished in rows], tokens))

    arguments = {"speculation": speculation, "sampler": sampler, "rule": rule}
    generation = Generation(model, prompts, count, **arguments, on_draft=on_draft, predictions=predictions)
    for _ in generation:
        pass
    assert len(rounds) == generation.stats.rounds
    return generation, rounds


@pytest.mark.parametrize("penalty", [1.0, 1.4])
@pytest.mark.parametrize("vocabulary", [None, (90, 8, 8, 21, 70, 3, 55, 41)], ids=["all", "some"])
def test_a_draft_is_the_exits_own_text(vocabulary, penalty):
    """The likeliest tokens of the draft vocabulary at the exit; its own drafts are penalised too."""
    model, count, d = model_of("llama3_2"), 14, 3
    speculation = Speculation(2, d, draft_vocabulary=vocabulary)
    _, rounds = drafts_of(model, PROMPTS[:3], count, speculation, Sampler(repetition_penalty=penalty))
    for texts, drafts in rounds:
        lengths = [len(text) - len(prompt) for text, prompt in zip(texts, PROMPTS, strict=False) if text]
        for text, draft in zip(texts, drafts, strict=True):
            room = min(d, count - min(lengths) - 1)
            assert text is None or draft == plain(model, tuple(text), room, penalty, 2, vocabulary)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_draft_ends_where_the_exit_is_not_sure(temperature):
    """After the token at which the product of the exit's largest probabilities is below the limit; a batch when all
    rows that still run are there."""
    model, count, least, d = model_of("llama3_2"), 24, 0.02, 5
    speculation, lengths = Speculation(2, d, min_confidence=least), Counter()
    for prompts in ([PROMPTS[0]], PROMPTS[:3]):
        _, rounds = drafts_of(model, prompts, count, speculation, Sampler(temperature, seed=5))
        for texts, drafts in rounds:
            room = count - min(len(text) - len(prompt) for text, prompt in zip(texts, prompts, strict=True) if text)
            ends = []
            for text, draft in zip(texts, drafts, strict=True):
                if text is None:
                    continue
                logits = walk(model, torch.tensor([[*text, *draft]]), range(2))[0, len(text) - 1 : -1].double()
                sure = (logits / (temperature or 1)).softmax(-1).amax(-1).cumprod(0)
                ends.append(next((k + 1 for k in range(len(draft)) if sure[k] < least), d))
            assert len(drafts[0]) == min(max(ends), d, room - 1)
            lengths[len(drafts[0])] += 1
    assert len(lengths) > 2


@pytest.mark.parametrize("predicted", [(), (0, 3, 1, 4, 2, 0, 1, 3)])
@pytest.mark.parametrize(("exit_layer", "ngram"), [(2, 1), (2, 2), (2, 3), (None, 2)])
def test_look_ups_are_what_a_search_finds(exit_layer, ngram, predicted):
    """Of a model with five tokens, whose texts repeat themselves: such drafts are often right. Without an
    exit, rounds without a match are plain steps. A prediction stands before the text."""
    model, stats, n, count = small_model(), GenerationStats(), 4, 24
    alone, speculation = exit_layer is None, Speculation(exit_layer, n, prompt_lookup=ngram)
    for prompt in ((1, 3, 0), (2, 2), (0, 4, 1, 0, 3), (1, 3, 0, 1, 3)):
        generation, rounds = drafts_of(
            model, [prompt], count, speculation, rule=AlwaysLookUp(), predictions=[predicted]
        )
        found = 0
        for (text,), (draft,) in rounds:
            expected = search((*predicted, *text), ngram, n)
            room = count + len(prompt) - len(text) - 1
            found += bool(expected[:room])
            assert draft == expected[:room] or not (expected or alone)
        assert generation.generated == [plain(model, prompt, count)]
        assert generation.stats.rounds_by_kind["lookup"] == found
        stats += generation.stats
    assert stats.rounds_by_kind["lookup"] > 5 and 0 < stats.acceptance_rate < 1
    others = stats.rounds_by_kind["plain" if alone else "chain"]
    assert predicted or (others > 3 and (stats.draft_steps == 0) == alone)


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 0.9])
def test_predictions_are_drafted_from_the_first_round_and_change_no_token(temperature):
    """In one batch, and one after the other in fewer rows: right ones, ones with a wrong token, and none."""
    model, count, sampler = model_of("llama3_2"), 16, Sampler(temperature, seed=4)
    expected = run(model, PROMPTS, count, sampler=sampler).generated
    right = [[*prompt, *answer] for prompt, answer in zip(PROMPTS, expected, strict=True)]
    wrong = [[(token + (i % 5 == 4)) % 97 for i, token in enumerate(text)] for text in right]
    arguments = {"speculation": Speculation(None, 4, prompt_lookup=1), "sampler": sampler, "rule": AlwaysLookUp()}
    row_rounds = []
    for predictions in (right, wrong, [()] * len(PROMPTS), [right[0], (), wrong[2], (), ()]):
        for rows in (None, 2):
            generation = run(model, PROMPTS, count, rows=rows, predictions=predictions, **arguments)
            assert generation.generated == expected
        row_rounds.append(generation.stats.row_rounds)
    # Each round gives four drafted tokens and one of the model's own; the prefill has given the first one.
    assert row_rounds[0] == len(PROMPTS) * 3 < row_rounds[1] < row_rounds[2] > row_rounds[3]


def test_predictions_have_tokens_of_the_model():
    with pytest.raises(ConfigError, match=r"^predictions: 97 .*Allowed: 0\.\.96"):
        Generation(model_of("llama3_2"), [PROMPT], 4, predictions=[[3, 97]])


def test_rows_without_a_match_go_along_with_a_look_up():
    model, prompts, count = small_model(), [(1, 3, 0, 1, 3), (0, 1, 2, 3, 4)], 20
    speculation = Speculation(2, 3, prompt_lookup=2)
    generation, rounds = drafts_of(model, prompts, count, speculation, rule=AlwaysLookUp())
    running = [[text for text in texts if text is not None] for texts, _ in rounds]
    has_room = [texts for texts in running if min(map(len, texts)) + 2 < 5 + count + 1]
    matches = [[bool(search(text, 2, 3)) for text in texts] for texts in has_room]
    assert generation.stats.rounds_by_kind["lookup"] == sum(map(any, matches))
    assert any(any(row) and not all(row) for row in matches)
    assert generation.generated == [plain(model, prompt, count) for prompt in prompts]


@pytest.mark.parametrize("kind", ["copies", "the model itself", "shared layers"])
def test_a_draft_decoder_and_the_model_are_left_as_they_were(kind):
    model = make_model()
    decoder = model if kind == "the model itself" else perturbed(model)
    if kind == "shared layers":
        decoder.layers[0] = model.layers[0]
    decoder.train()
    layers = {*model.layers, *decoder.layers}
    generation = run(model, [PROMPT], 10, speculation=Speculation(2, 3), draft_weights=(decoder, None))
    assert generation.generated == [greedy("llama3_2", PROMPT, 10)]
    assert decoder.training and not model.decoding and not decoder.decoding
    assert all(layer.attn.kv_cache is None and not layer.attn.cache_enabled for layer in layers)
    assert all(layer.attn.num_kv_heads == 2 for layer in layers)
    tokens = torch.tensor([PROMPT])
    assert torch.equal(decoder.eval()(tokens), walk(decoder, tokens, range(L)))


# ---- where drafts do not pay ----

NEW = 129


@pytest.fixture
def clock(monkeypatch):
    """Each layer takes a second, and a twentieth for each further token. Watch layers with `clock.watch`."""
    now = SimpleNamespace(seconds=0.0)

    def tick(module, args):
        now.seconds += 0.95 + 0.05 * args[0].shape[1]

    def watch(layers):
        for layer in layers:
            layer.register_forward_pre_hook(tick)

    monkeypatch.setitem(SIZE, "max_seq_len", 2 * NEW)
    monkeypatch.setattr(accounts, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    now.watch = watch
    return now


def bad_draft(model, kind):
    """A speculation and a draft model whose drafts the model never says."""
    if kind in KINDS:
        return Speculation(2, 4), (noisy(Draft(model, *KINDS[kind]), 10.0).decoder(model), None)
    decoder = perturbed(model, 40.0, 2)
    return Speculation(2, 4, prompt_lookup=1 if kind == "look-up" else None), (decoder, None)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rows"), [("exit", 3), ("look-up", 1), ("copy", 3), ("adapter", 3)])
def test_decoding_with_drafts_that_are_all_wrong_is_a_twentieth_slower_at_most(kind, rows, clock):
    model, prompts = make_model(), PROMPTS[:rows]
    speculation, draft_weights = bad_draft(model, kind)
    clock.watch({*model.layers, *draft_weights[0].layers})
    plainly = run(model, prompts, NEW)
    drafted = run(model, prompts, NEW, speculation=speculation, draft_weights=draft_weights, rule=DraftRule())
    assert drafted.generated == plainly.generated
    assert drafted.stats.decode_s < 1.05 * plainly.stats.decode_s
    assert drafted.stats.plain_share > (0.3 if kind == "look-up" else 0.9) and drafted.stats.drafted > 0


@pytest.mark.parametrize("variant", slow_except(VARIANTS, "chain"))
def test_rounds_without_a_draft_change_no_token(variant):
    model, drafts = model_of("llama3_2"), []
    generation = run(
        model, PROMPTS, 18, rows=3, rule=PlainBetween(), on_draft=drafts.append, **drafting(variant, model),
    )  # fmt: skip
    assert generation.generated == [plain(model, prompt, 18) for prompt in PROMPTS]
    stats = generation.stats
    empty = sum(not draft[0] for draft in drafts)  # with those that have no room for a draft
    assert 3 < stats.rounds_by_kind["plain"] <= empty
    assert stats.plain_share == stats.rounds_by_kind["plain"] / stats.rounds
    assert stats.rounds_accepting.total() <= 3 * (stats.rounds - stats.rounds_by_kind["plain"])
