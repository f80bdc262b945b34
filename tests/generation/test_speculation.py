"""Greedy self-speculation gives the tokens of the full model, whatever drafts; and what is refused."""

import itertools
import re

import pytest
import torch
from helpers.decoding import PROMPT, L, greedy, make_model, model_of, until
from helpers.speculation import PROMPTS, VARIANTS, perturbed, plain, run, speculation_of
from helpers.tiny import FAMILIES, SIZE, VOCAB
from torchtune.models.llama3_2._component_builders import llama3_2

from layerskip_recipes import layerskip_decoder
from layerskip_recipes.generation import engine
from layerskip_recipes.generation.api import generate
from layerskip_recipes.generation.drafting.choice import DiscountedUCB
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.kernels.compiling import CompiledSteps
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.stats import GenerationStats
from layerskip_recipes.model.kv_cache import decoding_kernels

# ---- greedy: the tokens of the full model, whatever drafts ----


@pytest.mark.slow
@pytest.mark.parametrize(("family", "penalty", "variant"), [
    *(("llama3_2", 1.4, variant) for variant in VARIANTS),
    *(("gemma2", 1.0, variant) for variant in ("chain", "vocabulary", "drafter")),
    *(("phi3", 0.8, variant) for variant in ("chain", "all")),
], ids=str)  # fmt: skip
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
    for drafts in (stats, together.stats):
        assert 0 < drafts.accepted < drafts.drafted
    assert stats.tokens == together.stats.tokens == sum(map(len, expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_in_every_family(family):
    model = model_of(family)
    generation = run(model, PROMPTS[:3], 14, speculation=speculation_of("all", model))
    assert generation.generated == [greedy(family, prompt, 14) for prompt in PROMPTS[:3]]
    assert 0 < generation.stats.acceptance_rate < 1


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_limit(variant):
    model = model_of("llama3_2")
    speculation = speculation_of(variant, model)
    for prompt, count in itertools.product(PROMPTS[:2], (1, 2, 3, 7, 18)):
        generation = run(model, [prompt], count, speculation=speculation)
        assert generation.generated == [plain(model, prompt, 18)[:count]]
        assert generation.stats.tokens == count


@pytest.mark.parametrize("variant", ["chain", "all"])
def test_stop_tokens_wherever_they_fall(variant):
    full = greedy("llama3_2", PROMPT, 18)
    for stop in set(full):
        model = model_of("llama3_2")
        generation = run(model, [PROMPT], 18, stop_tokens=[stop], speculation=speculation_of(variant, model))
        assert generation.generated == [until(full, [stop])]


@pytest.mark.parametrize("variant", ["look-up", "all"])
@pytest.mark.parametrize(("family", "limit"), [("llama3_2", 128), ("gemma2", 64)])
def test_as_long_as_the_model_allows(family, limit, variant):
    model = model_of(family)
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
            {"draft_vocabulary": range(0, VOCAB, 2)},
            {"drafter": perturbed(model, 0.3)},
            {"prompt_lookup": 1},
        )
    ]
    seen = [(s.rounds, s.draft_steps, s.accepted, *s.rounds_by_kind) for s in stats]
    assert len(set(seen)) == len(seen)


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


# ---- what is learned of drafts and look-ups ----


class Recording(DiscountedUCB):
    """Keeps all that it was taught, and picks strategies in turns."""

    def __init__(self):
        super().__init__(trial=1000)
        self.taught = []

    def learn(self, strategy, tokens, seconds):
        super().learn(strategy, tokens, seconds)
        self.taught.append((strategy.name, tokens, seconds))


@pytest.mark.parametrize("compile", [False, True])
def test_a_round_that_is_cut_teaches_nothing(compile, monkeypatch):
    """Compiled, drafts have their whole length up to the end; what is kept of the last rounds is less."""
    model = model_of("llama3_2")
    graphs = CompiledSteps(torch.device("cpu"))
    graphs.failed = True  # eager steps, but otherwise as compiled ones
    monkeypatch.setattr(engine, "compiled_steps", lambda _: graphs)
    choice, speculation = Recording(), Speculation(2, 5, prompt_lookup=1)
    prompt = PROMPT * 3
    generation = Generation(model, [prompt], 24, speculation=speculation, compile=compile, choice=choice)
    kept = [len(new[0]) for new in generation][1:]
    rooms = [23 - sum(kept[:i]) for i in range(len(kept))]
    assert generation.generated == [plain(model, prompt, 24)]
    assert [tokens for _, tokens, _ in choice.taught] == [
        tokens for tokens, room in zip(kept, rooms, strict=True) if room > 5
    ]
    assert 0 < len(choice.taught) < len(kept) and all(seconds > 0 for _, _, seconds in choice.taught)
    assert {name for name, _, _ in choice.taught} == {"chain", "lookup"}


