"""The report of a generation run: totals over prompts, derived figures, and the printed form."""

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torchtune import utils

from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.stats import GenerationStats, is_looping, memory_bandwidth

log = utils.get_logger("INFO")

# Statistics that a report has under their own names.
REPORTED = (
    "tokens",
    "prefill_s",
    "prefill_tokens",
    "reused_tokens",
    "decode_s",
    "draft_s",
    "verify_s",
    "compile_s",
    "tokens_per_second",
    "answer_tokens_per_second",
    "drafted",
    "accepted",
    "acceptance_rate",
    "rounds",
    "accepted_histogram",
    "acceptance_by_position",
    "bytes_per_token",
)


def report_path(document: Path, key: str, interrupted: bool) -> Path:
    """The path of a report or picture; an interrupted run overwrites no earlier one."""
    if not (interrupted and document.exists()):
        return document
    log.warning("%s: the %s of an earlier run stays", key, document)
    names = (document.with_stem(f"{document.stem}_interrupted{n or ''}") for n in count())
    return next(path for path in names if not path.exists())


@dataclass
class Totals:
    """Statistics and outputs of one decoding method over all prompts."""

    stats: GenerationStats = field(default_factory=GenerationStats)
    outputs: dict[int, list[int]] = field(default_factory=dict)

    def add(self, prompts: Sequence[int], generation: Generation) -> None:
        """Add the non-empty outputs of a batch, by the numbers of their prompts."""
        self.stats += generation.stats
        self.outputs |= {i: output for i, output in zip(prompts, generation.generated, strict=True) if output}


def make_report(ours: Totals, plain: Totals | None, device: torch.device) -> dict[str, Any]:
    """The figures of a run; `plain` is the run without drafts on the same prompts, the baseline."""
    stats = ours.stats
    peak = peak_memory_bytes(device)  # before the bandwidth is measured, which takes memory too
    bandwidth = memory_bandwidth(device)
    per_second = stats.tokens_per_second
    moved = None if stats.bytes_per_token is None or not per_second else stats.bytes_per_token * per_second
    report = {name: getattr(stats, name) for name in REPORTED} | {
        "accept_s": stats.accept_s if stats.drafted else None,
        "rounds_by_kind": dict(stats.rounds_by_kind),
        "accepted_per_round": safe_divide(stats.accepted, stats.row_rounds) if stats.drafted else None,
        "looping_outputs": sum(map(is_looping, ours.outputs.values())),
        "memory_bandwidth": bandwidth,
        "share_of_memory_bandwidth": moved / bandwidth if moved and bandwidth else None,
        "peak_memory_bytes": peak,
    }
    if plain is None:
        return report
    speedup = ratio(stats, plain.stats)
    of_baseline = ("tokens_per_second", "prefill_s", "decode_s", "tokens")
    return report | {
        **{f"baseline_{name}": getattr(plain.stats, name) for name in of_baseline},
        "speedup": speedup,
        "answer_speedup": ratio(stats, plain.stats, "answer_tokens_per_second"),
        **draft_figures(stats, plain.stats, speedup),
        "identical": ours.outputs == plain.outputs if ours.outputs else None,
    }


def draft_figures(stats: GenerationStats, plain: GenerationStats, speedup: float | None) -> dict[str, Any]:
    """Acceptance and cost of drafting, the ideal speed-up, and the share of it that was measured (engine efficiency).

    The ideal is (rho n + 1) / (s c + 1), with n drafted tokens and s draft steps per round (fewer with look-ups), and c
    the time of a draft step divided by that of a plain step.
    """
    rounds = stats.row_rounds
    num_drafted, steps = safe_divide(stats.drafted, rounds), safe_divide(stats.draft_steps, stats.rounds)
    plain_s, draft_s = safe_divide(plain.decode_s, plain.rounds), safe_divide(stats.draft_s, stats.draft_steps)
    cost = draft_s / plain_s if num_drafted and draft_s and plain_s else None
    ideal = None
    if num_drafted and steps is not None and plain_s and stats.acceptance_rate is not None:
        ideal = (stats.acceptance_rate * num_drafted + 1) / ((cost or 0.0) * steps + 1)
    return {
        "tokens_per_round": safe_divide(stats.tokens - stats.first_tokens, rounds) if stats.rounds else None,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "acceptance_rate": stats.acceptance_rate,
        "drafted_per_round": num_drafted or None,
        "draft_steps_per_round": steps if num_drafted else None,
        "draft_cost": cost,
        "ideal_speedup": ideal,
        "engine_efficiency": speedup / ideal if speedup and ideal else None,
    }


def safe_divide(a: float, b: float) -> float | None:
    return a / b if b else None


def ratio(a: GenerationStats, b: GenerationStats, rate: str = "tokens_per_second") -> float | None:
    """a's tokens per second divided by b's. The rate `answer_tokens_per_second` is that of whole answers."""
    fast, slow = getattr(a, rate), getattr(b, rate)
    return fast / slow if fast and slow else None


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of the device's allocator; on a CPU the peak resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def print_report(report: dict[str, Any]) -> None:

    def show(key: str, form: str = ".2f", factor: float = 1.0) -> str:
        return "-" if report.get(key) is None else format(report[key] * factor, form)

    reused = f"; {report['reused_tokens']} tokens were in the cache" if report["reused_tokens"] else ""
    compiled = f"; compiling {report['compile_s']:.1f} s more" if report["compile_s"] else ""
    speedup = f", {show('answer_speedup')}x" if "answer_speedup" in report else ""
    lines = {
        "tokens": str(report["tokens"]),
        "prefill": f"{show('prefill_s')} s{reused}",
        "decode": f"{show('decode_s')} s, {show('tokens_per_second', '.1f')} tokens/s{compiled}",
        "whole answers": f"{show('answer_tokens_per_second', '.1f')} tokens/s{speedup}",
        "phases": f"draft {show('draft_s')} s, verify {show('verify_s')} s, rest {show('accept_s')} s",
        "acceptance": f"{show('acceptance_rate')} ({report['accepted']} of {report['drafted']}), "
        f"{show('accepted_per_round')} per round",
        "by position": " ".join(f"{rate:.2f}" for rate in report["acceptance_by_position"]),
        "rounds": ", ".join(f"{count} {kind}" for kind, count in report["rounds_by_kind"].items()),
        "looping outputs": f"{report['looping_outputs']} of {report['prompts']}",
        "memory": f"peak {show('peak_memory_bytes', '.0f', 1e-6)} MB; {show('bytes_per_token', '.1f', 1e-6)} MB read "
        f"per token, {show('share_of_memory_bandwidth', '.0%')} of the bandwidth",
        "plain decoding": f"{show('baseline_tokens_per_second', '.1f')} tokens/s",
        "speed-up": f"{show('speedup')}x",
        "ideal": f"{show('ideal_speedup')}x at a draft cost of {show('draft_cost', '.3f')}; "
        f"engine efficiency {show('engine_efficiency')}",
        "identical output": {True: "yes", False: "NO", None: "-"}[report.get("identical")],
    }
    # Leave out what does not apply to this run.
    left_out = [] if report["drafted"] else ["phases", "by position"]
    left_out += [] if len(report["rounds_by_kind"]) > 1 else ["rounds"]
    left_out += [] if report.get("ideal_speedup") else ["ideal"]
    left_out += [] if "speedup" in report else ["plain decoding", "speed-up", "identical output"]
    print(f"\n--- {report['prompts']} prompts, temperature {report['temperature']}")
    for name, text in lines.items():
        if name not in left_out:
            print(f"{name:<19}{text}")
