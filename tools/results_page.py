"""Runs the commands in a Markdown page and writes their results into the page.

    python tools/results_page.py docs/results.md [--only NAME ...] [--missing]

A block is two comments and the lines between them:

    <!-- run quickstart_benchmark: tune run layerskip_benchmark --config quickstart/benchmark -->
    <!-- end -->

The script runs the command and replaces the lines between the comments by the results. It copies the picture to
PAGE_NAME.png beside the page. The report is the JSON document in the last line of the command's output, or the file
that this line names as "json". The page is saved after each command; after an interruption, `--missing` runs only
the commands of empty blocks.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerskip_recipes.benchmark.report import COLUMNS, show

Report = Mapping[str, Any]
BLOCK = re.compile(r"(<!-- run (?P<name>\w+): (?P<command>.+?) -->\n)(?P<figures>.*?)(<!-- end -->)", flags=re.S)


def run(command: str) -> tuple[Report, Path | None]:
    """Run a command. Returns its report and picture (or None)."""
    print(f"+ {command}", flush=True)
    # Find this environment's programs even if it is not activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        shlex.split(command), capture_output=True, text=True, check=False, env=os.environ | {"PATH": path}
    )
    if done.returncode:
        sys.exit(f"{command!r} failed: {(done.stdout + done.stderr).strip()[-600:]}")
    printed = json.loads(done.stdout.strip().splitlines()[-1])
    report = json.loads(Path(printed["json"]).read_text()) if "json" in printed else printed
    return report, Path(printed["picture"]) if "picture" in printed else None


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows]]


def training_cost(report: Report) -> list[str]:
    rows = [[name, f"{row['seconds']:.3f}", f"{row['peak_gb']:.2f}"] for name, row in report["figures"].items()]
    ratios = [f"- {name}: {ratio:.2f}" for name, ratio in report["ratios"].items()]
    head = f"{report['batch']} x {report['seq_len']} random tokens, exits {report['exits']} and the last.\n"
    return [head, *table(["method", "s / step", "peak GiB"], rows), "", *ratios]


def quality_by_exit(report: Report) -> list[str]:
    rows = [
        [e, *(f"{row[key]:.3f}" for key in ("loss", "accuracy", "agreement")), show(row["accepted_length"], ".2f")]
        for e, row in report["exits"].items()
    ]
    return table(["exit", "loss, nats", "accuracy", "agreement", "accepted length"], rows)


def _measured_on(report: Report) -> str:
    versions = ", ".join(map(" ".join, report["versions"].items()))
    bandwidth = f"{report['memory_bandwidth'] / 1e9:.1f} GB/s"
    compiled = "compiled" if report["compiled"] else "not compiled"
    return (
        f"{report['device']}, {report['threads']} threads, {bandwidth}, {report['config']['dtype']}; {versions}; "
        f"{report['date']}. {report['prompts']} prompts x {report['max_new_tokens']} tokens, batch "
        f"{report['batch_size']}, {report['repeats']} repeats, {compiled}."
    )


def speed(report: Report) -> list[str]:
    lines = [_measured_on(report)]
    lines += [f"\n{name} is left out ({why})." for name, why in report["peers_left_out"].items()]
    drafts = ("acceptance", "tokens/round", "ideal", "efficiency")
    answers = ("answers, tokens/s", "speed-up of answers")
    shown = ("method", *answers, "tokens/s", "speed-up", "not looping", "loops", *drafts, "identical")
    for temperature in dict.fromkeys(row["temperature"] for row in report["results"]):
        of_temperature = [row for row in report["results"] if row["temperature"] == temperature]
        rows = [[COLUMNS[column](row) for column in shown] for row in of_temperature]
        lines += [f"\nTemperature {temperature}:\n", *table(shown, rows)]
    return lines


def tuner(report: Report) -> list[str]:
    """Predicted and measured speeds, the fastest variant first."""
    variants = [row for row in report["results"] if row["kind"] == "variant" and row["speedup"]]
    variants.sort(key=lambda row: -row["speedup"]["median"])
    rows = [[row["name"], show(row["predicted_speedup"], ".2f"), show(row["speedup"], ".2f")] for row in variants]
    return [f"{_measured_on(report)}\n", *table(["pair", "predicted", "measured"], rows)]


# A report is recognised by the first of these keys that it has.
FIGURES: dict[str, Callable[[Report], list[str]]] = {
    "ratios": training_cost,
    "exits": quality_by_exit,
    "tune": tuner,
    "results": speed,
}


def figures(report: Report) -> list[str]:
    for key, write in FIGURES.items():
        if report.get(key):
            return write(report)
    sys.exit(f"a report with {', '.join(report)} is unknown. Known: those with one of {', '.join(FIGURES)}")


def update(page: Path, only: Sequence[str], missing: bool) -> None:
    """Run the page's blocks (all, or those in `only`) and update it. `missing` skips blocks with results."""
    blocks = {block["name"]: block for block in BLOCK.finditer(page.read_text())}
    unknown = [name for name in only if name not in blocks]
    if unknown or not blocks:
        sys.exit(f"{page}: no block {', '.join(unknown) or 'at all'}. There: {', '.join(blocks) or 'none'}")
    for name in only or blocks:
        if missing and blocks[name]["figures"].strip():
            continue
        command = blocks[name]["command"]
        report, picture = run(command)
        lines = [f"\n    {command}\n", *figures(report)]
        if picture is not None:
            copy = page.with_name(f"{page.stem}_{name}.png")
            shutil.copy(picture, copy)
            lines.append(f"\n![{name.replace('_', ' ')}]({copy.name})")
        new = f"{blocks[name][1]}" + "\n".join(lines) + "\n\n<!-- end -->"
        # Read the page again: somebody may have edited it while the command ran.
        text = BLOCK.sub(
            lambda block: new if block["name"] == name else block[0],  # noqa: B023 - called at once
            page.read_text(),
        )
        whole = page.with_name(f".{page.name}")
        whole.write_text(text)
        whole.replace(page)  # an interruption leaves the old page or the new one


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="a Markdown file with blocks")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="run these blocks")
    parser.add_argument("--missing", action="store_true", help="run the blocks that have no figures yet")
    args = parser.parse_args(arguments)
    if not args.page.is_file():
        parser.error(f"{args.page} is no file. Allowed: a Markdown page; for example docs/results.md")
    update(args.page, args.only, args.missing)


if __name__ == "__main__":
    main(sys.argv[1:])
