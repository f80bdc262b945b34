"""`layerskip export`: write a checkpoint for transformers or a serving engine.

It writes the whole model with a decoding loop for transformers, which drafts with an exit or with the trained copy
beside the model. Or it writes a separate draft model: the first E layers, or the trained copy of them, with the final
norm and the head.
"""

import json
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from pydantic import Field
from safetensors.torch import load_file, save_file
from torchtune import training, utils

from layerskip_recipes.acceptance.tokens_per_round import MIN_CONFIDENCE
from layerskip_recipes.acceptance.trained_exits import DESCRIPTION, read_trained_exits
from layerskip_recipes.checkpoint.drafts import DRAFT, DRAFT_FILE, DraftDescription, own_draft, read_description
from layerskip_recipes.checkpoint.hf_checkpointer import INDEXES, HFCheckpointer, readable, weight_files
from layerskip_recipes.checkpoint.weights import read_weights
from layerskip_recipes.config.layer_strings import default_exit
from layerskip_recipes.config.paths import check_folder, read_json
from layerskip_recipes.config.schema import check
from layerskip_recipes.distributed.loading import make_position_tables
from layerskip_recipes.errors import ConfigError, first_line
from layerskip_recipes.families.hf_decoder import build_decoder
from layerskip_recipes.families.hf_names import from_files, of_text_model
from layerskip_recipes.families.reading import FAMILIES, parse_hf_config, text_config
from layerskip_recipes.folders.model_folder import holds_adapters, model_folder, named_folder, without_code
from layerskip_recipes.folders.run_folder import flush
from layerskip_recipes.model.decoder import layerskip_decoder
from layerskip_recipes.model.draft import weights_hash

log = utils.get_logger("INFO")

# Llama keeps torchtune's tokenizer in original/; transformers keeps more templates in additional_chat_templates/.
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "original/tokenizer.model", "additional_chat_templates/*")
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")  # in Hugging Face's names
# The decoding loop for transformers and its requirements; this package never imports it.
DECODING_LOOP = Path(__file__).parents[1] / "custom_generate"
NUM_SPECULATIONS = 8  # the longest draft of a trained copy, which ends at low confidence
CONVERTER = "convert_hf_to_gguf.py"
PROBE = (16, 64)  # texts and tokens that show the hidden states of a draft
SHARED = 0.1  # the least cosine between a hidden state and the direction that all share
BELOW = 50.0  # nats between the mean logit of a draft vocabulary and other tokens' logits, or more


