"""Self-speculation gives the tokens of plain decoding, greedy and sampled, whatever drafts, in rows that prompts share
or follow; and sampled tokens have the model's distribution."""

import functools

import pytest
import torch
from helpers.decoding import (
    PROMPT,
    SMALL,
    L,
    greedy,
    make_model,
    model_of,
    small_model,
    until,
)
from helpers.sampling import filtered, p_value, penalised
from helpers.speculation import PROMPTS, TRAINED, VARIANTS, AlwaysLookUp, drafting, perturbed, plain, run
from helpers.tiny import VOCAB, slow_except, walk
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from layerskip_recipes.generation.api import generate
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.reference import speculative_decode, speculative_round
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.state import ModelState
from layerskip_recipes.generation.stats import GenerationStats
from layerskip_recipes.model.kv_cache import decoding_kernels

START = (1, 3, 0, 4, 1, 2)


@functools.cache
@torch.no_grad()
def probabilities(count, repetition_penalty=1.0, exit_layer=3, **filters):
    """The exact probability of each continuation of START by `count` tokens of the small model, see `numbered`."""
    probs, sequences = torch.ones(1), torch.tensor([START])
    for _ in range(count):
        logits = walk(small_model(), sequences, range(exit_layer))[:, -1].tolist()
        following = [
            filtered(penalised(row, tokens, repetition_penalty), **filters)
            for row, tokens in zip(logits, sequences.tolist(), strict=True)
        ]
        probs = (probs[:, None] * torch.tensor(following)).flatten()
        more = torch.arange(SMALL).repeat(len(sequences))[:, None]
        sequences = torch.cat([sequences.repeat_interleave(SMALL, 0), more], 1)
    return probs


def numbered(rows, count):
    """The first `count` tokens of each row as one number in base SMALL."""
    return sum(torch.tensor(rows)[:, i] * SMALL ** (count - 1 - i) for i in range(count))


CASES = {
    "llama3_2": (1.4, [None, *VARIANTS, "copy, chain", "copy, look-up", *(v for v in TRAINED if "adapter" in v)]),
    "gemma2": (1.0, [None, "chain", "vocabulary", "perturbed", "adapter, chain", "adapter, vocabulary"]),
    "gemma3": (1.0, [None, "chain", "all", "copy, chain", "adapter, look-up"]),
    "lfm2": (1.0, [None, *VARIANTS, "copy, chain", "adapter, chain", "adapter, look-up"]),
    "olmo3": (1.0, [None, "chain", "copy, chain", "adapter, chain"]),
    "phi3": (0.8, ["all"]),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "variant"), [(family, variant) for family, (_, variants) in CASES.items() for variant in variants]
)
def test_a_row_of_a_batch_gets_the_tokens_it_gets_alone(family, variant):
    """Prompts of different lengths that accept and stop differently: each in a batch of its own, all in one batch, and
    one after the other in fewer rows, with a penalty whose tokens a row must forget."""
    model, penalty = model_of(family), CASES[family][0]
    alone = [plain(model, prompt, 18, penalty) for prompt in PROMPTS]
    stop_tokens = [alone[0][4], alone[2][9]]
    expected = [until(tokens, stop_tokens) for tokens in alone]
    assert len(set(map(len, expected))) > 1
    arguments = {"sampler": Sampler(repetition_penalty=penalty), "stop_tokens": stop_tokens, "rule": AlwaysLookUp()}
    arguments |= drafting(variant, model)
    singles = [run(model, [prompt], 18, **arguments) for prompt in PROMPTS]
    assert [generation.generated for generation in singles] == [[tokens] for tokens in expected]
    for rows in (None, 1, 2):
        generation = run(model, PROMPTS, 18, rows=rows, **arguments)
        assert generation.generated == expected and all(generation.finished)
        stats = generation.stats
        assert (stats.drafted > 0) == (variant is not None)
        assert 0 < stats.accepted < stats.drafted or variant not in VARIANTS
        assert (stats.first_tokens, stats.tokens) == (len(PROMPTS), sum(map(len, expected)))
        assert stats.prefill_tokens == sum(map(len, PROMPTS))
        assert generation.cache.num_rows == (rows or len(PROMPTS))
        # A row that took another prompt drafts, and so accepts, as if that had been its first one.
        if rows == 1 and variant is not None:
            total = sum((single.stats for single in singles), GenerationStats())
            counted = [(each.drafted, each.accepted, each.row_rounds) for each in (stats, total)]
            assert counted[0] == counted[1]


