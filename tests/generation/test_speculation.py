"""Every way to draft against plain decoding from scratch, greedy and sampled; the cache; what a generation counts."""

import copy
import functools
import itertools
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from helpers.decoding import PROMPT, greedy, make_model, model_of, small_model, until
from helpers.sampling import filtered, p_value, penalised, rng
from helpers.speculation import PROMPTS, plain
from helpers.speculation_search import search
from helpers.tiny import FAMILIES, SIZE, VOCAB
from helpers.walks import walk
from torchtune.models.llama3_2._component_builders import llama3_2

from layerskip_recipes import layerskip_decoder
from layerskip_recipes.generation import engine
from layerskip_recipes.generation.api import generate
from layerskip_recipes.generation.drafting.choice import Chooser
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.kernels.compiling import CompiledSteps
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.stats import GenerationStats
from layerskip_recipes.model.kv_cache import DecodingCache, cached_attention, without_plans

L = 6


@functools.cache
def perturbed(model, noise=0.05, layers=None):
    """A decoder whose layers are copies of the model's that say something else now and then."""
    drafter = copy.copy(model)
    drafter._modules = dict(model._modules)
    drafter._modules["layers"] = copy.deepcopy(model.layers[:layers])
    torch.manual_seed(60)
    for parameter in drafter.layers.parameters():
        parameter.data += noise * parameter.data.std() * torch.randn_like(parameter) if parameter.dim() > 1 else 0
    return drafter


VARIANTS = {
    "chain": {"exit_layer": 2, "num_speculations": 4},
    "tree": {"exit_layer": 2, "num_speculations": 3, "tree_width": 3, "tree_children": 2},
    "one level": {"exit_layer": 1, "num_speculations": 1, "tree_width": 2},
    "narrow": {"exit_layer": 1, "num_speculations": 3, "tree_children": 3},
    "vocabulary": {"exit_layer": 2, "num_speculations": 4, "draft_vocabulary": [*range(0, VOCAB, 3), 70, 8, 21]},
    "look-up": {"exit_layer": 2, "num_speculations": 4, "prompt_lookup": 1},
    "exits": {"exit_layer": [1, 2, 4], "num_speculations": 2},
    "threshold 0": {"exit_layer": 2, "num_speculations": 4, "threshold": 0.0},
    "threshold 0.15": {"exit_layer": 2, "num_speculations": 4, "threshold": 0.15},
    "threshold 1": {"exit_layer": 2, "num_speculations": 4, "threshold": 1.0},
    "threshold auto": {"exit_layer": 2, "num_speculations": 4, "threshold": "auto"},
    "drafter": {"exit_layer": 2, "num_speculations": 4, "drafter": perturbed},
    "all with a chain": {
        "exit_layer": [1, 4],
        "num_speculations": 5,
        "threshold": "auto",
        "draft_vocabulary": range(0, VOCAB, 2),
        "prompt_lookup": 1,
        "drafter": perturbed,
    },
    "all with a tree": {
        "exit_layer": (3, 1),
        "num_speculations": 3,
        "tree_width": 2,
        "tree_children": 2,
        "draft_vocabulary": torch.arange(0, VOCAB, 2),
        "prompt_lookup": 2,
        "drafter": perturbed,
    },
}


def speculation_of(variant, model):
    """A new Speculation of that name."""
    arguments = dict(VARIANTS[variant])
    if "drafter" in arguments:
        arguments["drafter"] = arguments["drafter"](model)
    return Speculation(**arguments)


def run(model, prompts, count, **arguments):
    """A generation at its end."""
    generation = Generation(model, prompts, count, **arguments)
    for _ in generation:
        pass
    return generation


# ---- greedy: the tokens of the full model, whatever drafts ----


