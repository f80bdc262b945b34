"""Drafts that are looked up in the text so far."""

from collections.abc import Sequence


class LookUp:
    """Drafts from the text itself: what followed the last earlier place with the same last `ngram` tokens.

    Prompt look-up decoding (Saxena, 2023): summaries and edits repeat their prompt.

    Args:
        ngram: tokens that have to agree, 1 or more.
    """

    def __init__(self, ngram: int) -> None:
        self.ngram = ngram
        self.tokens: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}  # n-gram -> where the token behind its last place stands

    def extend(self, tokens: Sequence[int]) -> None:
        """More text."""
        for token in tokens:
            # Entered once something follows, so that the end of the text never finds itself.
            if len(self.tokens) >= self.ngram:
                self.after[tuple(self.tokens[-self.ngram :])] = len(self.tokens)
            self.tokens.append(token)

    def find(self, count: int) -> tuple[list[int], int]:
        """Tokens that may follow, and how much of the text before them is the same: which says how likely they are.

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
