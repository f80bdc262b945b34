"""Sampling with self-speculation has the distribution of the full model, whatever drafts."""

import pytest
import torch
from helpers.decoding import START, model_of, numbered, probabilities, small_model
from helpers.sampling import p_value, rng
from helpers.speculation import PROMPTS, VARIANTS, AlwaysLookUp, perturbed, plain, run, speculation_of

from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.reference import speculative_decode, speculative_round
from layerskip_recipes.generation.sampling import Sampler

T1 = {"temperature": 1.0}
SHORT = {"exit_layer": 1, "num_speculations": 2}
LONG = {"exit_layer": 1, "num_speculations": 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ({}, {"temperature": 0.9, "min_p": 0.1, "repetition_penalty": 1.5}),
        ({"exit_layer": 2}, {"temperature": 0.7, "top_k": 4}),
        (SHORT, T1 | {"repetition_penalty": 1.6}),
        (LONG, T1 | {"min_p": 0.15}),
        (LONG, {"temperature": 1.2, "top_p": 0.8}),
        (SHORT, T1 | {"top_k": 2}),
        ({"exit_layer": 2, "num_speculations": 4}, {"temperature": 0.9, "top_k": 4, "top_p": 0.9}),
        ({"exit_layer": 3, "num_speculations": 3}, T1),
        (SHORT | {"draft_vocabulary": torch.tensor([0, 2, 3], dtype=torch.int32)}, T1),
        (SHORT | {"drafter": True}, T1),
        (LONG | {"prompt_lookup": 1}, T1),
        (LONG | {"min_confidence": 0.2}, {"temperature": 0.8}),
        (LONG | {"min_confidence": 0.3}, T1 | {"top_k": 3}),
        (
            SHORT | {"draft_vocabulary": [0, 1, 3], "drafter": True},
            {"temperature": 1.1, "top_k": 5, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 0.7},
        ),
    ],
    ids=str,
)
def test_sampled_continuations_have_the_models_distribution(arguments, settings):
    """The first three tokens of many rows, which accept differently, against all 125 continuations."""
    model, exit_layer = small_model(), 3
    if "num_speculations" in arguments:
        speculation = Speculation(**arguments)
        if speculation.drafter:
            speculation.drafter = perturbed(model, 0.3)
        generation_arguments = {"speculation": speculation, "choice": AlwaysLookUp()}
    else:
        generation_arguments, exit_layer = arguments, arguments.get("exit_layer", 3)
    generation = run(model, [START] * 5000, 5, sampler=Sampler(**settings, rng=rng(63)), **generation_arguments)
    expected = probabilities(3, exit_layer=exit_layer, **settings)
    assert p_value(numbered(generation.generated, 3), expected) > 1e-3
    if "num_speculations" in arguments:
        assert 0.1 < generation.stats.acceptance_rate < 0.95 or arguments["exit_layer"] == 3
        assert (generation.stats.draft_steps == 0) == ("prompt_lookup" in arguments)


@pytest.mark.parametrize("variant", [None, "chain", "vocabulary", "drafter"])
def test_the_generator_alone_decides(variant):
    """The same seed gives the same tokens, another seed others; the global generator is neither used nor moved."""
    model, outputs = model_of("llama3_2"), []
    speculations = [variant and speculation_of(variant, model) for _ in range(3)]
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


@pytest.mark.slow
def test_sampled_rounds_of_the_reference():
    """Both have the distribution of the full model, and accept as many tokens in a round."""
    model, temperature, n, generator = small_model(), 0.9, 3000, rng(8)
    exact = probabilities(3, temperature=temperature)
    texts = [speculative_decode(model, list(START), 3, 1, 3, temperature, generator) for _ in range(n)]
    assert p_value(numbered(texts, 3), exact) > 1e-3
    sampler = Sampler(temperature, rng=generator)
    generation = run(model, [START] * n, 5, speculation=Speculation(1, 3), sampler=sampler)
    assert p_value(numbered(generation.generated, 3), exact) > 1e-3
    # The engine's first round begins behind the first token, so the reference begins there too.
    first = [speculative_round(model, [*START, new[0]], 1, 3, temperature, generator) for new in texts]
    longest = Generation(model, [START] * n, 5, speculation=Speculation(1, 3), sampler=sampler)
    steps = iter(longest)
    next(steps)
    kept = torch.tensor([len(new) for new in next(steps)])
    assert p_value(kept, torch.bincount(torch.tensor([len(new) for new in first])) / n) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("speculation", [None, Speculation(2, 2)], ids=["plain", "chain"])
def test_sampled_tokens_of_later_prompts_have_the_models_distribution(speculation):
    """Of prompts that took the place of others."""
    sampler, prompts = Sampler(1.0, rng=rng(3)), [(1, 3)] * 40 + [START] * 600
    generation = run(small_model(), prompts, 3, rows=40, speculation=speculation, sampler=sampler)
    assert p_value(numbered(generation.generated[40:], 2), probabilities(2, temperature=1.0)) > 1e-3
