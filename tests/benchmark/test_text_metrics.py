"""The metrics of outputs against references, by their formulas."""

import math
from typing import get_args

import pytest

from layerskip_recipes.benchmark.text_metrics import Metric, check_references, text_metrics
from layerskip_recipes.generation.text.prompts import Example

OUTPUTS = ["The cat sat on the mat.", "a b c d e f", "", "x y z"]
REFERENCES = ["the cat, the dog: on a mat", "a c b d e f g", "nothing here", "X Y Z"]


def examples(references: list[str]) -> list[Example]:
    return [Example("p", reference) for reference in references]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("rouge1", [10 / 13, 12 / 13]),
        ("rouge2", [2 / 11, 4 / 11]),
        ("rougeL", [8 / 13, 10 / 13]),
    ],
)
def test_rouge_is_the_mean_f_measure(name, by_hand):
    """2 hits / (words of both) of words, pairs or the longest common sequence: of "the cat sat on the mat", 6 words,
    and "the cat the dog on a mat", 7 words, the words the, the, cat, on and mat are hits."""
    expected = sum([*by_hand, 0, 1]) / 4
    assert text_metrics([name], OUTPUTS, examples(REFERENCES)) == {name: pytest.approx(expected, abs=1e-6)}


@pytest.mark.slow
def test_bleu_is_that_of_all_outputs_together():
    """Words of both outputs that stand in their references, 9 of 9; pairs 6 of 7, triples 3 of 5, and 2 of 4; their
    geometric mean, times exp(1 - 11 / 9) as the references have 11 words, full stops among them."""
    outputs, references = ["the cat sat on the mat.", "one two"], ["the cat sat on the red mat.", "one two three"]
    expected = math.exp(1 - 11 / 9) * (9 / 9 * 6 / 7 * 3 / 5 * 2 / 4) ** (1 / 4)
    assert text_metrics(["bleu"], outputs, examples(references)) == {"bleu": pytest.approx(expected, abs=1e-6)}


def test_exact_match_is_without_the_space_around():
    outputs, references = [" [IN:X ]\n", "[in:x ]", "", "a b"], ["[IN:X ]", "[IN:X ]", " ", "a  b"]
    assert text_metrics(["exact_match"], outputs, examples(references)) == {"exact_match": 2 / 4}


def test_exact_match_is_without_the_opening_of_a_think_block():
    """The prompts of some reasoning models open the block, and then outputs begin inside it."""
    outputs = ["add\n</think>\n\nfour", "<think>\nadd\n</think>\n\nfour", "</think>four"]
    reference = "<think>\nadd\n</think>\n\nfour"
    assert text_metrics(["exact_match"], outputs, examples([reference] * 3)) == {"exact_match": 2 / 3}


def test_metrics_need_references():
    with pytest.raises(ValueError, match=r"metrics: bleu, rouge1 .*prompt 2 of 3"):
        check_references(["bleu", "rouge1"], [Example("p", response) for response in ["a", None, None]])
    check_references(get_args(Metric), [Example("p", ""), Example("q", "r")])
    check_references([], [Example("p")])
