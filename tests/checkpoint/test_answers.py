"""Known answers: the longest match in them, their file, and what a JSONL file must have."""

from itertools import chain

import numpy as np
import pytest
from helpers.speculation import longest_matches, search

from layerskip_recipes.checkpoint import answers as module
from layerskip_recipes.checkpoint.answers import (
    Answers,
    Matches,
    answer_tokens,
    answers_beside,
    read_answers,
    write_answers,
)
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.drafting import lookup as lookup_module
from layerskip_recipes.generation.drafting.lookup import LEAST_PROBABILITY, Lookup


class Letters:
    """A tokenizer of single letters."""

    def __init__(self, first="a"):
        self.first = ord(first)

    def decode(self, tokens):
        return "".join(chr(self.first + token) for token in tokens)

    def tokenize_messages(self, messages):
        tokens = [[ord(letter) - self.first for letter in message.text_content] for message in messages]
        masks = [[message.masked] * len(part) for message, part in zip(messages, tokens, strict=True)]
        return [*chain(*tokens)], [*chain(*masks)]


def random_tokens(count, vocabulary, seed):
    return np.random.default_rng(seed).integers(vocabulary, size=count).astype(np.int32)


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 70_000])
@pytest.mark.parametrize("count", [2, 3, 70, 200])
def test_the_longest_match_is_that_of_a_search(vocabulary, count):
    tokens = random_tokens(count, vocabulary, count)
    answers = Answers("", tokens, "")
    for seed in range(30):
        text = random_tokens(1 + 3 * seed, vocabulary, seed)
        if seed % 2:  # with a match in any case
            text = np.concatenate([text, tokens[seed % count : seed % count + seed]])
        found, (following, length) = answers.matches(text), longest_matches(tokens, text, 1)
        assert found.length == length and found.is_whole
        assert sorted(tokens[found.following].tolist()) == sorted(following)


def test_many_matches_are_counted_at_evenly_spread_places():
    tokens = np.array([1, 2, 1, 2, 1, 3] * 1000 + [0], dtype=np.int32)
    found = Answers("", tokens, "").matches(np.array([9, 1]))
    share = (tokens[found.following] == 2).mean()
    assert not found.is_whole and len(found.following) <= module.MOST_PLACES and abs(share - 2 / 3) < 0.02


@pytest.mark.parametrize(("least", "with_answers"), [(1, True), (None, True), (3, True), (2, False)])
def test_drafts_are_what_a_search_finds_in_both_texts(least, with_answers):
    tokens = random_tokens(150, 4, 1)
    answers = Answers("", tokens, "") if with_answers else None
    lengths = set()
    for seed in range(20):
        text = [*random_tokens(12, 4, seed), *tokens[5 * seed : 5 * seed + 6]]
        lookup = Lookup(text, least, answers)
        drafted, expected = lookup.find(8)
        assert drafted == search(text, least, 8, tokens if with_answers else (), LEAST_PROBABILITY)
        assert lookup.text.tokens.tolist() == text and 0 <= expected <= len(drafted)
        lengths.add(len(drafted))
    assert len(lengths) > 1


def test_a_text_of_one_word_is_searched_at_its_end_alone(monkeypatch):
    compared = []
    monkeypatch.setattr(lookup_module, "MOST_SEARCHED", 100)
    monkeypatch.setattr(
        lookup_module, "some_of", lambda places, length: compared.append(places) or Matches(places, length)
    )
    lookup = Lookup([7] * 5000, 1, None)
    assert lookup.find(8)[0] == [7] * 8 and max(map(len, compared)) <= 100 and len(compared) == 1


def sample(tokens, hidden):
    return {"tokens": tokens, "labels": [-100 if i < hidden else token for i, token in enumerate(tokens)]}


def test_answers_follow_the_end_of_their_prompts_and_are_bounded():
    samples = [sample(list(range(20)), 15), sample([30, 31, 32], 1)]
    assert answer_tokens(samples, 99).tolist() == [*range(15 - module.LEAD, 20), 30, 31, 32]
    assert answer_tokens(samples, 5).tolist() == [7, 8, 9, 10, 11]
    seen = []
    answer_tokens((seen.append(i) or sample([1, 2, 3], 0) for i in range(100)), 9)
    assert len(seen) == 3  # the others are not tokenized


def test_a_file_beside_the_model_is_for_one_tokenizer(tmp_path, caplog):
    tokens = np.array([0, 1, 2, 0, 1, 3], dtype=np.int32)
    write_answers(tmp_path, Answers("", tokens, "abcabd"))
    found = answers_beside(tmp_path, Letters(), 4)
    assert found.tokens.tolist() == tokens.tolist() and found.matches(np.array([0, 1])).length == 2
    for tokenizer, num_tokens in ((Letters("b"), 4), (Letters(), 3)):
        assert answers_beside(tmp_path, tokenizer, num_tokens) is None
        with pytest.raises(ConfigError, match=r"^self_speculation.answers: .*another tokenizer"):
            read_answers(str(tmp_path / "answers.npz"), tokenizer, num_tokens, "self_speculation.answers")
    (tmp_path / "answers.npz").write_bytes(b"PK\x03\x04 cut off")
    assert answers_beside(tmp_path, Letters(), 4) is None


def test_a_damaged_file_is_no_traceback(tmp_path, caplog):
    file = tmp_path / "answers.npz"
    np.savez(file, tokens=np.int32(3), order=np.int32(3), sample=np.array(""))
    assert answers_beside(tmp_path, Letters(), 4) is None
    np.save(tmp_path / "a.npy", np.zeros(3))
    (tmp_path / "a.npy").rename(file)
    assert answers_beside(tmp_path, Letters(), 4) is None and caplog.text.count("answers.npz") == 2


def test_answers_are_the_outputs_of_json_lines(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text('{"input": "abc", "output": "de"}\n{"prompt": "abc", "text": "fe"}\n')
    found = read_answers(str(file), Letters(), 99, "answers")
    assert sorted(map(tuple, found.tokens.reshape(2, 5).tolist())) == [(0, 1, 2, 3, 4), (0, 1, 2, 5, 4)]


@pytest.mark.parametrize("content", [None, "", '{"input": "abc", "output": ""}\n', '{"input": "abc"}\n', "nothing\n"])
def test_files_without_answers_are_refused(content, tmp_path):
    file = tmp_path / "train.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=r"^self_speculation.answers: .*train.jsonl"):
        read_answers(str(file), Letters(), 99, "self_speculation.answers")