def test_generate_takes_every_setting(monkeypatch):
    """What `generate` is given reaches the draft: here at once, each with an effect of its own."""
    model, arguments = model_of("llama3_2"), {"exit_layer": 2, "num_speculations": 3}
    expected = [plain(model, prompt, 18, 1.4) for prompt in PROMPTS]
    settings = {"draft_vocabulary": range(0, VOCAB, 2), "prompt_lookup": 1, "min_confidence": 0.02}
    prompts = [torch.tensor(prompt) for prompt in PROMPTS]
    out = generate(model, prompts, 18, repetition_penalty=1.4, pad_id=96, **settings, **arguments)
    assert out.tokens.tolist() == [
        [96] * (9 - len(prompt)) + [*prompt, *tokens] for prompt, tokens in zip(PROMPTS, expected, strict=True)
    ]
    monkeypatch.setattr(ModelState, "rule", lambda *_: AlwaysLookUp())
    one_by_one = [{}, *({key: value} for key, value in settings.items())]
    stats = [generate(model, torch.tensor(PROMPT), 30, **arguments, **setting).stats for setting in one_by_one]
    seen = [(s.rounds, s.draft_steps, s.accepted, *s.rounds_by_kind) for s in stats]
    assert len(set(seen)) == len(seen)


def test_a_draft_decoder_needs_the_layers_of_the_exit():
    model = model_of("llama3_2")
    draft_decoder = perturbed(model, 0.05, 3)
    generation = run(model, [PROMPT], 9, speculation=Speculation(3, 2), draft_weights=(draft_decoder, None))
    assert generation.generated == [greedy("llama3_2", PROMPT, 9)]
    with pytest.raises(ValueError, match=r"^exit_layer: 4 .*Allowed: 1\.\.3"):
        run(model, [PROMPT], 4, speculation=Speculation(4, 2), draft_weights=(draft_decoder, None))


def test_a_head_that_cannot_be_cut_has_no_draft_vocabulary():
    model = make_model()
    model.output = lambda x, linear=model.output: linear(x)
    assert run(model, [PROMPT], 6, speculation=Speculation(2, 2)).generated == [greedy("llama3_2", PROMPT, 6)]
    with pytest.raises(ValueError, match=r"^draft_vocabulary: .*Allowed: "):
        run(model, [PROMPT], 6, speculation=Speculation(2, 2, draft_vocabulary=[1, 2]))


def test_a_row_may_end_at_the_models_length_beside_a_short_one():
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


@pytest.mark.parametrize("before", [True, False])
def test_torchs_settings_change_only_on_a_gpu_and_only_while_decoding(before):
    """cuDNN's plans and sums in bf16."""
    products = torch.backends.cuda.matmul

    def settings():
        return torch.backends.cuda.cudnn_sdp_enabled(), products.allow_bf16_reduced_precision_reduction

    def set_all(plans, in_bf16):
        torch.backends.cuda.enable_cudnn_sdp(plans)
        products.allow_bf16_reduced_precision_reduction = in_bf16

    kept = settings()
    try:
        set_all(before, before)
        for device, inside in (("cuda", False), ("cpu", before)):
            with pytest.raises(KeyboardInterrupt), decoding_kernels(torch.device(device)):
                assert settings() == (inside, inside)
                raise KeyboardInterrupt
            assert settings() == (before, before)
    finally:
        set_all(*kept)


@pytest.mark.parametrize(
    ("family", "exit_layer", "d"),
    [
        *((family, 2, 4) for family in ("llama3_2", "gemma2", "lfm2")),
        *(pytest.param("llama3_2", *way, marks=pytest.mark.slow) for way in ((1, 2), (L, 3))),
    ],
)
def test_each_greedy_round_is_the_reference_round(family, exit_layer, d):
    """Token for token, in each round: what was accepted, and the full model's next token."""
    model, prompt = model_of(family), list(PROMPTS[1])
    generation = Generation(model, [prompt], 16, speculation=Speculation(exit_layer, d))
    (text, *rounds) = [new for (new,) in generation]  # the first token ends the prefill
    text = prompt + text
    for new in rounds:
        room = len(prompt) + 16 - len(text)
        assert new == speculative_round(model, text, exit_layer, d, lambda logits: logits[0].argmax(-1).tolist())[:room]
        text += new
    assert text[len(prompt) :] == speculative_decode(model, prompt, 16, exit_layer, d)


