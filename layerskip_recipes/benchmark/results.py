"""`layerskip results FILE`: every figure that we report, measured anew on this machine, as one page.

Each part is a command that a reader can run alone. What a part prints or writes is kept in a working folder, and a part
whose result is there is not run again: an interrupted page continues.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchtune import utils

from layerskip_recipes.benchmark.report import COLUMNS, device_name, show
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.training.run_log import package_versions


@dataclass(frozen=True)
class Model:
    """What is measured.

    Args:
        configs: what the names of its configs begin with, in front of "eval" and "benchmark".
        finetune: the config of its training.
        generate: the generation config that the tuner extends.
        checkpoint: the folder that the training ends with.
        trains: whether the page may train it, if that folder is not there.
        cost: options of `layerskip cost`.
        sweep: overrides of the sweep.
        batch: overrides of the benchmark in batches; none: no such part.
    """

    configs: str
    finetune: str
    generate: str
    checkpoint: str
    trains: bool = False
    cost: Sequence[str] = ()
    sweep: Sequence[str] = ()
    batch: Sequence[str] = ()


# The other ways do no more in a batch than alone.
OTHERS = ("tree", "adaptive", "exits", "draft_vocabulary", "lookup", "int8", "int8_lookup")
CHAIN_ONLY = [f"variants.{name}=null" for name in OTHERS]
MODELS = {
    "quickstart": Model(
        "quickstart/",
        "quickstart/finetune",
        "quickstart/generate",
        "epoch_0",
        trains=True,
        cost=["early_exit_loss.chunk_tokens=256", "--batch", "8", "--seq-len", "256"],
        sweep=["repeats=1", "sweep.exit_layers=[1,2,3,4,5,6,8,12,16]", "sweep.num_speculations=[2,4,6,8,12]"],
        # Rows share the weights that a step reads, so drafts that are not accepted cost more than alone: fewer of them.
        batch=["batch_size=8", "variants.chain.num_speculations=3", "peers=[torchtune,transformers]", *CHAIN_ONLY],
    ),
    "smollm2": Model(
        "smollm2/135M_",
        "smollm2/135M_full_single_device_layerskip",
        "smollm2/135M_generate_layerskip",
        "epoch_7",
        cost=["float32_matmul_precision=highest", "--steps", "3", "--repeats", "1"],
        sweep=["repeats=1", "sweep.exit_layers=[2,4,6,8,12,16,20,24,28]", "sweep.num_speculations=[1,2,3,4,6,8]"],
    ),
}
# Both choose for uncompiled steps: a graph for each of many cells would take an hour to compile.
EAGER = ["compile=false", "temperatures=[0.0]", "peers=[]"]


def parts(model: Model, folder: Path, work: Path) -> dict[str, tuple[list[str], Path]]:
    """The commands by name, in order, each with the file that its figures are in; pictures are `work`/NAME.png."""

    def recipe(name: str, *overrides: str) -> list[str]:
        config = ["--config", f"{model.configs}{name}", f"output_dir={folder}"]
        return ["tune", "run", f"layerskip_{name}", *config, *overrides]

    def benchmark(part: str, *overrides: str) -> tuple[list[str], Path]:
        places = [f"report_dir={work / part}", f"picture={work / part}.png"]
        name = "tune" if part == "tune" else "benchmark"
        return recipe("benchmark", *overrides, *places), work / part / f"{name}.json"

    exits = work / "exits.json"
    sweep, _ = benchmark("sweep", *EAGER, "sweep={}", *model.sweep)
    return {
        "cost": (["layerskip", "cost", model.finetune, *model.cost], work / "cost.log"),
        "eval": (recipe("eval", f"report={exits}", f"picture={work}/eval.png"), exits),
        "benchmark": benchmark("benchmark"),
        **({"batch": benchmark("batch", *model.batch)} if model.batch else {}),
        "sweep": (sweep, work / "sweep" / "sweep.json"),
        "tune": benchmark("tune", *EAGER, "tune=true", f"tune_extends={model.generate}"),
    }


def run(command: Sequence[str]) -> str:
    """Run a command; returns its output, raises a ValueError with the end of what it said if it fails."""
    print(f"+ {shlex.join(command)}", flush=True)
    # The programs of this environment, also where it is not activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PATH": path})
    if done.returncode:
        raise ConfigError(f"results: {shlex.join(command)!r} failed: {(done.stdout + done.stderr).strip()[-600:]}")
    return done.stdout


def run_part(command: Sequence[str], result: Path, checkpoint: Path) -> Any:
    """Run a command, unless its result is there: whole, of the same command, weights, machine and versions.

    Args:
        command: what to run.
        result: the file with its figures; to a .log goes what it prints.
        checkpoint: whose weights it measures.

    Returns:
        The JSON document in the result, of a .log in its last line.

    Raises:
        ValueError: if the command fails.
    """
    weights = {file.name: file.stat().st_mtime for file in sorted(checkpoint.glob("model*"))}
    where = {"device": device_name(utils.get_device(None)), "threads": torch.get_num_threads(), **package_versions()}
    told = result.with_suffix(".command")
    of = json.dumps({"command": list(command), "weights": weights, "where": where})
    result.parent.mkdir(parents=True, exist_ok=True)
    if not (told.exists() and told.read_text() == of):
        # Of other weights or versions, as the journal that a sweep continues.
        for old in (result, result.with_suffix(".jsonl")):
            old.unlink(missing_ok=True)
        told.write_text(of)
    if not result.exists() or _read(result).get("interrupted"):
        output = run(command)
        if result.suffix == ".log":
            result.write_text(output)
    return _read(result)


def _read(result: Path) -> dict[str, Any]:
    text = result.read_text().strip()
    return json.loads(text.splitlines()[-1] if result.suffix == ".log" else text)


def write_results(file: str, models: Sequence[str], work: str = "results") -> Path:
    """Measure, and write the page with its pictures beside it.

    Args:
        file: of the page, Markdown; what stands there behind the line BY_HAND is kept.
        models: names of `MODELS`, each perhaps with =FOLDER, the output_dir of its training.
        work: where what was measured is kept.

    Returns:
        The page's path.

    Raises:
        ValueError: for a model that is unknown or has no checkpoint, a file that is no such page, or a part that fails.
    """
    page, chosen = Path(file), {}
    for given in models:
        name, _, folder = given.partition("=")
        if name not in MODELS:
            raise ConfigError(f"results: {name!r} is unknown. Allowed: {', '.join(MODELS)}; for example quickstart")
        chosen[name] = Path(folder or Path(work) / name)
        model = MODELS[name]
        if not model.trains and not (chosen[name] / model.checkpoint).is_dir():
            raise ConfigError(
                f"results: {name} needs {chosen[name] / model.checkpoint}. First: tune run layerskip_finetune --config "
                f"{model.finetune} output_dir={chosen[name]}"
            )
    if not page.parent.is_dir():
        raise ConfigError(f"results: {str(page.parent)!r} is no folder; for example docs/results.md")
    if page.is_dir():
        raise ConfigError(f"results: {file!r} is a folder. Allowed: a file; for example {page / 'results.md'}")
    text = page.read_text() if page.exists() else BY_HAND
    if BY_HAND not in text and not text.startswith(_HEAD.partition("\n")[0]):
        raise ConfigError(
            f"results: {file!r} is there and no page of ours. Allowed: a new file; for example my_results.md"
        )
    command = ["layerskip", "results", file, *models, *(["--work", work] if work != "results" else [])]
    lines = [_HEAD.format(command=shlex.join(command))]
    for name, folder in chosen.items():
        model = MODELS[name]
        if not (folder / model.checkpoint).is_dir():
            run(["tune", "run", "layerskip_finetune", "--config", model.finetune, f"output_dir={folder}"])
        lines += section(name, model, folder, Path(work) / f"{name}_figures", page)
    whole = page.with_name(f".{page.name}")
    whole.write_text("\n".join(lines) + f"\n\n{by_hand(page)}")
    whole.replace(page)  # what was written by hand is nowhere else
    return page


BY_HAND = "<!-- From here on written by hand: `layerskip results` keeps it. -->"


def by_hand(page: Path) -> str:
    """The end of a page, from its line BY_HAND on."""
    _, _, kept = (page.read_text() if page.exists() else "").partition(BY_HAND)
    return BY_HAND + (kept or "\n")


_HEAD = """# Results

