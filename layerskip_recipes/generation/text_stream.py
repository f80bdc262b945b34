"""Generated tokens as text: where it ends, and how it is shown while it grows."""

import shutil
import unicodedata
from collections.abc import Sequence
from typing import Any

from layerskip_recipes.generation.engine import Generation

DIM, PLAIN, SAVE, RESTORE = "\x1b[2m", "\x1b[0m", "\x1b[s", "\x1b[u\x1b[J"
TAB = 8  # columns from one tab stop to the next


def columns_of(character: str) -> int:
    """How many columns of a terminal a character takes; a tab the most that it can."""
    if character == "\t":
        return TAB
    if unicodedata.combining(character) or unicodedata.category(character).startswith("C"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def column_after(text: str, column: int, width: int) -> int:
    """The column of the cursor after a text that a terminal wraps.

    Args:
        text: what is printed.
        column: before it, from 0.
        width: columns of the terminal.
    """
    for character in text:
        if character in "\r\n":
            column = 0
        elif character == "\t":
            column = min(column - column % TAB + TAB, width - 1)
        else:
            takes = columns_of(character)
            column = takes if column + takes > width else column + takes
    return column


class TextStream:
    """The text of one output.

    Args:
        tokenizer: decodes.
        stop_tokens: they end an output and are not shown.
        stop_strings: an output ends before the first of them.
        prompt: the tokens of a text that the output goes on from, whose end it must fit to the letter: what
            SentencePiece decodes alone loses its first space, which is an indentation in a program.
        column: of the cursor where the output begins to be shown, from 0.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_tokens: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        prompt: Sequence[int] = (),
        column: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        # A few are enough; none before the end of an earlier text, where some tokenizers stop decoding.
        tail = list(prompt[-8:])
        begin = next((i for i in range(len(tail), 0, -1) if tail[i - 1] in stop_tokens), 0)
        self.before = tail[begin:]
        self.before_text = tokenizer.decode(self.before) if self.before else ""
        while "�" in self.before_text:  # it begins within a character, whose bytes are tokens
            self.before = self.before[1:]
            self.before_text = tokenizer.decode(self.before) if self.before else ""
        self.stop_tokens = stop_tokens
        self.stop_strings = stop_strings
        self.shown = ""
        self.tokens: list[int] = []
        self.draft_is_shown = False
        self.column = column

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self.tokenizer.decode([*self.before, *tokens])
        if not text.startswith(self.before_text):  # a tokenizer whose texts depend on what follows
            return self.tokenizer.decode(list(tokens))
        return text[len(self.before_text) :]

    def text(self, tokens: Sequence[int]) -> str:
        """Without the stop token, cut before a stop string."""
        if tokens and tokens[-1] in self.stop_tokens:
            tokens = tokens[:-1]
        text = self._decode(tokens)
        return text[: min((at for s in self.stop_strings if (at := text.find(s)) >= 0), default=len(text))]

    def cut(self, tokens: list[int], new: int) -> bool:
        """Shorten tokens to the first prefix whose text holds a stop string; only the last `new` are in question."""
        if not self.stop_strings:
            return False
        text = self._decode(tokens)
        if not any(s in text for s in self.stop_strings):
            return False
        for length in range(len(tokens) - new + 1, len(tokens) + 1):
            text = self._decode(tokens[:length])
            if any(s in text for s in self.stop_strings):
                del tokens[length:]
                return True
        return False

    def show(self, tokens: Sequence[int], last: bool) -> None:
        """Print what tokens add to the text shown so far, but no unfinished character and no stop string's start."""
        self.tokens = list(tokens)
        text = self.text(tokens)
        if not last:
            text = text.rstrip("�")
            held = max((n for s in self.stop_strings for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
            text = text[: len(text) - held]
        erase, new = RESTORE if self.draft_is_shown else "", text[len(self.shown) :]
        self.draft_is_shown = False
        print(erase + new, end="", flush=True)
        self.column = column_after(new, self.column, shutil.get_terminal_size().columns)
        self.shown = max(self.shown, text, key=len)

    def show_draft(self, drafts: Sequence[Sequence[int]]) -> None:
        """Print drafted tokens dim, until `show` replaces them by what was accepted; for terminals, one row only."""
        text = self._decode([*self.tokens, *drafts[0]])[len(self.shown) :]
        # Across a line's end the cursor could not be brought back when the screen scrolls. The last column stays free.
        line, room = next(iter(text.splitlines()), ""), shutil.get_terminal_size().columns - 1 - self.column
        end = next((i for i in range(len(line)) if sum(map(columns_of, line[: i + 1])) > room), len(line))
        self.draft_is_shown = True  # before it is: Ctrl-C may come between
        print(f"{SAVE}{DIM}{line[:end]}{PLAIN}", end="", flush=True)


def follow(generation: Generation, texts: Sequence[TextStream], shown: TextStream | None = None) -> None:
    """Run a generation to its end, ending rows at stop strings.

    Args:
        generation: not yet begun; of its statistics `tokens` is what is kept.
        texts: one for each row.
        shown: prints the first row as it grows; after Ctrl-C too the text that stands, and no draft, is seen last.
    """
    try:
        for new in generation:
            for row, output in enumerate(texts):
                if new[row] and output.cut(generation.generated[row], len(new[row])):
                    generation.finished[row] = True
            if shown is not None:
                shown.show(generation.generated[0], last=generation.finished[0])
    except KeyboardInterrupt:
        if shown is not None:
            shown.show(generation.generated[0], last=True)
        raise
    finally:
        generation.stats.tokens = sum(map(len, generation.generated))
