"""hf_checkpointer: reads and writes Hugging Face folders for models of `hf_decoder`.

transformers can open a written folder: it has weights, config, generation config and tokenizer.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torchtune import training

from layerskip_recipes.acceptance.trained_exits import DESCRIPTION
from layerskip_recipes.checkpoint.peft_adapters import PeftAdapters
from layerskip_recipes.checkpoint.side_files import SideFiles
from layerskip_recipes.config.paths import read_json
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.families.hf_config import HFConfig
from layerskip_recipes.families.hf_decoder import build_decoder
from layerskip_recipes.families.hf_names import from_files, hf_name, of_text_model, place_in_files, to_files
from layerskip_recipes.families.reading import parse_hf_config, text_config
from layerskip_recipes.folders.model_folder import base_folder, model_folder, without_code
from layerskip_recipes.model.adapters import ADAPTER_FILE, BIASES, check_tensors

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
# Copied, except OWN_FILES and the indexes of weight files, whose names end in INDEXES.
OTHER_FILES = ("*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.txt", "*.model", "LICENSE*")
OWN_FILES = ("adapter_config.json", DESCRIPTION, "config.json", "trainer_state.json")
INDEXES = ".index.json"
NOT_WEIGHTS = ("rotary_emb.inv_freq", "masked_bias")  # buffers in old checkpoints


class HFCheckpointer:
    """A checkpointer of a Hugging Face folder, for models of `hf_decoder`; usable as a `_component_` in YAML.

    Args:
        path: as for `hf_decoder`. LoRA in a folder of PEFT's adapters is merged into the weights of its base model.
        output_dir: folder for checkpoints; not needed to read.
        shard_size: maximum size of a written file, such as "5GB".
        adapter_checkpoint: a checkpoint of a LoRA training; the recipe reads its adapters for generation.
    """

    def __init__(
        self, path: str, output_dir: str | None = None, shard_size: str = "5GB", adapter_checkpoint: str | None = None
    ) -> None:
        self._checkpoint_dir = model_folder(path, weights=True)  # torchtune's name
        self._base_dir = base_folder(self._checkpoint_dir, weights=True)
        self._raw_config = text_config(read_json(self._base_dir / "config.json", "checkpointer.path"))
        self.config: HFConfig = parse_hf_config(self._raw_config, str(self._base_dir / "config.json"))
        self._merged = (
            PeftAdapters(self._checkpoint_dir, self.config) if self._base_dir != self._checkpoint_dir else None
        )
        is_local = Path(path).expanduser().exists()  # otherwise a name on the hub
        self._base = str(self._checkpoint_dir.resolve()) if is_local else path
        self._joined: dict[str, torch.Tensor] = {}
        self.output_dir, self.shard_size = None if output_dir is None else Path(output_dir), shard_size

    @cached_property
    def side_files(self) -> SideFiles:
        """The files to copy into checkpoints. A training reads them at its start."""
        has_tokenizer = (self._checkpoint_dir / "tokenizer.json").is_file()
        folder = self._checkpoint_dir if has_tokenizer else self._base_dir
        files = (file for pattern in OTHER_FILES for file in folder.glob(pattern) if file.name not in OWN_FILES)
        side = SideFiles(folder, (file for file in files if not file.name.endswith(INDEXES)))
        if folder != self._base_dir:  # what PEFT does not save beside adapters
            side.content |= SideFiles(self._base_dir, self._base_dir.glob("generation_config.json")).content
        for name, content in side.content.items():
            with suppress(ValueError):  # a damaged file that no training needs
                side.content[name] = without_code(name.name, content)
        return side

    def load_checkpoint(self) -> dict[str, Any]:
        """The weights with torchtune's names, in the files' dtype, as views of the mapped files."""
        tensors: dict[str, torch.Tensor] = {}
        for file in weight_files(self._base_dir):
            tensors |= of_text_model(load_file(file))
        with torch.device("meta"):
            parameters = build_decoder(self.config, max_seq_len=1).state_dict()
        head = self.config.OUTER_NAMES["output.weight"]
        unused = (*NOT_WEIGHTS, head) if self.config.tie_word_embeddings else NOT_WEIGHTS
        tensors = {name: value for name, value in tensors.items() if not name.endswith(unused)}
        where = f"checkpointer.path: the weights in {str(self._base_dir)!r} do not fit its config.json, it"
        check_tensors(to_files(parameters, self.config), tensors, where)
        # Adapters of a part of a joined matrix need it when they are saved.
        if self._merged is not None:
            tensors = self._merged.merge(tensors)
        self._joined = {name: value for name, value in tensors.items() if name.split(".")[-2] in self.config.JOINED}
        return {training.MODEL_KEY: from_files(tensors, parameters, self.config)}

    def save_checkpoint(self, contents: Mapping[str, Any], epoch: int = 0, adapter_only: bool = False) -> None:
        """Write `epoch_N` under output_dir; `adapter_only` leaves out the model's weights."""
        if self.output_dir is None:
            raise ConfigError("output_dir: missing, the folder for checkpoints. For example output_dir=out")
        folder = self.output_dir / f"epoch_{epoch}"
        folder.mkdir(parents=True, exist_ok=True)
        if not adapter_only:
            state = contents[training.MODEL_KEY]
            save_torch_state_dict(to_files(state, self.config), folder, max_shard_size=self.shard_size)
            config = self._raw_config
            dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
            config = {key: config[key] for key in config if key not in ("torch_dtype", "auto_map")} | {"dtype": dtype}
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        self.side_files.write(folder)
        if training.ADAPTER_KEY in contents:
            torch.save(contents[training.ADAPTER_KEY], folder / ADAPTER_FILE)
            self._write_peft(contents, folder)

    def _write_peft(self, contents: Mapping[str, Any], folder: Path) -> None:
        """Write adapters in PEFT's format; the adapters in a joined matrix become one with a block matrix as B."""
        ours, described = contents[training.ADAPTER_KEY], contents[training.ADAPTER_CONFIG]
        biases = contents.get(BIASES, {})
        # Group the adapters by the matrix in the files.
        whole: dict[str, list[tuple[slice, str]]] = defaultdict(list)
        for name in (name.removesuffix(".lora_a.weight") for name in ours if name.endswith(".lora_a.weight")):
            file_name, rows = place_in_files(name, self.config)
            whole[file_name].append((rows, name))
        # One LoRA A, B and DoRA magnitude for each matrix.
        tensors, ranks = {}, {}
        for file_name, parts in whole.items():
            parts.sort(key=lambda part: part[0].start or 0)
            prefix, names = f"base_model.model.{file_name}", [name for _, name in parts]
            tensors[f"{prefix}.lora_A.weight"] = torch.cat([ours[f"{name}.lora_a.weight"] for name in names])
            blocks = [ours[f"{name}.lora_b.weight"] for name in names]
            if parts[0][0] != slice(None):  # zeros in the other rows of a joined matrix
                num_rows = len(self._joined[f"{file_name}.weight"])
                places = [(0, 0, rows.start, num_rows - rows.stop) for rows, _ in parts]
                blocks = [F.pad(block, place) for block, place in zip(blocks, places, strict=True)]
                ranks[file_name.rpartition(".")[2]] = len(parts)
            tensors[f"{prefix}.lora_B.weight"] = torch.cat(blocks, dim=1)
            if f"{names[0]}.magnitude" in ours:
                magnitude = ours[f"{names[0]}.magnitude"]
                if parts[0][0] != slice(None):
                    # Rows without an adapter keep their weights' norm, so DoRA does not change them.
                    norms = torch.linalg.norm(self._joined[f"{file_name}.weight"].float(), dim=1)
                    magnitude = norms.to(magnitude)
                    for rows, name in parts:
                        magnitude[rows] = ours[f"{name}.magnitude"]
                tensors[f"{prefix}.lora_magnitude_vector"] = magnitude
        for name, value in biases.items():
            module = hf_name(name.removesuffix(".bias"), self.config)
            tensors[f"base_model.model.{module}.base_layer.bias"] = value
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        # Write the files.
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = dict(described)
        config["target_modules"] = sorted({name.rpartition(".")[2] for name in whole})
        config["base_model_name_or_path"] = self._base
        if ranks:
            config["rank_pattern"] = {name: described["r"] * n for name, n in ranks.items()}
            config["alpha_pattern"] = {name: described["lora_alpha"] * n for name, n in ranks.items()}
        if biases:
            config["bias"] = "lora_only"
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


