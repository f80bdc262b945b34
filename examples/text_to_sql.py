"""Write train.jsonl and test.jsonl for the `qa/*` configs, from a public data set of questions with SQL queries.

    python examples/text_to_sql.py advising.json sql

advising.json (CC BY 4.0) is data/advising.json of https://github.com/jkkummerfeld/text2sql-data, whose paper is
https://arxiv.org/abs/1806.09029. The questions are about university courses. The script keeps
the data set's split by question.
"""

import json
import random
import sys
from pathlib import Path

from qa_files import write_splits


def pairs(queries: list[dict], split: str) -> list[dict[str, str]]:
    """Questions and SQL queries of a split, with the variables' values filled in."""
    found = []
    for query in queries:
        for sentence in query["sentences"]:
            if sentence["question-split"] == split:
                question, sql = sentence["text"], query["sql"][0]
                values = {v["name"]: v["example"] for v in query["variables"]} | sentence["variables"]
                for name in sorted(values, key=len, reverse=True):  # number10 before number1
                    question, sql = question.replace(name, values[name]), sql.replace(name, values[name])
                found.append({"input": question, "output": sql})
    return found


def main() -> None:
    queries, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    splits = {split: pairs(queries, split) for split in ("train", "test")}
    for lines in splits.values():
        random.Random(0).shuffle(lines)  # the file is sorted by query
    write_splits(folder, splits, "questions")


if __name__ == "__main__":
    main()
