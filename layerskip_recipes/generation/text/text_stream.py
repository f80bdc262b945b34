"""Generated tokens as text: stop strings, streaming to a terminal, and the file of answers."""

import json
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import IO, Any

from torchtune import utils

from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.report import report_path
from layerskip_recipes.generation.text.prompts import Example

log = utils.get_logger("INFO")

# A draft is dim and stays in its line, since a terminal cannot restore the cursor once the screen has scrolled. So
# wrapping is off while it is printed. The leading space makes a full line wrap first.
DIM, NORMAL, ERASE = " \b\x1b7\x1b[?7l\x1b[2m", "\x1b[0m\x1b[?7h", "\x1b8\x1b[J"
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # an incomplete character decodes to this
UNFINISHED_TOKENS = 3  # the most tokens of an incomplete character, which has up to four bytes in UTF-8


class StopString:
    """Finds a string in a growing text in linear time, with the algorithm of Knuth, Morris and Pratt."""

    def __init__(self, string: str) -> None:
        self.string = string
        self.matched = 0  # length of the longest start of the string that ends the text
        self.shorter = [0]  # for each match but none: the length of the next shorter start that ends it
        for character in string[1:]:
            self.shorter.append(self._grow(self.shorter[-1], character))

    def find_end(self, new: str) -> int | None:
        """Read new text; returns where the string ends in it, if it does."""
        for end, character in enumerate(new, start=1):
            self.matched = self._grow(self.matched, character)
            if self.matched == len(self.string):
                self.matched = self.shorter[-1]
                return end
        return None

    def _grow(self, matched: int, character: str) -> int:
        while matched and self.string[matched] != character:
            matched = self.shorter[matched - 1]
        return matched + (self.string[matched] == character)


class TextStream:
    """The text of one output while it grows; it ends before the first stop token or stop string.

    Each new token costs a constant time, whatever the length of the text. Only the last tokens are decoded with it: a
    token changes no text before the last whole character. Of the text that was returned already nothing is kept. The
    output continues `prompt`, whose last tokens are decoded with it, since SentencePiece drops the first space of a
    text, such as an indentation.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_tokens: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        prompt: Sequence[int] = (),
    ) -> None:
        self.tokenizer, self.stop_tokens = tokenizer, stop_tokens
        self.stop_strings = [StopString(string) for string in stop_strings]
        # A few tokens of the prompt are enough, after the last stop token: some tokenizers decode nothing after one.
        tail = list(prompt[-8:])
        begin = next((i for i in range(len(tail), 0, -1) if tail[i - 1] in stop_tokens), 0)
        self.context = tail[begin:]
        while UNFINISHED in (text := tokenizer.decode(self.context) if self.context else ""):
            self.context = self.context[1:]  # the tail begins within a character of several tokens
        self.context_text = text
        self.window, self.window_text = list(self.context), self.context_text  # decoded together with the next tokens
        self.unread: list[int] = []  # tokens whose last character is incomplete
        self.pieces: list[str] = []  # the text of all other tokens since `new_text`, and what it held back
        self.stopped = False  # whether `pieces` ends before a stop string
        self.read = 0  # number of tokens so far
        self.draft_is_shown, self.draft_s = False, 0.0  # draft_s: seconds of showing drafts

    def text(self, tokens: Sequence[int]) -> str:
        """The text of all output tokens, without the stop token and cut before a stop string."""
        if tokens and tokens[-1] in self.stop_tokens:
            tokens = tokens[:-1]
        text = self._continue(self.context, self.context_text, tokens)
        return text[: min((at for stop in self.stop_strings if (at := text.find(stop.string)) >= 0), default=None)]

    def extend(self, new: Sequence[int]) -> int | None:
        """Read new tokens; returns how many belong to the output if one completes a stop string, else None."""
        for position, token in enumerate(new, start=1):
            self.read += 1
            if token in self.stop_tokens:
                continue
            self.unread.append(token)
            text = self._continue(self.window, self.window_text, self.unread)
            num_final = len(self.unread)
            if text.endswith(UNFINISHED):
                # All tokens before an incomplete character are final, also if they are no valid text.
                num_final -= UNFINISHED_TOKENS
                final = self._continue(self.window, self.window_text, self.unread[:num_final]) if num_final > 0 else ""
                if not final or not text.startswith(final):
                    continue
                text = final
            self.window, self.unread = self.unread[:num_final], self.unread[num_final:]
            self.window_text = self.tokenizer.decode(self.window)
            if self._add(text):
                return position
        return None

    def _add(self, text: str) -> bool:
        """Add text; returns whether it completes a stop string, and then ends the text before it."""
        starts = [end - len(stop.string) for stop in self.stop_strings if (end := stop.find_end(text)) is not None]
        if not self.stopped:
            self.pieces.append(text)
            if starts:
                grown = "".join(self.pieces)
                self.pieces, self.stopped = [grown[: len(grown) - len(text) + min(starts)]], True
        return self.stopped

    def show(self, last: bool) -> None:
        erase = NORMAL + ERASE if self.draft_is_shown else ""
        self.draft_is_shown = False
        print(erase + self.new_text(last), end="", flush=True)

    def new_text(self, last: bool) -> str:
        """The text since the last call; if not `last`, without an incomplete character or a stop string's start."""
        if last and self.unread:
            self._add(self._continue(self.window, self.window_text, self.unread))
            self.unread = []
        text = "".join(self.pieces)
        held = 0 if last or self.stopped else max((stop.matched for stop in self.stop_strings), default=0)
        self.pieces = [text[len(text) - held :]]
        return text[: len(text) - held]

    def show_draft(self, drafts: Sequence[Sequence[int]]) -> None:
        """Print a draft of row 0 dim on a terminal, until `show` replaces it by the accepted tokens."""
        started = time.perf_counter()
        text = "".join(self.pieces) + self._continue(self.window, self.window_text, [*self.unread, *drafts[0]])
        line = next(iter(text.splitlines()), "")
        self.draft_is_shown = True  # set before printing: Ctrl-C may come between
        print(f"{DIM}{line}{NORMAL}", end="", flush=True)
        self.draft_s += time.perf_counter() - started

    def _continue(self, window: Sequence[int], window_text: str, tokens: Sequence[int]) -> str:
        """The text that tokens add to a window's text."""
        text = self.tokenizer.decode([*window, *tokens])
        if not text.startswith(window_text):  # later tokens changed the window's text
            return self.tokenizer.decode(list(tokens))
        return text[len(window_text) :]


