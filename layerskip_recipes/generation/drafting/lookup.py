"""Prompt look-up decoding (Saxena, 2023): drafts copied from earlier in the text, since summaries and edits repeat
their prompt.
"""

from collections.abc import Sequence

import torch

from layerskip_recipes.generation.drafting.drafter import DraftedTokens, DraftStrategy, RoundStart
from layerskip_recipes.generation.steps import StepContext
from layerskip_recipes.model.decoder import on_device


class TextIndex:
    """Finds the continuation of the last earlier occurrence of the text's last `ngram` tokens."""

    def __init__(self, ngram: int) -> None:
        self.ngram = ngram
        self.tokens: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}  # n-gram -> position of the token after its last occurrence

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
        at = self.after.get(tuple(self.tokens[-self.ngram :]))
        if at is None:
            return [], 0
        same, most = self.ngram, min(4 * self.ngram, at)
        while same < most and self.tokens[at - 1 - same] == self.tokens[-1 - same]:
            same += 1
        found = self.tokens[at : at + count]
        # Repeat a continuation that is shorter than the draft.
        return [found[i % len(found)] for i in range(count)], (same // self.ngram).bit_length() - 1


class LookupDrafter:
    """Drafts up to `longest` tokens from the text by `TextIndex`; none unless every running row has a match."""

    def __init__(self, context: StepContext, longest: int, ngram: int, prompts: Sequence[Sequence[int]]) -> None:
        self.context, self.longest, self.ngram = context, longest, ngram
        self.texts = [TextIndex(ngram) for _ in prompts]
        self.extend(prompts)

    def propose(self, now: RoundStart) -> DraftedTokens:
        """`Drafter.propose`; a `ChainDrafter` verifies the draft."""
        count, match, tokens = now.draft_length(self.context, self.longest), 0, now.last[:, None]
        rows = zip(self.texts, now.finished, strict=True)
        found = [([0] * count, 2) if done else text.find(count) for text, done in rows]
        if count and all(row for row, _ in found):
            tokens = torch.cat([tokens, on_device([row for row, _ in found], self.context.device)], 1)
            match = min(match for _, match in found)
        return DraftedTokens(DraftStrategy("lookup", match), tokens)

    def replace(self, row: int, text: Sequence[int]) -> None:
        self.texts[row] = TextIndex(self.ngram)
        self.texts[row].extend(text)

    def extend(self, tokens: Sequence[Sequence[int]]) -> None:
        for text, new in zip(self.texts, tokens, strict=True):
            text.extend(new)
