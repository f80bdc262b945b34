"""Tokens per round of a draft length, by following the rounds of each text."""

import math
from collections.abc import Sequence

import torch


def tokens_per_round(
    first: torch.Tensor, later: torch.Tensor, counts: torch.Tensor, drafts: Sequence[int]
) -> list[float]:
    return [tokens for tokens, _ in followed_rounds(first, later, counts, drafts)]


def followed_rounds(
    first: torch.Tensor,
    later: torch.Tensor,
    counts: torch.Tensor,
    drafts: Sequence[int],
    sure: tuple[torch.Tensor, torch.Tensor] | None = None,
    least: float = 0.0,
) -> list[tuple[float, float]]:
    """Tokens and drafted tokens per round for each draft length, found by following the rounds of each text from its
    first token on.

    first, later [b, s]: the probability that a token is accepted as the first drafted one, or as a later one. counts
    [b, s]: True for the tokens of texts. A text's first token comes from its prefill. With `sure`, the largest
    probability of the first drafted token and of later ones, a draft ends where their product is below `least`.
    """
    found = []
    for d in drafts:
        rounds = drafted = written = 0.0
        for row, there in enumerate(counts.tolist()):
            starts = [i for i in range(len(there)) if there[i] and (i == 0 or not there[i - 1])]
            for start in starts:
                end = next((i for i in range(start, len(there)) if not there[i]), len(there))
                a, b, *c = [x[row, start + 1 : end].tolist() for x in (first, later, *(sure or ()))]
                begins = [1.0] + [0.0] * (len(a) + d + 1)  # the probability that a round begins at a token
                for i in range(len(a)):
                    length = d
                    if sure is not None:
                        known = [*c[0][i : i + 1], *c[1][i + 1 :], 0.0]
                        length = next((k for k in range(1, d) if math.prod(known[:k]) < least), d)
                    drafted += begins[i] * length
                    reached = begins[i]
                    for k, p in enumerate([*a[i : i + 1], *b[i + 1 : i + length]]):
                        begins[i + k + 1] += reached * (1 - p)
                        reached *= p
                    begins[min(i + length + 1, len(a))] += reached
                rounds += sum(begins[: len(a)])
                written += len(a)
        found.append((written / rounds, drafted / rounds))
    return found
