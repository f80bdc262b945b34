"""The engine against the algorithm that reference.py spells out."""

import pytest
import torch
from helpers.decoding import START, L, model_of, numbered, probabilities, small_model
from helpers.sampling import p_value, rng
from helpers.speculation import PROMPTS, run
from helpers.tiny import FAMILIES

from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.reference import speculative_decode, speculative_round
from layerskip_recipes.generation.sampling import Sampler


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("exit_layer", "d"), [(1, 2), (2, 4), (L, 3)])
def test_greedy_rounds(family, exit_layer, d):
    """Token for token, in each round: what was accepted, and the full model's next token."""
    model, prompt = model_of(family), list(PROMPTS[1])
    generation = Generation(model, [prompt], 16, speculation=Speculation(exit_layer, d))
    (text, *rounds) = [new for (new,) in generation]  # the first token ends the prefill
    text = prompt + text
    for new in rounds:
        room = len(prompt) + 16 - len(text)
        assert new == speculative_round(model, text, exit_layer, d)[:room]
        text += new
    assert text[len(prompt) :] == speculative_decode(model, prompt, 16, exit_layer, d)


@pytest.mark.slow
def test_sampled_rounds():
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
