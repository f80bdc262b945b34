"""The metrics of outputs against references, by their formulas."""

import math
import re
from collections import Counter
from typing import get_args

import pytest

from layerskip_recipes.benchmark.text_metrics import Metric, check_references, text_metrics
from layerskip_recipes.generation.text.prompts import Example

OUTPUTS = ["The cat sat on the mat.", "a b c d e f", "", "x y z"]
REFERENCES = ["the cat, the dog: on a mat", "a c b d e f g", "nothing here", "X Y Z"]


def examples(references: list[str]) -> list[Example]:
    return [Example("p", reference) for reference in references]


def f_measure(hits: int, output: int, reference: int) -> float:
    """2PR / (P + R)."""
    return 2 * hits / (output + reference) if hits else 0.0


def ngrams(words: list[str], n: int) -> Counter:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def common_subsequence(a: list[str], b: list[str]) -> int:
    """The longest one, by its definition."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + common_subsequence(a[1:], b[1:])
    return max(common_subsequence(a[1:], b), common_subsequence(a, b[1:]))


def rouge_by_hand(n: int | str, output: str, reference: str) -> float:
    a, b = (re.findall("[a-z0-9]+", text.lower()) for text in (output, reference))
    if n == "L":
        return f_measure(common_subsequence(a, b), len(a), len(b))
    a, b = ngrams(a, n), ngrams(b, n)
    return f_measure((a & b).total(), a.total(), b.total())


@pytest.mark.parametrize(("name", "n"), [("rouge1", 1), ("rouge2", 2), ("rougeL", "L")])
def test_rouge_is_the_mean_f_measure(name, n):
    expected = [rouge_by_hand(n, *pair) for pair in zip(OUTPUTS, REFERENCES, strict=True)]
    assert 0 < expected[0] < 1 and expected[2:] == [0, 1]
    found = text_metrics([name], OUTPUTS, examples(REFERENCES))
    assert list(found) == [name] and found[name] == pytest.approx(sum(expected) / 4, abs=1e-6)


def test_bleu_is_the_corpus_formula():
    """Precisions of 1 to 4 words over all outputs, their geometric mean, and the brevity penalty."""
    outputs, references = ["the cat sat on the mat.", "one two"], ["the cat sat on the red mat.", "one two three"]
    # Full stops are words. In one: the cat sat on the mat . / the cat sat on the red mat .
    hits, counts = [7 + 2, 5 + 1, 3, 2], [7 + 2, 6 + 1, 5, 4]
    length, reference = 7 + 2, 8 + 3
    mean = math.exp(sum(math.log(h / c) for h, c in zip(hits, counts, strict=True)) / 4)
    expected = math.exp(1 - reference / length) * mean
    assert text_metrics(["bleu"], outputs, examples(references)) == {"bleu": pytest.approx(expected, abs=1e-6)}
    assert text_metrics(["bleu"], references, examples(references)) == {"bleu": pytest.approx(1.0)}


def test_exact_match_is_without_the_space_around():
    outputs, references = [" [IN:X ]\n", "[in:x ]", "", "a b"], ["[IN:X ]", "[IN:X ]", " ", "a  b"]
    assert text_metrics(["exact_match"], outputs, examples(references)) == {"exact_match": 2 / 4}


def test_exact_match_is_without_the_opening_of_a_think_block():
    """The prompts of some reasoning models open the block, and then outputs begin inside it."""
    outputs = ["add\n</think>\n\nfour", "<think>\nadd\n</think>\n\nfour", "</think>four"]
    reference = "<think>\nadd\n</think>\n\nfour"
    assert text_metrics(["exact_match"], outputs, examples([reference] * 3)) == {"exact_match": 2 / 3}


def test_correct_is_what_the_task_accepts():
    judge = Example("p", "four", is_right=lambda output: output in ("four", "4"))
    assert text_metrics(["correct", "exact_match"], [" 4\n", "five", "four"], [judge] * 3) == {
        "correct": 2 / 3,
        "exact_match": 1 / 3,
    }
    check_references(["correct"], [judge])
    with pytest.raises(ValueError, match=r"^metrics: correct needs prompts that judge .* such as .*tasks\.bfcl"):
        check_references(["correct"], [judge, *examples(["four"])])


def test_metrics_need_references():
    with pytest.raises(ValueError, match="metrics: bleu, rouge1 needs references, and prompt 2 of 3 has none"):
        check_references(["bleu", "rouge1"], [Example("p", response) for response in ["a", None, None]])
    check_references([name for name in get_args(Metric) if name != "correct"], [Example("p", ""), Example("q", "r")])
    check_references([], [Example("p")])
