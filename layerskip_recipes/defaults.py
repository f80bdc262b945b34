"""The values that the configs hf/* choose by themselves: OmegaConf resolvers of a model's folder and of this machine.

    dtype: ${layerskip.dtype:${device}}

Any config can use them, and a value in the place of such a line replaces it. Of the kinds of training, "full" trains
all weights, "lora" adapters, and "qlora" adapters on weights of 4 bits.
"""

import warnings
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf

from layerskip_recipes.config.recipe_config import best_device
from layerskip_recipes.model.head import chunk_tokens
from layerskip_recipes.model.hf_config import HFConfig, read_hf_config
from layerskip_recipes.model.hf_folder import model_folder
from layerskip_recipes.model.limits import machine_memory
from layerskip_recipes.processes import num_processes

Kind = Literal["full", "lora", "qlora"]
SAMPLES_PER_STEP = 16
LONGEST = {"cpu": 512}  # tokens of a sample, where time is the limit and not memory
LONGEST_ELSEWHERE = 2048
ITEMSIZE = {"fp32": 4, "bf16": 2}

# ---- formulas ----


def count_weights(config: HFConfig) -> tuple[int, int]:
    """The weights of all layers, and those of embedding and head; norms and biases are too few to count."""
    heads, key_heads, width = config.heads
    attention = config.hidden_size * width * (2 * heads + 2 * key_heads)
    mlp = 3 * config.hidden_size * config.intermediate_size
    tables = 1 if config.tie_word_embeddings else 2
    return config.num_hidden_layers * (attention + mlp), tables * config.vocab_size * config.hidden_size


def training_bytes(config: HFConfig, kind: Kind, itemsize: int, device: str = "cpu") -> int:
    """What a training keeps from step to step, and the logits of a chunk of tokens with their gradient in fp32.

    A weight that is trained has a gradient and two averages of AdamW beside it. Of a frozen one of 4 bits half a byte
    is kept, and a sixteenth of that for its scales.
    """
    layers, tables = count_weights(config)
    kept = {
        "full": 4 * itemsize * (layers + tables),
        "lora": itemsize * (layers + tables),
        "qlora": itemsize * tables + layers * 17 // 32,
    }
    return kept[kind] + chunk_tokens(device) * config.vocab_size * 2 * 4


def token_bytes(config: HFConfig, itemsize: int, recompute: bool) -> int:
    """What a training step keeps for each token until the backward pass.

    About 16 vectors of the model's width and 4 of the feed-forward's in each layer; where layers are computed again
    (activation checkpointing) these are there for one layer only, and the others keep their inputs.
    """
    layer = 16 * config.hidden_size + 4 * config.intermediate_size
    depth = config.num_hidden_layers
    return itemsize * (layer + depth * config.hidden_size if recompute else depth * layer)


