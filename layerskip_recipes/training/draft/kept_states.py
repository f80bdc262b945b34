"""KeptStates: the frozen model's states of each text, kept in a file so that later epochs train the draft alone."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from layerskip_recipes.errors import ConfigError


class KeptStates:
    """The states that a draft learns from, in bf16, in a temporary file that disappears with the process.

    The first epoch also uses the states rounded to bf16. A resumed run computes them again in different batches, so its
    losses agree only up to the rounding of matrix products.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, open as long as the run
        self.places: dict[bytes, int] = {}  # digest of a text -> offset of its states in the file

    def states(
        self,
        tokens: torch.Tensor,
        counted: torch.Tensor,
        compute: Callable[[list[int]], tuple[torch.Tensor, torch.Tensor]],
        inputs: Mapping[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The two results of `Draft.teacher_states`, each [b, s, d]; 0 after a row's last counted label.

        `compute` returns them for some rows. `inputs` are the model's other inputs. A packed row's mask follows from
        its input_pos, so tokens and positions identify a row.
        """
        positions = inputs.get("input_pos")
        if inputs.get("mask") is not None and positions is None:
            raise ConfigError(
                "draft.keep_states: True knows texts by tokens and positions, and collate_fn gives a mask without "
                "input_pos. Set draft.keep_states=false"
            )
        # Identify each row by a digest of its tokens and positions.
        lengths = [int(row.nonzero().max()) + 1 if row.any() else 0 for row in counted.cpu()]
        texts = torch.stack([tokens] if positions is None else [tokens, positions], 1).cpu()
        keys = [
            hashlib.blake2b(text[:, :length].numpy().tobytes(), digest_size=16).digest()
            for text, length in zip(texts, lengths, strict=True)
        ]
        # Compute the states of new texts, and append them to the file.
        missing = [row for row, key in enumerate(keys) if key not in self.places]
        if missing:
            for row, both in zip(missing, torch.cat(compute(missing), -1), strict=True):
                self.width, self.dtype = both.shape[-1], both.dtype
                self.places[keys[row]] = self.file.seek(0, os.SEEK_END)
                bits = both[: lengths[row]].to("cpu", torch.bfloat16).view(torch.int16)
                self.file.write(bits.numpy().tobytes())
        # Read all states from the file, so that new and kept ones are rounded alike.
        states = tokens.new_zeros(*tokens.shape, self.width, dtype=self.dtype)
        for row, (key, length) in enumerate(zip(keys, lengths, strict=True)):
            if length:
                self.file.seek(self.places[key])
                data = bytearray(self.file.read(length * self.width * 2))
                states[row, :length] = torch.frombuffer(data, dtype=torch.bfloat16).view(length, self.width)
        x, last = states.chunk(2, -1)
        return x, last
