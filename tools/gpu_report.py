"""Check and measure this package on one GPU, and write a page of results, in about 40 minutes.

    python tools/gpu_report.py --list
    python tools/gpu_report.py --out gpu_report                  # all steps
    python tools/gpu_report.py --out gpu_report --budget 570     # run what fits into 570 seconds
    python tools/gpu_report.py --out gpu_report --only decode_8b

Each step runs in its own process (tools/gpu_steps.py) with a time limit, and writes NAME.json and NAME.log to the
folder. After a failed step the page shows its traceback, and the next step runs. A second call runs the steps that have
no result or that timed out; --only repeats steps. The page, report.md, is updated after each step.

Nothing is downloaded; tools/gpu_wheels.py collects packages for a machine without a network. Models have random
weights, except --model-dir and a small model trained here. They need 20 GB of disk space.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROGRAM = Path(__file__).with_name("gpu_steps.py")


@dataclass(frozen=True)
class Step:
    """A step's title on the page and its time limit in seconds."""

    title: str
    limit_s: float


# The first two steps measure what ESTIMATES say, in ten minutes.
STEPS = {
    "decode_1b": Step("Decoding with the shape of Llama 3.2 1B, random weights, bf16, batch 1", 240),
    "decode_8b": Step("Decoding with the shape of Llama 3 8B, random weights, bf16, batch 1", 330),
    "environment": Step("Environment, and a tiny run from training to generation", 240),
    "tests": Step("Tests marked `gpu`", 420),
    "drafts_1b": Step("Other drafts and longer texts, and transformers, with the shape of Llama 3.2 1B", 300),
    "drafts_8b": Step("Other drafts and longer texts, and transformers, with the shape of Llama 3 8B", 420),
    "batches": Step("Batches of 8 and 32, random weights, bf16", 420),
    "lossless": Step("Outputs of self-speculation beside plain decoding, small trained model", 360),
    "train_1b": Step("Training with the shape of Llama 3.2 1B, random weights", 480),
    "train_8b": Step("Training with the shape of Llama 3 8B, random weights", 360),
    "finetune": Step("Finetuning the model in --model-dir, with a draft beside it", 540),
}


Rows = Mapping[str, Mapping[str, Any]]  # of a step, by method: the first value of each column, after the shortest text


@dataclass(frozen=True)
class Estimate:
    """What docs/gpu.md expects for one H100: `least` <= the value <= `most`. A KeyError: it was not measured."""

    text: str
    step: str
    value: Callable[[Rows], float]
    least: float = 0.0
    most: float = math.inf


def ms(rows: Rows, method: str) -> float:
    """Of a round."""
    return rows[method]["ms a round"]["median"]


def per_byte(method: str) -> Callable[[Rows], float]:
    """A round's time divided by the time to read its bytes."""
    return lambda rows: ms(rows, method) / rows[method]["ms to read"]


def as_one(drafts: str) -> Callable[[Rows], float]:
    """A round's time as one CUDA graph divided by its time as a graph for each step."""
    return lambda rows: ms(rows, f"{drafts}{ONE_GRAPH}") / ms(rows, drafts)


