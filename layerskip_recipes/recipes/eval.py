"""`tune run layerskip_eval`: how good is each exit? Loss, perplexity and agreement with the last layer, with a picture.

One pass over the data serves all exits; the heads run exit by exit and in chunks of tokens, as in training.
"""

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader
from torchtune import training
from tqdm import tqdm

from layerskip_recipes import checkpoint as ckpt
from layerskip_recipes.config import build_recipe, main_of
from layerskip_recipes.exit_quality import exit_quality
from layerskip_recipes.layers import select_layers
from layerskip_recipes.recipes.data import check_collate_fn, check_dataset, load_data
from layerskip_recipes.settings import (
    COMMON,
    anything,
    build,
    build_on_meta,
    check_device,
    check_dtype,
    check_one_process,
    check_settings,
    check_vocabulary,
    component,
    number,
    text,
)

SETTINGS = COMMON | {
    "quantizer": component(optional=True),
    "dataset": check_dataset,
    "collate_fn": check_collate_fn,
    "batch_size": number(minimum=1),
    "max_batches": number(minimum=1, optional=True),
    "layers": anything,
    "picture": text("exits.png"),
}
REQUIRED = ("dataset",)


def plot_exits(quality: dict[int, dict[str, float]], path: Path, title: str) -> None:
    """A PNG with two panels over the exit layer: the loss, and the agreement with the last layer."""
    from matplotlib.figure import Figure  # a second to import, and only here

    exits = list(quality)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, key, label in zip(
        panels, ("loss", "agreement"), ("loss (nats per token)", "agreement with the last layer"), strict=True
    ):
        panel.plot(exits, [quality[e][key] for e in exits], marker="o", markersize=4, color="tab:blue")
        panel.set_xlabel("exit layer (layers run)")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    panels[1].set_ylim(0, 1.02)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def check_config(cfg: DictConfig) -> None:
    """All of an evaluation config that can be wrong on any machine.

    Raises:
        ValueError: the key, what was given, what is allowed.
    """
    check_settings(cfg, SETTINGS, {}, REQUIRED)
    model = build_on_meta(cfg)
    ckpt.check_checkpointer(cfg, model)
    select_layers(cfg.get("layers", ":"), len(model.layers))


class LayerSkipEval:
    """Measures the exits of a checkpoint on a dataset.

    Args:
        cfg: model, checkpointer, tokenizer, dataset, batch_size, max_batches, layers (the layers whose output is an
            exit, ":" for all), picture (a PNG's path, null for none).

    Raises:
        ValueError: for a wrong setting, before any weight is loaded.
    """

    def __init__(self, cfg: DictConfig) -> None:
        check_config(cfg)
        self.cfg = cfg
        self.device = check_device(cfg)
        self.dtype = check_dtype(cfg, self.device)
        ckpt.check_checkpoint_files(cfg)
        ckpt.require_weights(cfg)
        check_one_process()
        torch.set_float32_matmul_precision(cfg.get("float32_matmul_precision", "highest"))
        training.set_seed(seed=cfg.get("seed"))

    def setup(self) -> None:
        """The data, then the model."""
        cfg = self.cfg
        tokenizer = build(cfg.tokenizer, "tokenizer")
        check_vocabulary(tokenizer, build_on_meta(cfg))
        dataset, collate = load_data(cfg, tokenizer, ignore_index=-100)
        self.batches = DataLoader(dataset, batch_size=cfg.get("batch_size", 1), collate_fn=collate)
        self.model = ckpt.load_decoder(cfg, self.device, self.dtype)

    def evaluate(self) -> dict[str, Any]:
        """Measure, print a table, draw the picture.

        Returns:
            The report that is also printed as the last line.
        """
        cfg = self.cfg
        total = min(len(self.batches), cfg.get("max_batches") or len(self.batches))
        batches = (
            batch for batch, _ in zip(tqdm(self.batches, total=total, desc="batches"), range(total), strict=False)
        )
        chosen = select_layers(cfg.get("layers", ":"), self.model.num_layers)
        exits = sorted({layer + 1 for layer, on in enumerate(chosen) if on} | {self.model.num_layers})
        quality = exit_quality(self.model, batches, exits, self.device)
        print(f"\n{'exit':>5} {'loss':>8} {'perplexity':>11} {'accuracy':>9} {'agreement':>10}")
        for e, q in quality.items():
            print(f"{e:>5} {q['loss']:>8.3f} {q['perplexity']:>11.4g} {q['accuracy']:>9.3f} {q['agreement']:>10.3f}")
        report: dict[str, Any] = {"exits": quality, "batches": total}
        if cfg.get("picture"):
            plot_exits(quality, Path(cfg.picture), title=f"{cfg.checkpointer.checkpoint_dir}, {total} batches")
            report["picture"] = cfg.picture
            print(f"picture: {cfg.picture}")
        print(json.dumps(report), flush=True)
        return report


def main() -> None:
    """Measure loss and agreement with the last layer at every exit of a model.

    tune run layerskip_eval --config quickstart/eval
    """

    def steps() -> None:
        recipe = build_recipe(LayerSkipEval, main.__doc__)
        recipe.setup()
        recipe.evaluate()

    main_of(steps)
