"""Self-speculative decoding on one screen: the engine's algorithm without cache, batch or compilation.

A round drafts d tokens with the layers below exit E, and verifies all of them with the layers from E up in one pass
(LayerSkip, arXiv 2404.16710, section 4.3). Drafted tokens are accepted or replaced such that the output has the full
model's distribution (Leviathan et al., arXiv 2211.17192, algorithm 1).

Notation: x_E is the hidden state after E layers, g the norm and head, s the length of the text, D the model's width, v
the vocabulary size.
"""

from typing import Any

import torch

from layerskip_recipes.model.decoder import LayerSkipDecoder


@torch.no_grad()
def speculative_decode(
    model: LayerSkipDecoder,
    prompt: list[int],
    max_new_tokens: int,
    exit_layer: int,
    num_speculations: int,
    temperature: float = 0.0,
    rng: torch.Generator | None = None,
) -> list[int]:
    text = list(prompt)
    while len(text) < len(prompt) + max_new_tokens:
        text += speculative_round(model, text, exit_layer, num_speculations, temperature, rng)
    return text[len(prompt) :][:max_new_tokens]


@torch.no_grad()
def speculative_round(
    model: LayerSkipDecoder,
    text: list[int],
    exit_layer: int,
    num_speculations: int,
    temperature: float = 0.0,
    rng: torch.Generator | None = None,
) -> list[int]:
    """The accepted tokens of one round, and one token of the full model."""
    # 1. Draft token by token: q_i = softmax(g(x_E) / temperature) after i drafted tokens.
    tokens, q = list(text), []
    for _ in range(num_speculations):
        x = model(torch.tensor([tokens]), exit_layer=exit_layer, unembed=False)  # x_E [1, s + i, D]
        logits: Any = model.unembed(x)  # g(x_E) [1, s + i, v]
        q.append(distribution(logits[0, -1], temperature))  # [v]
        tokens.append(draw(q[-1], rng))

    # 2. Verify. The draft has computed x_E of every token but the last drafted one.
    last = model(torch.tensor([tokens]), exit_layer=exit_layer, unembed=False)[:, -1:]
    x = torch.cat([x, last], 1)  # [1, s + d, D]
    p = distribution(model(hidden=x, start_layer=exit_layer)[0], temperature)[len(text) - 1 :]  # [d + 1, v]

    # 3. Accept a drafted token with probability min(1, p/q). Replace a rejected one by a draw from norm(max(0, p - q)).
    new: list[int] = []
    for token, q_i, p_i in zip(tokens[len(text) :], q, p, strict=False):
        if torch.rand((), generator=rng) * q_i[token] >= p_i[token]:
            rest = (p_i - q_i).clamp(min=0)
            return [*new, draw(rest / rest.sum(), rng)]
        new.append(token)
    return [*new, draw(p[num_speculations], rng)]  # all accepted: one more token


def distribution(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """softmax(logits / temperature), [..., v]; at temperature 0 one-hot, so that only greedy choices are accepted."""
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    return (logits / temperature).softmax(-1)


def draw(probs: torch.Tensor, rng: torch.Generator | None) -> int:
    return int(torch.multinomial(probs, 1, generator=rng))
