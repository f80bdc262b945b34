"""Turns benchmark runs into figures, a Markdown table and a picture."""

import platform
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from layerskip_recipes.benchmark.config import BASELINE
from layerskip_recipes.benchmark.measuring import Run
from layerskip_recipes.generation.report import draft_figures, ratio, safe_divide
from layerskip_recipes.generation.stats import GenerationStats

ACCEPTANCES = (0.5, 0.7, 0.9)  # accept rates to report speed-ups for, with random weights


def total(runs: Sequence[Run]) -> GenerationStats:
    return sum((run.stats for run in runs), GenerationStats())


def by_repeat(runs: Sequence[Run]) -> list[GenerationStats]:
    return [total([run for run in runs if run.repeat == i]) for i in sorted({run.repeat for run in runs})]


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Median and range of the values that are not None."""
    known = [value for value in values if value is not None]
    return {"median": statistics.median(known), "min": min(known), "max": max(known)} if known else None


def figures(runs: Sequence[Run], plain_runs: Sequence[Run], bandwidth: float) -> dict[str, Any]:
    """The figures of a method at one temperature: times in seconds; rates as median, min and max over the repeats.

    `plain_runs` are those without drafts on the same prompts, whose outputs should be equal.
    """
    stats, repeats = total(runs), by_repeat(runs)
    rate = spread([s.tokens_per_second for s in repeats])
    plain_repeats = by_repeat(plain_runs)
    speedup = spread([*map(ratio, repeats, plain_repeats)])
    # Compare both methods on the batches where neither loops.
    pairs = [pair for pair in zip(runs, plain_runs, strict=True) if not any(run.loops for run in pair)]
    not_looping = by_repeat([run for run, _ in pairs])
    plain_not_looping = by_repeat([plain_run for _, plain_run in pairs])
    per_token, drafts = stats.bytes_per_token or None, stats.drafted > 0
    return {
        "tokens_per_second": rate,
        "speedup": speedup,
        "speedup_not_looping": spread([*map(ratio, not_looping, plain_not_looping)]),
        "answer_tokens_per_second": spread([s.answer_tokens_per_second for s in repeats]),
        "answer_speedup": spread(
            [ratio(a, b, "answer_tokens_per_second") for a, b in zip(repeats, plain_repeats, strict=False)]
        ),
        "outputs": sum(len(run.outputs) for run in runs),
        "looping_outputs": sum(run.loops for run in runs),
        "identical": [r.outputs for r in runs] == [r.outputs for r in plain_runs] if runs else None,
        **draft_figures(stats, total(plain_runs), speedup["median"] if isinstance(speedup, dict) else None),
        "rounds": stats.rounds,
        "rounds_by_kind": dict(stats.rounds_by_kind),
        "round_s": safe_divide(stats.decode_s, stats.rounds),
        "draft_s_per_round": safe_divide(stats.draft_s, stats.rounds) if drafts else None,
        "verify_s_per_round": safe_divide(stats.verify_s, stats.rounds) if drafts else None,
        "rest_s_per_round": safe_divide(stats.accept_s, stats.rounds) if drafts else None,
        "bytes_per_token": per_token,
        "share_of_memory_bandwidth": safe_divide(per_token * rate["median"], bandwidth) if per_token and rate else None,
        "prefill_s": safe_divide(stats.prefill_s, len(runs)),
        "per_repeat": [{"decoded_tokens": s.tokens - s.first_tokens, "decode_s": s.decode_s} for s in repeats],
    }


def speedup_by_acceptance(row: Mapping[str, Any], step_s: float | None) -> dict[str, float] | None:
    """{accept rate rho: (rho n + 1) step_s / round_s} for n drafted tokens per round; None if nothing is drafted."""
    n, round_s = row["drafted_per_round"], row["round_s"]
    if not (n and round_s and step_s):
        return None
    return {str(rho): (rho * n + 1) * step_s / round_s for rho in ACCEPTANCES}


# ---- the report ----


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def show(value: dict[str, float] | float | None, form: str, factor: float = 1.0) -> str:
    """Format a number, or a median with its range; "-" for None."""
    if isinstance(value, dict):
        median, low, high = (show(value[name], form, factor) for name in ("median", "min", "max"))
        return median + ("" if low == high else f" ({low}-{high})")
    return "-" if value is None else format(value * factor, form)


COLUMNS = {
    "method": lambda r: r["name"],
    "answers, tokens/s": lambda r: show(r["answer_tokens_per_second"], ".1f"),
    "speed-up of answers": lambda r: show(r["answer_speedup"], ".2f"),
    "tokens/s": lambda r: show(r["tokens_per_second"], ".1f"),
    "speed-up": lambda r: show(r["speedup"], ".2f"),
    "not looping": lambda r: show(r["speedup_not_looping"], ".2f"),
    "loops": lambda r: f"{r['looping_outputs']} of {r['outputs']}",
    "ideal": lambda r: show(r["ideal_speedup"], ".2f"),
    "efficiency": lambda r: show(r["engine_efficiency"], ".2f"),
    "acceptance": lambda r: show(r["acceptance_rate"], ".2f"),
    "tokens/round": lambda r: show(r["tokens_per_round"], ".2f"),
    "draft cost": lambda r: show(r["draft_cost"], ".3f"),
    "round, ms": lambda r: show(r["round_s"], ".2f", 1e3),
    "draft, verify, rest": lambda r: ", ".join(
        show(r[f"{phase}_s_per_round"], ".2f", 1e3) for phase in ("draft", "verify", "rest")
    ),
    "MB/token": lambda r: show(r["bytes_per_token"], ".1f", 1e-6),
    "bandwidth": lambda r: show(r["share_of_memory_bandwidth"], ".0%"),
    "prefill, ms": lambda r: show(r["prefill_s"], ".1f", 1e3),
    "compile, s": lambda r: show(r["compile_s"], ".0f"),
    "identical": lambda r: {True: "yes", False: "NO", None: "-"}[r["identical"]],
}
# With random weights, outputs and acceptance mean nothing.
COST_COLUMNS = ("method", "round, ms", "draft, verify, rest", "draft cost", "efficiency", "MB/token", "bandwidth")


def _lookup(key: str, name: str, form: str, row: Mapping[str, Any]) -> str:
    return show((row[key] or {}).get(name), form)


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a page: a summary of the settings, and a table for each temperature."""
    cfg = report["config"]
    if report["random_weights"]:
        columns = {name: COLUMNS[name] for name in COST_COLUMNS}
        columns |= {
            f"at acceptance {rho}": partial(_lookup, "speedup_by_acceptance", str(rho), ".2f") for rho in ACCEPTANCES
        }
        title = f"{cfg['model']['_component_']}, {report['parameters'] / 1e6:.0f} million random weights"
    else:
        columns = COLUMNS | {name: partial(_lookup, "metrics", name, ".3f") for name in cfg.get("metrics") or []}
        title = cfg["checkpointer"].get("checkpoint_dir") or cfg["checkpointer"].get("path")
    quantizer = f", {cfg['quantizer']['_component_'].rpartition('.')[2]}" if cfg.get("quantizer") else ""
    compiled, bandwidth = "compiled" if report["compiled"] else "eager", report["memory_bandwidth"] / 1e9
    lines = [
        f"# {title}\n",
        f"    {report['command']}\n",
        f"{report['device']} ({report['threads']} threads, {bandwidth:.1f} GB/s), {cfg['dtype']}{quantizer}, "
        f"{compiled}, batch {report['batch_size']}. {report['prompts']} prompts of {report['prompt_tokens']:.0f} "
        f"tokens on average, {report['max_new_tokens']} new tokens, {report['repeats']} repeats. "
        f"{', '.join(map(' '.join, report['versions'].items()))}. {report['date']}.",
        *([f"\nNot compiled: {', '.join(report['not_compiled'])}."] if report["not_compiled"] else []),
        *(["\nInterrupted: some repeats are missing."] if report["interrupted"] else []),
    ]
    for temperature in dict.fromkeys(row["temperature"] for row in report["results"]):
        lines += [f"\nTemperature {temperature}:\n", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        rows = [row for row in report["results"] if row["temperature"] == temperature]
        lines += [f"| {' | '.join(column(row) for column in columns.values())} |" for row in rows]
    return "\n".join(lines) + "\n"


def plot(results: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw bars of tokens per second, with a panel for each temperature: of whole answers, with their range over the
    repeats, and in light colours of decoding alone."""
    from matplotlib.figure import Figure  # takes a second to import

    temperatures = list(dict.fromkeys(row["temperature"] for row in results))
    count = len(temperatures)
    figure = Figure(figsize=(5 * count + 2, 1.5 + 0.4 * len(results) / count), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False, sharey=True)[0]
    for temperature, panel in zip(temperatures, panels, strict=True):
        panel.set_title(f"temperature {temperature}")
        rows = [r for r in results if r["temperature"] == temperature and r["tokens_per_second"]]
        names = [row["name"] for row in rows]
        colour = ["tab:gray" if name == BASELINE else "tab:blue" for name in names]
        answers = [row["answer_tokens_per_second"] for row in rows]
        medians = [rate["median"] for rate in answers]
        reach = [[r["median"] - r["min"] for r in answers], [r["max"] - r["median"] for r in answers]]
        panel.barh(names, [row["tokens_per_second"]["median"] for row in rows], color=colour, alpha=0.35)
        panel.barh(names, medians, xerr=reach, color=colour, capsize=3)
        panel.set_xlabel("tokens per second: whole answers; light: decoding alone")
        panel.grid(alpha=0.3, axis="x")
    panels[0].invert_yaxis()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
