"""Sampling with self-speculation has the distribution of the full model, whatever drafts."""

import functools
import itertools

import pytest
import torch
from helpers.decoding import model_of
from helpers.sampling import filtered, p_value, penalised, rng
from helpers.speculation import PROMPTS, VARIANTS, AlwaysLookUp, perturbed, plain, run, speculation_of
from helpers.walks import walk
from torchtune.models.llama3_2._component_builders import llama3_2

from layerskip_recipes import layerskip_decoder
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.sampling import Sampler

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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("speculation", "settings"),
    [
        ({}, {"temperature": 0.9, "min_p": 0.1, "repetition_penalty": 1.5}),
        ({"num_speculations": 2}, T1 | {"repetition_penalty": 1.6}),
        ({"num_speculations": 3}, T1 | {"min_p": 0.15}),
        ({"num_speculations": 3}, {"temperature": 1.2, "top_p": 0.8}),
        ({"num_speculations": 2}, T1 | {"top_k": 2}),
        ({"num_speculations": 2, "draft_vocabulary": torch.tensor([0, 2, 3, 5], dtype=torch.int32)}, T1),
        ({"num_speculations": 2, "drafter": True}, T1),
        ({"num_speculations": 3, "prompt_lookup": 1}, T1),
        (
            {"num_speculations": 2, "draft_vocabulary": [0, 1, 3, 6], "drafter": True},
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
        arguments |= {"speculation": Speculation(1, **speculation), "choice": AlwaysLookUp()}
        if speculation.get("drafter"):
            arguments["speculation"].drafter = perturbed(model, 0.3)
    generation = run(model, [START] * n, 5, sampler=Sampler(**settings, rng=rng(62)), **arguments)
    assert p_value(numbered(generation.generated, 3), probabilities(3, **settings)) > 1e-3
    if speculation:
        assert 0.1 < generation.stats.acceptance_rate < 0.95


def test_sampled_look_ups_have_the_models_distribution():
    """Drafts from the text alone, in rows whose every token stands in the prompt."""
    prompt, n = (0, 1, 2, 3, 4, 5, 6, 0), 6000
    model = sampled_model()
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
