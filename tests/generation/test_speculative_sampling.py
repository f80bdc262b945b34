"""Sampling: plain decoding has the model's distribution, and self-speculation gives its tokens, whatever drafts."""

import pytest
import torch
from helpers.decoding import SMALL, START, model_of, numbered, probabilities, small_model, walk
from helpers.sampling import p_value
from helpers.speculation import PROMPTS, TRAINED, VARIANTS, AlwaysLookUp, drafting, plain, run

from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.reference import speculative_decode
from layerskip_recipes.generation.sampling import Sampler

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


@pytest.mark.parametrize("variant", VARIANTS | TRAINED)
@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[-1]], ids=str)
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
    for prompt, tokens in zip(PROMPTS, expected, strict=False):
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


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}], ids=str)
def test_sampling_from_one_token_is_greedy(settings):
    model = model_of("llama3_2")
    sampler = Sampler(0.8, **settings, repetition_penalty=1.4)
    generation = run(model, PROMPTS[:3], 12, sampler=sampler, **drafting("all", model))
    assert generation.generated == [plain(model, prompt, 12, 1.4) for prompt in PROMPTS[:3]]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_reference_gives_the_engines_tokens(temperature):
    model = model_of("llama3_2")
    for prompt in PROMPTS:
        sampler = Sampler(temperature, seed=7)
        expected = run(model, [prompt], 12, speculation=Speculation(2, 3), sampler=sampler).generated[0]
        assert speculative_decode(model, list(prompt), 12, 2, 3, temperature, seed=7) == expected


@pytest.mark.slow
@torch.no_grad()
def test_acceptance_of_sampled_drafts():
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