# ---- rows that take one prompt after the other ----


def test_each_step_yields_what_is_new_of_each_prompt():
    """At most as many prompts as rows are under way; the third begins when one of the first two has ended."""
    model = model_of("llama3_2")
    generation, so_far = Generation(model, PROMPTS, 6, rows=2, speculation=Speculation(2, 3)), [[] for _ in PROMPTS]
    for new in generation:
        for tokens, more in zip(so_far, new, strict=True):
            tokens += more
        assert so_far == generation.generated
        assert sum(bool(g) and not done for g, done in zip(so_far, generation.finished, strict=True)) <= 2
        assert not so_far[2] or generation.finished[0] or generation.finished[1]
    assert so_far == [plain(model, prompt, 6) for prompt in PROMPTS]
    # What the rows hold at the end serves later prompts.
    held = [[*prompt, *tokens, 9] for prompt, tokens in zip(PROMPTS, so_far, strict=True)]
    last = [held[prompt] for prompt in generation.in_row]
    again = run(model, last, 4, cache=generation.cache)
    assert again.generated == [plain(model, tuple(text), 4) for text in last]
    assert again.stats.reused_tokens > 0


def test_prompts_are_stopped_while_they_run_and_while_they_wait():
    model = model_of("llama3_2")
    generation = Generation(model, PROMPTS[:4], 5, rows=1)
    for _ in generation:
        if len(generation.generated[0]) == 3 and not generation.finished[0]:
            generation.stop(0, 2)
            generation.stop(2, 0)
    expected = [plain(model, prompt, 5) for prompt in PROMPTS[:4]]
    assert generation.generated == [expected[0][:2], expected[1], [], expected[3]]
    assert generation.stats.first_tokens == 3 and all(generation.finished)


# ---- bf16 and int8 ----


@functools.cache
def model_in(precision, family):
    model = make_model(family)
    if precision == "bf16":
        return model.to(torch.bfloat16)
    quantize_(model, Int8WeightOnlyConfig(version=2))
    return model


