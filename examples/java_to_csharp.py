"""Write train.jsonl and test.jsonl for the `qa/*` configs, from public Java methods with their C# versions.

    git clone --depth 1 https://github.com/microsoft/CodeXGLUE
    python examples/java_to_csharp.py CodeXGLUE csharp

    input:  Translate to C#: public int size() {return count;}
    output: public virtual int Size(){return count;}

The data are the task code-to-code-trans of CodeXGLUE (Computational Use of Data Agreement), whose paper is
https://arxiv.org/abs/2102.04664. The methods are from Lucene, POI, JGit and Antlr. The script keeps the split into
training and test methods.
"""

import sys
from pathlib import Path

from qa_files import write_splits

DATA = Path("Code-Code/code-to-code-trans/data")


def methods(file: Path) -> list[str]:
    """One method on each line. Strings in the code may have other line breaks than "\\n"."""
    return file.read_text(encoding="utf-8").rstrip("\n").split("\n")


def pairs(data: Path, split: str) -> list[dict[str, str]]:
    """The Java methods of a split with their translations."""
    java, csharp = (methods(data / f"{split}.java-cs.txt.{language}") for language in ("java", "cs"))
    return [
        {"input": f"Translate to C#: {method.strip()}", "output": translation.strip()}
        for method, translation in zip(java, csharp, strict=True)
    ]


def main() -> None:
    data, folder = Path(sys.argv[1]) / DATA, Path(sys.argv[2])
    write_splits(folder, {split: pairs(data, split) for split in ("train", "test")}, "methods")


if __name__ == "__main__":
    main()