@pytest.mark.parametrize(
    ("family", "penalty"), [("llama3_2", 1.0), ("llama3_2", 1.4), ("gemma2", 1.0), ("phi3", 0.8)], ids=str
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_a_batch_are_what_they_are_alone(variant, family, penalty):
    """Prompts of different lengths that accept and stop differently; and each of the rows in a batch of its own."""
    model = model_of(family)
    alone = [plain(model, prompt, 18, penalty) for prompt in PROMPTS]
    stop_tokens = [alone[0][4], alone[2][9]]
    expected = [until(tokens, stop_tokens) for tokens in alone]
    assert len(set(map(len, expected))) > 1
    arguments = {"sampler": Sampler(repetition_penalty=penalty), "stop_tokens": stop_tokens}
    together = run(model, PROMPTS, 18, **arguments, speculation=speculation_of(variant, model))
    assert together.generated == expected
    speculation, stats = speculation_of(variant, model), GenerationStats()
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        generation = run(model, [prompt], 18, **arguments, speculation=speculation)
        assert generation.generated == [tokens]
        stats += generation.stats
    for drafts in (stats, together.stats):  # with auto, by the clock, there may be few
        assert 0 < drafts.drafted > drafts.accepted and (
            drafts.accepted or VARIANTS[variant].get("threshold") == "auto"
        )
    assert stats.tokens == together.stats.tokens == sum(map(len, expected))


@pytest.mark.parametrize("variant", ["tree", "all with a tree"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trees_in_every_family(family, variant):
    model = model_of(family)
    generation = run(model, PROMPTS[:3], 14, speculation=speculation_of(variant, model))
    assert generation.generated == [greedy(family, prompt, 14) for prompt in PROMPTS[:3]]
    assert 0 < generation.stats.acceptance_rate < 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_limit(variant):
    model = model_of("llama3_2")
    speculation = speculation_of(variant, model)
    for prompt, count in itertools.product(PROMPTS[:3], (1, 2, 3, 7, 18)):
        generation = run(model, [prompt], count, speculation=speculation)
        assert generation.generated == [plain(model, prompt, 18)[:count]]
        assert generation.stats.tokens == count


@pytest.mark.parametrize("variant", ["tree", "all with a chain", "all with a tree"])
def test_stop_tokens_wherever_they_fall(variant):
    full = greedy("llama3_2", PROMPT, 18)
    for stop in set(full):
        model = model_of("llama3_2")
        generation = run(model, [PROMPT], 18, stop_tokens=[stop], speculation=speculation_of(variant, model))
        assert generation.generated == [until(full, [stop])]


@pytest.mark.parametrize("variant", ["tree", "look-up", "all with a tree"])
@pytest.mark.parametrize(("family", "limit"), [("llama3_2", 128), ("gemma2", 64)])
def test_as_long_as_the_model_allows(family, limit, variant):
    """A tree's nodes have slots behind the text, which gemma2's sliding window must have room for."""
    model = model_of(family)
    if family == "gemma2":
        limit -= {"tree": 1 + 3 * 3, "look-up": 0, "all with a tree": 1 + 3 * 2}[variant]
    prompt = tuple(position % VOCAB for position in range(limit - 7))
    generation = run(model, [prompt], 7, speculation=speculation_of(variant, model))
    assert generation.generated == [greedy(family, prompt, 7)]
    with pytest.raises(ValueError, match=rf"^max_generated_tokens: .* {limit} .*up to 7, "):
        Generation(model, [prompt], 8, speculation=speculation_of(variant, model))


def test_generate_takes_every_setting():
    """What `generate` is given reaches the draft: here at once, each with an effect of its own."""
    model, arguments = model_of("llama3_2"), {"exit_layer": 2, "num_speculations": 3}
    expected = [plain(model, prompt, 18, 1.4) for prompt in PROMPTS]
    out = generate(
        model,
        [torch.tensor(prompt) for prompt in PROMPTS],
        18,
        repetition_penalty=1.4,
        tree_width=2,
        tree_children=2,
        draft_vocabulary=range(0, VOCAB, 2),
        prompt_lookup=1,
        drafter=perturbed(model),
        pad_id=96,
        **arguments,
    )
    assert out.tokens.tolist() == [
        [96] * (9 - len(prompt)) + [*prompt, *tokens] for prompt, tokens in zip(PROMPTS, expected, strict=True)
    ]
    stats = [
        generate(model, torch.tensor(PROMPT), 30, **arguments, **setting).stats
        for setting in (
            {},
            {"tree_width": 3},
            {"tree_children": 3},
            {"draft_vocabulary": range(0, VOCAB, 2)},
            {"threshold": 1.0},
            {"drafter": perturbed(model, 0.3)},
            {"prompt_lookup": 1},
        )
    ]
    seen = [(s.rounds, s.draft_steps, s.accepted, *s.arms) for s in stats]
    assert seen[2] == seen[0]  # a greedy tree of one node a level is a chain
    assert len(set(seen)) == len(seen) - 1


def test_several_exits_are_all_tried_and_remembered():
    model = model_of("llama3_2")
    speculation = Speculation([1, 2, 4], 1)
    generation = run(model, [PROMPT], 60, speculation=speculation)
    assert generation.generated == [plain(model, PROMPT, 60)]
    assert set(generation.stats.arms) == {"fixed exit 1", "fixed exit 2", "fixed exit 4"}
    assert min(generation.stats.arms.values()) >= 4
    assert sum(generation.stats.arms.values()) == generation.stats.rounds
    again = run(model, [PROMPT], 20, speculation=speculation)
    records = speculation.policy.chooser.records
    learnt = Counter({f"fixed exit {arm.exit_layer}": record.rounds for arm, record in records.items()})
    done = generation.stats.arms + again.stats.arms
    # The last round of each may be cut at the limit: then it teaches nothing.
    assert not learnt - done and sum((done - learnt).values()) <= 2


@pytest.mark.parametrize("compile", [False, True])
def test_a_round_that_is_cut_teaches_nothing(compile, monkeypatch):
    """Compiled, drafts have their whole length up to the end; what is kept of the last rounds is less."""
    model = model_of("llama3_2")
    steps = CompiledSteps(torch.device("cpu"))
    steps.failed = True  # the steps as they are, in the ways of compiled ones
    monkeypatch.setattr(engine, "compiled_steps", lambda *_: steps)
    speculation, taught = Speculation([1, 2], 5), []
    monkeypatch.setattr(speculation.policy, "learn", lambda arm, tokens, *_: taught.append(tokens))
    generation = Generation(model, [PROMPT], 24, speculation=speculation, compile=compile)
    kept = [len(new[0]) for new in generation][1:]
    rooms = [23 - sum(kept[:i]) for i in range(len(kept))]
    assert taught == [tokens for tokens, room in zip(kept, rooms, strict=True) if room > 5]
    assert 0 < len(taught) < len(kept)


def test_auto_tries_both_lengths_and_no_draft(monkeypatch):
    """By a clock of the test's: a round without a draft takes as long as four with one."""
    model, learn = model_of("llama3_2"), Chooser.learn

    def timed(self, arm, tokens, seconds):
        learn(self, arm, tokens, 4.0 if arm.kind == "plain" else 1.0)

    monkeypatch.setattr(Chooser, "learn", timed)
    generation = run(model, [PROMPT], 60, speculation=Speculation(2, 4, threshold="auto"))
    assert generation.generated == [plain(model, PROMPT, 60)]
    assert set(generation.stats.arms) == {"fixed exit 2", "adaptive exit 2", "plain"}
    assert min(generation.stats.arms.values()) >= 4


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_auto_drafts_nothing_where_drafts_are_slow(temperature, monkeypatch):
    """By a clock of the test's: whatever drafts takes a second a token, a plain round one in all."""
    model, learn = model_of("llama3_2"), Chooser.learn

    def timed(self, arm, tokens, seconds):
        learn(self, arm, tokens, 1.0 if arm.kind == "plain" else 8.0 * tokens)

    monkeypatch.setattr(Chooser, "learn", timed)
    rng = torch.Generator().manual_seed(0)
    sampler = Sampler(temperature, rng=rng)
    generation = run(model, [PROMPT, PROMPT[:3]], 60, speculation=Speculation(2, 4, threshold="auto"), sampler=sampler)
    stats = generation.stats
    assert stats.arms["plain"] > 0.6 * stats.rounds > 20
    # A round without a draft is one token of each row.
    drafted = stats.rounds - stats.arms["plain"]
    assert stats.draft_steps <= 4 * drafted and [len(row) for row in generation.generated] == [60, 60]
    if temperature == 0:
        assert generation.generated == [plain(model, PROMPT, 60), plain(model, PROMPT[:3], 60)]


def test_confidences_are_judged_by_what_was_accepted():
    """Each round's drafts up to the first rejection; a round that the limit cuts may have had more accepted."""
    speculation = Speculation(2, 4, threshold=0.1)
    generation = run(model_of("llama3_2"), [PROMPT, PROMPT[:3]], 40, speculation=speculation)
    length, stats = speculation.policy.lengths[2], generation.stats
    assert stats.accepted <= sum(length.accepted) <= stats.accepted + 8 and stats.accepted > 0
    rejected = sum(length.drafted) - sum(length.accepted)
    assert 0 < rejected <= sum(stats.rounds_accepting.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 7}, "drafter: it has 7 layers, and the model 6"),
        ({"num_kv_heads": 4}, "drafter: its num_kv_heads is 4, and the model's 2"),
        ({"embed_dim": 64}, "drafter: its head_dim is 16, and the model's 8"),
        ({"vocab_size": 50}, "drafter: its vocabulary is 50, and the model's 97"),
    ],
)
def test_a_drafter_that_does_not_fit(changes, message):
    drafter = layerskip_decoder(llama3_2(**SIZE | changes))
    with pytest.raises(ValueError, match=f"^{message}"):
        Generation(model_of("llama3_2"), [PROMPT], 4, speculation=Speculation(2, 3, drafter=drafter))
    wide = layerskip_decoder(llama3_2(**SIZE)).double()
    with pytest.raises(ValueError, match=r"^drafter: its dtype is torch\.float64, and the model's"):
        Generation(model_of("llama3_2"), [PROMPT], 4, speculation=Speculation(2, 3, drafter=wide))


