"""Drafts that are looked up in the text so far: prompt look-up decoding (Saxena, 2023).

Summaries and edits repeat their prompt, and what followed a place in it follows again.
"""

from collections.abc import Sequence

import torch

from layerskip_recipes.generation.drafting.drafter import DraftedTokens, DraftStrategy, RoundStart
from layerskip_recipes.generation.steps import StepContext
from layerskip_recipes.model.decoder import on_device


class TextIndex:
    """Finds what followed the last earlier place with the same last `ngram` tokens.

    Args:
        ngram: tokens that have to be the same, 1 or more.
    """

    def __init__(self, ngram: int) -> None:
        self.ngram = ngram
        self.tokens: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}  # n-gram -> where the token behind its last place stands

    def extend(self, tokens: Sequence[int]) -> None:
        """The text goes on by these tokens."""
        for token in tokens:
            # Entered once something follows, so that the end of the text never finds itself.
            if len(self.tokens) >= self.ngram:
                self.after[tuple(self.tokens[-self.ngram :])] = len(self.tokens)
            self.tokens.append(token)

    def find(self, count: int) -> tuple[list[int], int]:
        """Tokens that may follow, and how long the text before them is the same: the longer, the likelier they are.

        Args:
            count: how many.

        Returns:
            `count` tokens, and 0 for less than 2 n-grams, 1 for less than 4, 2 for more; ([], 0) if the end of the text
            is new.
        """
        at = self.after.get(tuple(self.tokens[-self.ngram :]))
        if at is None:
            return [], 0
        same, most = self.ngram, min(4 * self.ngram, at)
        while same < most and self.tokens[at - 1 - same] == self.tokens[-1 - same]:
            same += 1
        found = self.tokens[at : at + count]
        # A repetition shorter than the draft goes on repeating.
        return [found[i % len(found)] for i in range(count)], (same // self.ngram).bit_length() - 1


class LookupDrafter:
    """Drafts what followed the last tokens earlier in the text; the draft is empty unless every running row has one.

    Args:
        longest: d, the tokens of a draft.
        ngram: see `TextIndex`.
    """

    def __init__(self, context: StepContext, longest: int, ngram: int, prompts: Sequence[Sequence[int]]) -> None:
        self.context, self.longest, self.ngram = context, longest, ngram
        self.texts = [TextIndex(ngram) for _ in prompts]
        self.extend(prompts)

    def propose(self, now: RoundStart) -> DraftedTokens:
        """See `Drafter.propose`; drafters of an exit verify such drafts."""
        depth, match, tokens = now.depth(self.context, self.longest), 0, now.last[:, None]
        rows = zip(self.texts, now.finished, strict=True)
        found = [([0] * depth, 2) if done else text.find(depth) for text, done in rows]
        if depth and all(row for row, _ in found):
            tokens = torch.cat([tokens, on_device([row for row, _ in found], self.context.device)], 1)
            match = min(match for _, match in found)
        slots = self.context.cache.slots[: now.last_slot + tokens.shape[1]]
        return DraftedTokens(DraftStrategy("lookup", match), slots, tokens)

    def replace(self, row: int, text: Sequence[int]) -> None:
        """A row goes on from another text."""
        self.texts[row] = TextIndex(self.ngram)
        self.texts[row].extend(text)

    def extend(self, tokens: Sequence[Sequence[int]]) -> None:
        """The text of each row goes on by these tokens."""
        for text, new in zip(self.texts, tokens, strict=True):
            text.extend(new)
