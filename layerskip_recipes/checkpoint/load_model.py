"""load_model: load a model and its tokenizer in one call."""

from pathlib import Path
from typing import Any, Literal

import torch
from torchtune import training

from layerskip_recipes.checkpoint.drafts import DRAFT_FILE, own_draft, read_description, read_draft
from layerskip_recipes.checkpoint.hf_checkpointer import HFCheckpointer
from layerskip_recipes.checkpoint.trained_exits import exit_that_drafts, read_trained_exits
from layerskip_recipes.config.choices import best_device
from layerskip_recipes.config.schema import DeviceName, Text, checked_arguments
from layerskip_recipes.data.tokenizer import HFTokenizer, hf_tokenizer
from layerskip_recipes.distributed.loading import make_position_tables
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.decoder import LayerSkipDecoder, layerskip_decoder
from layerskip_recipes.model.hf_decoder import hf_decoder
from layerskip_recipes.model.hf_folder import model_folder


@checked_arguments()
def load_model(
    path: Text,
    *,
    draft: Text | None = None,
    device: DeviceName | None = None,
    dtype: Literal["fp32", "bf16"] | None = None,
) -> tuple[LayerSkipDecoder, HFTokenizer]:
    """Load a model in eval mode, and its tokenizer.

    `generate` with `num_speculations` uses the trained draft if there is one. Otherwise it drafts from the trained exit
    nearest to a quarter of the depth, which layerskip.json names.

    Args:
        path: a run of layerskip_finetune (loads its newest checkpoint), a checkpoint, a Hugging Face folder, or a name
            on the hub. A trained draft also loads the model that it was trained for.
        draft: a run or a checkpoint with a draft trained for this model; None takes one that was trained beside it.
        device: such as "cpu" or "cuda:1"; None chooses the best device.
        dtype: "fp32" or "bf16"; None is fp32 on a CPU and bf16 elsewhere.

    Raises:
        ConfigError: if the folder holds no model that `hf_decoder` supports, or the draft is another model's.

    Example:
        >>> model, tokenizer = load_model("out")                                             # doctest: +SKIP
        >>> prompt = tokenizer.prompt("Why is the sky blue?")                                # doctest: +SKIP
        >>> out = generate(model, prompt, 128, num_speculations=6, stop_tokens=tokenizer.stop_tokens)  # doctest: +SKIP
        >>> print(tokenizer.decode(out.tokens[0]))                                           # doctest: +SKIP
    """
    folder = model_folder(path)
    # Load a draft's base model with it.
    if (folder / DRAFT_FILE).is_file():
        base = read_description(str(folder), "path").base
        if base.checkpointer != "HFCheckpointer":
            raise ConfigError(
                f"path: {str(folder)!r} is a draft for a model that {base.checkpointer} reads. Allowed: a draft for a "
                "model of hf_checkpointer. For this draft, use layerskip_generate with self_speculation.draft"
            )
        draft, folder = str(folder), model_folder(base.folder)
    draft = draft or own_draft(folder, HFCheckpointer)
    torch_device = torch.device(device or best_device())
    dtype = dtype or ("fp32" if torch_device.type == "cpu" else "bf16")
    torch_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
    # Build on the meta device: the weights are initialised only once, by the checkpoint.
    with training.set_default_dtype(torch_dtype), torch.device("meta"):
        model = layerskip_decoder(hf_decoder(str(folder)))
    model.to_empty(device=torch_device)
    make_position_tables(model, torch_device, torch_dtype)
    model.load_state_dict(HFCheckpointer(str(folder)).load_checkpoint()[training.MODEL_KEY])
    model.requires_grad_(False).eval()
    model.drafting = _drafting(model, folder, draft)
    return model, hf_tokenizer(str(folder))


def _drafting(model: LayerSkipDecoder, folder: Path, draft: str | None) -> dict[str, Any]:
    """Default arguments of `generate` for drafting; empty without a trained exit or draft."""
    if draft is not None:
        trained = read_draft(str(model_folder(draft, "draft")), model, "draft")
        arguments: dict[str, Any] = {"exit_layer": trained.exit_layer, "draft_vocabulary": trained.vocabulary}
        return arguments | {"drafter": trained.decoder(model)}
    described = read_trained_exits(folder, model.num_layers, model.tok_embeddings.num_embeddings)
    exit_layer = exit_that_drafts((described and described.exits) or [], model.num_layers)
    return {} if exit_layer is None else {"exit_layer": exit_layer}
