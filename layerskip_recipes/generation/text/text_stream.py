"""Generated tokens as text: where it ends, how it is shown while it grows, and the file of answers."""

import json
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import IO, Any

from torchtune import utils

from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.text.prompts import Example

log = utils.get_logger("INFO")

# A draft is dim and stays in its line, since a terminal's cursor cannot come back once a line's end has scrolled the
# screen: wrapping is off while it is printed. The space before wraps a full line at once.
DRAFT, PLAIN, ERASE = " \b\x1b7\x1b[?7l\x1b[2m", "\x1b[0m\x1b[?7h", "\x1b8\x1b[J"
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a character decodes to whose bytes are not all there


class TextStream:
    """The text of one output while it grows, and where it ends.

    Only the last tokens are decoded for each new one: a token changes no text before the last whole character.

    Args:
        stop_tokens: they end an output and are not shown.
        stop_strings: an output ends before the first of them.
        prompt: the tokens of a text that the output continues. Its last tokens are decoded together with the output,
            since SentencePiece drops the first space of what is decoded alone, an indentation in a program.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_tokens: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        prompt: Sequence[int] = (),
    ) -> None:
        self.tokenizer, self.stop_tokens, self.stop_strings = tokenizer, stop_tokens, stop_strings
        # A few tokens of the prompt are enough. Those up to a stop token, which ended an earlier reply, are left out:
        # some tokenizers decode nothing behind one.
        tail = list(prompt[-8:])
        begin = next((i for i in range(len(tail), 0, -1) if tail[i - 1] in stop_tokens), 0)
        self.before = tail[begin:]
        self.before_text = tokenizer.decode(self.before) if self.before else ""
        while UNFINISHED in self.before_text:  # the tail begins within a character, whose bytes are tokens
            self.before = self.before[1:]
            self.before_text = tokenizer.decode(self.before) if self.before else ""
        self.window, self.window_text = list(self.before), self.before_text  # the tokens that are decoded with the next
        self.unread: list[int] = []  # tokens whose last character is not whole yet
        self.grown = ""  # the text of all others
        self.read = 0  # tokens so far
        self.shown = ""
        self.draft_is_shown = False

    def text(self, tokens: Sequence[int]) -> str:
        """The whole text of an output's tokens: without the stop token, cut before a stop string."""
        if tokens and tokens[-1] in self.stop_tokens:
            tokens = tokens[:-1]
        text = self._continue(self.before, self.before_text, tokens)
        return text[: min((at for s in self.stop_strings if (at := text.find(s)) >= 0), default=len(text))]

    def extend(self, new: Sequence[int]) -> int | None:
        """Read new tokens up to one that completes a stop string: how many belong to the output, None if it goes on."""
        for position, token in enumerate(new, start=1):
            self.read += 1
            if token in self.stop_tokens:
                continue
            before = len(self.grown)
            self.unread.append(token)
            text = self._continue(self.window, self.window_text, self.unread)
            if not text.endswith(UNFINISHED):
                self.grown += text
                self.window, self.unread = self.unread, []
                self.window_text = self.tokenizer.decode(self.window)
            longest = max(map(len, self.stop_strings), default=0)
            if any(s in self.grown[max(before - longest, 0) :] for s in self.stop_strings):
                return position
        return None

    def show(self, last: bool) -> None:
        """Print what is new of the text: unless it is the last, no unfinished character and not the start of a stop
        string.
        """
        text = self.grown
        if last:
            text += self._continue(self.window, self.window_text, self.unread) if self.unread else ""
        stop = min((at for s in self.stop_strings if (at := text.find(s)) >= 0), default=None)
        if stop is not None:
            text = text[:stop]
        elif not last:
            held = max((n for s in self.stop_strings for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
            text = text[: len(text) - held]
        erase = PLAIN + ERASE if self.draft_is_shown else ""
        self.draft_is_shown = False
        print(erase + text[len(self.shown) :], end="", flush=True)
        self.shown = max(self.shown, text, key=len)

    def show_draft(self, drafts: Sequence[Sequence[int]]) -> None:
        """Print drafted tokens dim, until `show` replaces them by what was accepted; for terminals, one row only."""
        text = self.grown + self._continue(self.window, self.window_text, [*self.unread, *drafts[0]])
        line = next(iter(text[len(self.shown) :].splitlines()), "")
        self.draft_is_shown = True  # noted before the draft is printed: Ctrl-C may come between
        print(f"{DRAFT}{line}{PLAIN}", end="", flush=True)

    def _continue(self, window: Sequence[int], window_text: str, tokens: Sequence[int]) -> str:
        """The text that tokens add to those of a window."""
        text = self.tokenizer.decode([*window, *tokens])
        if not text.startswith(window_text):  # a tokenizer whose texts depend on the tokens that follow
            return self.tokenizer.decode(list(tokens))
        return text[len(window_text) :]


def follow(
    generation: Generation,
    texts: Sequence[TextStream],
    shown: TextStream | None = None,
    on_end: Callable[[int], None] = lambda prompt: None,
) -> None:
    """Run a generation to its end, ending outputs at stop strings; `shown` prints the first text as it grows.

    The time for texts counts as decoding, since the user waits for them. `on_end` is called with the number of each
    prompt whose output has ended, and its time does not count. After Ctrl-C the accepted text stays, without the draft.
    """
    seconds, running = 0.0, set(range(len(texts)))
    try:
        for new in generation:
            started = time.perf_counter()
            here = running.intersection(generation.in_row)
            for prompt in here:
                text = texts[prompt]
                if (text.stop_strings or text is shown) and (kept := text.extend(new[prompt])) is not None:
                    generation.stop(prompt, len(generation.generated[prompt]) - len(new[prompt]) + kept)
            if shown is not None:
                shown.show(last=generation.finished[0])
            seconds += time.perf_counter() - started
            for prompt in sorted(prompt for prompt in here if generation.finished[prompt]):
                running.discard(prompt)
                on_end(prompt)
    except KeyboardInterrupt:
        if shown is not None:
            shown.extend(generation.generated[0][shown.read :])
            shown.show(last=True)
        raise
    finally:
        generation.stats.decode_s += seconds


class AnswersInOrder:
    """Shows answers in the order of their prompts and writes them to a file, in whatever order they come.

    A context manager that writes the finished answers to `path` at its end, also after an interruption. A run that is
    killed leaves its answers in PATH.partial, in the order in which they came. A prompt with an error is skipped, and
    its line in the file has the error.
    """

    def __init__(self, path: str | None, examples: Sequence[Example], show: Callable[[int, str], None]) -> None:
        self.path, self.examples, self.show = path, examples, show
        # Answers that wait for their turn, None of a prompt that has none.
        self.waiting: dict[int, str | None] = {i: None for i, example in enumerate(examples) if example.error}
        self.next = 0
        self.lines: dict[int, str] = {}
        self.file: IO[str] | None = None

    def __enter__(self) -> "AnswersInOrder":
        if self.path is not None:
            partial = Path(f"{self.path}.partial")
            try:
                partial.parent.mkdir(parents=True, exist_ok=True)
                if partial.exists():  # all that a killed run left
                    kept = next(path for n in count(1) if not (path := Path(f"{partial}.{n}")).exists())
                    partial.rename(kept)
                    log.warning("output_file: the answers of a run that came to no end are in %s", kept)
                self.file = partial.open("w", encoding="utf-8")
            except OSError as e:
                message = f"output_file: {self.path!r} cannot be written ({e}); for example answers.jsonl"
                raise ConfigError(message) from e
            for i in self.waiting:
                self._note(i, {"line": self.examples[i].line, "error": self.examples[i].error})
        return self

    def add(self, i: int, answer: str, tokens: int, interrupted: bool = False) -> None:
        """The answer to a prompt, of so many tokens; interrupted: it would have gone on."""
        self.waiting[i] = answer
        line = {"prompt": self.examples[i].prompt, "text": answer, "tokens": tokens}
        self._note(i, line | ({"interrupted": True} if interrupted else {}))
        while self.next in self.waiting:
            self._show(self.next)
            self.next += 1

    def __exit__(self, *_: object) -> None:
        for i in sorted(self.waiting):
            self._show(i)
        if self.file is not None:
            self.file.close()
            lines = "".join(self.lines[i] for i in sorted(self.lines))
            Path(self.path or "").write_text(lines, encoding="utf-8")
            Path(self.file.name).unlink()

    def _show(self, i: int) -> None:
        if (answer := self.waiting.pop(i)) is not None:
            self.show(i, answer)

    def _note(self, i: int, line: dict[str, Any]) -> None:
        if self.file is not None:
            self.lines[i] = json.dumps({"index": i} | line, ensure_ascii=False) + "\n"
            self.file.write(self.lines[i])
            self.file.flush()
