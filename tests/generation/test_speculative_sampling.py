"""Sampling with self-speculation has the distribution of the full model, whatever drafts."""

import itertools

import pytest
import torch
from helpers.decoding import SMALL, START, model_of, numbered, probabilities, small_model
from helpers.sampling import p_value, rng
from helpers.speculation import PROMPTS, VARIANTS, AlwaysLookUp, perturbed, plain, run, speculation_of
from helpers.walks import walk

from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.sampling import Sampler

# ---- sampling: the distribution of the full model, whatever drafts ----

T1 = {"temperature": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("speculation", "settings"),
    [
        ({}, {"temperature": 0.9, "min_p": 0.1, "repetition_penalty": 1.5}),
        ({"num_speculations": 2}, T1 | {"repetition_penalty": 1.6}),
        ({"num_speculations": 3}, T1 | {"min_p": 0.15}),
        ({"num_speculations": 3}, {"temperature": 1.2, "top_p": 0.8}),
        ({"num_speculations": 2}, T1 | {"top_k": 2}),
        ({"num_speculations": 2, "draft_vocabulary": torch.tensor([0, 2, 3], dtype=torch.int32)}, T1),
        ({"num_speculations": 2, "drafter": True}, T1),
        ({"num_speculations": 3, "prompt_lookup": 1}, T1),
        (
            {"num_speculations": 2, "draft_vocabulary": [0, 1, 3], "drafter": True},
            {"temperature": 1.1, "top_k": 5, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 0.7},
        ),
    ],
    ids=str,
)
def test_sampled_continuations_have_the_models_distribution(speculation, settings):
    """The first three tokens of many rows, which accept differently, against all 125 continuations."""
    n, model = 5000, small_model()
    arguments = {}
    if speculation:
        arguments |= {"speculation": Speculation(1, **speculation), "choice": AlwaysLookUp()}
        if speculation.get("drafter"):
            arguments["speculation"].drafter = perturbed(model, 0.3)
    generation = run(model, [START] * n, 5, sampler=Sampler(**settings, rng=rng(63)), **arguments)
    assert p_value(numbered(generation.generated, 3), probabilities(3, **settings)) > 1e-3
    if speculation:
        assert 0.1 < generation.stats.acceptance_rate < 0.95


def test_sampled_look_ups_have_the_models_distribution():
    """Drafts from the text alone, in rows whose every token stands in the prompt."""
    prompt, n = (0, 1, 2, 3, 4, 0), 6000
    model = small_model()
    arguments = {"speculation": Speculation(1, 2, prompt_lookup=1), "choice": AlwaysLookUp()}
    generation = run(model, [prompt] * n, 4, sampler=Sampler(1.0, rng=rng(63)), **arguments)
    assert generation.stats.draft_steps == 0 and 0.05 < generation.stats.acceptance_rate < 0.8
    tokens = torch.tensor(generation.generated)
    for first, second in itertools.product(range(SMALL), range(SMALL)):
        for before, position in (((first,), 1), ((first, second), 2)):
            rows = (tokens[:, :position] == torch.tensor(before)).all(1)
            if (position == 1 and second) or rows.sum() < 400:
                continue
            logits = walk(model, torch.tensor([[*prompt, *before]]), range(3))[0, -1]
            assert p_value(tokens[rows, position], logits.softmax(-1)) > 1e-4


@pytest.mark.parametrize("variant", ["chain", "vocabulary", "drafter"])
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
