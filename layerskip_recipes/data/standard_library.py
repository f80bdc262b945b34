"""The quickstart's data: the source code of Python's standard library, read from the running interpreter.

It gives a tokenizer, a dataset, and prompts from held-out files, without a download.
"""

import json
import os
import sysconfig
import zlib
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset

from layerskip_recipes.config.schema import PositiveInt, check, checked_arguments
from layerskip_recipes.data.tokenizer import HFTokenizer, hf_tokenizer
from layerskip_recipes.errors import ConfigError

Split = Literal["train", "heldout"]

END = "<|endoftext|>"
# Folders that are missing on some machines, or contain tables instead of code.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings"}


@checked_arguments("dataset.")
def stdlib_texts(split: Split) -> dict[str, str]:
    """Map relative path to source code, in a fixed order; about one in twenty files is held out."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for folder, inner, files in os.walk(root):
        inner[:] = set(inner) - LEFT_OUT  # os.walk skips the removed folders
        paths += [Path(folder, file).relative_to(root) for file in files if file.endswith(".py")]
    texts = {}
    for path in sorted(paths):
        # Split by a hash of the name, which is the same on every machine.
        held_out = zlib.crc32(path.as_posix().encode()) % 20 == 0
        if held_out == (split == "heldout"):
            text = (root / path).read_text(encoding="utf-8", errors="replace")
            if len(text) > 1000:
                texts[path.as_posix()] = text
    return texts


def stdlib_tokenizer(path: str, vocab_size: int = 2048, max_seq_len: int | None = None) -> HFTokenizer:
    """Load a byte-level BPE tokenizer from the Hugging Face folder `path`, or train it there in a few seconds.

    `vocab_size` includes the end token.
    """
    folder = Path(path)
    if not (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(stdlib_texts("train").values(), trainer)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        # Written last and renamed: a folder with this file is complete.
        tokenizer.save(str(folder / "tokenizer.json.part"))
        os.replace(folder / "tokenizer.json.part", folder / "tokenizer.json")
    tokenizer = hf_tokenizer(path, max_seq_len=max_seq_len)
    if tokenizer.vocab_size != vocab_size:
        raise ConfigError(
            f"tokenizer.vocab_size: {vocab_size}, but the tokenizer in {path!r} has {tokenizer.vocab_size} tokens. "
            "Remove the folder, or give another path"
        )
    return tokenizer


class StdlibDataset(Dataset):
    """The standard library as a stream of tokens, with the end token after each file, cut into windows of seq_len.

    The labels equal the tokens: the recipe shifts them. `max_samples` keeps evenly spaced windows.
    """

    @checked_arguments("dataset.")
    def __init__(
        self,
        tokenizer: Any,
        split: Split = "train",
        seq_len: Annotated[PositiveInt, Field(examples=[256])] = 256,
        max_samples: PositiveInt | None = None,
    ) -> None:
        stream = []
        for text in stdlib_texts(split).values():
            stream += [*tokenizer.encode(text, add_bos=False, add_eos=False), tokenizer.eos_id]
        windows = len(stream) // seq_len
        self.windows = torch.tensor(stream[: windows * seq_len]).view(windows, seq_len)
        if max_samples is not None and max_samples < windows:
            self.windows = self.windows[torch.arange(max_samples) * windows // max_samples]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        window = self.windows[index].tolist()
        return {"tokens": window, "labels": window}


@checked_arguments("prompts.")
def heldout_prompts(
    count: Annotated[PositiveInt, Field(examples=[8])] = 8,
    characters: Annotated[PositiveInt, Field(examples=[450])] = 450,
) -> list[str]:
    """Code from held-out files, each prompt from another file.

    A prompt ends with the signature of a function in the middle of its file. A token has about three characters.
    """
    prompts = []
    for text in stdlib_texts("heldout").values():
        lines = text.splitlines(keepends=True)
        for i in range(len(lines) // 2, len(lines) - 10):
            if lines[i].lstrip().startswith("def ") and lines[i].rstrip().endswith(":"):
                before = "".join(lines[: i + 1])
                if len(before) >= characters:
                    prompts.append(before[-characters:])
                break
    check("prompts.count", count, Annotated[int, Field(ge=1, le=len(prompts), examples=[min(8, len(prompts))])])
    return [prompts[i * len(prompts) // count] for i in range(count)]