def test_rates_are_kept_where_a_choice_is_passed_on():
    """Both ways are tried once for all generations together; without a choice each generation begins anew."""
    model, choice, prompt = model_of("llama3_2"), DiscountedUCB(trial=3), PROMPT * 3
    arguments = {"speculation": Speculation(2, 2, prompt_lookup=1)}
    first = run(model, [prompt], 30, **arguments, choice=choice)
    learned = {strategy: record.rounds for strategy, record in choice.records.items()}
    assert {strategy.name for strategy in learned} == {"chain", "lookup"}
    again = run(model, [prompt], 30, **arguments, choice=choice)
    assert all(record.rounds >= learned[strategy] for strategy, record in choice.records.items())
    assert sum(record.rounds for record in choice.records.values()) > sum(learned.values())
    assert first.generated == again.generated == run(model, [prompt], 30, **arguments).generated


# ---- refused ----


@pytest.mark.parametrize(
    ("arguments", "message", "allowed"),
    [
        ({"num_speculations": 0}, "num_speculations: 0 ", "an integer of 1 or more; for example num_speculations=6"),
        ({"num_speculations": 1.5}, "num_speculations: 1.5 ", "an integer of 1 or more"),
        ({"prompt_lookup": 0}, "prompt_lookup: 0 ", "an integer of 1 or more (or null)"),
        ({"draft_vocabulary": []}, "draft_vocabulary: no list ", "ids of 0..96"),
        ({"draft_vocabulary": [0.5, 1.5]}, "draft_vocabulary: no list ", "ids of 0..96"),
        ({"draft_vocabulary": [True, False]}, "draft_vocabulary: no list ", "ids of 0..96"),
        ({"draft_vocabulary": "abc"}, "draft_vocabulary: no list ", "ids of 0..96"),
        ({"draft_vocabulary": [1, 97]}, "draft_vocabulary: 97 ", "ids of 0..96"),
        ({"draft_vocabulary": [5, -1]}, "draft_vocabulary: -1 ", "ids of 0..96"),
        ({"exit_layer": [2, 4]}, "exit_layer: [2, 4] ", "1..6"),
        ({"exit_layer": "2"}, "exit_layer: '2' ", "1..6"),
        ({"exit_layer": 7}, "exit_layer: 7 ", "1..6"),
        ({"exit_layer": 0}, "exit_layer: 0 ", "1..6"),
        ({"exit_layer": [1, 4], "num_speculations": None}, "exit_layer: [1, 4] ", "1..6"),
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


def test_a_drafter_needs_the_layers_of_the_exit():
    model = model_of("llama3_2")
    drafter = perturbed(model, 0.05, 3)
    assert run(model, [PROMPT], 9, speculation=Speculation(3, 2, drafter=drafter)).generated == [
        greedy("llama3_2", PROMPT, 9)
    ]
    with pytest.raises(ValueError, match=r"^exit_layer: 4 .*drafter"):
        Generation(model, [PROMPT], 4, speculation=Speculation(4, 2, drafter=drafter))


def test_a_head_that_cannot_be_cut_has_no_draft_vocabulary():
    model = make_model()
    model.output = lambda x, linear=model.output: linear(x)
    assert run(model, [PROMPT], 6, speculation=Speculation(2, 2)).generated == [greedy("llama3_2", PROMPT, 6)]
    with pytest.raises(ValueError, match=r"^draft_vocabulary: .*Allowed: "):
        run(model, [PROMPT], 6, speculation=Speculation(2, 2, draft_vocabulary=[1, 2]))


@pytest.mark.parametrize("before", [True, False])
def test_settings_of_torch_on_a_gpu_and_elsewhere_nothing_changes(before):
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
