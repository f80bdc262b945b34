"""Components for `prompts:` of a config: the tasks of the LayerSkip paper, and JSONL files.

Each returns a list of {"prompt": text, "response": text}; with `chat` the prompt is {"user": text}. The first `n_shot`
rows become examples before every prompt; the next `count` rows are measured. The paper names the data sets and the
number of examples. We chose the templates and the rows.
"""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from datasets import load_dataset
from pydantic import Field

from layerskip_recipes.config.schema import PositiveInt, Text, checked_arguments
from layerskip_recipes.data.json_lines import read_json_lines
from layerskip_recipes.errors import ConfigError

Row = tuple[str, Mapping[str, Any]]  # its place for error messages, its fields
Examples = list[dict[str, Any]]

Template = Annotated[Text, Field(examples=["\"'Question: {question}'\""])]  # quoted for the shell and for YAML
Source = Annotated[Text, Field(examples=["data.jsonl"])]
Split = Annotated[Text, Field(examples=["test"])]
Count = Annotated[int, Field(ge=1, examples=[100])]
ZeroOrMore = Annotated[int, Field(ge=0)]

CNN_DM, XSUM, HUMAN_EVAL = "abisee/cnn_dailymail", "EdinburghNLP/xsum", "openai/openai_humaneval"
# Arguments of `load_dataset` for names on the hub. CNN/DailyMail has several versions. `datasets` no longer runs XSum's
# script; the hub has a copy in Parquet.
HUB_OPTIONS = {CNN_DM: {"name": "3.0.0"}, XSUM: {"revision": "refs/convert/parquet"}}
JSON_LINES = (".jsonl", ".jsonl.gz")
# Arguments of `load_dataset` for files. They keep texts unchanged: "NA" stays a word, and quotes in a TSV stay quotes.
FILE_OPTIONS: dict[str, dict[str, Any]] = {
    ".json": {"path": "json"},
    ".parquet": {"path": "parquet"},
    ".csv": {"path": "csv", "keep_default_na": False},
    ".tsv": {"path": "csv", "keep_default_na": False, "sep": "\t", "quoting": csv.QUOTE_NONE},
}


@checked_arguments("prompts.")
def task(
    source: Source,
    split: Split = "test",
    *,
    prompt: Template,
    response: Template,
    n_shot: ZeroOrMore = 0,
    count: Count | None = 100,
    chat: bool = False,
) -> Examples:
    """Fill templates with the rows of a data set.

    Args:
        source: a data set on the hub, a local folder of one, or a file: .jsonl, .jsonl.gz, .json, .parquet, .csv, .tsv.
        split: ignored for a file.
        prompt: a Python format string over a row's fields, such as "Question: {question}\\nAnswer:".
        response: the format string of the reference. It follows an example's prompt directly, so start it with a space.
        n_shot: number of examples before every prompt.
        count: number of prompts to measure, at most; None for all.
        chat: format the prompt with the chat template, as a user's message.
    """
    return _few_shot(_load(source, split), prompt, response, n_shot, count, chat)


# The defaults of `task` for each data set.
cnn_dm_summarization = partial(
    task, source=CNN_DM, prompt="Article: {article}\nSummary:", response=" {highlights}", n_shot=1
)
xsum_summarization = partial(
    task, source=XSUM, prompt="Article: {document}\nSummary in one sentence:", response=" {summary}"
)
# Compares with the canonical solution and never executes code; lm-eval's task `humaneval` measures pass@1.
human_eval = partial(task, source=HUMAN_EVAL, prompt="{prompt}", response="{canonical_solution}", count=None)
# Needs a file of the data set. The config paper/topv2_1_5B finetunes a model with these templates.
topv2 = partial(task, prompt="{utterance}\n", response="{semantic_parse}")