PLAIN, ONE_GRAPH = "baseline", ", one graph"
DRAFTS_1B, DRAFTS_8B = (f"exit {exit_layer}, 6 drafts of 4096 tokens" for exit_layer in (2, 4))
TOKENS = 0.7 * 6 + 1  # of a round, if 70% of the drafted tokens are accepted
ESTIMATES = (
    Estimate("1B without drafts: tokens/s, 600 or more", "decode_1b", lambda rows: 1000 / ms(rows, PLAIN), least=600),
    Estimate("1B without drafts: time / time to read the bytes, at most 2.25", "decode_1b", per_byte(PLAIN), most=2.25),
    Estimate(
        f"1B, {DRAFTS_1B}, 70% accepted: tokens/s, 1500 or more",
        "decode_1b",
        lambda rows: 1000 * TOKENS / ms(rows, DRAFTS_1B),
        least=1500,
    ),
    Estimate(f"1B, {DRAFTS_1B}: time / time to read, at most 2.25", "decode_1b", per_byte(DRAFTS_1B), most=2.25),
    Estimate(
        f"1B, {DRAFTS_1B}: a draft step / a plain step, at most 0.15",
        "decode_1b",
        lambda rows: rows[DRAFTS_1B]["ms draft"] / 6 / ms(rows, PLAIN),
        most=0.15,
    ),
    Estimate(
        f"1B, {DRAFTS_1B}: CUDA graphs launched in a round, 8",
        "decode_1b",
        lambda rows: rows[DRAFTS_1B]["CUDA graphs a round"],
        least=8,
        most=8,
    ),
    Estimate("1B: a round as one CUDA graph / as 8, less than 1", "decode_1b", as_one(DRAFTS_1B), most=1),
    Estimate("8B without drafts: tokens/s, at most 223", "decode_8b", lambda rows: 1000 / ms(rows, PLAIN), most=223),
    Estimate("8B without drafts: time / time to read the bytes, at most 1.3", "decode_8b", per_byte(PLAIN), most=1.3),
    Estimate(f"8B, {DRAFTS_8B}: time / time to read, at most 1.3", "decode_8b", per_byte(DRAFTS_8B), most=1.3),
    Estimate(
        f"8B, {DRAFTS_8B}, 70% accepted: speed-up, 2.5 or more",
        "decode_8b",
        lambda rows: TOKENS * ms(rows, PLAIN) / ms(rows, DRAFTS_8B),
        least=2.5,
    ),
    Estimate("8B: a round as one CUDA graph / as 8, at most 1.02", "decode_8b", as_one(DRAFTS_8B), most=1.02),
)
TIMED_OUT = "timed out"  # the next call runs such a step again, with what it has compiled
PACKAGES = ("torch", "triton", "torchtune", "torchao", "transformers", "liger-kernel", "layerskip-recipes")


def output_of(*command: str) -> str:
    """The output of a command, or "unknown" if it fails."""
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


def circumstances() -> dict[str, str]:
    """GPU, driver, versions and commit, without imports that could fail."""
    card = output_of("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    found = {"card, memory, driver": card, "processors": f"{os.cpu_count()}", "python": platform.python_version()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found | {"commit": output_of("git", "rev-parse", "HEAD"), "date": time.strftime("%Y-%m-%d %H:%M %z")}


def run_step(name: str, limit_s: float, args: argparse.Namespace) -> dict[str, Any]:
    """Run a step in its own process. Its rows and log survive a crash."""
    rows, log = args.out / f"{name}.rows", args.out / f"{name}.log"
    rows.unlink(missing_ok=True)
    command = [sys.executable, str(PROGRAM), name, str(rows), "--device", args.device]
    command += ["--work", str(args.out.resolve() / "work")] + (["--tiny"] if args.tiny else [])
    command += ["--model-dir", str(args.model_dir)] if args.model_dir else []
    started, status = time.monotonic(), TIMED_OUT
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = "failed" if process.wait(limit_s) else "done"
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):  # also ends the processes that the step started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return {
        "status": status,
        "seconds": time.monotonic() - started,
        "limit_s": limit_s,
        "command": shlex.join(["python", *sys.argv]),
        "on": circumstances(),
        "rows": [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else [],
        "error": None if status == "done" else log.read_text(errors="replace")[-4000:],
    }


# ---- the page ----