def rotation(num_layers: int) -> int:
    """R of the rotational curriculum: the paper's 8 for 16 to 64 layers.

    With fewer layers it is less, so that 2 early exits are on at a step, and with more it is more, for about 8.
    """
    return max(-(-num_layers // 8), min(8, num_layers // 2), 1)


def full_learning_rate(width: int) -> float:
    """3e-5 at the width of Llama 2 7B, as in the paper, and in inverse proportion to the width, to at most 5e-4.

    For the 13B this gives 2.4e-5, and the paper has 2e-5.
    """
    return min(float(f"{3e-5 * 4096 / width:.2g}"), 5e-4)


# ---- resolvers ----


def device() -> str:
    """The best device of this machine."""
    return best_device()


def dtype(device: str | None, model_dir: str | None = None, kind: Kind | None = None) -> str:
    """bf16 on a GPU that computes in it, else fp32.

    Full training takes fp32 on a GPU too where that fits, as bf16 rounds small steps of the weights away.
    """
    if not _computes_in_bf16(device):
        return "fp32"
    if (
        model_dir is not None
        and kind == "full"
        and _recompute(_config(model_dir), kind, device, "fp32", 512) is not None
    ):
        return "fp32"
    return "bf16"


def compute_dtype(device: str | None, dtype: str) -> str | None:
    """bf16 for weights in fp32 on a GPU that computes in it."""
    return "bf16" if dtype == "fp32" and _computes_in_bf16(device) else None


def _computes_in_bf16(device: str | None) -> bool:
    on_gpu = (device or best_device()).startswith("cuda")
    return on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)


def seq_len(model_dir: str, kind: Kind, device: str | None, dtype: str) -> int:
    """The longest sample: 512 tokens on a CPU and 2048 elsewhere, halved until one fits into memory."""
    config = _config(model_dir)
    length = min(LONGEST.get(device or best_device(), LONGEST_ELSEWHERE), config.longest[0])
    while length > 128 and _recompute(config, kind, device, dtype, length) is None:
        length //= 2
    return length


def recompute(model_dir: str, kind: Kind, device: str | None, dtype: str, length: int | None) -> bool:
    """Whether activations are computed again in the backward pass: where a sample fits into memory only so."""
    config = _config(model_dir)
    return _recompute(config, kind, device, dtype, length or config.longest[0]) is not False


def batch_size(
    model_dir: str, kind: Kind, device: str | None, dtype: str, length: int | None, recompute: bool | None
) -> int:
    """The samples of the longest length that fit into memory, a power of two of at most 8."""
    config = _config(model_dir)
    each = token_bytes(config, _itemsize(dtype), bool(recompute)) * (length or config.longest[0])
    fits = _room(config, kind, device, dtype) // each
    return max(size for size in (1, 2, 4, 8) if size <= max(fits, 1))


def accumulation(batch_size: int) -> int:
    """The micro-batches with which all processes make a step of 16 samples."""
    samples = batch_size if isinstance(batch_size, int) and batch_size > 0 else 1  # others are refused later
    return max(SAMPLES_PER_STEP // (samples * num_processes()), 1)


def lr(model_dir: str, kind: Kind) -> float:
    """Of adapters 3e-4, torchtune's; of all weights see `full_learning_rate`."""
    return full_learning_rate(_config(model_dir).hidden_size) if kind == "full" else 3e-4


def interval(model_dir: str) -> int:
    """R of the rotational curriculum for the model's depth."""
    return rotation(_config(model_dir).num_hidden_layers)


def new_tokens(model_dir: str, wanted: int) -> int:
    """So many new tokens, and at most half of the longest text that the model takes."""
    return min(wanted, _config(model_dir).longest[0] // 2)


def folder(model_dir: str) -> str:
    """Where the files are: of a run its newest checkpoint, of a name on the hub what was downloaded."""
    return str(model_folder(model_dir, "model_dir"))


RESOLVERS = (
    *(device, dtype, compute_dtype, seq_len, recompute, batch_size, accumulation),
    *(lr, interval, new_tokens, folder),
)


def register() -> None:
    """Make the resolvers known to OmegaConf, each as layerskip.NAME."""
    with warnings.catch_warnings():  # OmegaConf 2.4 calls it register_resolver, the name of another function before
        warnings.simplefilter("ignore")
        for resolver in RESOLVERS:
            OmegaConf.register_new_resolver(f"layerskip.{resolver.__name__}", resolver, replace=True)


# ---- what was chosen, in words ----


def explain(source: DictConfig) -> list[str]:
    """What the resolvers chose for a run, in lines for its log."""
    texts = {key: text for key, text in _leaves(source).items() if "${layerskip." in text and ".folder:" not in text}
    chosen = {key: OmegaConf.select(source, key) for key in texts}
    shown = ", ".join(f"{key}={'null' if value is None else value}" for key, value in chosen.items())
    return [f"Chosen for this model and machine: {shown}. Any key=value of yours replaces its value."] if shown else []


def _leaves(source: DictConfig) -> dict[str, str]:
    """The texts of a config by their dotted keys, interpolations as they stand."""
    found: dict[str, str] = {}

    def walk(part: Any, key: str) -> None:
        if isinstance(part, dict):
            for name, value in part.items():
                walk(value, f"{key}.{name}" if key else str(name))
        elif isinstance(part, str):
            found[key] = part

    walk(OmegaConf.to_container(source, resolve=False), "")
    return found


# ---- a model's folder and a machine's memory ----


def _config(model_dir: str) -> HFConfig:
    return read_hf_config(model_folder(model_dir, "model_dir"), "model_dir")


def _itemsize(dtype: str) -> int:
    """Of a number. A wrong dtype is for the check of the key, which comes after the resolvers."""
    return ITEMSIZE.get(dtype, 4)


def _room(config: HFConfig, kind: Kind, device: str | None, dtype: str) -> int:
    """The bytes that are left for activations: of nine tenths of a GPU's memory, or half of the machine's."""
    device = device or best_device()
    if device.startswith("cuda") and torch.cuda.is_available():
        there = torch.cuda.get_device_properties(device).total_memory * 9 // 10
    else:
        there = machine_memory() // 2 // num_processes()
    return there - training_bytes(config, kind, _itemsize(dtype), device) // num_processes()


def _recompute(config: HFConfig, kind: Kind, device: str | None, dtype: str, length: int) -> bool | None:
    """Whether a sample needs activation checkpointing; None if it does not fit even so."""
    room = _room(config, kind, device, dtype)
    fitting = (again for again in (False, True) if token_bytes(config, _itemsize(dtype), again) * length <= room)
    return next(fitting, None)


register()
