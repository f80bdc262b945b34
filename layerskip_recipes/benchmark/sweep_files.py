"""The cells of a sweep and what is left of them: a journal to continue from, rows for CSV and JSON, a heat map."""

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torchtune import utils

from layerskip_recipes.benchmark.report import device_name
from layerskip_recipes.checkpoint.checkpointers import checkpoint_files
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.adapters import adapter_file

if TYPE_CHECKING:
    from layerskip_recipes.benchmark.recipe import LayerSkipBenchmark

log = utils.get_logger("INFO")

# What may differ between a sweep and its continuation.
FREE = ("report_dir", "picture", "output_dir", "tune_extends", "tune_file", "variants", "peers", "sweep")
FREE += ("temperatures",)
FORMAT = 1  # of the journal


class Cell(NamedTuple):
    """A way of drafting."""

    exit_layer: int
    num_speculations: int
    threshold: float | str | None = None

    @property
    def name(self) -> str:
        """As in the tuner's variants."""
        chain = f"exit{self.exit_layer}_draft{self.num_speculations}"
        return chain if self.threshold is None else f"{chain}_threshold{self.threshold}"

    @property
    def section(self) -> dict[str, Any]:
        """As a `self_speculation` section."""
        return {key: value for key, value in self._asdict().items() if value is not None}


@dataclass(frozen=True)
class Measured:
    """Of a cell: speed-ups over the autoregressive runs beside it, by repeat; seconds of their step, and of a round."""

    speedups: list[float]
    tokens_per_second: float
    tokens_per_round: float
    acceptance_rate: float
    drafted_per_round: float
    step_s: float
    draft_step_s: float
    verify_s: float
    rest_s: float
    identical: bool | None

    @property
    def speedup(self) -> float:
        """The median."""
        return statistics.median(self.speedups)


# ---- the journal ----


class Journal:
    """Measured cells in a file, a JSON line each, after a line that says of which sweep. Nothing is written before the
    first cell.

    Args:
        path: of the file.
        sweep: what must be the same in a sweep that continues.

    Raises:
        ValueError: if the file is of another sweep, or a line of it is broken.
    """

    def __init__(self, path: Path, sweep: dict[str, Any]) -> None:
        self.path, self.sweep = path, json.loads(json.dumps(sweep))
        self.cells: dict[float, dict[Cell, Measured]] = {}
        text = path.read_text() if path.exists() else ""
        self.whole = text[: text.rfind("\n") + 1]  # a last line without end was torn off
        for at, line in enumerate(self.whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                if at == 1:
                    self._check(entry)
                    continue
                cell, temperature = Cell(*entry.pop("cell")), entry.pop("temperature")
                self.cells.setdefault(temperature, {})[cell] = Measured(**entry)
            except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as e:
                raise ConfigError(f"report_dir: line {at} of {str(path)!r} is none of a sweep ({e}). Delete it") from e
        if self.cells:
            log.info("%s: %d cells were measured before", path, sum(map(len, self.cells.values())))

    def _check(self, before: dict[str, Any]) -> None:
        for key in {**before, **self.sweep}:
            if before.get(key) != self.sweep.get(key):
                raise ConfigError(
                    f"report_dir: {str(self.path)!r} is a sweep with {key}={before.get(key)!r}, and here it is "
                    f"{self.sweep.get(key)!r}. Give another report_dir, or delete the file"
                )

    def add(self, temperature: float, cell: Cell, measured: Measured) -> None:
        """Write it down."""
        self.cells.setdefault(temperature, {})[cell] = measured
        line = json.dumps({"temperature": temperature, "cell": cell, **asdict(measured)})
        if self.whole is None:
            with self.path.open("a") as file:
                file.write(line + "\n")
            return
        # The first one of this process: without a torn line, and never half a file.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text((self.whole or json.dumps(self.sweep) + "\n") + line + "\n")
        new.replace(self.path)
        self.whole = None


def read_journal(bench: "LayerSkipBenchmark") -> Journal:
    """The journal of a benchmark's sweep, in its report_dir.

    Raises:
        ValueError: if there is one of another sweep.
    """
    kept = OmegaConf.to_container(bench.cfg, resolve=True)
    section = bench.cfg.checkpointer
    folder, files = Path(section.get("checkpoint_dir", "")), checkpoint_files(section)
    paths = {name: folder / name for name in files}
    if section.get("adapter_checkpoint") is not None:
        paths["adapters"] = adapter_file(section.adapter_checkpoint)
    weights = {name: [path.stat().st_size, path.stat().st_mtime] for name, path in paths.items()}
    prompts = hashlib.sha256(json.dumps(bench.prompts).encode()).hexdigest()
    versions = {name: version(name) for name in ("torch", "torchtune", "torchao", "layerskip-recipes")}
    here = {"device": device_name(bench.device), "threads": torch.get_num_threads(), "versions": versions}
    config = {key: kept[key] for key in kept if key not in FREE}
    return Journal(
        Path(bench.cfg.report_dir) / "sweep.jsonl",
        {"format": FORMAT, **config, **here, "size and time of the weights": weights, "hash of the prompts": prompts},
    )


# ---- what is written ----


def rows(measured: Mapping[float, Mapping[Cell, Measured]], cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A row for every cell at every temperature; those that were left out have no figures."""
    found = []
    for temperature, there in measured.items():
        for cell in cells:
            known = there.get(cell)
            figures = asdict(known) if known else dict.fromkeys(Measured.__dataclass_fields__)
            of_repeats = figures.pop("speedups") or [None]
            spread = {
                "speedup": known and known.speedup,
                "speedup_min": min(of_repeats) if known else None,
                "speedup_max": max(of_repeats) if known else None,
            }
            found.append({"temperature": temperature, **cell._asdict(), **spread, **figures})
    return found


def heat_map(
    measured: Mapping[float, Mapping[Cell, Measured]], values: Mapping[str, Any], path: Path, title: str
) -> None:
    """A PNG: speed-up by exit and draft length, a panel for each temperature and threshold; grey was left out."""
    from matplotlib.figure import Figure  # a second to import, and only here

    exits, lengths = sorted(values["exit_layers"]), sorted(values["num_speculations"])
    panels = [(temperature, threshold) for temperature in measured for threshold in values["thresholds"]]
    size = (1.5 + 0.6 * len(lengths) * len(panels), 1.6 + 0.3 * len(exits))
    figure = Figure(figsize=size, layout="constrained")
    for panel, (temperature, threshold) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        there = measured[temperature]
        grid = [
            [there[cell].speedup if (cell := Cell(e, d, threshold)) in there else float("nan") for d in lengths]
            for e in exits
        ]
        panel.set_facecolor("lightgrey")
        panel.imshow(grid, aspect="auto", cmap="viridis", origin="lower")
        middle = statistics.median([x for row in grid for x in row if x == x] or [0.0])
        for y, row in enumerate(grid):
            for x, speedup in enumerate(row):
                if speedup == speedup:
                    colour = "black" if speedup > middle else "white"
                    panel.text(x, y, f"{speedup:.2f}", ha="center", va="center", fontsize=7, color=colour)
        panel.set_xticks(range(len(lengths)), lengths)
        panel.set_yticks(range(len(exits)), exits)
        panel.set_xlabel("drafted tokens")
        panel.set_ylabel("exit layer (layers run)")
        panel.set_title(f"temperature {temperature}" + (f", threshold {threshold}" if threshold is not None else ""))
    figure.suptitle(f"speed-up, {title}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