def test_a_row_at_the_models_end_beside_a_short_one():
    """What the long row drafts behind its end, as the other one has room, has no position in the model."""
    model, long = model_of("llama3_2"), (*range(1, 97), *range(1, 26))
    generation = run(model, [PROMPT[:3], long], 7, speculation=Speculation(2, 5))
    assert model.max_seq_len == len(long) + 7
    assert generation.generated == [plain(model, PROMPT[:3], 7), plain(model, long, 7)]


def test_what_was_drafted_behind_a_stop_counts_nowhere():
    """Drafts of the last layer are all right: of four the second one stops, so one before it was drafted and stands."""
    model = model_of("llama3_2")
    prompt = next(p for p in PROMPTS if len(set(plain(model, p, 3))) == 3)
    stop = plain(model, prompt, 3)[2]
    generation = run(model, [prompt], 16, speculation=Speculation(L, 4), stop_tokens=[stop])
    assert generation.generated == [plain(model, prompt, 3)]
    assert (generation.stats.rounds, generation.stats.drafted, generation.stats.accepted) == (1, 1, 1)


# ---- what is drafted ----


def drafts_of(model, prompts, count, speculation, sampler=None):
    """A generation at its end, and its rounds: the rows' texts before it (None of a row at its end), their drafts."""
    rounds = []

    def on_draft(tokens):
        rows = zip(prompts, generation.generated, generation.finished, strict=True)
        rounds.append(([None if finished else [*p, *g] for p, g, finished in rows], tokens))

    generation = Generation(model, prompts, count, speculation=speculation, sampler=sampler, on_draft=on_draft)
    for _ in generation:
        pass
    assert len(rounds) == generation.stats.rounds
    return generation, rounds


@pytest.mark.parametrize("penalty", [1.0, 1.4])
@pytest.mark.parametrize("vocabulary", [None, [90, 8, 8, 21, 70, 3, 55, 41]], ids=["all", "some"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 2)], ids=["chain", "one node a level", "tree"])
def test_a_chain_is_the_exits_own_text(shape, vocabulary, penalty):
    """Of the draft vocabulary the likeliest token at the exit, its own drafts penalised too; so is a tree's chain."""
    model, count, d = model_of("llama3_2"), 14, 3
    speculation = Speculation(2, d, *shape, draft_vocabulary=vocabulary)
    generation, rounds = drafts_of(model, PROMPTS[:3], count, speculation, Sampler(repetition_penalty=penalty))
    assert generation.tree.is_chain == (shape[0] == 1)  # children of one node a level are for sampling
    for texts, drafts in rounds:
        lengths = [len(text) - len(prompt) for text, prompt in zip(texts, PROMPTS, strict=False) if text]
        for text, draft in zip(texts, drafts, strict=True):
            expected, tokens = [], text
            for _ in range(min(d, count - min(lengths) - 1) if text else 0):
                logits = walk(model, torch.tensor([tokens]), range(2))[0, -1].tolist()
                logits = penalised(logits, tokens, penalty)
                expected.append(max(vocabulary or range(VOCAB), key=logits.__getitem__))
                tokens = [*tokens, expected[-1]]
            assert draft == expected or text is None


def test_drafts_looked_up_beside_a_tree_are_told_as_they_are():
    """All of them, though the tree of other rounds has more nodes than its chain."""
    prompts, count, d = [PROMPT * 3], 20, 4
    generation, rounds = drafts_of(model_of("llama3_2"), prompts, count, Speculation(2, d, 3, 2, prompt_lookup=2))
    assert generation.stats.arms["lookup"] and generation.tree.nodes > d + 1
    for (text,), (draft,) in rounds:
        assert len(draft) == min(d, count - (len(text) - len(prompts[0])) - 1)