hf_checkpointer = HFCheckpointer  # its name in configs


def weights_found(folder: Path) -> str:
    """The names of files in a folder that look like weights, for error messages."""
    suffixes = (".safetensors", ".bin", ".pt", ".pth")
    return ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix in suffixes)) or "no weights"


def weight_files(folder: Path, key: str = "checkpointer.path") -> list[Path]:
    """The weight files of a folder, checked to be complete; errors name `key`."""
    index = folder / INDEX
    # As in transformers: an index beside a single file is a leftover of an earlier save.
    if index.is_file() and not (folder / SINGLE).is_file():
        files = [folder / name for name in sorted({*read_json(index, key).get("weight_map", {}).values()})]
    else:
        files = [folder / SINGLE]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ConfigError(
            f"{key}: {str(folder)!r} lacks {', '.join(missing[:3])}, its weights. Allowed: {SINGLE}, or "
            f"{INDEX} and all files that it names; there: {weights_found(folder)}"
        )
    return [readable(file, key) for file in files]


def readable(file: Path, key: str) -> Path:
    """The file, after a look at its header; errors name `key`."""
    try:
        with safe_open(file, "pt"):
            return file
    except (SafetensorError, OSError) as e:
        raise ConfigError(f"{key}: {str(file)!r} cannot be read, is it complete? ({e})") from e
