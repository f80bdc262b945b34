"""What the host knows of a generation: prompts, outputs so far, and which prompt each row decodes."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from layerskip_recipes.config.schema import PositiveInt, check
from layerskip_recipes.model.decoder import on_device


class BatchRows:
    """The b batch rows, each with the prompt that it decodes; a row that has finished takes the next prompt.

    `limit` is the maximum length of an output; see `Generation` for the other arguments.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        num_rows: int | None,
        limit: int,
        stop_tokens: Sequence[int],
        predictions: Sequence[Sequence[int]] | None = None,
    ) -> None:
        check("rows", num_rows, PositiveInt | None)
        self.prompts = [list(prompt) for prompt in prompts]
        count = len(self.prompts)
        self.predictions = predictions or [()] * count
        self.limit, self.stop_tokens = limit, {int(token) for token in stop_tokens}
        self.generated: list[list[int]] = [[] for _ in range(count)]
        self.finished = [False] * count
        self.in_row = list(range(min(num_rows or count, count)))
        self.waiting = deque(range(len(self.in_row), count))
        self.seen: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.in_row)

    def values_in_rows(self, values: Sequence[Any]) -> list[Any]:
        """Values by prompt, [p] -> the values of the prompts in the rows, [b]."""
        return [values[prompt] for prompt in self.in_row]

    @property
    def texts(self) -> list[list[int]]:
        """Prompt and output of each row, [b][any length]."""
        return [self.prompts[prompt] + self.generated[prompt] for prompt in self.in_row]

    def searched(self, row: int) -> list[int]:
        """What look-ups search for a row: the predictions of its answer, and its text."""
        prompt = self.in_row[row]
        return [*self.predictions[prompt], *self.prompts[prompt], *self.generated[prompt]]

    @property
    def lengths(self) -> list[int]:
        return [len(self.prompts[prompt]) + len(self.generated[prompt]) for prompt in self.in_row]

    @property
    def room(self) -> list[int]:
        """How many more tokens each row may get, [b]; 0 if it has finished."""
        return [0 if self.finished[i] else self.limit - len(self.generated[i]) for i in self.in_row]

    def by_prompt(self, new: Sequence[list[int]]) -> list[list[int]]:
        """New tokens by row, [b][n] -> by prompt, [p][n]."""
        by_prompt: list[list[int]] = [[]] * len(self.prompts)  # one shared empty list, as there may be many prompts
        for prompt, tokens in zip(self.in_row, new, strict=True):
            by_prompt[prompt] = tokens
        return by_prompt

    def add(self, new: Sequence[Sequence[int]]) -> list[list[int]]:
        """Append each row's new tokens, cut at a stop token and at the limit; returns the tokens kept, [b][n]."""
        final_tokens = []
        for prompt, tokens, room in zip(self.in_row, new, self.room, strict=True):
            cut = list(tokens[:room])
            stop = next((i for i, token in enumerate(cut) if token in self.stop_tokens), None)
            cut = cut if stop is None else cut[: stop + 1]
            self.generated[prompt] += cut
            self.finished[prompt] |= stop is not None or len(self.generated[prompt]) >= self.limit
            final_tokens.append(cut)
        self._see(final_tokens)
        return final_tokens

    def end(self, prompt: int, keep: int) -> int:
        """End an output after its first `keep` tokens; returns the number of dropped tokens."""
        if prompt in self.waiting:
            self.waiting.remove(prompt)
        dropped = len(self.generated[prompt][keep:])
        del self.generated[prompt][keep:]
        self.finished[prompt] = True
        return dropped

    @property
    def free(self) -> int | None:
        """A finished row; None if there is none, or if no prompt waits for it."""
        done = (row for row, prompt in enumerate(self.in_row) if self.finished[prompt])
        return next(done, None) if self.waiting else None

    def take_next(self, row: int) -> list[int]:
        """Give the row the next prompt, and return that prompt."""
        self.in_row[row] = prompt = self.waiting.popleft()
        if self.seen is not None:
            self.seen[row] = False
            self._see([self.prompts[prompt] if i == row else [] for i in range(len(self))])
        return self.prompts[prompt]

    def begin_seen(self, vocabulary_size: int, device: torch.device) -> None:
        """Keep `seen` from now on."""
        self.seen = torch.zeros(len(self), vocabulary_size, dtype=torch.bool, device=device)
        self._see(self.texts)

    def _see(self, tokens: Sequence[Sequence[int]]) -> None:
        if self.seen is None:
            return
        pairs = [(row, token) for row, of_row in enumerate(tokens) for token in of_row]
        if pairs:
            rows, ids = on_device(pairs, self.seen.device).unbind(1)
            # A value on the device: torch would copy a number of the host there, and wait for that.
            self.seen.index_put_((rows, ids), torch.ones((), dtype=torch.bool, device=self.seen.device))