def test_a_drafter_drafts_in_the_models_place():
    """From exit 1 of a drafter whose attention is the model's, so that what stands in the cache is its own too."""
    model = model_of("llama3_2")
    drafter = perturbed(model, 0.3, 1)
    drafter.layers[0].attn = copy.deepcopy(model.layers[0].attn)
    drafter.layers[0].sa_norm = copy.deepcopy(model.layers[0].sa_norm)
    differs = 0
    for (text,), (draft,) in drafts_of(model, [PROMPT], 18, Speculation(1, 3, drafter=drafter))[1]:
        tokens = tuple(text)
        assert draft == plain(drafter, tokens, len(draft), 1.0, 1)
        differs += draft != plain(model, tokens, len(draft), 1.0, 1)
    assert differs > 2


@pytest.mark.parametrize("threshold", [0.0, 0.15, 0.2, 1.0])
def test_a_draft_stops_after_the_first_token_below_the_threshold(threshold):
    """In a batch when that holds for every row that still runs."""
    model, count, d = model_of("llama3_2"), 16, 4
    lengths = Counter()
    for prompts in ([PROMPT], PROMPTS[:2], PROMPTS[1:4]):
        for texts, drafts in drafts_of(model, prompts, count, Speculation(2, d, threshold=threshold))[1]:
            running = [row for row, text in enumerate(texts) if text]
            room = max(count - len(texts[row]) + len(prompts[row]) for row in running)
            expected = [[] for _ in running]
            for _ in range(min(d, room - 1)):
                confidences = []
                for row, tokens in zip(running, expected, strict=True):
                    probs = walk(model, torch.tensor([[*texts[row], *tokens]]), range(2))[0, -1].softmax(-1)
                    tokens.append(probs.argmax().item())
                    confidences.append(probs.max())
                if max(confidences) < threshold:
                    break
            assert [drafts[row] for row in running] == expected
            lengths[len(expected[0])] += 1
    assert (set(lengths) - {0} == {1}) == (threshold == 1.0)
    assert threshold in (0.0, 1.0) or min(lengths[1], lengths[2], lengths[d]) > 0


def always_looks_up(ngram, d):
    """A Speculation that looks up wherever it can: what is the fastest is no matter."""
    speculation = Speculation(2, d, prompt_lookup=ngram)
    speculation.policy.chooser.pick = lambda arms: arms[-1]
    return speculation


@pytest.mark.parametrize("ngram", [1, 2])
def test_look_ups_are_what_a_search_finds(ngram):
    """Of a model with five tokens, whose texts repeat themselves: such drafts are often right."""
    model, stats, n, count = small_model(), GenerationStats(), 4, 24
    for prompt in ((1, 3, 0), (2, 2), (0, 4, 1, 0, 3), (1, 3, 0, 1, 3)):
        generation, rounds = drafts_of(model, [prompt], count, always_looks_up(ngram, n))
        found = 0
        for (text,), (draft,) in rounds:
            expected = search(text, ngram, n)
            found += bool(expected)
            assert draft == expected[: count + len(prompt) - len(text) - 1] or not expected
        assert generation.generated == [plain(model, prompt, count)]
        assert generation.stats.arms["lookup"] == found
        stats += generation.stats
    assert stats.arms["lookup"] > 5 and 0 < stats.acceptance_rate < 1


def test_a_look_up_needs_every_row_that_still_runs():
    model, prompts = small_model(), [(1, 3, 0, 1, 3), (0, 1, 2, 3, 4)]
    generation, rounds = drafts_of(model, prompts, 20, always_looks_up(2, 3))
    assert generation.generated == [plain(model, prompt, 20) for prompt in prompts]
    with_all = [all(text is None or search(text, 2, 3) for text in texts) for texts, _ in rounds]
    assert generation.stats.arms["lookup"] == sum(with_all)
    assert 0 < sum(with_all) < len(with_all)


@pytest.mark.parametrize("kind", ["copies", "the model itself", "shared layers"])
def test_a_drafter_and_the_model_are_left_as_they_were(kind):
    model = make_model()
    drafter = model if kind == "the model itself" else perturbed(model)
    if kind == "shared layers":
        drafter.layers[0] = model.layers[0]
    drafter.train()
    layers = {*model.layers, *drafter.layers}
    generation = run(model, [PROMPT], 10, speculation=Speculation(2, 3, drafter=drafter))
    assert generation.generated == [greedy("llama3_2", PROMPT, 10)]
    assert not model.decoding and not drafter.decoding
    assert all(layer.attn.kv_cache is None and not layer.attn.cache_enabled for layer in layers)
    assert all(layer.attn.num_kv_heads == 2 for layer in layers)
    tokens = torch.tensor([PROMPT])
    assert torch.equal(drafter.eval()(tokens), walk(drafter, tokens, range(L)))


# ---- sampling: the distribution of the full model, whatever drafts ----

SMALL = 7
START = (1, 3, 0, 6, 1, 2)


@functools.cache
def sampled_model():
    """Three layers, seven tokens: every continuation of three tokens can be counted."""
    sizes = {"num_layers": 3, "num_heads": 2, "num_kv_heads": 1, "embed_dim": 16, "intermediate_dim": 32}
    torch.manual_seed(61)
    model = llama3_2(vocab_size=SMALL, max_seq_len=32, **sizes)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.35)
    return layerskip_decoder(model).eval()


@functools.cache
@torch.no_grad()
def probabilities(count, repetition_penalty=1.0, **filters):
    """The exact probability of each continuation of START by `count` tokens, numbered in base 7."""
    probs, sequences = torch.ones(1), torch.tensor([START])
    for _ in range(count):
        logits = walk(sampled_model(), sequences, range(3))[:, -1].tolist()
        following = [
            filtered(penalised(row, tokens, repetition_penalty), **filters)
            for row, tokens in zip(logits, sequences.tolist(), strict=True)
        ]
        probs = (probs[:, None] * torch.tensor(following)).flatten()
        more = torch.arange(SMALL).repeat(len(sequences))[:, None]
        sequences = torch.cat([sequences.repeat_interleave(SMALL, 0), more], 1)
    return probs


def numbered(rows, count):
    """The first `count` tokens of each row as one number."""
    return sum(torch.tensor(rows)[:, i] * SMALL ** (count - 1 - i) for i in range(count))