def export(
    checkpoint: str,
    out: str,
    exit_layer: int | None = None,
    draft: int | None = None,
    vocabulary: Sequence[int] | None = None,
    draft_folder: str | None = None,
) -> Path:
    """Write a Hugging Face folder `out`, which must not exist yet, and return it.

    Args:
        checkpoint: as `path` of `LLM.load`: a Hugging Face folder with safetensors, adapters, or a trained draft of
            kind copy.
        exit_layer: written as `assistant_early_exit`, with our decoding loop in `custom_generate`.
        draft: export only the first `draft` layers, with the final norm and the head. For a trained draft: 0 or its E.
        vocabulary: the only tokens that this draft may propose; None: all.
        draft_folder: the model's trained draft; None: the one beside it.

    0 is the trained exit, which layerskip.json names, or the draft that was trained beside the model. Without an exit,
    a copy that was trained beside the model is written to `draft`, and the decoding loop drafts with it.
    """
    source, target = named_folder(checkpoint, "export", weights=True), Path(out)
    draft_folder = draft_folder or own_draft(source)
    is_draft = draft_folder == str(source)
    names_draft = (exit_layer, draft) == (None, 0) or (is_draft and (exit_layer, draft) != (None, None))
    if draft_folder and names_draft:
        return _export_trained(draft_folder, out, exit_layer, draft)
    if draft_folder and is_draft:
        source = model_folder(draft_folder, "export", weights=True)
    if holds_adapters(source):
        with tempfile.TemporaryDirectory(prefix="layerskip-") as scratch:
            adapted = HFCheckpointer(str(source), scratch)
            adapted.save_checkpoint(adapted.load_checkpoint())
            return export(str(Path(scratch) / "epoch_0"), out, exit_layer, draft, vocabulary, draft_folder)
    config, exit_layer, draft = _checked(source, exit_layer, draft)
    weights = weight_files(source, "export")
    if target.exists():
        raise ConfigError(f"export: {out!r} exists already; choose another folder")
    check_folder("export", target.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Write to a temporary folder and rename it: an interrupted export leaves nothing at `out`.
    with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as beside:
        folder = Path(beside) / target.name
        folder.mkdir()
        _copy_files(source, folder)
        config = _write_model(folder, weights, config, draft, vocabulary)
        _write_generation_config(folder / "generation_config.json", config, exit_layer)
        if draft_folder and exit_layer is None and draft is None and _runs_in_loop(config):
            _write_own_draft(draft_folder, folder / DRAFT)
        if exit_layer is not None or (folder / DRAFT).exists():  # the decoding loop needs a draft
            (folder / "custom_generate").mkdir()
            for name in ("generate.py", "requirements.txt"):
                shutil.copy(DECODING_LOOP / name, folder / "custom_generate")
        flush(folder)
        folder.rename(target)
    return target


def _checked(source: Path, exit_layer: int | None, draft: int | None) -> tuple[dict[str, Any], int | None, int | None]:
    """The config of a checkpoint's text model, and the two exits, with the trained one in the place of 0."""
    config = text_config(read_json(source / "config.json", "export"))
    config.pop("auto_map", None)
    if exit_layer is not None and not _runs_in_loop(config):
        raise ConfigError(
            f"--exit-layer: {exit_layer} is for the decoding loop of transformers, which does not run "
            f"{config['architectures'][0]}. Leave it out, or write a draft model with --draft"
        )
    layers = config.get("num_hidden_layers")
    if not isinstance(layers, int):
        raise ConfigError(f"export: {str(source / 'config.json')!r} has no num_hidden_layers. Allowed: a text model")
    if 0 in (exit_layer, draft):
        trained = _trained_exit(source, layers)
        exit_layer, draft = (trained if value == 0 else value for value in (exit_layer, draft))
    for key, value, most in (("--exit-layer", exit_layer, max(layers - 1, 1)), ("--draft", draft, layers)):
        check(key, value, Annotated[int, Field(ge=1, le=most, examples=[default_exit(layers)])] | None)
    if exit_layer is not None and draft is not None:
        raise ConfigError(f"--exit-layer: {exit_layer} is for the whole model. Leave it out with --draft {draft}")
    return config, exit_layer, draft


def _runs_in_loop(config: Mapping[str, Any]) -> bool:
    """Whether the decoding loop for transformers runs this model; families unknown to us are not refused."""
    family = FAMILIES.get(next(iter(config.get("architectures") or [""])))
    return family is None or family.IN_TRANSFORMERS_LOOP


def _write_model(
    folder: Path, weights: list[Path], config: dict[str, Any], draft: int | None, vocabulary: Sequence[int] | None
) -> dict[str, Any]:
    """Write and return the config, and write the weights, of the first `draft` layers or of all."""
    layers = config["num_hidden_layers"]
    if draft is not None:
        config = first_layers(config, draft)
        (folder / DESCRIPTION).unlink(missing_ok=True)  # it describes the whole model
    tensors = _read_layers(weights, draft or layers)
    if vocabulary is not None:
        tensors["lm_head.weight"] = head_of_vocabulary(tensors, config, vocabulary)
        config = config | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_torch_state_dict(tensors, folder)
    return config


def how_to_run(checkpoint: str, out: Path, exit_layer: int | None = None, draft: int | None = None) -> str:
    """The commands that decode with what `export` wrote to `out` with these arguments."""
    if draft is not None:
        named = named_folder(checkpoint, "export")
        model = read_description(str(named), "export").base.folder if (named / DRAFT_FILE).exists() else checkpoint
        settings = {"model": str(out), "num_speculative_tokens": 4, "method": "draft_model"}  # always all of them
        return f"""With llama.cpp ({CONVERTER} is in its repository):
  python {CONVERTER} {model} --outtype bf16 --outfile model.gguf
  python {CONVERTER} {out} --outtype q8_0 --outfile draft.gguf
  llama-server -m model.gguf -md draft.gguf --spec-type draft-simple \\
    --spec-draft-n-max {NUM_SPECULATIONS} --spec-draft-p-min {MIN_CONFIDENCE}
With vLLM:
  python -m vllm.entrypoints.openai.api_server --model {model} \\
    --speculative-config '{json.dumps(settings)}'"""
    if not (out / DECODING_LOOP.name).exists():
        return ""
    return f"""In transformers:
  model = AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)
  model.generate(**inputs, max_new_tokens=128)
A draft model for llama.cpp and vLLM:
  layerskip export {checkpoint} {out}_draft --draft {exit_layer or ""}""".rstrip()


def _trained_exit(source: Path, layers: int) -> int:
    described = read_trained_exits(source, layers)
    trained = described.exit_that_drafts(layers) if described else None
    if trained is None and own_draft(source):
        raise ConfigError(
            f"--exit-layer: {str(source)!r} has no trained exit, but a draft beside the model. Export the model "
            "without --exit-layer, and its draft with --draft"
        )
    if trained is None:
        raise ConfigError(
            f"export: {str(source / DESCRIPTION)!r} names no early exit. Allowed: a number, for example "
            f"{default_exit(layers)} after --exit-layer or --draft"
        )
    return trained


def _export_trained(folder: str, out: str, exit_layer: int | None, draft: int | None) -> Path:
    """Export a trained draft of kind copy as a model of its own."""
    described = read_description(folder, "export")
    if described.kind != "copy":
        raise ConfigError(
            f"export: {folder!r} holds an adapter, which reads the model's hidden states; no other program can run it. "
            "Allowed: a draft trained with draft.kind=copy"
        )
    if exit_layer is not None or draft not in (0, described.exit_layer):
        key, value = ("--exit-layer", exit_layer) if exit_layer is not None else ("--draft", draft)
        raise ConfigError(f"{key}: {value} does not fit {folder!r}, a trained draft. Allowed: --draft without a number")
    with _as_model(folder, described) as model:
        return export(model, out, draft=described.num_layers, vocabulary=described.vocabulary)


@contextmanager
def _as_model(folder: str, described: DraftDescription) -> Iterator[str]:
    """A trained copy as a temporary checkpoint, with the embedding and head of its base."""
    base = described.base
    with tempfile.TemporaryDirectory(prefix="layerskip-") as scratch:
        checkpointer = base.build_checkpointer(scratch)
        weights = read_weights(checkpointer)
        if weights_hash(weights) != base.hash:
            raise ConfigError(f"export: {folder!r} drafts for {base.folder!r}, whose weights have changed since")
        tensors = {name: value for name, value in weights.items() if not LAYER.search(name)}
        tensors |= load_file(readable(Path(folder) / DRAFT_FILE, "export"))
        checkpointer._weight_map = defaultdict(lambda: "0001")  # torchtune looks up the file of each key
        checkpointer.save_checkpoint({training.MODEL_KEY: tensors}, epoch=0)
        yield str(Path(scratch) / "epoch_0")


def _write_own_draft(draft_folder: str, folder: Path) -> None:
    """Write the layers and norm of the copy beside a model, and how to draft with them, for the decoding loop."""
    described = read_description(draft_folder, "export")
    if described.kind != "copy":
        log.info("export: %r holds an adapter, with which only this package drafts, so it is left out", draft_folder)
        return
    folder.mkdir()
    with _as_model(draft_folder, described) as model:
        tensors = _read_layers(weight_files(Path(model), "export"), described.num_layers)
        first_layers = {name: t for name, t in tensors.items() if LAYER.search(name) or name == "model.norm.weight"}
        save_file(first_layers, folder / "model.safetensors", metadata={"format": "pt"})
    settings: dict[str, Any] = {"num_layers": described.num_layers, "vocabulary": described.vocabulary}
    settings |= {"num_speculations": NUM_SPECULATIONS, "min_confidence": MIN_CONFIDENCE}
    (folder / "draft.json").write_text(json.dumps(settings) + "\n")


@torch.no_grad()
def head_of_vocabulary(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], vocabulary: Sequence[int]
) -> torch.Tensor:
    """The head [v, d] of a draft; all tokens outside of the vocabulary have the same row, whose logit is low.

    Their own rows were not trained together with these layers. The new row is the mean row of the vocabulary, so its
    logit is never the largest, minus a multiple of the direction that the hidden states of language models share. With
    this direction the tokens are not sampled either.
    """
    hf_config = parse_hf_config(config, "config.json")
    embeddings = tensors["model.embed_tokens.weight"]
    dtype = embeddings.dtype
    with training.set_default_dtype(dtype), torch.device("meta"):
        model = layerskip_decoder(build_decoder(hf_config, max_seq_len=PROBE[1]))
    same = {name: value.to(dtype) for name, value in tensors.items()}
    if hf_config.tie_word_embeddings:
        same.pop("lm_head.weight", None)
    model.load_state_dict(from_files(same, model.state_dict(), hf_config), assign=True)
    make_position_tables(model, torch.device("cpu"), dtype)
    # The mean direction of the hidden states of random texts, and the least that other texts' states have of it.
    ids = torch.tensor(sorted(vocabulary))
    texts = ids[torch.randint(len(ids), PROBE, generator=torch.Generator().manual_seed(0))]
    some, other = model.eval().norm(model.hidden_states(texts, exits=[])[0]).float().chunk(2)
    direction = F.normalize(F.normalize(some, dim=-1).mean((0, 1)), dim=-1)
    head = tensors.get("lm_head.weight", embeddings).clone()
    row = head[ids].float().mean(0)
    if F.cosine_similarity(other, direction, dim=-1).min() > SHARED:
        row -= BELOW / (other @ direction).min() * direction
    else:
        log.warning(
            "export: the draft's hidden states share no direction, so a program that samples drafts may propose tokens "
            "outside of its vocabulary"
        )
    others = torch.ones(len(head), dtype=torch.bool).index_fill(0, ids, False)
    head[others] = row.to(head)
    return head