Made by one command, which trains the quickstart's model if it is not there:

    {command}

Speeds are medians of the repeats, with their range if there are several; every way decodes the same prompts in the
same process in turns. Not measured: what needs a GPU where there is none, and peers that are not installed."""


def section(name: str, model: Model, folder: Path, work: Path, page: Path) -> list[str]:
    """The page's part for a model; copies the pictures."""
    commands = parts(model, folder, work)
    found = {part: run_part(*command, folder / model.checkpoint) for part, command in commands.items()}
    where = found["benchmark"]
    lines = [
        f"\n## {name}\n",
        f"{where['device']}, {where['threads']} threads, {where['memory_bandwidth'] / 1e9:.1f} GB/s, "
        f"{where['config']['dtype']}; {', '.join(map(' '.join, where['versions'].items()))}; {where['date']}.",
    ]
    writers: dict[str, tuple[str, Callable]] = {
        "cost": ("A training step", cost_table),
        "eval": ("Quality by exit", exits_table),
        "benchmark": ("Generation", speed_tables),
        "batch": ("Generation in batches", speed_tables),
        "sweep": ("Exit layers and draft lengths", sweep_lines),
        "tune": ("What the tuner says", tune_table),
    }
    for part, (title, write) in writers.items():
        if part not in found:
            continue
        lines += [f"\n### {title}\n", f"    {shlex.join(commands[part][0])}\n", *write(found[part])]
        if part != "cost":
            picture = f"{page.stem}_{name}_{part}.png"
            shutil.copy(work / f"{part}.png", page.with_name(picture))
            lines.append(f"\n![{title.lower()}]({picture})")
    best, chosen = fastest_cell(found["sweep"]), fastest_way(found["tune"])
    lines.append(
        f"\nThe tuner's choice, {chosen[0]} at {chosen[1]:.2f}x, against the best of the sweep, {best[0]} at "
        f"{best[1]:.2f}x: {chosen[1] / best[1]:.2f} of it."
    )
    return lines


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown."""
    return [f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows]]


def cost_table(cost: Mapping[str, Any]) -> list[str]:
    """Seconds and memory of a step, and the ratios that matter."""
    rows = [[way, f"{of['seconds']:.3f}", f"{of['peak_gb']:.2f}"] for way, of in cost["figures"].items()]
    ratios = [f"- {what}: {ratio:.2f}" for what, ratio in cost["ratios"].items()]
    head = f"{cost['batch']} x {cost['seq_len']} random tokens, exits of layers {cost['layers']} and the last.\n"
    return [head, *table(["way", "s / step", "peak GB"], rows), "", *ratios]


def exits_table(report: Mapping[str, Any]) -> list[str]:
    """Loss and agreement by exit."""
    rows = [
        [e, *(f"{of[key]:.3f}" for key in ("loss", "accuracy", "agreement")), show(of["accepted_length"], ".2f")]
        for e, of in report["exits"].items()
    ]
    return table(["exit", "loss, nats", "accuracy", "agreement", "accepted length"], rows)


def speed_tables(report: Mapping[str, Any]) -> list[str]:
    """A table of ways for each temperature."""
    compiled = "compiled" if report["compiled"] else "not compiled"
    lines = [
        f"{report['prompts']} prompts x {report['max_new_tokens']} tokens, batch {report['batch_size']}, "
        f"{report['repeats']} repeats, {compiled}."
    ]
    lines += [f"\n{name} is left out ({why})." for name, why in report["peers_left_out"].items()]
    drafts = ("acceptance", "tokens/round", "ideal", "efficiency")
    shown = ("way", "tokens/s", "speed-up", "not looping", "loops", *drafts, "identical")
    for temperature in dict.fromkeys(row["temperature"] for row in report["results"]):
        of_temperature = [row for row in report["results"] if row["temperature"] == temperature]
        rows = [[COLUMNS[column](row) for column in shown] for row in of_temperature]
        lines += [f"\nTemperature {temperature}:\n", *table(shown, rows)]
    return lines


def fastest_cell(report: Mapping[str, Any]) -> tuple[str, float]:
    """Name and speed-up of the best cell of a sweep."""
    cell = max((row for row in report["cells"] if row["speedup"] is not None), key=lambda row: row["speedup"])
    return f"exit {cell['exit_layer']} with drafts of {cell['num_speculations']}", cell["speedup"]


def sweep_lines(report: Mapping[str, Any]) -> list[str]:
    """How many cells were measured."""
    measured = [row for row in report["cells"] if row["speedup"] is not None]
    name, speedup = fastest_cell(report)
    return [
        f"Not compiled, greedy. {len(measured)} of {len(report['cells'])} pairs measured, the others could not win. "
        f"Fastest: {name}, {speedup:.2f}x."
    ]


def fastest_way(report: Mapping[str, Any]) -> tuple[str, float]:
    """Name and speed-up of the best variant of a benchmark."""
    rows = [row for row in report["results"] if row["kind"] == "variant" and row["speedup"]]
    best = max(rows, key=lambda row: row["speedup"]["median"])
    return best["name"], best["speedup"]["median"]


def tune_table(report: Mapping[str, Any]) -> list[str]:
    """Prediction beside measurement."""
    rows = [
        [row["name"], show(row["predicted_speedup"], ".2f"), show(row["speedup"], ".2f")]
        for row in report["results"]
        if row["kind"] == "variant"
    ]
    return table(["way", "predicted", "measured"], rows)