T1 = {"temperature": 1.0}


@pytest.mark.parametrize(
    ("speculation", "settings"),
    [
        ({}, {"temperature": 0.9, "min_p": 0.1, "repetition_penalty": 1.5}),
        ({"num_speculations": 2}, T1 | {"repetition_penalty": 1.6}),
        ({"num_speculations": 3}, T1 | {"min_p": 0.15}),
        ({"num_speculations": 2, "tree_width": 2, "tree_children": 2}, T1),
        ({"num_speculations": 3, "tree_width": 3}, {"temperature": 1.2, "top_p": 0.8}),
        ({"num_speculations": 2, "tree_width": 2, "tree_children": 3}, T1 | {"top_k": 2}),
        ({"num_speculations": 2, "tree_children": 3}, {"temperature": 0.8, "min_p": 0.1}),
        ({"num_speculations": 2, "tree_width": 3, "tree_children": 2}, T1 | {"repetition_penalty": 1.6}),
        ({"num_speculations": 2, "draft_vocabulary": torch.tensor([0, 2, 3, 5], dtype=torch.int32)}, T1),
        ({"num_speculations": 2, "draft_vocabulary": [6, 4, 2], "tree_width": 2, "tree_children": 3}, T1),
        ({"num_speculations": 3, "threshold": 0.5}, T1),
        ({"num_speculations": 2, "drafter": True}, T1),
        ({"num_speculations": 2, "drafter": True, "tree_width": 2}, T1),
        ({"num_speculations": 3, "prompt_lookup": 1}, T1),
        (
            {"num_speculations": 2, "tree_width": 2, "draft_vocabulary": [0, 1, 3, 6], "drafter": True},
            {"temperature": 1.1, "top_k": 5, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 0.7},
        ),
    ],
    ids=str,
)
def test_sampled_continuations_have_the_models_distribution(speculation, settings):
    """The first three tokens of many rows, which accept differently, against all 343 continuations."""
    n, model = 5000, sampled_model()
    arguments = {}
    if speculation:
        arguments["speculation"] = Speculation(1, **speculation)
        if speculation.get("drafter"):
            arguments["speculation"].drafter = perturbed(model, 0.3)
            arguments["speculation"].policy.chooser.pick = lambda arms: arms[-1]
    generation = run(model, [START] * n, 5, sampler=Sampler(**settings, rng=rng(62)), **arguments)
    assert p_value(numbered(generation.generated, 3), probabilities(3, **settings)) > 1e-3
    if speculation:
        assert 0.1 < generation.stats.acceptance_rate < 0.95


def test_sampled_look_ups_have_the_models_distribution():
    """Drafts from the text alone, in rows whose every token stands in the prompt."""
    prompt, n = (0, 1, 2, 3, 4, 5, 6, 0), 6000
    model = sampled_model()
    speculation = Speculation(1, 2, prompt_lookup=1)
    speculation.policy.chooser.pick = lambda arms: arms[-1]
    generation = run(model, [prompt] * n, 4, sampler=Sampler(1.0, rng=rng(63)), speculation=speculation)
    assert set(generation.stats.arms) == {"lookup"} and 0.05 < generation.stats.acceptance_rate < 0.8
    tokens = torch.tensor(generation.generated)
    for first, second in itertools.product(range(SMALL), range(SMALL)):
        for before, position in (((first,), 1), ((first, second), 2)):
            rows = (tokens[:, :position] == torch.tensor(before)).all(1)
            if (position == 1 and second) or rows.sum() < 400:
                continue
            logits = walk(model, torch.tensor([[*prompt, *before]]), range(3))[0, -1]
            assert p_value(tokens[rows, position], logits.softmax(-1)) > 1e-4


def test_sampled_drafts_that_stop_by_their_confidence():
    """Small batches, of which each stops where its own confidences say so."""
    model, rows, lengths = sampled_model(), [], Counter()
    generator = rng(64)
    for _ in range(400):
        speculation = Speculation(1, 3, threshold=0.5)
        generation = Generation(
            model,
            [START] * 3,
            5,
            sampler=Sampler(1.0, rng=generator),
            speculation=speculation,
            on_draft=lambda tokens: lengths.update([len(tokens[0])]),
        )
        for _ in generation:
            pass
        rows += generation.generated
    assert min(lengths[1], lengths[2], lengths[3]) > 50
    second_and_third = numbered(rows, 3) % SMALL**2
    assert p_value(second_and_third, probabilities(3, temperature=1.0).view(SMALL, -1).sum(0)) > 1e-3


@pytest.mark.parametrize("variant", ["chain", "tree", "narrow", "vocabulary", "threshold 0.15", "drafter"])
def test_the_generator_alone_decides(variant):
    """The same seed gives the same tokens, another seed others; the global generator is neither used nor moved."""
    model, outputs = model_of("llama3_2"), []
    speculations = [speculation_of(variant, model) for _ in range(3)]
    before = torch.get_rng_state()
    for seed, speculation in zip((1, 1, 2), speculations, strict=True):
        sampler = Sampler(1.0, top_p=0.9, min_p=0.01, repetition_penalty=1.1, rng=rng(seed))
        outputs.append(run(model, PROMPTS[:2], 16, sampler=sampler, speculation=speculation).generated)
    assert outputs[0] == outputs[1] != outputs[2]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("settings", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}], ids=str)
def test_sampling_from_one_token_is_greedy(variant, settings):
    model = model_of("llama3_2")
    sampler = Sampler(0.8, **settings, repetition_penalty=1.4)
    generation = run(model, PROMPTS[:3], 12, sampler=sampler, speculation=speculation_of(variant, model))
    assert generation.generated == [plain(model, prompt, 12, 1.4) for prompt in PROMPTS[:3]]


# ---- the cache of an earlier generation ----


def count_positions(model):
    """A Counter of (layer, positions) for every call from now on."""
    calls = Counter()
    for number, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda _, args, number=number: calls.update([(number, args[0].shape[1])]))
    return calls


