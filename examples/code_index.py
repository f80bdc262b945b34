"""Write train.jsonl and test.jsonl for the `qa/*` configs: functions of Python's standard library, indexed as JSON.

    python examples/code_index.py index

    input:  Index as JSON: (the source code of a short function)
    output: {"function": "join", "parameters": ["a", "p"], "returns": true, "calls": ["os.fspath", "map"]}

The code is that of the running interpreter, so the data differ between versions of Python. The test functions are in
files that no training function is in.
"""

import ast
import json
import random
import sys
import textwrap
from pathlib import Path
from typing import Any

from qa_files import write_splits

from layerskip_recipes.quickstart import stdlib_texts

MAX_CHARACTERS = 300


def index_entry(node: ast.FunctionDef) -> dict[str, Any]:
    names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    calls = [ast.unparse(inner.func) for inner in ast.walk(node) if isinstance(inner, ast.Call)]
    returns = any(isinstance(inner, ast.Return) and inner.value is not None for inner in ast.walk(node))
    return {"function": node.name, "parameters": names, "returns": returns, "calls": list(dict.fromkeys(calls))}


def pairs(texts: dict[str, str]) -> list[dict[str, str]]:
    """The distinct short functions of source files with their index entries, shuffled."""
    entries: dict[str, str] = {}  # by source code
    for text in texts.values():
        lines = text.splitlines(keepends=True)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                source = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno])).rstrip()
                if len(source) <= MAX_CHARACTERS:
                    entries[source] = json.dumps(index_entry(node))
    shuffled = [{"input": f"Index as JSON:\n{source}", "output": entry} for source, entry in entries.items()]
    random.Random(0).shuffle(shuffled)
    return shuffled


def main() -> None:
    splits = {"train": pairs(stdlib_texts("train")), "test": pairs(stdlib_texts("heldout"))}
    write_splits(Path(sys.argv[1]), splits, "functions")


if __name__ == "__main__":
    main()
