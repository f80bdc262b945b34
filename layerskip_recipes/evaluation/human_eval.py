"""HumanEval (Chen et al., arXiv 2107.03374): pass@1, by running each program that the model wrote against its tests.

The programs run on this machine, each in a process of its own with limits of time, memory, file size and (not for root,
whom the system does not hold to it) processes, in an empty folder, without environment and input. That stops accidents,
not attacks: it is no sandbox, so nothing runs unless the config says `execute: true`.
"""

import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

from tqdm import tqdm

from layerskip_recipes.config.checks import check_choice, check_number, check_text
from layerskip_recipes.data.json_lines import read_json_lines
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.evaluation.answers import Answers, speed
from layerskip_recipes.generation.sampling import Sampler

# What follows the function is not the answer (section 2.1 of the paper).
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
# The exit status of a program whose tests all ran: 0 would be exit() in the middle of it.
PASSED = 77
# Limits come first, in the child itself: code between fork and exec is not safe in a process with threads. The
# program is read from stdin, which is at its end then.
GUARD = """
import os, resource, sys
memory, seconds, passed = map(int, sys.argv[1:])
limits = {"AS": memory, "CPU": seconds, "FSIZE": 2**20, "NPROC": 0, "CORE": 0}
for name, limit in limits.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
exec(compile(sys.stdin.buffer.read(), "<program>", "exec"), {"__name__": "__main__"})
os._exit(passed)
"""


@dataclass(frozen=True)
class HumanEval:
    """The `human_eval` section.

    Args:
        file: HumanEval.jsonl or HumanEval.jsonl.gz.
        execute: true allows to run what the model writes.
        timeout: seconds of each program.
        memory_mb: address space of each program.
        count: the first so many problems; None: all.
        temperature: of sampling; 0 is greedy.

    Raises:
        ValueError: if a value is out of range, or execution is not allowed.
    """

    file: str | None = None
    execute: bool = False
    timeout: float = 3.0
    memory_mb: int = 1024
    count: int | None = None
    temperature: float = 0.0

    def __post_init__(self) -> None:
        check_text("human_eval.file", self.file, example="HumanEval.jsonl.gz")
        check_choice("human_eval.execute", self.execute, (True, False))
        check_number("human_eval.timeout", self.timeout, minimum=0, above=True, integer=False, example=3.0)
        check_number("human_eval.memory_mb", self.memory_mb, minimum=1, example=1024)
        check_number("human_eval.count", self.count, minimum=1, optional=True, example=20)
        check_number("human_eval.temperature", self.temperature, minimum=0, integer=False, example=0.2)
        if not self.execute:
            raise ConfigError(
                "human_eval.execute: false, and pass@1 means to run programs that the model wrote, on this machine, "
                "with limits but no sandbox. Where that can do no harm (a container, a virtual machine) allow it: "
                "human_eval.execute=true"
            )


@dataclass(frozen=True)
class Problem:
    """A function to complete: its beginning, its name, and the source of `check(candidate)`."""

    task_id: str
    prompt: str
    entry_point: str
    test: str

    def program(self, completion: str) -> str:
        """The completed function and its tests."""
        return f"{self.prompt}{completion}\n\n{self.test}\n\ncheck({self.entry_point})\n"


def read_problems(file: str, count: int | None = None) -> list[Problem]:
    """The problems of a JSONL file, perhaps compressed.

    Args:
        file: its path; .gz is decompressed.
        count: the first so many; None: all.

    Raises:
        ValueError: if it cannot be read, or a line is broken: its number, and the field.
    """
    problems: dict[str, Problem] = {}
    for at, line in islice(read_json_lines(file, "human_eval.file").items(), count):
        where = f"human_eval.file: {file!r} line {at}"
        problem = _problem(line, where)
        if problem.task_id in problems:
            raise ConfigError(f"{where}: task_id {problem.task_id!r} is there a second time")
        problems[problem.task_id] = problem
    if not problems:
        raise ConfigError(f"human_eval.file: {file!r} holds no problem; for example HumanEval.jsonl.gz")
    return list(problems.values())


def _problem(line: Mapping[str, Any], where: str) -> Problem:
    names = [field.name for field in fields(Problem)]
    for name in names:
        if not isinstance(line.get(name), str) or not line[name]:
            raise ConfigError(f"{where}: {name} is missing, or no text. Each line needs {', '.join(names)}")
    if not line["entry_point"].isidentifier():
        raise ConfigError(f"{where}: entry_point {line['entry_point']!r} is no name of a function")
    return Problem(**{name: line[name] for name in names})


def run_program(source: str, timeout: float, memory_mb: int) -> str:
    """Run a program in a process of its own, and end whatever it started.

    Args:
        source: Python.
        timeout: seconds of wall clock, the interpreter's start included.
        memory_mb: address space, in MiB.

    Returns:
        "passed" if it ran to its end; "timed out"; or "failed: " and the last line of its error.
    """
    limits = [memory_mb * 2**20, math.ceil(timeout) + 1, PASSED]
    with (
        tempfile.TemporaryDirectory(prefix="layerskip-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as program,
        tempfile.TemporaryFile() as errors,
    ):
        program.write(source.encode(errors="replace"))
        program.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", GUARD, *map(str, limits)],
            cwd=folder,
            env={"TMPDIR": folder},
            stdin=program,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            left = _end_group(process)
        if left:
            return "failed: it left processes behind"
        if process.returncode == PASSED:
            return "passed"
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().split("\n")[-1]
        return f"failed: {said[:200] or f'exit status {process.returncode}'}"


def _end_group(process: subprocess.Popen) -> bool:
    """Kill a program and all that it started; whether there was anything left to kill."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    process.wait()
    return True


def check_execution(section: HumanEval) -> None:
    """Raises a ValueError if not even an empty program runs within the limits, on this machine."""
    outcome = run_program("", section.timeout, section.memory_mb)
    if outcome != "passed":
        raise ConfigError(
            f"human_eval: an empty program does not run within timeout={section.timeout} and "
            f"memory_mb={section.memory_mb} here ({outcome}); for example human_eval.timeout=3.0 "
            "human_eval.memory_mb=1024"
        )


def pass_at_1(answers: Answers, problems: Sequence[Problem], section: HumanEval, max_new_tokens: int) -> dict[str, Any]:
    """One completion of each problem, run against its tests.

    Args:
        answers: writes the completions.
        problems: of `read_problems`.
        section: limits and temperature.
        max_new_tokens: of a completion.

    Returns:
        {"pass@1": the share that passed, "problems": how many, "tokens", "tokens_per_second", "acceptance_rate" if
        there were drafts, "results": {task_id: {"passed", "outcome", "completion"}}}.
    """
    prompts = [answers.tokenizer.encode(problem.prompt, add_bos=True, add_eos=False) for problem in problems]
    completions, stats = answers(prompts, max_new_tokens, STOPS, Sampler(section.temperature), name="human_eval")
    results = {}
    for problem, completion in zip(problems, tqdm(completions, desc="running"), strict=True):
        outcome = run_program(problem.program(completion), section.timeout, section.memory_mb)
        results[problem.task_id] = {"passed": outcome == "passed", "outcome": outcome, "completion": completion}
    passed = sum(result["passed"] for result in results.values())
    print(f"\nhuman_eval: pass@1 {passed / len(results):.3f} ({passed} of {len(results)})")
    return {"pass@1": passed / len(results), "problems": len(results), **speed(stats), "results": results}