def _write_generation_config(file: Path, config: dict[str, Any], exit_layer: int | None) -> None:
    """Set or remove the exit, which transformers' `assistant_model` must not name."""
    if not file.exists() and exit_layer is None:
        return
    # transformers reads the stop tokens from this file if it exists, else from config.json.
    tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    settings = read_json(file, "export", tokens)
    settings.pop("assistant_early_exit", None)
    if exit_layer is not None:
        settings["assistant_early_exit"] = exit_layer
    file.write_text(json.dumps(settings, indent=2) + "\n")


def first_layers(config: dict[str, Any], draft: int) -> dict[str, Any]:
    """A config.json for the first `draft` layers; also cuts its lists with one entry per layer."""
    layers = config["num_hidden_layers"]
    cut = {key: value[:draft] for key, value in config.items() if isinstance(value, list) and len(value) == layers > 1}
    return config | cut | {"num_hidden_layers": draft}


def _copy_files(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and settings, but no weights or adapters."""
    for file in (file for pattern in COPIED for file in source.glob(pattern)):
        if file.is_file() and not (file.name.endswith(INDEXES) or file.name.startswith("adapter_")):
            place = target / file.relative_to(source)
            place.parent.mkdir(exist_ok=True)
            try:
                place.write_bytes(without_code(file.name, file.read_bytes()))
            except ValueError as e:
                raise ConfigError(f"export: {str(source)!r} holds no readable {file.name} ({first_line(e)})") from e


def _read_layers(files: list[Path], layers: int) -> dict[str, torch.Tensor]:
    """The tensors of the first `layers` layers and all tensors outside of layers, as views of the mapped files."""
    tensors = {name: tensor for file in files for name, tensor in of_text_model(load_file(file)).items()}
    number = {name: int(match[1]) for name in tensors if (match := LAYER.search(name))}
    return {name: tensor for name, tensor in tensors.items() if number.get(name, 0) < layers}