def follow(
    generation: Generation,
    texts: Sequence[TextStream],
    shown: TextStream | None = None,
    on_end: Callable[[int], None] = lambda prompt: None,
    counts_text: bool = True,
) -> None:
    """Run a generation, ending outputs at stop strings; `shown` prints the first text as it grows.

    `on_end` gets the index of each prompt whose output has ended. Detokenizing and printing count as decoding time,
    since the user waits for them, but not in a comparison with a generation that shows nothing (no `counts_text`).
    `on_end` never counts. After Ctrl-C the accepted text stays on the screen, the draft does not.
    """
    seconds, running = 0.0, set(range(len(texts)))
    try:
        for new in generation:
            started = time.perf_counter()
            in_rows = running.intersection(generation.in_row)
            for prompt in in_rows:
                text = texts[prompt]
                if (text.stop_strings or text is shown) and (num_kept := text.extend(new[prompt])) is not None:
                    generation.stop(prompt, len(generation.generated[prompt]) - len(new[prompt]) + num_kept)
            if shown is not None:
                shown.show(last=generation.finished[0])
            seconds += time.perf_counter() - started
            for prompt in sorted(prompt for prompt in in_rows if generation.finished[prompt]):
                running.discard(prompt)
                on_end(prompt)
    except KeyboardInterrupt:
        if shown is not None:
            shown.extend(generation.generated[0][shown.read :])
            shown.show(last=True)
        raise
    finally:
        generation.stats.decode_s += seconds if counts_text else -shown.draft_s if shown is not None else 0.0


class AnswersInOrder:
    """Shows answers in prompt order and writes them to a file, in whatever order they come.

    A context manager that writes the finished answers to `path` at its end. After an interruption it does so as well,
    but not over an earlier file. A killed run leaves them in PATH.partial, in order of completion. A prompt with an
    error is not shown; the file has its error.
    """

    def __init__(self, path: str | None, examples: Sequence[Example], show: Callable[[int, str], None]) -> None:
        self.path, self.examples, self.show = path, examples, show
        # Answers that wait for their turn; None for a bad prompt.
        self.waiting: dict[int, str | None] = {i: None for i, example in enumerate(examples) if example.error}
        self.next = 0
        self.lines: dict[int, str] = {}
        self.file: IO[str] | None = None

    def __enter__(self) -> "AnswersInOrder":
        if self.path is not None and Path(self.path).exists() and not Path(self.path).is_file():
            self.file = open(self.path, "w", encoding="utf-8")  # a pipe or device, such as /dev/stdout
        elif self.path is not None:
            partial = Path(f"{self.path}.partial")
            partial.parent.mkdir(parents=True, exist_ok=True)
            if partial.exists():  # left by a killed run
                backup = next(path for n in count(1) if not (path := Path(f"{partial}.{n}")).exists())
                partial.rename(backup)
                log.warning("output_file: the answers of an unfinished run are in %s", backup)
            self.file = partial.open("w", encoding="utf-8")
        for i in self.waiting:
            self._note(i, {"line": self.examples[i].line, "error": self.examples[i].error})
        return self

    def add(self, i: int, answer: str, tokens: int, interrupted: bool = False) -> None:
        """Add the answer to prompt i; `tokens` is its length, `interrupted` marks an unfinished answer."""
        self.waiting[i] = answer
        line = {"prompt": self.examples[i].prompt, "text": answer, "tokens": tokens}
        self._note(i, line | ({"interrupted": True} if interrupted else {}))
        while self.next in self.waiting:
            self._show(self.next)
            self.next += 1

    def __exit__(self, error: object, *_: object) -> None:
        for i in sorted(self.waiting):
            self._show(i)
        if self.file is None:
            return
        self.file.close()
        if self.file.name != self.path:
            target = report_path(Path(self.path or ""), "output_file", interrupted=error is not None)
            target.write_text("".join(self.lines[i] for i in sorted(self.lines)), encoding="utf-8")
            Path(self.file.name).unlink()

    def _show(self, i: int) -> None:
        if (answer := self.waiting.pop(i)) is not None:
            self.show(i, answer)

    def _note(self, i: int, line: dict[str, Any]) -> None:
        if self.file is not None:
            self.lines[i] = json.dumps({"index": i} | line, ensure_ascii=False) + "\n"
            self.file.write(self.lines[i])
            self.file.flush()
