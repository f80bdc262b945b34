"""Runs the benchmarks in a Markdown page and writes their results into the page.

    python tools/results_page.py docs/results.md

A block is two comments and the lines between them:

    <!-- run quickstart_benchmark: tune run layerskip_benchmark --config quickstart/benchmark -->
    <!-- end -->

The script runs the command and replaces the lines between the comments by the results. It copies the picture to
PAGE_NAME.png beside the page. The last line of the command's output names report and picture.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from layerskip_recipes.benchmark.report import COLUMNS, body

SHOWN = (
    *("method", "answers, tokens/s", "speed-up of answers", "tokens/s", "speed-up", "not looping", "loops"),
    *("acceptance", "tokens/round", "ideal", "efficiency", "identical"),
)
BLOCK = re.compile(r"(?P<start><!-- run (?P<name>\w+): (?P<command>.+?) -->\n).*?<!-- end -->", flags=re.S)


def run(command: str) -> tuple[dict[str, Any], Path | None]:
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
    return json.loads(Path(printed["json"]).read_text()), Path(printed["picture"]) if "picture" in printed else None


def filled(block: re.Match[str], page: Path) -> str:
    """A block with the results of its command, whose picture goes beside the page."""
    report, picture = run(block["command"])
    lines = [f"\n    {block['command']}\n", *body(report, {name: COLUMNS[name] for name in SHOWN})]
    if picture is not None:
        copy = page.with_name(f"{page.stem}_{block['name']}.png")
        shutil.copy(picture, copy)
        lines.append(f"\n![{block['name'].replace('_', ' ')}]({copy.name})")
    return block["start"] + "\n".join(lines) + "\n\n<!-- end -->"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="a Markdown file with blocks")
    page = parser.parse_args(arguments).page
    new = {block["name"]: filled(block, page) for block in BLOCK.finditer(page.read_text())}
    # Read the page again: somebody may have edited it while the commands ran.
    page.write_text(BLOCK.sub(lambda block: new.get(block["name"], block[0]), page.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