def shown(value: Any) -> str:
    """A number as text; for several measurements, the median and range."""
    if isinstance(value, Mapping):
        low, high = shown(value["min"]), shown(value["max"])
        return shown(value["median"]) + ("" if low == high else f" ({low} to {high})")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "-" if value is None else str(value)


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([shown(row.get(column)) for column in columns] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def verdicts(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each estimate beside its measurement."""
    verdicts = []
    for estimate in ESTIMATES:
        rows = defaultdict[str, dict[str, Any]](dict)
        for row in results.get(estimate.step, {}).get("rows", []):
            if "method" in row:
                rows[row["method"]] = row | rows[row["method"]]
        value, verdict = None, "not measured yet"
        with suppress(KeyError):
            value = estimate.value(rows)
            verdict = "holds" if estimate.least <= value <= estimate.most else "does not hold"
        verdicts.append({"estimate for an H100": estimate.text, "measured": value, "verdict": verdict})
    return verdicts


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["# Report of a GPU", ""]
    if results:
        last = max(results.values(), key=lambda result: result["on"]["date"])
        lines += [f"- {name}: {value}" for name, value in last["on"].items()]
    lines += [f"- command: `{command}`" for command in dict.fromkeys(r["command"] for r in results.values())]
    lines += ["", "## Estimates of docs/gpu.md", "", *table(verdicts(results))]
    lines += ["", "Repeated measurements are shown as median (range)."]
    for name, step in STEPS.items():
        lines += ["", f"## {step.title}", ""]
        if name not in results:
            lines.append("Not run yet.")
            continue
        result = results[name]
        lines.append(f"`{name}` {result['status']} after {result['seconds']:.0f} s.")
        if result["rows"]:
            lines += ["", *table(result["rows"])]
        if result["error"]:
            lines += ["", "```", result["error"].strip().replace("```", "'''"), "```"]
    return "\n".join(lines) + "\n"


# ---- the steps in their order ----


def read_results(out: Path) -> dict[str, dict[str, Any]]:
    """The results of earlier calls, in step order."""
    files = {name: out / f"{name}.json" for name in STEPS}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def run_steps(args: argparse.Namespace) -> bool:
    """Run the requested steps or those without a result. Returns whether all succeeded."""
    ends = time.monotonic() + args.budget
    results = read_results(args.out)
    waiting = [name for name in STEPS if results.get(name, {}).get("status", TIMED_OUT) == TIMED_OUT]
    for name in args.only or waiting:
        left_s, limit_s = ends - time.monotonic(), args.limit or STEPS[name].limit_s
        if left_s < limit_s / 3:
            print(f"{left_s:.0f} s of the budget are left, too few for {name}: call again for the other steps")
            break
        print(f"{name}: at most {min(left_s, limit_s):.0f} s", flush=True)
        result = run_step(name, min(left_s, limit_s), args)
        print(f"{name}: {result['status']} after {result['seconds']:.0f} s", flush=True)
        (args.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        results = read_results(args.out)
        (args.out / "report.md").write_text(page(results))
        for row in verdicts({name: result}) if result["rows"] else ():
            if row["measured"] is not None:
                print(f"{row['estimate for an H100']}: {shown(row['measured'])}, {row['verdict']}", flush=True)
    print(args.out / "report.md")
    return all(result["status"] == "done" for result in results.values())


def main(arguments: Sequence[str]) -> None:
    """Run the steps; exit with status 1 if one did not succeed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_report"), help="the folder (default gpu_report)")
    parser.add_argument("--list", action="store_true", help="print the steps and their status")
    parser.add_argument("--only", nargs="+", choices=STEPS, metavar="STEP", help="run these steps, finished or not")
    parser.add_argument("--budget", type=float, default=3600, metavar="SECONDS", help="for all steps (default 3600)")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="time limit for each step, instead of its own")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the steps with --tiny")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the steps")
    parser.add_argument("--model-dir", type=Path, help="a folder with an instruct model, to finetune in the last step")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step's processes end too
    if args.list:
        there = read_results(args.out)
        for name, step in STEPS.items():
            print(f"{name:<12} {step.limit_s:>4.0f} s  {there.get(name, {}).get('status', '-'):<10} {step.title}")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    sys.exit(0 if run_steps(args) else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