@pytest.mark.parametrize("chunk", [512, 3, 2])
@pytest.mark.parametrize("variant", [None, "chain", "tree", "drafter", "look-up"])
@pytest.mark.parametrize("family", ["llama3_2", "gemma2"])
def test_a_conversation_goes_on_from_the_cache(family, variant, chunk, monkeypatch):
    """The next prompt is the text so far and more: only what is new runs, and the tokens are those from scratch."""
    monkeypatch.setattr(engine, "PREFILL_CHUNK", chunk)
    model = make_model(family)
    calls, cache, prompt, reused = count_positions(model), None, PROMPT, 0
    for more in [(30, 31, 7), (9,), (60, 2, 41, 7, 7)]:
        speculation = speculation_of(variant, model) if variant else None
        generation = Generation(model, [prompt], 7, speculation=speculation, cache=cache, reserve=50)
        calls.clear()
        steps = iter(generation)
        next(steps)
        new = len(prompt) - reused
        pieces = [min(chunk, new - i) for i in range(0, new, chunk)] if reused or family == "gemma2" else [new]
        assert calls == Counter({(layer, n): m for layer in range(L) for n, m in Counter(pieces).items()})
        assert (generation.stats.reused_tokens, generation.stats.prefill_tokens) == (reused, new)
        for _ in steps:
            pass
        assert generation.generated == [greedy(family, prompt, 7)]
        assert cache is None or generation.cache is cache
        cache = generation.cache
        # The last token of the answer was never an input.
        reused = len(prompt) + 7 - 1
        prompt = (*prompt, *generation.generated[0], *more)


@pytest.mark.parametrize(
    ("prompt", "reused"),
    [
        ((*PROMPT, 1, 2, 3), 4),
        ((*PROMPT[:2], 1, 2, 3), 2),
        (PROMPT[:3], 2),  # at least the last token runs
        (PROMPT, 3),
        ((77, *PROMPT), 0),
        ((4,), 0),
    ],
)
def test_a_prompt_that_diverges_reuses_the_common_part(prompt, reused):
    model = model_of("llama3_2")
    first = run(model, [PROMPT], 9, speculation=Speculation(2, 3, 2, 2), reserve=40)
    again = run(model, [prompt], 9, speculation=Speculation(2, 3), cache=first.cache)
    assert again.stats.reused_tokens == reused and again.cache is first.cache
    assert again.generated == [greedy("llama3_2", prompt, 9)]


def test_rows_reuse_what_all_of_them_have():
    model = model_of("llama3_2")
    first = run(
        model, PROMPTS[:3], 6, stop_tokens=[greedy("llama3_2", PROMPTS[0], 6)[2]], speculation=Speculation(2, 3)
    )
    prompts = [(*prompt, *tokens, 1, 2) for prompt, tokens in zip(first.prompts, first.generated, strict=True)]
    assert len(first.generated[0]) == 3
    again = run(model, prompts, 6, cache=first.cache, reserve=30, speculation=Speculation(3, 2, 2))
    assert again.cache is not first.cache and again.stats.reused_tokens == 0  # too small
    assert again.generated == [greedy("llama3_2", prompt, 6) for prompt in prompts]
    prompts = [(*prompts[0], 5), (*prompts[1], 5), (*prompts[2][:6], 5)]
    last = run(model, prompts, 6, cache=again.cache)
    # The third row has six tokens in common with what ran before, the others more.
    assert last.cache is again.cache and last.stats.reused_tokens == 3 * 6
    assert last.stats.prefill_tokens == sum(len(prompt) - 6 for prompt in prompts)
    assert last.generated == [greedy("llama3_2", prompt, 6) for prompt in prompts]
    fewer = run(model, prompts[:2], 6, cache=again.cache)
    assert fewer.cache is not again.cache and fewer.stats.reused_tokens == 0
    assert fewer.generated == last.generated[:2]


def test_an_exits_cache_is_no_cache_of_the_whole_model():
    """Layers above the exit never ran; the other way round what is there is enough."""
    model = model_of("llama3_2")
    first = run(model, [PROMPT], 6, exit_layer=2, reserve=60)
    prompt = (*PROMPT, *first.generated[0], 9)
    exit_again = run(model, [prompt], 6, exit_layer=2, cache=first.cache)
    assert exit_again.stats.reused_tokens == len(prompt) - 2
    assert exit_again.generated == [greedy("llama3_2", prompt, 6, 2)]
    whole = run(model, [prompt], 6, cache=first.cache, speculation=Speculation(2, 3))
    assert whole.cache is first.cache and whole.stats.reused_tokens == 0
    assert whole.generated == [greedy("llama3_2", prompt, 6)]
    prompt = (*prompt, *whole.generated[0], 9)
    exit_again = run(model, [prompt], 6, exit_layer=3, cache=first.cache)
    assert exit_again.stats.reused_tokens == len(prompt) - 2
    assert exit_again.generated == [greedy("llama3_2", prompt, 6, 3)]


@pytest.mark.parametrize("when", ["prefill", "rounds"])
def test_after_an_interruption_the_cache_holds_what_ran(when):
    model = make_model()
    first = run(model, [PROMPT], 6, reserve=60)
    prompt = (*PROMPT, *first.generated[0], 9, 60, 2)
    generation, steps = Generation(model, [prompt], 12, cache=first.cache, speculation=Speculation(2, 3, 2, 2)), 0
    fails = 2 if when == "rounds" else 0
    hook = model.layers[4].register_forward_pre_hook(lambda *_: 1 / 0 if steps == fails else None)
    with pytest.raises(ZeroDivisionError):
        for _ in generation:
            steps += 1
    hook.remove()
    assert generation.generated[0] == greedy("llama3_2", prompt, 12)[: len(generation.generated[0])]
    prompt = (*prompt, *generation.generated[0], 41)
    again = run(model, [prompt], 12, cache=first.cache)
    assert again.cache is first.cache
    assert again.stats.reused_tokens == len(prompt) - (2 if when == "rounds" else 4 + 1)
    assert again.generated == [greedy("llama3_2", prompt, 12)]


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
    assert total.arms == {f"fixed exit {exit_layer}": len(rounds)}
    assert (total.prefill_tokens, total.reused_tokens, total.rows) == (sum(map(len, PROMPTS)), 0, len(PROMPTS))
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
        cache += layers * SLOT * (root + max(n, 1) + 1)
    assert (stats.weight_bytes, stats.cache_bytes) == (weights, cache)


