"""Drafts that are looked up: in the text, since summaries and edits repeat their prompt (prompt look-up decoding,
Saxena, 2023), and in known answers, since answers to one task resemble each other.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from layerskip_recipes.checkpoint.answers import LONGEST_MATCH, Answers, Matches, some_of
from layerskip_recipes.generation.drafting.drafter import DraftedTokens, Drafter, RoundKind, RoundStart
from layerskip_recipes.generation.prefill import common_length
from layerskip_recipes.generation.steps import StepContext
from layerskip_recipes.model.decoder import on_device

LEAST_PROBABILITY = 0.1  # a draft of any length ends where the probability that all of it is right falls below this
MOST_SEARCHED = 4096  # of the last places in a text that end with its last token; a text of one word has no others


class GrowingText:
    """The tokens of a batch row."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self._buffer, self._end = np.zeros(2 * len(tokens) + 64, dtype=np.int32), 0
        self.extend(tokens)

    @property
    def tokens(self) -> np.ndarray:
        return self._buffer[: self._end]

    def extend(self, tokens: Sequence[int]) -> None:
        end = self._end + len(tokens)
        if end > len(self._buffer):
            self._buffer = np.concatenate([self._buffer, np.zeros(end, dtype=np.int32)])
        self._buffer[self._end : end] = tokens
        self._end = end

    def cut(self, length: int) -> None:
        self._end = length

    def matches(self, text: np.ndarray) -> Matches:
        """The earlier places with the longest match of the text's own end, the last of them first."""
        if not len(text):
            return Matches(np.arange(0), 0)
        places, length = np.flatnonzero(text[:-1] == text[-1])[::-1][:MOST_SEARCHED], 1
        while len(places) and length < LONGEST_MATCH:
            longer = places[places >= length]
            longer = longer[text[longer - length] == text[-1 - length]]
            if not len(longer):
                break
            places, length = longer, length + 1
        return some_of(places + 1, length if len(places) else 0)


class Lookup:
    """Looks up what follows a text, token by token, in the text itself and in known answers.

    In each of them, the places with the longest match of the text's end count, and there the most frequent next token.
    Its probability is estimated as

        count / (places + 0.2) * length / (length + 1)

    so that a longer match, and places that agree, make it likelier. The likelier one of the two tokens is drafted.
    """

    def __init__(self, text: Sequence[int], least: int | None, answers: Answers | None) -> None:
        self.text, self.least = GrowingText(text), least
        # What is searched, and the least length of a match there.
        self.sources: list[tuple[GrowingText | Answers, int]] = [] if least is None else [(self.text, least)]
        self.sources += [] if answers is None else [(answers, 1)]

    def find(self, count: int) -> tuple[list[int], float]:
        """At most `count` tokens that may follow, and how many of them are expected to be right.

        They end where the probability that all of them are right falls below LEAST_PROBABILITY.
        """
        start = len(self.text.tokens)
        drafted: list[int] = []
        reached: list[Matches | None] = [None] * len(self.sources)
        sure, expected = 1.0, 0.0
        while len(drafted) < count:
            matches = [self._matches(i) if known is None else known for i, known in enumerate(reached)]
            guesses = [_likeliest(self.sources[i][0].tokens, known) for i, known in enumerate(matches)]
            probability, token = max(guesses, key=lambda guess: guess[0])  # the text wins a tie
            sure *= probability
            if sure < LEAST_PROBABILITY:
                break
            expected += sure
            drafted.append(token)
            self.text.extend([token])
            reached = [_after(self.sources[i][0].tokens, known, token) for i, known in enumerate(matches)]
        self.text.cut(start)
        return drafted, expected

    def _matches(self, i: int) -> Matches:
        source, least = self.sources[i]
        matches = source.matches(self.text.tokens)
        return matches if matches.length >= least else Matches(matches.following[:0], 0)


def _likeliest(tokens: np.ndarray, matches: Matches) -> tuple[float, int]:
    """The estimated probability of the most frequent token after the matches, and the token; (0, 0) without any.

    Among equally frequent ones, the one at the first place.
    """
    if not len(matches.following):
        return 0.0, 0
    token, times = Counter(tokens[matches.following].tolist()).most_common(1)[0]
    return times / (len(matches.following) + 0.2) * matches.length / (matches.length + 1), token


def _after(tokens: np.ndarray, matches: Matches, token: int) -> Matches | None:
    """The matches that go on with the token; None: search again."""
    following = matches.following[tokens[matches.following] == token] + 1
    following = following[following < len(tokens)]
    return Matches(following, matches.length + 1, matches.is_whole) if len(following) else None


class LookupDrafter(Drafter):
    """Drafts up to `num_speculations` tokens that are looked up for any row.

    The tokens that come out of a round tell how good its look-up was, whether it was the draft or not.
    """

    def __init__(
        self,
        context: StepContext,
        num_speculations: int,
        least: int | None,
        answers: Answers | None,
        texts: Sequence[Sequence[int]],
    ) -> None:
        self.context, self.num_speculations = context, num_speculations
        self.least, self.answers = least, answers
        self.rows = [Lookup(text, least, answers) for text in texts]
        self.offered: RoundKind  # in this round
        self.drafts: list[list[int]] = []  # its tokens, [b][up to n]

    def offer(self, round_start: RoundStart) -> RoundKind | None:
        num_to_draft = round_start.num_to_draft(self.context, self.num_speculations)
        pairs = zip(self.rows, round_start.finished, strict=True)
        drafts = [([], 0.0) if done else row.find(num_to_draft) for row, done in pairs]
        if not any(tokens for tokens, _ in drafts):
            return None
        self.drafts = [tokens for tokens, _ in drafts]
        expected = sum(tokens for _, tokens in drafts) / round_start.finished.count(False)
        self.offered = RoundKind("lookup", min(int(1 + expected).bit_length() - 1, 2), untried=1.0 + expected)
        return self.offered

    def propose(self, round_start: RoundStart) -> DraftedTokens:
        fixed = self.context.backend.fixed_shapes
        count = self.num_speculations if fixed else max(map(len, self.drafts))
        # Rows with shorter drafts get any tokens behind them.
        tokens = on_device([[*draft, *[0] * (count - len(draft))] for draft in self.drafts], self.context.device)
        return DraftedTokens(self.offered, torch.cat([round_start.last[:, None], tokens], 1))

    def replace(self, row: int, text: Sequence[int]) -> None:
        self.rows[row] = Lookup(text, self.least, self.answers)

    def extend(self, tokens: Sequence[Sequence[int]]) -> float | None:
        gains = [1 + common_length(draft, new) for draft, new in zip(self.drafts, tokens, strict=False) if new]
        self.drafts = []
        for row, new in zip(self.rows, tokens, strict=True):
            row.text.extend(new)
        return sum(gains) / len(gains) if gains else None
