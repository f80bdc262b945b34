"""Prompts with references, for `prompts:` of a config: JSONL files, and the tasks that the LayerSkip paper measures.

Each component returns a list of {"prompt": text, "response": text}; in a chat the prompt is {"user": text} and perhaps
"system". The first `n_shot` rows are examples in front of every prompt and are not measured; the next `count` rows are
measured. The paper names the data and the number of examples; the templates, the rows and their number are ours.

A `source` is a data set's name on the Hugging Face hub, a local folder of one, or a file: .jsonl, .jsonl.gz, .json,
.parquet, .csv or .tsv. A file has no splits, so `split` is for the other two.
"""

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from datasets import load_dataset
from pydantic import Field

from layerskip_recipes.config.schema import Text, check, checked_arguments, nearest
from layerskip_recipes.data.json_lines import read_json_lines
from layerskip_recipes.errors import ConfigError

Row = tuple[str, Mapping[str, Any]]  # its place, for messages; its fields
Examples = list[dict[str, Any]]

Template = Annotated[Text, Field(examples=["\"'Question: {question}'\""])]  # quoted for the shell and for YAML
Source = Annotated[Text, Field(examples=["data.jsonl"])]
Split = Annotated[Text, Field(examples=["test"])]
Count = Annotated[int, Field(ge=1, examples=[100])]
ZeroOrMore = Annotated[int, Field(ge=0)]

CNN_DM, XSUM, HUMAN_EVAL = "abisee/cnn_dailymail", "EdinburghNLP/xsum", "openai/openai_humaneval"
# Arguments of `load_dataset` for a name on the hub: the first data set has several versions; the second is published as
# a script, which `datasets` no longer runs, and the hub has a copy in Parquet.
HUB_OPTIONS = {CNN_DM: {"name": "3.0.0"}, XSUM: {"revision": "refs/convert/parquet"}}
JSON_LINES = (".jsonl", ".jsonl.gz")
# Arguments of `load_dataset` for other files. Texts stay as they are: "NA" is a word, and a quote in a TSV is a quote.
FILE_OPTIONS: dict[str, dict[str, Any]] = {
    ".json": {"path": "json"},
    ".parquet": {"path": "parquet"},
    ".csv": {"path": "csv", "keep_default_na": False},
    ".tsv": {"path": "csv", "keep_default_na": False, "sep": "\t", "quoting": csv.QUOTE_NONE},
}


# ---- the components ----


def _task(
    name: str, summary: str, source: str, prompt: str, response: str, n_shot: int = 0, count: int | None = 100
) -> Callable[..., Examples]:
    """The component of a task; these arguments are its name, its description and the defaults of its arguments."""

    @checked_arguments("prompts.")
    def load(
        source: Source = source,
        split: Split = "test",
        n_shot: ZeroOrMore = n_shot,
        count: Count | None = count,
        prompt: Template = prompt,
        response: Template = response,
        chat: bool = False,
    ) -> Examples:
        return _few_shot(_load(source, split), prompt, response, n_shot, count, chat)

    load.__name__ = load.__qualname__ = name
    load.__doc__ = f"""{summary}

    Args:
        source: the data; see the head of this file.
        split: of a data set on the hub or in a folder.
        n_shot: examples in front of every prompt.
        count: prompts to measure; None for all.
        prompt, response, chat: as in `jsonl`.

    Raises:
        ConfigError: if the data cannot be loaded, lacks a field, or has fewer rows than asked for.
    """
    return load


cnn_dm_summarization = _task(
    "cnn_dm_summarization",
    "CNN/DailyMail: an article, to be summarised as its highlights do; one example, as in the paper.",
    CNN_DM,
    prompt="Article: {article}\nSummary:",
    response=" {highlights}",
    n_shot=1,
)
xsum_summarization = _task(
    "xsum_summarization",
    "XSUM: a BBC article, to be summarised in one sentence; no example, as in the paper.",
    XSUM,
    prompt="Article: {document}\nSummary in one sentence:",
    response=" {summary}",
)
human_eval = _task(
    "human_eval",
    "HumanEval: the signature and docstring of a Python function, to be completed. The text is compared with the "
    "canonical solution and never executed; for pass@1 there is lm-eval's task `humaneval`.",
    HUMAN_EVAL,
    prompt="{prompt}",
    response="{canonical_solution}",
    count=None,
)
topv2 = _task(
    "topv2",
    "TOPv2: a request to an assistant, to be parsed into nested intents and slots; for a model finetuned on the data "
    "set with the same templates, as by the config paper/topv2_1_5B. The source is one of the data set's TSV files.",
    "",
    prompt="{utterance}\n",
    response="{semantic_parse}",
)


@checked_arguments("prompts.")
def cnn_dm_language_modeling(
    source: Source = CNN_DM,
    split: Split = "test",
    prompt_words: Annotated[int, Field(ge=1, examples=[100])] = 100,
    response_words: Annotated[int, Field(ge=1, examples=[100])] = 100,
    count: Count | None = 100,
) -> Examples:
    """CNN/DailyMail: the beginning of an article, to be continued as the article does.

    Args:
        source: with the column article; see the head of this file.
        split: of a data set on the hub or in a folder.
        prompt_words, response_words: lengths of the beginning and of its reference, in words of about 1.3 tokens
            each; shorter articles are left out.
        count: articles to measure; None for all.

    Raises:
        ConfigError: if the data cannot be loaded, lacks a field, or has fewer articles that are long enough.
    """
    rows = _cut_articles(_load(source, split), prompt_words, response_words)
    return _few_shot(rows, "{beginning}", "{rest}", n_shot=0, count=count)


