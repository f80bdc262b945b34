"""The commands and examples of the README and of docs/, as a reader finds them."""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in a language."""
    text = PAGES[page].read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.S | re.M)


def examples() -> dict[str, str]:
    """The YAML files of all pages: {name: content}. Their first line is a comment with the name."""
    found: dict[str, str] = {}
    for page in PAGES:
        for block in blocks(page, "yaml"):
            name = re.match(r"# (my\w*\.yaml)\n", block)
            assert name, f"{page}: an example has no name in its first line: {block[:60]!r}"
            assert name[1] not in found, f"{page}: {name[1]} is on another page too"
            found[name[1]] = block
    return found


def commands(pages: Iterable[str] = PAGES) -> dict[str, list[str]]:
    """The command lines of pages without repetition: {line: words}, in the order of the pages.

    They are in fenced blocks and in indented lines. Lines that && or a backslash join are taken apart or joined, and
    variables of the environment that stand before a command are left out.
    """
    return {line: words for line, (words, _) in commands_and_short_runs(pages).items()}


def commands_and_short_runs(pages: Iterable[str] = PAGES) -> dict[str, tuple[list[str], list[str]]]:
    """`commands`, each with the words that a test appends to shorten its run: {line: (words, short)}.

    A comment before a block has these words, for all of its commands or for those of one recipe:
    `<!-- short: output_dir=here -->` and `<!-- short finetune: epochs=1 -->`.
    """
    found: dict[str, tuple[list[str], list[str]]] = {}
    for page in pages:
        text = PAGES[page].read_text(encoding="utf-8")
        fenced = re.findall(r"^((?:<!-- short.* -->\n)*)```bash\n((?s:.*?))^```$", text, flags=re.M)
        indented = [("", line) for line in re.findall(r"^    (tune run .*)$", text, flags=re.M)]
        for comments, block in [*fenced, *indented]:
            short_runs = re.findall(r"<!-- short ?(\w*): (.*) -->", comments)
            for line in block.replace("\\\n", " ").splitlines():
                for part in line.split("&&"):
                    command = re.sub(r"^(\s*[A-Z_]+=\S+)+ ", "", part).strip()
                    if command and not command.startswith("#"):
                        short = [text for recipe, text in short_runs if f"layerskip_{recipe}" in command or not recipe]
                        found.setdefault(command, (shlex.split(command, comments=True), shlex.split(" ".join(short))))
    return found