@checked_arguments("prompts.")
def cnn_dm_language_modeling(
    source: Source = CNN_DM,
    split: Split = "test",
    prompt_words: PositiveInt = 100,
    response_words: PositiveInt = 100,
    count: Count | None = 100,
) -> Examples:
    """CNN/DailyMail: continue an article from its first words; skips articles that are too short."""
    rows = _cut_articles(_load(source, split), prompt_words, response_words)
    return _few_shot(rows, "{beginning}", "{rest}", n_shot=0, count=count)


@checked_arguments("prompts.")
def jsonl(
    path: Annotated[Text, Field(examples=["questions.jsonl"])],
    prompt: Template = "{prompt}",
    response: Template | None = "{response}",
    n_shot: ZeroOrMore = 0,
    count: Count | None = None,
    chat: bool = False,
) -> Examples:
    """Any task from a JSONL file; for the other arguments see `task`. `response` is None for questions alone."""
    return _few_shot(_read_lines(path, "prompts.path"), prompt, response, n_shot, count, chat)


# ---- from rows to prompts ----


def _few_shot(
    rows: Iterable[Row], prompt: str, response: str | None, n_shot: int, count: int | None, chat: bool = False
) -> Examples:
    rows = list(rows if count is None else islice(rows, n_shot + count))
    if len(rows) <= n_shot:
        raise ConfigError(
            f"prompts.n_shot: {n_shot} examples and a prompt need {n_shot + 1} rows, but only {len(rows)} fit. "
            "Allowed: fewer examples, or a larger file"
        )
    filled = [(_fill(prompt, row), None if response is None else _fill(response, row)) for row in rows]
    examples = "".join(f"{question}{answer or ''}\n\n" for question, answer in filled[:n_shot])
    prompts = ((examples + question, answer) for question, answer in filled[n_shot:])
    return [{"prompt": {"user": text} if chat else text, "response": answer} for text, answer in prompts]


def _fill(template: str, row: Row) -> str:
    """Fill a template with a row's fields; null counts as missing."""
    place, fields = row
    present = {name: value for name, value in fields.items() if value is not None}
    try:
        return template.format_map(present)
    except (LookupError, ValueError, AttributeError, TypeError) as e:
        raise ConfigError(
            f"prompts: the template {template!r} does not fit {place} ({e!r}). Allowed: its fields in braces "
            f"({', '.join(present)}), and {{{{ for a brace; for example 'Question: {{question}}'"
        ) from e


def _cut_articles(rows: Iterable[Row], prompt_words: int, response_words: int) -> Iterator[Row]:
    """Split each article that is long enough into its beginning and the rest."""
    for place, fields in rows:
        article = _fill("{article}", (place, fields))
        ends = [word.end() for word in re.finditer(r"\S+", article)]
        if len(ends) >= prompt_words + response_words:
            middle, end = ends[prompt_words - 1], ends[prompt_words + response_words - 1]
            yield place, {"beginning": article[:middle], "rest": article[middle:end]}


# ---- from files to rows ----


def _read_lines(path: str, key: str) -> Iterator[Row]:
    return ((f"{path!r} line {number}", fields) for number, fields in read_json_lines(path, key))


def _load(source: str, split: str) -> Iterator[Row]:
    """Read a source row by row: most tasks use few rows of a large table."""
    if source.endswith(JSON_LINES):
        return _read_lines(source, "prompts.source")
    options = FILE_OPTIONS.get(Path(source).suffix)
    try:
        if options is not None:
            table = load_dataset(data_files=source, split="train", **options)
        else:
            table = load_dataset(source, split=split, **HUB_OPTIONS.get(source, {}))
    except Exception as e:
        # The message of `datasets` is often only "an error occurred".
        raise ConfigError(
            f"prompts.source: {source!r} (split {split!r}) cannot be loaded: {e.__cause__ or e}. Allowed: a data set's "
            f"name on the hub, a folder of one, or a file: {', '.join([*JSON_LINES, *FILE_OPTIONS])}"
        ) from e
    return ((f"{source!r} row {number}", table[number]) for number in range(len(table)))
