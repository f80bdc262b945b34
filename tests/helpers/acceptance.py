"""Shared by tests: matches."""

import math

import torch


def matches(
    agrees: torch.Tensor, drafts: int, counts: torch.Tensor | None = None, later: torch.Tensor | None = None
) -> list[float]:
    """For each k the probability that k drafted tokens agree, position by position: the product of the shares at which
    the i-th agrees where those before it do, over positions with i labels in a row.

    Args:
        agrees, counts: [b, s].
        later: [b, s], of all drafted tokens but the first, if they differ.
    """
    counts = torch.ones_like(agrees) if counts is None else counts
    later = agrees if later is None else later
    shares = []
    for k in range(1, drafts + 1):
        hits, could = 0, 0
        for first, others, there in zip(agrees.tolist(), later.tolist(), counts.tolist(), strict=True):
            for i in range(len(first) - k + 1):
                in_a_row = [first[i], *others[i + 1 : i + k]]
                if all(there[i : i + k]) and all(in_a_row[:-1]):
                    could += 1
                    hits += in_a_row[-1]
        shares.append(hits / could if could else 0.0)
    return [math.prod(shares[:k]) for k in range(1, drafts + 1)]
