"""`tune run layerskip_eval`: how good is each exit? Loss, perplexity and agreement with the last layer, with a picture.

One pass over the data serves all exits; the heads run exit by exit and in chunks of tokens, as in training.
"""

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
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
    "num_speculations": number(minimum=1),
    "compare": anything,
    "picture": text("exits.png"),
    "report": text("exits.json"),
}
REQUIRED = ("dataset",)


def plot_exits(measured: dict[str, dict[int, dict[str, float]]], path: Path, title: str) -> None:
    """A PNG with two panels over the exit layer: the loss, and the agreement with the last layer, by checkpoint."""
    from matplotlib.figure import Figure  # a second to import, and only here

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, key, label in zip(
        panels, ("loss", "agreement"), ("loss (nats per token)", "agreement with the last layer"), strict=True
    ):
        for name, quality in measured.items():
            panel.plot(list(quality), [q[key] for q in quality.values()], marker="o", markersize=4, label=name)
        panel.set_xlabel("exit layer (layers run)")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    panels[1].set_ylim(0, 1.02)
    if len(measured) > 1:
        panels[0].legend()
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
    for name, other in checkpoints(cfg).items():
        try:
            ckpt.check_checkpointer(other, model)
        except ValueError as e:
            raise ValueError(f"compare.{name}: {e}") from e


def checkpoints(cfg: DictConfig) -> dict[str, DictConfig]:
    """The config once for its own checkpoint, and once for each of `compare`, by name.

    Raises:
        ValueError: if `compare` is no mapping of names to parts of the checkpointer section.
    """
    compare = OmegaConf.create({}) if cfg.get("compare") is None else cfg.compare
    if not isinstance(compare, DictConfig) or not all(isinstance(part, DictConfig) for part in compare.values()):
        raise ValueError(
            f"compare: {compare!r} is not allowed. Allowed: names with what differs in the checkpointer section; for "
            'example "compare={before: {checkpoint_dir: /tmp/model, checkpoint_files: [model.safetensors]}}"'
        )
    others = {str(name): OmegaConf.merge(cfg, {"checkpointer": section}) for name, section in compare.items()}
    return {Path(str(cfg.checkpointer.get("checkpoint_dir"))).name: cfg} | others


class LayerSkipEval:
    """Measures the exits of a checkpoint on a dataset.

    Args:
        cfg: model, checkpointer, tokenizer, dataset, batch_size, max_batches, layers (the layers whose output is an
            exit, ":" for all), num_speculations (d of the accepted length), compare (other checkpoints by name),
            picture and report (paths of a PNG and a JSON document, null for none).

    Raises:
        ValueError: for a wrong setting, before any weight is loaded.
    """

    def __init__(self, cfg: DictConfig) -> None:
        check_config(cfg)
        self.cfg = cfg
        self.device = check_device(cfg)
        self.dtype = check_dtype(cfg, self.device)
        for one in checkpoints(cfg).values():
            ckpt.check_checkpoint_files(one)
            ckpt.require_weights(one)
        check_one_process()
        torch.set_float32_matmul_precision(cfg.get("float32_matmul_precision", "highest"))
        training.set_seed(seed=cfg.get("seed"))

    def setup(self) -> None:
        """The data, then the model. Those to compare with come one after the other, in `evaluate`."""
        cfg = self.cfg
        tokenizer = build(cfg.tokenizer, "tokenizer")
        check_vocabulary(tokenizer, build_on_meta(cfg))
        dataset, collate = load_data(cfg, tokenizer, ignore_index=-100)
        self.batches = DataLoader(dataset, batch_size=cfg.get("batch_size", 1), collate_fn=collate)
        self.model = ckpt.load_decoder(cfg, self.device, self.dtype)

    def evaluate(self) -> dict[str, Any]:
        """Measure every checkpoint, print a table of each, write picture and report.

        Returns:
            The report, which is also printed as the last line.
        """
        cfg = self.cfg
        total = min(len(self.batches), cfg.get("max_batches") or len(self.batches))
        own, *others = checkpoints(cfg)
        measured = {own: self._measure(own, total)}
        for name in others:
            del self.model  # one at a time in memory
            self.model = ckpt.load_decoder(checkpoints(cfg)[name], self.device, self.dtype)
            measured[name] = self._measure(name, total)
        report: dict[str, Any] = {"exits": measured[own], "batches": total}
        if others:
            report["compare"] = {name: measured[name] for name in others}
        if cfg.get("picture"):
            plot_exits(measured, Path(cfg.picture), title=f"{cfg.checkpointer.checkpoint_dir}, {total} batches")
            report["picture"] = cfg.picture
            print(f"picture: {cfg.picture}")
        if cfg.get("report"):
            Path(cfg.report).parent.mkdir(parents=True, exist_ok=True)
            Path(cfg.report).write_text(json.dumps(report, indent=2) + "\n")
        print(json.dumps(report), flush=True)
        return report

    def _measure(self, name: str, total: int) -> dict[int, dict[str, float]]:
        """The model's table, and its quality by exit."""
        cfg, model = self.cfg, self.model
        progress = tqdm(self.batches, total=total, desc=name)
        batches = (batch for batch, _ in zip(progress, range(total), strict=False))
        chosen = select_layers(cfg.get("layers", ":"), model.num_layers)
        exits = sorted({layer + 1 for layer, on in enumerate(chosen) if on} | {model.num_layers})
        draft = cfg.get("num_speculations", 6)
        quality = exit_quality(model, batches, exits, self.device, num_speculations=draft)
        progress.close()
        print(f"\n{name}")
        print(f"{'exit':>5} {'loss':>8} {'perplexity':>11} {'accuracy':>9} {'agreement':>10} {f'of {draft}':>6}")
        for e, q in quality.items():
            print(
                f"{e:>5} {q['loss']:>8.3f} {q['perplexity']:>11.4g} {q['accuracy']:>9.3f} {q['agreement']:>10.3f} "
                f"{q['accepted_length']:>6.2f}"
            )
        return quality


def main() -> None:
    """Measure loss and agreement with the last layer at every exit of a model.

    tune run layerskip_eval --config quickstart/eval
    """

    def steps() -> None:
        recipe = build_recipe(LayerSkipEval, main.__doc__)
        recipe.setup()
        recipe.evaluate()

    main_of(steps)