def test_bytes_of_a_tree():
    """A level is one early pass of its nodes; attention of every pass looks at the slots of all nodes."""
    depth, width, exit_layer = 3, 2, 2
    model, roots = model_of("llama3_2"), []
    generation = Generation(
        model,
        [PROMPT],
        18,
        speculation=Speculation(exit_layer, depth, width, 2),
        on_draft=lambda tokens: roots.append((len(PROMPT) + len(generation.generated[0]) - 1, len(tokens[0]))),
    )
    for _ in generation:
        pass
    weights = cache = 0
    for root, n in roots:
        nodes = n * width
        weights += (L + n * exit_layer) * LAYER + (n + 1) * HEAD
        cache += (L + n * exit_layer) * SLOT * (root + max(nodes, width) + 1)
    assert (generation.stats.weight_bytes, generation.stats.cache_bytes) == (weights, cache)
    assert generation.stats.draft_steps == sum(n for _, n in roots)


def test_statistics_add_up():
    a = GenerationStats(tokens=5, rows=1, rounds=3, weight_bytes=7, reused_tokens=2, compile_s=1.5, draft_steps=4)
    b = GenerationStats(tokens=3, rows=2, rounds=1, weight_bytes=1, cache_bytes=9, prefill_tokens=6, compile_s=0.5)
    a.count_round(3, 1)
    a.count_round(2, 2)
    b.count_round(4, 0)
    a.arms.update(["fixed exit 2", "lookup"])
    b.arms.update(["lookup"])
    both = a + b
    assert (both.tokens, both.rows, both.rounds, both.weight_bytes, both.cache_bytes) == (8, 3, 4, 8, 9)
    assert (both.reused_tokens, both.prefill_tokens, both.compile_s, both.draft_steps) == (2, 6, 2.0, 4)
    assert (both.drafted, both.accepted, both.arms) == (9, 3, {"fixed exit 2": 1, "lookup": 2})
    assert both.accepted_histogram == [1, 1, 1]
    assert both.acceptance_by_position == [2 / 3, 1 / 3, 0, 0]
    assert both.bytes_per_token == 17 / 5
    assert a.rounds == 3 and a.drafted == 5  # neither changes
    assert GenerationStats().acceptance_by_position == [] and GenerationStats().bytes_per_token is None


# ---- attention over the cache ----


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize(("s", "end"), [(1, 1), (1, 9), (5, 9), (5, 5)])
def test_cached_attention_is_that_of_expanded_heads(heads, s, end):
    """Softmax of the scores by hand, each query head with the key head that it shares."""
    generator = rng(70)
    q = torch.randn(3, heads[0], s, 8, generator=generator)
    k, v = torch.randn(2, 3, heads[1], end, 8, generator=generator)
    seen = torch.rand(3, s, end, generator=generator) < 0.5
    seen[:, :, 0] = True
    masks = [torch.zeros(3, s, end).masked_fill(~seen, -torch.inf), torch.zeros(1, s, end).masked_fill(~seen[:1], -9e9)]
    for mask in [*masks, *([None] if s in (1, end) else [])]:
        causal = torch.zeros(1, s, end).masked_fill(torch.ones(s, end).tril(end - s) == 0, -torch.inf)
        expected = torch.empty_like(q)
        for head in range(heads[0]):
            of = head * heads[1] // heads[0]
            scores = torch.einsum("bsd,btd->bst", q[:, head], k[:, of]) / 8**0.5
            weights = (scores + (causal if mask is None else mask)).softmax(-1)
            expected[:, head] = torch.einsum("bst,btd->bsd", weights, v[:, of])
        torch.testing.assert_close(cached_attention(q, k, v, mask), expected)


@pytest.mark.parametrize("variant", [None, "chain", "tree", "drafter"])
@pytest.mark.parametrize("family", ["llama3_2", "qwen2", "phi3"])
def test_attention_reads_the_cache_in_place_and_only_what_is_filled(family, variant, monkeypatch):
    """The keys of every call are a view of the cache, of its own heads, up to the last slot that is in use."""
    model, rows, reserve = model_of(family), 2, 100
    calls, attention = [], F.scaled_dot_product_attention

    def recording(q, k, v, **arguments):
        calls.append((k, v))
        return attention(q, k, v, **arguments)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    speculation = speculation_of(variant, model) if variant else None
    generation = Generation(model, [PROMPT, PROMPT[:2]], 14, speculation=speculation, reserve=reserve)
    nodes = generation.tree.nodes if variant else 1
    longest, rounds = 0, 0
    for _ in generation:
        cache = generation.cache
        assert cache.max_len == reserve
        buffers = {layer.k.untyped_storage().data_ptr() for layer in cache.layers}
        buffers |= {layer.v.untyped_storage().data_ptr() for layer in cache.layers}
        assert all(tensor.untyped_storage().data_ptr() in buffers for pair in calls for tensor in pair)
        if rounds == 0:
            assert {tuple(k.shape) for k, _ in calls} == {(rows, 2, len(PROMPT), 8)}
        else:
            ends = {k.shape for k, _ in calls} | {v.shape for _, v in calls}
            assert len(ends) == 1
            ((b, heads, end, width),) = ends
            assert (b, heads, width) == (rows, 2, 8)
            assert longest < end <= longest + nodes
        longest = max(len(p) + len(g) for p, g in zip(generation.prompts, generation.generated, strict=True)) - 1
        rounds += 1
        calls.clear()
    assert rounds > 3


