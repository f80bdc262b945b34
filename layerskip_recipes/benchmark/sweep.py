"""`layerskip_benchmark sweep=...`: exit layers with draft lengths, each pair measured; JSON, CSV and a heat map.

The pairs are variants like any others: in each turn autoregressive decoding and every pair decode the same prompts.
"""

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from layerskip_recipes.config.schema import Section
from layerskip_recipes.generation.drafting.section import SelfSpeculation
from layerskip_recipes.model.decoder import LayerSkipDecoder

LONGEST = 12  # the longest draft that sweep and tuner consider
LENGTHS = (1, 2, 3, 4, 6, 8, 10, 12)


class Pair(NamedTuple):
    """An exit layer and a draft length."""

    exit_layer: int
    num_speculations: int

    @property
    def name(self) -> str:
        """Of the variant that measures the pair."""
        return f"exit{self.exit_layer}_draft{self.num_speculations}"

    @property
    def variant(self) -> SelfSpeculation:
        """The section of a config."""
        return SelfSpeculation(**self._asdict())


class Sweep(Section):
    """The pairs of a sweep: every exit with every draft length."""

    exit_layers: Annotated[list[int], Field(min_length=1, examples=["[2,4,8]"])] | None = None
    """The exits; null: all layers but the last."""
    num_speculations: (
        Annotated[list[Annotated[int, Field(ge=1, le=LONGEST)]], Field(min_length=1, examples=["[2,4,6]"])] | None
    ) = None
    """The draft lengths; null: 1, 2, 3, 4, 6, 8, 10 and 12."""

    def pairs(self, model: LayerSkipDecoder) -> list[Pair]:
        """All pairs.

        Raises:
            ConfigError: if an exit does not fit the model.
        """
        exits = list(range(1, len(model.layers))) if self.exit_layers is None else self.exit_layers
        for exit_layer in exits:
            model.check_exit(exit_layer, "sweep.exit_layers")
        return list(dict.fromkeys(Pair(e, d) for e in exits for d in self.num_speculations or LENGTHS))


# The columns of the CSV, by the name of a figure in the report.
FIGURES = ("tokens_per_round", "acceptance_rate", "draft_cost", "ideal_speedup", "engine_efficiency", "identical")


def write_csv(results: Sequence[Mapping[str, Any]], pairs: Mapping[str, Pair], path: Path) -> None:
    """A row for each measured pair and temperature."""
    with path.open("w", newline="") as file:
        columns = ("temperature", *Pair._fields, "speedup", "speedup_min", "speedup_max", *FIGURES)
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in results:
            if row["name"] in pairs:
                speedup = row["speedup"] or {"median": None, "min": None, "max": None}
                spread = {"speedup": speedup["median"], "speedup_min": speedup["min"], "speedup_max": speedup["max"]}
                measured = {name: row[name] for name in FIGURES}
                writer.writerow(
                    {"temperature": row["temperature"], **pairs[row["name"]]._asdict(), **spread, **measured}
                )


def heat_map(results: Sequence[Mapping[str, Any]], pairs: Mapping[str, Pair], path: Path, title: str) -> None:
    """A picture of the speed-up by exit and draft length, with a panel for each temperature."""
    from matplotlib.figure import Figure  # a second to import, and only here

    exits = sorted({pair.exit_layer for pair in pairs.values()})
    lengths = sorted({pair.num_speculations for pair in pairs.values()})
    temperatures = list(dict.fromkeys(row["temperature"] for row in results))
    size = (1.5 + 0.6 * len(lengths) * len(temperatures), 1.6 + 0.3 * len(exits))
    figure = Figure(figsize=size, layout="constrained")
    for panel, temperature in zip(figure.subplots(1, len(temperatures), squeeze=False)[0], temperatures, strict=True):
        speedups = {
            pairs[row["name"]]: row["speedup"]["median"]
            for row in results
            if row["temperature"] == temperature and row["name"] in pairs and row["speedup"]
        }
        grid = [[speedups.get(Pair(e, d), float("nan")) for d in lengths] for e in exits]
        panel.set_facecolor("lightgrey")
        panel.imshow(grid, aspect="auto", cmap="viridis", origin="lower")
        middle = statistics.median(speedups.values()) if speedups else 0.0
        for (e, d), speedup in speedups.items():
            colour = "black" if speedup > middle else "white"
            place = (lengths.index(d), exits.index(e))
            panel.text(*place, f"{speedup:.2f}", ha="center", va="center", fontsize=7, color=colour)
        panel.set_xticks(range(len(lengths)), lengths)
        panel.set_yticks(range(len(exits)), exits)
        panel.set_xlabel("drafted tokens")
        panel.set_ylabel("exit layer (layers run)")
        panel.set_title(f"temperature {temperature}")
    figure.suptitle(f"speed-up, {title}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
