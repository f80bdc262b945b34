"""KeptStates: what the frozen model computed of each text, in a file, so that further epochs train the draft alone."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch


class KeptStates:
    """The states that a draft learns from, in bf16. The file is deleted with the process, however that ends.

    States that were just computed are rounded too, so that a resumed run, which computes them again, goes on alike.

    Args:
        folder: where the file lies.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115, as long as the run
        self.places: dict[bytes, int] = {}  # of each text where its states begin in the file
        self.size = 0

    def states(
        self,
        tokens: torch.Tensor,
        counted: torch.Tensor,
        positions: torch.Tensor | None,
        compute: Callable[[list[int]], tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Two states of each token, [b, s, d]; 0 behind the last label of a row that counts.

        Args:
            tokens: [b, s].
            counted: [b, s], which labels count.
            positions: [b, s], where several texts are packed into a row.
            compute: the states of the rows with these numbers.
        """
        lengths = [int(row.nonzero().max()) + 1 if row.any() else 0 for row in counted.cpu()]
        parts = [tokens] if positions is None else [tokens, positions]
        keys = [b"".join(part[i, :n].cpu().numpy().tobytes() for part in parts) for i, n in enumerate(lengths)]
        missing = [i for i, key in enumerate(keys) if key not in self.places]
        if missing:
            for i, both in zip(missing, torch.cat(compute(missing), -1), strict=True):
                self.width, self.dtype = both.shape[-1], both.dtype
                self.places[keys[i]] = self.size
                self.size += self.file.write(_as_int16(both[: lengths[i]]).numpy().tobytes())
        states = tokens.new_zeros(*tokens.shape, self.width, dtype=self.dtype)
        for i, (key, n) in enumerate(zip(keys, lengths, strict=True)):
            if n:
                data = bytearray(os.pread(self.file.fileno(), n * self.width * 2, self.places[key]))
                states[i, :n] = torch.frombuffer(data, dtype=torch.bfloat16).view(n, self.width)
        x, last = states.chunk(2, -1)
        return x, last


def _as_int16(states: torch.Tensor) -> torch.Tensor:
    """The bits of states in bf16, on the CPU."""
    return states.to("cpu", torch.bfloat16).contiguous().view(torch.int16)
