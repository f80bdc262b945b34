"""Shared by tests of trainings: datasets and sections of a config, runs, and what a run has logged."""

import functools
import json
from pathlib import Path

from helpers.configs import DATASET, MODEL
from helpers.recipes import ready

from layerskip_recipes.training.recipe import LayerSkipFinetune

UNTIED = {
    "_component_": "torchtune.models.llama2._component_builders.llama2",
    **{
        key: MODEL[key] for key in ("vocab_size", "num_layers", "num_heads", "num_kv_heads", "embed_dim", "max_seq_len")
    },
}


# ---- sections of a config ----


def json_data(file: Path, rows: list, dataset: str, **arguments) -> dict:
    """A dataset of torchtune's with these rows, which are written to the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows))
    component = f"torchtune.datasets.{dataset}_dataset"
    return {"_component_": component, "source": "json", "data_files": str(file), "split": "train", **arguments}


def text_data(file: Path, texts: list[str], **arguments) -> dict:
    return json_data(file, [{"text": text} for text in texts], "text_completion", **{"column": "text"} | arguments)


def texts(folder):
    """40 texts of 21 to 89 tokens: ranks differ in the length of their batches and in the labels that count."""
    lines = [f"def f{n}(x):\n    return x + {n}\n" * (1 + 7 * n % 4) for n in range(40)]
    return text_data(folder / "texts.json", lines)


VALIDATION = DATASET | {"seq_len": 48, "max_samples": 5}


# ---- runs ----

set_up = functools.partial(ready, LayerSkipFinetune)  # (config, overrides): the recipe, ready to train


def train(path: Path, *overrides: str) -> LayerSkipFinetune:
    """Run a config in this process."""
    recipe = set_up(path, *overrides)
    recipe.train()
    recipe.cleanup()
    return recipe


# ---- what it logged ----


def log_lines(out: Path) -> list[tuple[int, dict[str, float]]]:
    """The disk logger's lines in their order: step and numbers."""
    lines = []
    for line in (out / "logs" / "log.txt").read_text().splitlines():
        step, _, rest = line.partition(" | ")
        lines.append((int(step.split()[1]), {k: float(v) for k, v in (pair.rsplit(":", 1) for pair in rest.split())}))
    return lines


def read_log(out: Path) -> dict[int, dict[str, float]]:
    """The numbers of each step: those of the training and those of the validation."""
    steps: dict[int, dict[str, float]] = {}
    for step, line in log_lines(out):
        steps.setdefault(step, {}).update(line)
    return steps


def losses(out: Path) -> dict[int, dict[str, float]]:
    """What must not change by a resume: all but the speed."""
    return {s: {k: v for k, v in line.items() if "second" not in k} for s, line in read_log(out).items()}


def paper_weights(on, scale):
    """e~ of eq. 6 for the flags `on`, sum by sum as it is printed."""
    last = len(on) - 1
    e = [scale * sum(range(layer + 1)) for layer in range(last)] + [last + scale * sum(range(last))]
    e = [value * flag for value, flag in zip(e, on, strict=True)]
    return [value / sum(e) for value in e]


def note_good_draft(folder: Path) -> None:
    """In a draft's layerskip.json, the acceptance that a long training would have measured: generation drafts only
    where that pays."""
    file = folder / "layerskip.json"
    noted = json.loads(file.read_text())
    noted["measured"]["draft"] = {key: [1.0 + 0.95 * d for d in range(1, 9)] for key in ("greedy", "sampled")}
    file.write_text(json.dumps(noted))
