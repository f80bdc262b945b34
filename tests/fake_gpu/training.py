"""Trains on a fake GPU, two optimizer steps of each kind, and measures exits as before a save.

Prints, for each kind, the waits of the second step and of the measurement.
"""

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from helpers.configs import finetune_config, hf_sections, make_checkpoint
from helpers.recipes import ready
from stand_in_gpu import CUDA, fake_gpu, to_fake_gpu

from layerskip_recipes.data import standard_library
from layerskip_recipes.data.standard_library import stdlib_tokenizer
from layerskip_recipes.training import stochastic_adamw
from layerskip_recipes.training.label_counts import LabelCounts
from layerskip_recipes.training.optimizers import Optimizers
from layerskip_recipes.training.recipe import LayerSkipFinetune

ALONE = {"early_exit_loss": None, "layer_dropout": None}
ROUNDING = "layerskip_recipes.training.stochastic_adamw.StochasticAdamW"


def kinds(checkpoint: Path) -> dict[str, dict[str, Any]]:
    start = hf_sections(checkpoint)
    return {
        "AdamW": {"gradient_accumulation_steps": 2},
        "fused": {"optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3, "fused": True}},
        "stochastic": {"dtype": "bf16", "optimizer": {"_component_": ROUNDING, "lr": 1e-3}},
        "autocast": {"compute_dtype": "bf16", "clip_grad_norm": 1.0},
        "checkpointing": {"enable_activation_checkpointing": True},
        "in backward": {"optimizer_in_bwd": True},
        "LoRA": hf_sections(checkpoint, lora={}) | {"dtype": "bf16"},
        "adapter": start | ALONE | {"draft": {"exit_layer": 1}},
        "copy": start | ALONE | {"draft": {"exit_layer": 1, "kind": "copy", "finetune_model": True, "vocabulary": 64}},
    }


def read(shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    return [read(shape[1:], dtype) for _ in range(shape[0])] if shape else 1


def move(recipe: LayerSkipFinetune) -> None:
    """What `setup` builds for a device, for the fake one."""
    to_fake_gpu(recipe.model, *([] if recipe.draft is None else [recipe.draft]))
    recipe.device = recipe.validation.device = CUDA
    recipe.labels = LabelCounts(recipe.mesh, CUDA, len(recipe.labels.local_counts))
    recipe.optimizers = Optimizers(recipe.cfg, recipe.learner, None, recipe.total_steps, 0)
    recipe.progress = mock.MagicMock()


def train(path: Path) -> dict[str, Any]:
    recipe = ready(LayerSkipFinetune, path)
    batches = [*recipe.data.batches(0)]
    with fake_gpu(read) as gpu, ExitStack() as patches:
        patches.enter_context(mock.patch.object(stochastic_adamw, "update_on_gpu", stochastic_adamw.update_))
        move(recipe)
        for _ in range(2):
            gpu.waits.clear()
            recipe._train_step(dict(batch) for batch in batches)
        found = {"step": sorted(gpu.waits.elements())}
        gpu.waits.clear()
        exits = [1, recipe.model.num_layers] if recipe.draft is None else [0, recipe.model.num_layers]
        recipe.validation.quality(recipe.model, [dict(batches[0])], exits, recipe.draft)
        return found | {"measurement": sorted(gpu.waits.elements())}


def main(folder: Path) -> None:
    texts = dict([*standard_library.stdlib_texts("heldout").items()][:3])
    stdlib_tokenizer(str(folder / "tokenizer"), vocab_size=300)
    checkpoint = make_checkpoint(folder / "checkpoint", folder / "tokenizer")
    with mock.patch.object(standard_library, "stdlib_texts", lambda _: texts):
        for number, (kind, changes) in enumerate(kinds(checkpoint).items()):
            try:
                found = train(finetune_config(folder / str(number), folder / "tokenizer", **changes))
            except Exception as e:
                found = {"error": f"{type(e).__name__}: {e}"}
            print(json.dumps({"kind": kind, **found}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
