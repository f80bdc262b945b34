"""`layerskip_benchmark sweep=...`: exit layers, draft lengths and thresholds, each pair measured; CSV, JSON, heat map.

The cell that promises most is measured next, in turns with autoregressive decoding, until none that is left can beat
what was measured. Every cell goes into a journal as soon as it is measured (sweep_files.py): an interrupted sweep
continues from there.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtune import utils
from torchtune.modules import TransformerDecoder

from layerskip_recipes.benchmark.report import by_repeat, speedups, total
from layerskip_recipes.benchmark.sweep_files import Cell, Journal, Measured, heat_map, read_journal, rows
from layerskip_recipes.benchmark.tuner import LONGEST, NOTHING_TO_DRAFT, observe, write_fastest
from layerskip_recipes.config.checks import check_choice, check_number
from layerskip_recipes.config.schema import check
from layerskip_recipes.config.settings import check_section
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.drafting.speculation import Speculation, Threshold

if TYPE_CHECKING:
    from layerskip_recipes.benchmark.recipe import LayerSkipBenchmark

log = utils.get_logger("INFO")

# Other samples have other acceptance, and clocks are noisy: a cell is given up only if it would have to be better than
# expected by this factor.
SLACK = 1.1
LENGTHS = (1, 2, 3, 4, 6, 8, 10, 12)


def sweep_section(
    exit_layers: Sequence[int] | None = None,
    num_speculations: Sequence[int] | None = None,
    thresholds: Sequence[float | str | None] = (None,),
    prune: bool = True,
) -> dict[str, Any]:
    """The keys of the `sweep` section.

    Args:
        exit_layers: the E to try; None: all but the last layer.
        num_speculations: the draft lengths to try; None: those of LENGTHS that max_new_tokens allows.
        thresholds: of confidence, each with every pair; null drafts the whole length.
        prune: leave out what cannot win.
    """
    return dict(locals())


def check_sweep(section: Any, model: TransformerDecoder, max_new_tokens: int) -> dict[str, Any]:
    """The section's values, complete.

    Raises:
        ValueError: the key, what was given, what is allowed.
    """
    values = sweep_section(**check_section(section, "sweep", sweep_section))
    if values["exit_layers"] is None:
        values["exit_layers"] = range(1, len(model.layers))
    limit = min(LONGEST, max_new_tokens - 1)
    if values["num_speculations"] is None:
        values["num_speculations"] = [length for length in LENGTHS if length <= limit]
    for key in ("exit_layers", "num_speculations", "thresholds"):
        listed = list(values[key]) if isinstance(values[key], Sequence) and not isinstance(values[key], str) else []
        values[key] = listed
        if not listed or any(value in listed[:at] for at, value in enumerate(listed)):
            raise ConfigError(f"sweep.{key}: {section.get(key)!r} is no list of different values; for example "
                             "sweep.exit_layers=[2,4,8] sweep.num_speculations=[2,4,6]")  # fmt: skip
    for exit_layer in values["exit_layers"]:
        model.check_exit(exit_layer, "sweep.exit_layers")
    for length in values["num_speculations"]:
        check_number("sweep.num_speculations", length, minimum=1, maximum=limit, example="[2,4,6]")
    for threshold in values["thresholds"]:
        check("sweep.thresholds", threshold, Threshold | None)
    check_choice("sweep.prune", values["prune"], (True, False))
    return values


# ---- what is measured, and what cannot win ----


def promise(cell: Cell, tokens: Mapping[int, Sequence[float]], measured: Mapping[Cell, Measured]) -> float:
    """The speed-up that a cell can have at most: the tokens of its rounds, over the least cost of a round in steps.

    A round runs every layer at least once, so it costs no less than a step. Where its exit was measured with other
    drafts, more is known: a step of the draft costs the same, and the verification at least in proportion to its
    positions. A threshold can at best draft nothing that is rejected.

    Args:
        cell: not measured yet.
        tokens: of a round with 1, 2, .. drafts, by exit (`tuning.round_tokens`).
        measured: cells without threshold tell about their exit.
    """
    length = cell.num_speculations
    count = tokens[cell.exit_layer][length - 1] if cell.exit_layer in tokens else length + 1  # the last layer's own
    drafts = length if cell.threshold is None else count - 1
    steps = 1.0
    for other, known in measured.items():
        if other.exit_layer == cell.exit_layer and other.threshold is None:
            verify_s = known.verify_s * min(1.0, (drafts + 1) / (other.num_speculations + 1))
            steps = max(steps, (drafts * known.draft_step_s + verify_s + known.rest_s) / known.step_s)
    return SLACK * count / steps


def best_of(measured: Mapping[Cell, Measured]) -> Cell | None:
    """The fastest cell."""
    return max(measured, key=lambda cell: measured[cell].speedup, default=None)


# ---- with the benchmark ----


def sweep(bench: "LayerSkipBenchmark") -> dict[str, Any]:
    """Measure, write sweep.csv, sweep.json, sweep.png and, with tune_extends, the config of the fastest.

    Returns:
        The report; "interrupted" after Ctrl-C, with what there is by then.
    """
    cfg, folder = bench.cfg, Path(bench.cfg.report_dir)
    values = check_sweep(cfg.sweep, bench.model, bench.limit)
    pairs = [(e, d) for e in values["exit_layers"] for d in values["num_speculations"]]
    cells = [Cell(*pair, threshold) for threshold in values["thresholds"] for pair in pairs]
    journal = read_journal(bench)
    interrupted = False
    try:
        for temperature in bench.temperatures:
            _measure(bench, temperature, cells, values["prune"], journal)
    except KeyboardInterrupt:
        interrupted = True
        log.warning("interrupted: the same command continues")
    # A sweep that continues may ask for fewer cells.
    before = {temperature: journal.cells.get(temperature, {}) for temperature in bench.temperatures}
    measured = {t: {cell: there[cell] for cell in cells if cell in there} for t, there in before.items()}
    folder.mkdir(parents=True, exist_ok=True)
    report = bench.circumstances() | {"interrupted": interrupted, "cells": rows(measured, cells)}
    files = {"csv": folder / "sweep.csv", "json": folder / "sweep.json"}
    files["json"].write_text(json.dumps(report, indent=1) + "\n")
    with files["csv"].open("w", newline="") as file:
        writer = csv.DictWriter(file, list(report["cells"][0]))
        writer.writeheader()
        writer.writerows(report["cells"])
    if cfg.get("picture"):
        files["picture"] = Path(cfg.picture).with_name("sweep.png")  # not in the place of the benchmark's
        heat_map(measured, values, files["picture"], title=str(cfg.checkpointer.checkpoint_dir))
    for temperature, there in measured.items():
        best = best_of(there)
        if best is not None:
            left = f"{len(cells) - len(there)} {'are missing' if interrupted else 'cannot win'}"
            print(
                f"temperature {temperature}: {best.name} at {there[best].speedup:.2f}x is the fastest of {len(there)} "
                f"measured; {left}"
            )
    first = measured[bench.temperatures[0]]
    if cfg.get("tune_extends") is not None and first and not interrupted:
        best = best_of(first)
        at = f"temperature {bench.temperatures[0]}, {report['device']}"
        write_fastest(cfg, best.name, best.section, first[best].speedup, at)
    print(json.dumps({name: str(path) for name, path in files.items()}), flush=True)
    return report


def _measure(
    bench: "LayerSkipBenchmark", temperature: float, cells: Sequence[Cell], prune: bool, journal: Journal
) -> None:
    """All cells at a temperature, the most promising first, as long as one promises more than the best so far."""
    measured = journal.cells.setdefault(temperature, {})
    tokens = None
    while left := [cell for cell in cells if cell not in measured]:
        tokens = tokens or observe(bench, temperature, longest=max(cell.num_speculations for cell in cells))[0]
        promised = {cell: promise(cell, tokens, measured) for cell in left}
        cell = max(left, key=promised.__getitem__)
        # More than what a cell can have at most is noise, and must not end the sweep.
        certain = [
            min(measured[c].speedup, promise(c, tokens, {o: known for o, known in measured.items() if o != c}))
            for c in cells
            if c in measured
        ]
        if prune and certain and promised[cell] < max(*certain, 1.0):
            return
        found = measure(bench, temperature, cell)
        if found.speedup > promised[cell]:
            log.warning(
                "%s was measured at %.2fx, where %.2fx is the most: the machine was busy, more repeats tell more",
                cell.name,
                found.speedup,
                promised[cell],
            )
        journal.add(temperature, cell, found)
        print(
            f"temperature {temperature}, {len(measured)} of at most {len(cells)}: {cell.name} {found.speedup:.2f}x, "
            f"{found.tokens_per_round:.2f} tokens a round, at most {promised[cell]:.2f}x was promised",
            flush=True,
        )


def measure(bench: "LayerSkipBenchmark", temperature: float, cell: Cell) -> Measured:
    """A cell in turns with autoregressive decoding."""
    ways = {"baseline": None, cell.name: Speculation(*cell[:2], threshold=cell.threshold)}
    turns = [turn for turn in bench.take_turns(ways, temperature) if turn]
    plain, ours = ([turn[name] for turn in turns] for name in ways)
    stats, of_plain = total(ours), total(plain)
    rounds = sum(stats.rounds_accepting.values())
    if not rounds:
        raise ConfigError(NOTHING_TO_DRAFT)
    return Measured(
        speedups=[ratio for ratio in speedups(by_repeat(ours), by_repeat(plain)) if ratio],
        tokens_per_second=stats.tokens_per_second,
        tokens_per_round=(stats.tokens - stats.rows) / rounds,
        acceptance_rate=stats.acceptance_rate,
        drafted_per_round=stats.drafted / rounds,
        step_s=of_plain.decode_s / of_plain.rounds,
        draft_step_s=stats.draft_s / max(stats.draft_steps, 1),
        verify_s=stats.verify_s / stats.rounds,
        rest_s=stats.accept_s / stats.rounds,
        identical=all(a.outputs == b.outputs for a, b in zip(plain, ours, strict=True)) if temperature == 0 else None,
    )
