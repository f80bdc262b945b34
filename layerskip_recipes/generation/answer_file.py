"""The answers of a generation in the order of its prompts: shown, and in a file that no interruption breaks."""

import json
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from torchtune import utils

from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.prompts import Example

log = utils.get_logger("INFO")


class AnswersInOrder:
    """Takes answers in any order.

    A context manager; what is there at its end is written, so an interrupted run loses nothing that it finished. If it
    comes to no end, because it is killed, all finished answers stand in FILE.partial, in the order in which they came.
    A prompt that is skipped has a line in the file too, with its error.

    Args:
        path: FILE, of JSON lines; None: there is none.
        examples: the prompts, those with an error are skipped.
        show: called with the index and the answer of each prompt when its turn comes.

    Raises:
        ValueError: if the file cannot be written.
    """

    def __init__(self, path: str | None, examples: Sequence[Example], show: Callable[[int, str], None]) -> None:
        self.path, self.examples, self.show = path, examples, show
        # Answers that wait for their turn, None of a prompt that has none.
        self.waiting: dict[int, str | None] = {i: None for i, example in enumerate(examples) if example.error}
        self.next = 0
        self.lines: dict[int, str] = {}
        self.file = None

    def __enter__(self) -> "AnswersInOrder":
        if self.path is not None:
            partial = Path(f"{self.path}.partial")
            try:
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
            Path(self.path).write_text(lines, encoding="utf-8")
            Path(self.file.name).unlink()

    def _show(self, i: int) -> None:
        if (answer := self.waiting.pop(i)) is not None:
            self.show(i, answer)

    def _note(self, i: int, line: dict[str, Any]) -> None:
        if self.file is not None:
            self.lines[i] = json.dumps({"index": i} | line, ensure_ascii=False) + "\n"
            self.file.write(self.lines[i])
            self.file.flush()