def test_the_cache_is_written_where_it_says():
    """Slots of each row of its own, or the same in all rows; slots that are not written stay."""
    cache = DecodingCache(model_of("llama3_2"), 3, 8, torch.device("cpu"))
    layer, expected = cache.layers[0], torch.zeros(2, 3, 2, 8, 4)
    for at, end in (([[0, 1, 2]], 3), ([[3], [1], [2]], 4), ([[7, 4], [2, 3], [5, 6]], 8)):
        new = torch.randn(2, 3, 2, len(at[0]), 4, generator=rng(71))
        cache.seek(torch.tensor(at), end)
        k, v = layer.update(*new)
        for row, i in itertools.product(range(3), range(len(at[0]))):
            expected[:, row, :, at[row % len(at)][i]] = new[:, row, :, i]
        assert torch.equal(torch.stack([k, v]), expected[:, :, :, :end])


# ---- refused ----


@pytest.mark.parametrize(
    ("arguments", "message", "allowed"),
    [
        ({"num_speculations": 0}, "num_speculations: 0 ", "an integer of 1 or more; for example num_speculations=6"),
        ({"num_speculations": 1.5}, "num_speculations: 1.5 ", "an integer of 1 or more"),
        ({"tree_width": 0}, "tree_width: 0 ", "an integer of 1 or more; for example tree_width=4"),
        ({"tree_width": 98}, "tree_width: 98 ", "an integer of 1 to 97"),
        ({"tree_children": True}, "tree_children: True ", "an integer of 1 or more"),
        ({"tree_children": 98}, "tree_children: 98 ", "an integer of 1 to 97"),
        ({"prompt_lookup": 0}, "prompt_lookup: 0 ", "an integer of 1 or more (or null)"),
        ({"threshold": 1.5}, "threshold: 1.5 ", "a number of 0 to 1"),
        ({"threshold": "x"}, "threshold: 'x' ", "auto, or a number in [0, 1]"),
        ({"threshold": 0.3, "tree_width": 2}, "threshold: 0.3 ", "tree_width=1 tree_children=1"),
        ({"threshold": "auto", "tree_children": 2}, "threshold: auto ", "threshold=null"),
        ({"draft_vocabulary": []}, "draft_vocabulary: 0 ids ", "at least 1 different ids of 0..96"),
        ({"draft_vocabulary": [0.5, 1.5]}, "draft_vocabulary: 2 ids ", "at least 1 different ids of 0..96"),
        ({"draft_vocabulary": [True, False]}, "draft_vocabulary: ", "different ids of 0..96"),
        ({"draft_vocabulary": "abc"}, "draft_vocabulary: ", "different ids of 0..96"),
        ({"tree_widht": 2}, "tree_widht: ", "Nearest: tree_width"),
        ({"draft_vocabulary": [1, 97]}, "draft_vocabulary: 97 ", "different ids of 0..96"),
        ({"draft_vocabulary": [5, -1]}, "draft_vocabulary: -1 ", "different ids of 0..96"),
        ({"draft_vocabulary": [1, 2, 2], "tree_width": 3}, "draft_vocabulary: 3 ids ", "at least 3 different ids"),
        ({"draft_vocabulary": [1, 2], "tree_children": 3}, "draft_vocabulary: 2 ids ", "at least 3 different ids"),
        ({"exit_layer": [2, 7]}, "exit_layer: 7 ", "1..6"),
        ({"exit_layer": 0}, "exit_layer: 0 ", "1..6"),
        ({"exit_layer": []}, "exit_layer: [] ", "exit_layer=[4,8]"),
        ({"exit_layer": [], "prompt_lookup": 2}, "exit_layer: [] ", "exit_layer=[4,8]"),
        ({"exit_layer": [1, 4], "num_speculations": None}, "exit_layer: [1, 4] ", "1..6"),
        ({"tree_width": 2, "num_speculations": None}, "tree_width: ", "num_speculations=6"),
        ({"prompt_lookup": 2, "num_speculations": None}, "prompt_lookup: ", "num_speculations=6"),
        ({"exit_layer": None}, "num_speculations: 3 ", "exit_layer=8"),
        ({"temperature": 1.0, "min_p": 2}, "min_p: 2 ", "a number of 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty: 0 ", "a number above 0"),
    ],
    ids=str,
)
def test_wrong_settings_are_named_with_what_is_allowed(arguments, message, allowed):
    arguments = {"exit_layer": 2, "num_speculations": 3} | arguments
    with pytest.raises(ValueError, match=f"^{re.escape(message)}.*{re.escape(allowed)}"):
        generate(model_of("llama3_2"), torch.tensor(PROMPT), 4, **arguments)


def test_a_drafter_needs_the_layers_of_every_exit():
    model = model_of("llama3_2")
    drafter = perturbed(model, 0.05, 3)
    assert run(model, [PROMPT], 9, speculation=Speculation([1, 3], 2, drafter=drafter)).generated == [
        greedy("llama3_2", PROMPT, 9)
    ]
    with pytest.raises(ValueError, match=r"^exit_layer: 4 .*drafter"):
        Generation(model, [PROMPT], 4, speculation=Speculation([1, 4], 2, drafter=drafter))


def test_a_head_that_cannot_be_cut_has_no_draft_vocabulary():
    model = make_model()
    model.output = lambda x, linear=model.output: linear(x)
    assert run(model, [PROMPT], 6, speculation=Speculation(2, 2)).generated == [greedy("llama3_2", PROMPT, 6)]
    with pytest.raises(ValueError, match=r"^draft_vocabulary: .*Allowed: "):
        run(model, [PROMPT], 6, speculation=Speculation(2, 2, draft_vocabulary=[1, 2]))


@pytest.mark.parametrize("before", [True, False])
def test_no_plans_on_a_gpu_and_elsewhere_nothing_changes(before):
    kept = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(before)
        for device, inside in (("cuda", False), ("cpu", before)):
            with pytest.raises(KeyboardInterrupt), without_plans(torch.device(device)):
                assert torch.backends.cuda.cudnn_sdp_enabled() == inside
                raise KeyboardInterrupt
            assert torch.backends.cuda.cudnn_sdp_enabled() == before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(kept)
