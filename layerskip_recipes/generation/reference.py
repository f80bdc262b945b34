"""Self-speculative decoding on one screen: the engine's algorithm without cache, batch or compilation.

A round drafts n tokens with the layers below exit E, and verifies all of them with the layers from E up in one pass
(LayerSkip, arXiv 2404.16710, section 4.3). Draft and model choose tokens with the same noise, and a drafted token is
accepted exactly if it is the model's own choice (arXiv 2408.07978). So the output equals plain decoding, greedy or
sampled.

Notation: x_E is the hidden state after E layers, g the norm and head, s the length of the text, d the model's width, v
the vocabulary size.
"""

from collections.abc import Callable
from typing import Any

import torch

from layerskip_recipes.generation.sampling import Sampler, choose_tokens, noise_keys
from layerskip_recipes.model.decoder import LayerSkipDecoder


@torch.no_grad()
def speculative_decode(
    model: LayerSkipDecoder,
    prompt: list[int],
    max_new_tokens: int,
    exit_layer: int,
    num_speculations: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[int]:
    sampler, keys = Sampler(temperature), torch.tensor(noise_keys(seed, [prompt]))

    def choose_all(logits: torch.Tensor) -> list[int]:
        """The token that each position of logits [1, s, v] chooses: it follows in the text."""
        scores = sampler.scores(logits, None, sampler.tensors(logits.device))
        positions = torch.arange(logits.shape[1])[None] + 1
        return choose_tokens(scores, None if sampler.greedy else keys, positions)[0].tolist()

    text = list(prompt)
    while len(text) < len(prompt) + max_new_tokens:
        text += speculative_round(model, text, exit_layer, num_speculations, choose_all)
    return text[len(prompt) :][:max_new_tokens]


@torch.no_grad()
def speculative_round(
    model: LayerSkipDecoder,
    text: list[int],
    exit_layer: int,
    num_speculations: int,
    choose_all: Callable[[Any], list[int]],
) -> list[int]:
    """The accepted tokens of one round, and one token of the full model. `choose_all`: see `speculative_decode`."""
    # 1. Draft token by token from g(x_E).
    tokens = list(text)
    for _ in range(num_speculations):
        x = model(torch.tensor([tokens]), exit_layer=exit_layer, unembed=False)  # x_E [1, s + i, d]
        tokens.append(choose_all(model.unembed(x))[-1])

    # 2. Verify: one late pass over all tokens. The draft has computed x_E of every token but the last drafted one.
    last = model(torch.tensor([tokens]), exit_layer=exit_layer, unembed=False)[:, -1:]
    x = torch.cat([x, last], 1)  # [1, s + n, d]
    chosen = choose_all(model(hidden=x, start_layer=exit_layer))[len(text) - 1 :]  # the model's own n + 1 choices

    # 3. Accept drafted tokens while they are the model's own choices. Then comes one more token of the model.
    drafted = tokens[len(text) :]
    num_accepted = next((i for i, token in enumerate(drafted) if token != chosen[i]), num_speculations)
    return [*drafted[:num_accepted], chosen[num_accepted]]