def gap(model, tokens, one, other):
    """How much likelier `one` is than `other` after a text, in units of the logits' rounding."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens]))[0, -1].double()
    rounding = 2.0**-8 if model.tok_embeddings.weight.dtype == torch.bfloat16 else 2.0**-22
    return ((logits[one] - logits[other]).abs() / (logits.abs().max() * rounding)).item()


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "family", "variant"), [
    *((precision, "llama3_2", variant) for precision in ("bf16", "int8") for variant in ("chain", "look-up")),
    *(("bf16", "llama3_2", variant) for variant in ("vocabulary", "copy, chain", "adapter, chain")),
    *((precision, family, "chain") for precision in ("bf16", "int8") for family in ("gemma2", "gemma3")),
])  # fmt: skip
def test_drafts_in_low_precision_change_no_text_but_at_ties(precision, family, variant):
    """A verification of several rows rounds otherwise than one row does: where the two likeliest tokens are nearer to
    each other than rounding, either may be chosen. Anything else is a defect."""
    model, same = model_in(precision, family), 0
    drafts = drafting(variant, model)
    expected = run(model, PROMPTS, 16).generated
    alone = [run(model, [prompt], 16, **drafts).generated[0] for prompt in PROMPTS]
    together = run(model, PROMPTS, 16, **drafts).generated
    for prompt, whole, tokens in zip(PROMPTS * 2, expected * 2, together + alone, strict=True):
        first = next((i for i, (a, b) in enumerate(zip(whole, tokens, strict=True)) if a != b), None)
        same += first is None
        if first is not None:
            distance = gap(model, [*prompt, *whole[:first]], whole[first], tokens[first])
            assert distance < 16, (prompt, first, distance)
    # In int8 the weights are multiplied in fp32, where ties are rare.
    assert same >= (2 * len(PROMPTS) - 1 if precision == "int8" else 2)


# ---- sampled ----

SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.9, "min_p": 0.1, "repetition_penalty": 1.5},
    {"temperature": 0.7, "top_k": 4},
    {"temperature": 1.2, "top_p": 0.8},
    {"temperature": 1.1, "top_k": 5, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 0.7},
]


@pytest.mark.slow
@pytest.mark.parametrize("exit_layer", [None, 2])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_samples_have_the_models_distribution(settings, exit_layer):
    generation = run(small_model(), [START] * 5000, 3, sampler=Sampler(**settings, seed=63), exit_layer=exit_layer)
    expected = probabilities(3, exit_layer=exit_layer or 3, **settings)
    assert p_value(numbered(generation.generated, 3), expected) > 1e-3


@pytest.mark.parametrize("variant", slow_except(VARIANTS | TRAINED, "all"))
@pytest.mark.parametrize("settings", [pytest.param(SETTINGS[0], marks=pytest.mark.slow), SETTINGS[-1]], ids=str)
def test_no_draft_changes_a_sampled_token(variant, settings):
    """All prompts together, in two rows that take one after the other, and alone; one prompt stands twice."""
    model, prompts, sampler = model_of("llama3_2"), [*PROMPTS, PROMPTS[0]], Sampler(**settings, seed=4)
    expected = run(model, prompts, 16, sampler=sampler).generated
    assert expected[0] != expected[-1]
    total = 0
    for rows in (None, 2):
        arguments = {"sampler": sampler, "rows": rows, "rule": AlwaysLookUp()} | drafting(variant, model)
        generation = run(model, prompts, 16, **arguments)
        assert generation.generated == expected
        total += generation.stats.accepted
    assert total > 0
    for prompt, tokens in zip(PROMPTS[1:3], expected[1:3], strict=True):
        alone = run(model, [prompt], 16, sampler=sampler, **drafting(variant, model))
        assert alone.generated == [tokens]


@pytest.mark.parametrize("variant", [None, "chain"])
def test_the_seed_alone_decides(variant):
    """The same seed gives the same tokens, another seed others; the global generator is neither used nor moved."""
    model, outputs = model_of("llama3_2"), []
    before = torch.get_rng_state()
    for seed in (1, 1, 2):
        drafts = drafting(variant, model)
        outputs.append(run(model, PROMPTS[:2], 16, sampler=Sampler(1.0, seed=seed), **drafts).generated)
    assert outputs[0] == outputs[1] != outputs[2]
    assert torch.equal(torch.get_rng_state(), before)
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        drawn.append(run(model, PROMPTS[:2], 16, sampler=Sampler(1.0)).generated)
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_reference_samples_the_engines_tokens():
    model = model_of("llama3_2")
    for prompt in PROMPTS:
        expected = run(model, [prompt], 12, speculation=Speculation(2, 3), sampler=Sampler(0.9, seed=7)).generated[0]
        assert speculative_decode(model, list(prompt), 12, 2, 3, 0.9, seed=7) == expected


@pytest.mark.slow
@torch.no_grad()
def test_sampled_drafts_are_accepted_with_the_probability_of_a_shared_race():
    """The probability that draft and model choose the same token is that of two exponential races with the same noise:
    the sum over x of 1 / sum over y of max(q(y) / q(x), p(y) / p(x)) (Daliri et al., arXiv 2408.07978)."""
    model, count = small_model(), 4000
    generation = run(model, [START] * count, 3, speculation=Speculation(1, 1), sampler=Sampler(0.9, seed=3))
    texts, expected = torch.tensor([[*START, token] for token in range(SMALL)]), 0.0
    q, p = ((walk(model, texts, range(layers))[:, -1] / 0.9).softmax(-1) for layers in (1, 3))
    for weight, q_t, p_t in zip(probabilities(1, temperature=0.9).tolist(), q, p, strict=True):
        ratios = torch.maximum(q_t[None] / q_t[:, None], p_t[None] / p_t[:, None])  # [x, y]
        expected += weight * (1 / ratios.sum(1)).sum().item()
    assert generation.stats.drafted == count
    assert abs(generation.stats.accepted / count - expected) < 4.5 * (expected * (1 - expected) / count) ** 0.5
