"""KeptStates: what the frozen model computed of each text, in a file, so that further epochs train the draft alone."""

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from layerskip_recipes.errors import ConfigError


class KeptStates:
    """The states that a draft learns from, in bf16. The file is deleted with the process, however that ends.

    States are rounded to bf16 also in the epoch that computes them. A resumed run computes them again, and so learns
    from the same numbers as the run that was not stopped, up to rounding of products of other batches.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, as long as the run
        self.places: dict[bytes, int] = {}  # by a digest of the text, where its states begin in the file
        self.size = 0

    def states(
        self,
        tokens: torch.Tensor,
        counted: torch.Tensor,
        compute: Callable[[list[int]], tuple[torch.Tensor, torch.Tensor]],
        inputs: Mapping[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Two states of each token, [b, s, d]; 0 behind the last label of a row that counts.

        `compute` computes the states of some rows. `inputs` are the model's: where several texts are packed into a row,
        input_pos tells the mask.
        """
        positions = inputs.get("input_pos")
        if inputs.get("mask") is not None and positions is None:
            raise ConfigError(
                "draft.keep_states: True knows texts by tokens and positions, and collate_fn gives a mask without "
                "input_pos. Set draft.keep_states=false"
            )
        lengths = [int(row.nonzero().max()) + 1 if row.any() else 0 for row in counted.cpu()]
        keys = []
        for row, length in enumerate(lengths):
            parts = [tokens[row, :length]] if positions is None else [tokens[row, :length], positions[row, :length]]
            keys.append(hashlib.blake2b(torch.stack(parts).cpu().numpy().tobytes(), digest_size=16).digest())
        missing = [row for row, key in enumerate(keys) if key not in self.places]
        if missing:
            for row, both in zip(missing, torch.cat(compute(missing), -1), strict=True):
                self.width, self.dtype = both.shape[-1], both.dtype
                self._keep(keys[row], both[: lengths[row]])
        states = tokens.new_zeros(*tokens.shape, self.width, dtype=self.dtype)
        for row, (key, length) in enumerate(zip(keys, lengths, strict=True)):
            if length:
                self.file.seek(self.places[key])
                data = bytearray(self.file.read(length * self.width * 2))
                states[row, :length] = torch.frombuffer(data, dtype=torch.bfloat16).view(length, self.width)
        x, last = states.chunk(2, -1)
        return x, last

    def _keep(self, key: bytes, states: torch.Tensor) -> None:
        """Write the states of a text, [n, width], behind all others."""
        bits = states.to("cpu", torch.bfloat16).contiguous().view(torch.int16)
        try:
            self.file.seek(self.size)
            self.places[key] = self.size
            self.size += self.file.write(bits.numpy().tobytes())
            self.file.flush()
        except OSError as e:
            raise ConfigError(
                f"draft.keep_states: True has written {self.size / 2**30:.1f} GiB, and no more can be written ({e}). "
                "Set draft.keep_states=false, or an output_dir with more room"
            ) from e
