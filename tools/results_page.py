"""Runs the benchmarks in a Markdown page and writes their results into the page.

    python tools/results_page.py docs/results.md [--only NAME ...] [--missing]

A block is two comments and the lines between them:

    <!-- run quickstart_benchmark: tune run layerskip_benchmark --config quickstart/benchmark -->
    <!-- end -->

The script runs the command and replaces the lines between the comments by the results. It copies the picture to
PAGE_NAME.png beside the page. The last line of the command's output names report and picture. The page is saved after
each command; after an interruption, `--missing` runs only the commands of empty blocks.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerskip_recipes.benchmark.report import COLUMNS, body

SHOWN = (
    *("method", "answers, tokens/s", "speed-up of answers", "tokens/s", "speed-up", "not looping", "loops"),
    *("acceptance", "tokens/round", "ideal", "efficiency", "identical"),
)
BLOCK = re.compile(r"(<!-- run (?P<name>\w+): (?P<command>.+?) -->\n)(?P<figures>.*?)(<!-- end -->)", flags=re.S)


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
        lines = [f"\n    {command}\n", *body(report, {name: COLUMNS[name] for name in SHOWN})]
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
