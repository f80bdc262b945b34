"""Shared by tests of sampling: distributions, a chi-square test, and filters with Python lists."""

import math

import torch


def p_value(tokens, probs):
    """Chi-square test that `tokens` [n] are draws from `probs` [v]: small if they are not.

    What probs gives less than 5 expected draws is counted as one; a token of probability 0 fails at once.
    """
    observed = torch.bincount(tokens, minlength=probs.shape[0]).double()
    assert not observed[probs == 0].any()
    expected = probs.double() * len(tokens)
    rare = expected < 5
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2, dtype=torch.double), statistic / 2).item()


def filtered(logits, temperature, top_k=None, top_p=None, min_p=None):
    """The same with Python lists: temperature, top-k with its ties, min-p, then the smallest set of mass top_p."""
    weights = [math.exp(x / temperature) for x in logits]
    if top_k is not None:
        kth = sorted(weights, reverse=True)[min(top_k, len(weights)) - 1]
        weights = [w if w >= kth else 0.0 for w in weights]
    if min_p is not None:
        weights = [w if w >= min_p * max(weights) else 0.0 for w in weights]
    if top_p is not None:
        mass, kept = 0.0, set()
        for token in sorted(range(len(weights)), key=lambda t: -weights[t]):
            if mass / sum(weights) >= top_p:
                break
            mass += weights[token]
            kept.add(token)
        weights = [w if token in kept else 0.0 for token, w in enumerate(weights)]
    return [w / sum(weights) for w in weights]


def penalised(logits, tokens, penalty):
    """A list of logits, those of `tokens` less likely: positive ones divided by the penalty, others multiplied."""
    logits = list(logits)
    for token in set(tokens):
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    return logits
