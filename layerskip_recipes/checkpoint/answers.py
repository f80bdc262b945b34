"""Answers that drafts are looked up in: read from JSON lines, or written beside a checkpoint by its training."""

import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.utils import get_logger

from layerskip_recipes.data.replies import qa_dataset
from layerskip_recipes.errors import ConfigError, first_line

log = get_logger("INFO")
ANSWERS_FILE = "answers.npz"
MOST_TOKENS = 2_000_000
LONGEST_MATCH = 64
LEAD = 8  # tokens of the prompt's end before each answer, so that a text that has only begun its answer has matches
MOST_PLACES = 256  # of a match, whose next tokens are counted
SAMPLE = 64  # tokens that the model's tokenizer must decode to the same text


class Matches(NamedTuple):
    """The places where a text ends with the last `length` tokens of another one."""

    following: np.ndarray  # positions of the tokens that follow
    length: int
    is_whole: bool = True  # whether `following` has all of them


def some_of(following: np.ndarray, length: int) -> Matches:
    """At most `MOST_PLACES` evenly spread matches."""
    step = -(-len(following) // MOST_PLACES) or 1
    return Matches(following[::step], length, step == 1)


class Answers:
    """Token ids of many texts, one after the other, in which the longest match of any text is found.

    `order` has all positions but the last one, sorted by the tokens up to there, read backwards: a suffix array of the
    reversed tokens. A binary search then finds the places that share the longest end with a given text.
    """

    def __init__(self, source: str, tokens: np.ndarray, sample: str, order: np.ndarray | None = None) -> None:
        self.source, self.tokens, self.sample = source, tokens, sample
        self.order = sorted_by_past(tokens) if order is None else order
        self._places = memoryview(self.order)  # numbers of Python, which are faster than numpy's
        self._backwards = backwards(tokens)

    def matches(self, text: np.ndarray) -> Matches:
        """The places with the longest match, of at most `LONGEST_MATCH` tokens, of the end of a text."""
        query = backwards(text[-LONGEST_MATCH:])
        here = bisect_left(self._places, query, key=lambda place: self._past(place, len(query)))
        near = [self._past(self._places[i], len(query)) for i in (here - 1, here) if 0 <= i < len(self._places)]
        length = max((_common_tokens(query, past) for past in near), default=0)
        if length == 0:
            return Matches(self.order[:0], 0)
        wanted = query[: 4 * length]
        first = bisect_left(self._places, wanted, hi=here, key=lambda place: self._past(place, len(wanted)))
        end = bisect_right(self._places, wanted, lo=here, key=lambda place: self._past(place, len(wanted)))
        some = some_of(self.order[first:end], length)
        return some._replace(following=some.following + 1)

    def _past(self, place: int, size: int) -> bytes:
        """The tokens up to a position, backwards, as `size` bytes that compare as the tokens do."""
        start = 4 * (len(self.tokens) - 1 - place)
        return self._backwards[start : start + size]


def backwards(tokens: np.ndarray) -> bytes:
    """Tokens from the last to the first. Big-endian bytes compare as the numbers do."""
    return tokens[::-1].astype(">u4").tobytes()


def _common_tokens(a: bytes, b: bytes) -> int:
    size = min(len(a), len(b)) // 4
    differ = np.frombuffer(a, np.uint32, size) != np.frombuffer(b, np.uint32, size)
    return int(differ.argmax()) if differ.any() else size


def sorted_by_past(tokens: np.ndarray) -> np.ndarray:
    """All positions but the last one, sorted by their last `LONGEST_MATCH` tokens, read backwards (prefix doubling)."""
    count = len(tokens)
    rank = np.unique(tokens, return_inverse=True)[1].astype(np.int64) + 1
    order, known = np.argsort(rank, kind="stable"), 1  # `rank` compares so many tokens
    while known < LONGEST_MATCH and rank.max(initial=0) < count:
        earlier = np.zeros_like(rank)
        earlier[known:] = rank[:-known]  # of the tokens before; 0: there are none
        keys = rank * (count + 1) + earlier
        order = np.argsort(keys, kind="stable")
        sorted_keys = keys[order]
        rank = np.empty_like(rank)
        rank[order] = np.concatenate([[1], 1 + np.cumsum(sorted_keys[1:] != sorted_keys[:-1])])
        known *= 2
    return order[order < count - 1].astype(np.int32)


# ---- from data ----


def answer_tokens(samples: Iterable[Mapping[str, Any]], most: int) -> np.ndarray:
    """The tokens that count in the loss, each run of them after the `LEAD` tokens before it; at most `most` tokens."""
    collected: list[int] = []
    for sample in samples:
        tokens = np.asarray(sample["tokens"]).tolist()
        is_answer = (np.asarray(sample["labels"]) != CROSS_ENTROPY_IGNORE_IDX).tolist()
        for counted, run in groupby(range(len(tokens)), is_answer.__getitem__):
            if counted:
                places = [*run]
                collected += tokens[max(places[0] - LEAD, 0) : places[-1] + 1]
        if len(collected) >= most:
            break
    return np.array(collected[:most], dtype=np.int32)


def answers_of(dataset: Any, tokenizer: Any, source: str, most: int = MOST_TOKENS) -> Answers | None:
    """The answers of a dataset, of at most `most` tokens; None if they are empty."""
    tokens = answer_tokens(samples_of(dataset), most)
    return Answers(source, tokens, first_text(tokens, tokenizer)) if len(tokens) > 1 else None


def first_text(tokens: np.ndarray, tokenizer: Any) -> str:
    """The text of the first tokens, which another tokenizer would not decode to."""
    return tokenizer.decode(tokens[:SAMPLE].tolist())


def samples_of(dataset: Any) -> Iterable[Mapping[str, Any]]:
    """The samples of a dataset in a fixed random order, as a bound may leave out the last ones."""
    return (dataset[int(i)] for i in np.random.default_rng(0).permutation(len(dataset)))


# ---- files ----


def write_answers(folder: Path, answers: Answers) -> None:
    np.savez(folder / ANSWERS_FILE, tokens=answers.tokens, order=answers.order, sample=np.array(answers.sample))


def has_answers(folder: Path) -> bool:
    return (folder / ANSWERS_FILE).is_file()


def answers_beside(folder: Path, tokenizer: Any, num_tokens: int) -> Answers | None:
    """The answers in a checkpoint's folder; None, with a warning, if they are not for the model's tokenizer."""
    try:
        return _read_file(folder / ANSWERS_FILE, tokenizer, num_tokens)
    except ConfigError as e:
        log.warning(f"{e}. Drafts are not looked up there")
        return None


def read_answers(path: str, tokenizer: Any, num_tokens: int, key: str) -> Answers:
    """The answers of a JSONL file in the form of `qa_dataset`, or of a file that training wrote; errors name `key`."""
    if path.endswith(".npz"):
        try:
            return _read_file(Path(path), tokenizer, num_tokens)
        except ConfigError as e:
            raise ConfigError(f"{key}: {e}") from e
    try:
        answers = answers_of(qa_dataset(tokenizer, path), tokenizer, path)
    except ConfigError as e:
        raise ConfigError(f"{key}: {str(e).removeprefix('path: ')}") from e
    if answers is None:
        raise ConfigError(f"{key}: all answers in {path!r} are empty. Give a file with answers, such as train.jsonl")
    return answers


def _read_file(file: Path, tokenizer: Any, num_tokens: int) -> Answers:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            tokens, order, sample = (arrays[name] for name in ("tokens", "order", "sample"))
    except (OSError, ValueError, TypeError, AttributeError, KeyError, EOFError, BadZipFile, zlib.error) as e:
        raise ConfigError(f"{str(file)!r} cannot be read ({first_line(e)})") from e
    count = tokens.size
    is_sound = count > 1 and all(part.ndim == 1 and part.dtype == np.int32 for part in (tokens, order))
    is_sound = is_sound and len(order) == count - 1 and order.min() >= 0 and order.max() < count - 1
    if not is_sound:
        raise ConfigError(f"{str(file)!r} is damaged")
    fits = tokens.min() >= 0 and tokens.max() < num_tokens
    if not fits or first_text(tokens, tokenizer) != str(sample):
        raise ConfigError(f"{str(file)!r} has the tokens of another tokenizer")
    return Answers(str(file), tokens, str(sample), order)
