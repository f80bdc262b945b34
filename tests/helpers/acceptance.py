"""Shared by tests: tokens_per_round."""

from collections.abc import Sequence

import torch


def tokens_per_round(
    first: torch.Tensor, later: torch.Tensor, counts: torch.Tensor, drafts: Sequence[int]
) -> list[float]:
    """The tokens per round for each draft length, found by following the rounds of each text from its first token on.

    first, later [b, s]: the probability that a token is accepted as the first drafted one, or as a later one. counts
    [b, s]: True for the tokens of texts. A text's first token comes from its prefill.
    """
    texts = []
    for a, b, there in zip(first.tolist(), later.tolist(), counts.tolist(), strict=True):
        starts = [i for i in range(len(there)) if there[i] and (i == 0 or not there[i - 1])]
        for start in starts:
            end = next((i for i in range(start, len(there)) if not there[i]), len(there))
            texts.append((a[start + 1 : end], b[start + 1 : end]))
    found = []
    for d in drafts:
        rounds = 0.0
        for a, b in texts:
            begins = [1.0] + [0.0] * (len(a) + d + 1)  # the probability that a round begins at a token
            for i in range(len(a)):
                reached = begins[i]
                for k, p in enumerate([*a[i : i + 1], *b[i + 1 : i + d]]):
                    begins[i + k + 1] += reached * (1 - p)
                    reached *= p
                begins[min(i + d + 1, len(a))] += reached
            rounds += sum(begins[: len(a)])
        found.append(sum(len(a) for a, _ in texts) / rounds)
    return found