@checked_arguments("prompts.")
def jsonl(
    path: Annotated[Text, Field(examples=["questions.jsonl"])],
    prompt: Template = "{prompt}",
    response: Template = "{response}",
    n_shot: ZeroOrMore = 0,
    count: Count | None = None,
    chat: bool = False,
) -> Examples:
    """Any task from a file with a JSON object on each line.

    Args:
        path: the file, .jsonl or .jsonl.gz.
        prompt: a Python format string over a line's fields, such as "Question: {question}\\nAnswer:".
        response: likewise, for the reference; appended to an example's prompt as it stands, so that it starts with
            the space that belongs there.
        n_shot: examples in front of every prompt: the first lines, which are not measured.
        count: prompts to measure, the next lines; None for all.
        chat: whether a prompt is a user's message, for the chat template.

    Raises:
        ConfigError: for a file that does not exist, a line without a JSON object, a field that a line does not have,
            or fewer lines than asked for.
    """
    return _few_shot(_read_lines(path, "prompts.path"), prompt, response, n_shot, count, chat)


# ---- from rows to prompts ----


def _few_shot(
    rows: Iterable[Row], prompt: str, response: str, n_shot: int, count: int | None, chat: bool = False
) -> Examples:
    """The prompts of any task: the same examples, then a row's own prompt; the arguments are those of `jsonl`."""
    rows = iter(rows)
    examples = [_fill(prompt, row) + _fill(response, row) for row in islice(rows, n_shot)]
    if len(examples) < n_shot:
        works = max(0, len(examples) - 1)
        raise ConfigError(
            f"prompts.n_shot: {n_shot} is more than the {len(examples)} there are; for example prompts.n_shot={works}"
        )
    before = "".join(f"{example}\n\n" for example in examples)
    measured = [(before + _fill(prompt, row), _fill(response, row)) for row in islice(rows, count)]
    if not measured:
        raise ConfigError(f"prompts: nothing is left to measure, with n_shot={n_shot}. Give more data, or fewer shots")
    if count is not None and len(measured) < count:
        raise ConfigError(f"prompts.count: {count} is more than are left; for example prompts.count={len(measured)}")
    return [{"prompt": {"user": text} if chat else text, "response": reference} for text, reference in measured]


def _fill(template: str, row: Row) -> str:
    """The text of a template with a row's fields."""
    place, fields = row
    present = {name: value for name, value in fields.items() if value is not None}  # null counts as missing
    try:
        return template.format_map(present)
    except KeyError as e:
        name = str(e.args[0])
        raise ConfigError(
            f"prompts: {place} has no field {name!r}, which {template!r} needs. {nearest(name, present)}"
        ) from e
    except (ValueError, IndexError, AttributeError, TypeError) as e:
        raise ConfigError(
            f"prompts: {template!r} is no template for {place} ({e}). Allowed: fields in braces, and {{{{ for a brace; "
            "for example 'Question: {question}'"
        ) from e


def _cut_articles(rows: Iterable[Row], prompt_words: int, response_words: int) -> Iterator[Row]:
    """The beginning and the rest of each article that is long enough."""
    longest, needed = 0, prompt_words + response_words
    for place, fields in rows:
        article = _fill("{article}", (place, fields))
        ends = [word.end() for word in re.finditer(r"\S+", article)]
        longest = max(longest, len(ends))
        if len(ends) >= needed:
            middle, end = ends[prompt_words - 1], ends[needed - 1]
            yield place, {"beginning": article[:middle], "rest": article[middle:end]}
    if longest < needed:
        fits = max(1, longest // 2)
        raise ConfigError(
            f"prompts.prompt_words: {prompt_words} and response_words {response_words} are more than the {longest} "
            f"words of the longest article; for example prompts.prompt_words={fits} prompts.response_words={fits}"
        )


# ---- from files to rows ----


def _read_lines(path: str, key: str) -> Iterator[Row]:
    return ((f"{path!r} line {number}", fields) for number, fields in read_json_lines(path, key).items())


def _load(source: str, split: str) -> Iterator[Row]:
    """The rows of a source; read one by one, since few rows of a large table are used."""
    check("prompts.source", source, Source)  # the default of a task whose data is not on the hub is empty
    if source.endswith(JSON_LINES):
        return _read_lines(source, "prompts.source")
    table = _load_table(source, split)
    return ((f"{source!r} row {number}", table[number]) for number in range(len(table)))


def _load_table(source: str, split: str) -> Sequence[Mapping[str, Any]]:
    options = FILE_OPTIONS.get(Path(source).suffix)
    try:
        if options is not None:
            return load_dataset(data_files=source, split="train", **options)
        return load_dataset(source, split=split, **HUB_OPTIONS.get(source, {}))
    except Exception as e:
        # The message of `datasets` is often "an error occurred"; the cause says which one.
        raise ConfigError(
            f"prompts.source: {source!r} (split {split!r}) cannot be loaded: {e.__cause__ or e}. Allowed: a data set's "
            f"name on the hub, a folder of one, or a file: {', '.join([*JSON_LINES, *FILE_OPTIONS])}"
        ) from e
