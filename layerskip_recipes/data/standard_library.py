"""The quickstart's data: the Python standard library's own source, read from the running interpreter.

A tokenizer trained on it, a dataset of it, and prompts from files that the training never sees. No download.
"""

import json
import os
import sysconfig
import zlib
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset

from layerskip_recipes.config.checks import check_choice, check_number
from layerskip_recipes.data.tokenizer import HFTokenizer, hf_tokenizer
from layerskip_recipes.errors import ConfigError

END = "<|endoftext|>"
# Not on every machine (tests, the editor) or no code that anyone reads (tables).
LEFT_OUT = (
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "encodings",
    "__pycache__",
)


def stdlib_texts(split: str) -> dict[str, str]:
    """The standard library's modules by relative path, in a fixed order; about one in twenty is held out.

    Args:
        split: "train" or "heldout".

    Raises:
        ValueError: for another split.
    """
    check_choice("dataset.split", split, ("train", "heldout"))
    root = Path(sysconfig.get_path("stdlib"))
    texts = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        # By a hash of the name, so that the split is the same on every machine.
        held_out = zlib.crc32(name.encode()) % 20 == 0
        if held_out == (split == "heldout") and not set(path.relative_to(root).parts) & set(LEFT_OUT):
            text = path.read_text(encoding="utf-8", errors="replace")
            if len(text) > 1000:
                texts[name] = text
    return texts


def stdlib_tokenizer(path: str, vocab_size: int = 2048, max_seq_len: int | None = None) -> HFTokenizer:
    """A byte-level BPE tokenizer trained on the standard library, kept as a Hugging Face folder at `path`.

    Args:
        path: the folder; trained (a few seconds) if it does not exist yet.
        vocab_size: its size, end token included.
        max_seq_len: as in `hf_tokenizer`.
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
        # Last, and by renaming: a folder with this file is complete.
        tokenizer.save(str(folder / "tokenizer.json.part"))
        os.replace(folder / "tokenizer.json.part", folder / "tokenizer.json")
    tokenizer = hf_tokenizer(path, max_seq_len=max_seq_len)
    if tokenizer.vocab_size != vocab_size:
        raise ConfigError(
            f"tokenizer.vocab_size: {vocab_size}, but the tokenizer in {path!r} has {tokenizer.vocab_size} tokens. "
            "Remove it, or give another path"
        )
    return tokenizer


class StdlibDataset(Dataset):
    """The standard library as one stream of tokens, files separated by the end token, cut into windows.

    Args:
        tokenizer: any torchtune tokenizer.
        split: "train" or "heldout".
        seq_len: tokens of a window; each sample is {"tokens": [seq_len], "labels": the same}, shifted by the recipe.
        max_samples: fewer windows, spread over the stream; None for all.
    """

    def __init__(
        self, tokenizer: Any, split: str = "train", seq_len: int = 256, max_samples: int | None = None
    ) -> None:
        check_number("dataset.seq_len", seq_len, minimum=1, example=256)
        check_number("dataset.max_samples", max_samples, minimum=1, optional=True)
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


def heldout_prompts(count: int = 8, characters: int = 450) -> list[str]:
    """Beginnings of function bodies from held-out files: code that goes on sensibly.

    Each prompt ends with the signature of a function in the middle of its file and starts `characters` before it.

    Args:
        count: how many prompts, from as many files.
        characters: their length, about three a token.

    Raises:
        ValueError: if one is less than 1, or there are fewer such files.
    """
    check_number("prompts.count", count, minimum=1, example=8)
    check_number("prompts.characters", characters, minimum=1, example=450)
    prompts = []
    for text in stdlib_texts("heldout").values():
        lines = text.splitlines(keepends=True)
        for i in range(len(lines) // 2, len(lines) - 10):
            if lines[i].lstrip().startswith("def ") and lines[i].rstrip().endswith(":"):
                before = "".join(lines[: i + 1])
                if len(before) >= characters:
                    prompts.append(before[-characters:])
                break
    if not prompts:
        raise ConfigError(
            f"prompts.characters: {characters} are more than any held-out file has before a function in its middle; "
            "for example prompts.characters=450"
        )
    check_number("prompts.count", count, minimum=1, maximum=len(prompts), example=min(8, len(prompts)))
    return [prompts[i * len(prompts) // count] for i in range(count)]
