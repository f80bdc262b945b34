"""Prompt look-up decoding (Saxena, 2023): drafts copied from earlier in the text, since summaries and edits repeat
their prompt.
"""

from collections.abc import Sequence

import torch

from layerskip_recipes.generation.drafting.drafter import DraftedTokens, Drafter, RoundKind, RoundStart
from layerskip_recipes.generation.prefill import common_length
from layerskip_recipes.generation.steps import StepContext
from layerskip_recipes.model.decoder import on_device


class TextIndex:
    """Finds the continuation of the last earlier occurrence of the text's last `ngram` tokens."""

    def __init__(self, ngram: int, text: Sequence[int] = ()) -> None:
        self.ngram = ngram
        self.tokens: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}  # n-gram -> position of the token after its last occurrence
        self.extend(text)

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            # An n-gram is entered when a token follows it, so that the end of the text never finds itself.
            if len(self.tokens) >= self.ngram:
                self.after[tuple(self.tokens[-self.ngram :])] = len(self.tokens)
            self.tokens.append(token)

    def find(self, count: int) -> tuple[list[int], int]:
        """`count` tokens that may follow, and the match length, which predicts acceptance; ([], 0) without a match.

        The match length is 0 for a match of less than 2 n-grams, 1 for less than 4, 2 for more.
        """
        start = self.after.get(tuple(self.tokens[-self.ngram :]))
        if start is None:
            return [], 0
        same, most = self.ngram, min(4 * self.ngram, start)
        while same < most and self.tokens[start - 1 - same] == self.tokens[-1 - same]:
            same += 1
        found = self.tokens[start : start + count]
        # Repeat a continuation that is shorter than the draft.
        return [found[i % len(found)] for i in range(count)], (same // self.ngram).bit_length() - 1


class LookupDrafter(Drafter):
    """Drafts up to `num_speculations` tokens from the text, if every running row has a match.

    The tokens that come out of a round tell how good its look-up was, whether it was the draft or not.
    """

    def __init__(self, context: StepContext, num_speculations: int, ngram: int, texts: Sequence[Sequence[int]]) -> None:
        self.context, self.num_speculations, self.ngram = context, num_speculations, ngram
        self.indices = [TextIndex(ngram, text) for text in texts]
        self.offered: RoundKind  # in this round
        self.found: list[list[int]] = []  # its tokens, [b][n]

    def offer(self, now: RoundStart) -> RoundKind | None:
        num_to_draft = now.num_to_draft(self.context, self.num_speculations)
        running = [index for index, done in zip(self.indices, now.finished, strict=True) if not done]
        found = [index.find(num_to_draft) for index in running] if num_to_draft else []
        if not found or not all(tokens for tokens, _ in found):
            return None
        of_running = iter(tokens for tokens, _ in found)
        self.found = [[0] * num_to_draft if done else next(of_running) for done in now.finished]
        self.offered = RoundKind("lookup", min(match for _, match in found), untried=1.0)
        return self.offered

    def propose(self, now: RoundStart) -> DraftedTokens:
        found = on_device(self.found, self.context.device)
        return DraftedTokens(self.offered, torch.cat([now.last[:, None], found], 1))

    def replace(self, row: int, text: Sequence[int]) -> None:
        self.indices[row] = TextIndex(self.ngram, text)

    def extend(self, tokens: Sequence[Sequence[int]]) -> float | None:
        given = [1 + common_length(found, new) for found, new in zip(self.found, tokens, strict=False) if new]
        self.found = []
        for index, new in zip(self.indices, tokens, strict=True):
            index.extend(new)
        return sum(given) / len(given) if given else None
