"""Write train.jsonl and test.jsonl for the `qa/*` configs and paper/topv2_1_5B, from TOPv2, the paper's narrow task.

    python examples/topv2.py /tmp/TOPv2

/tmp/TOPv2 is the unpacked data set (CC BY-SA 4.0) of https://fb.me/TOPv2Dataset, whose paper is
https://arxiv.org/abs/2010.03546. The script reads its files, such as alarm_train.tsv and alarm_test.tsv, and writes
into the same folder.
"""

import sys
from pathlib import Path

from qa_files import write_splits


def pairs(file: Path) -> list[dict[str, str]]:
    """The sentences of a file with their semantic parses. Quotation marks are part of the sentences."""
    header, *rows = (line.split("\t") for line in file.read_text(encoding="utf-8").split("\n") if line)
    columns = [header.index(name) for name in ("utterance", "semantic_parse")]
    return [dict(zip(("input", "output"), (row[column] for column in columns), strict=True)) for row in rows]


def main() -> None:
    folder = Path(sys.argv[1])
    files = {split: sorted(folder.glob(f"*_{split}.tsv")) for split in ("train", "test")}
    splits = {split: [pair for file in tables for pair in pairs(file)] for split, tables in files.items()}
    write_splits(folder, splits, "sentences")


if __name__ == "__main__":
    main()
