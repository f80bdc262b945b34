"""The memory plan beside the bytes that are alive on a fake GPU, for the shapes of Qwen3 8B."""

from pathlib import Path

import pytest
from stand_in_gpu import needs_fake_gpu, run

pytestmark = [pytest.mark.slow, needs_fake_gpu]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    found = run(Path(__file__).with_name("memory.py"), str(tmp_path_factory.mktemp("fake")))
    return {result.pop("case"): result for result in found}


def test_the_plan_is_at_most_a_tenth_above_the_peak_and_never_below(cases):
    """Of training, of the measurement at a save, and of decoding."""
    wrong = {case: result for case, result in cases.items() if not 1 <= result["planned"] / result["peak"] <= 1.1}
    assert wrong == {} and len(cases) == 16


def test_the_cases_are_trainings_with_and_without_checkpointing(cases):
    """So that both plans of the activations are tested, for all weights, adapters and a draft."""
    kinds = {(case.split()[0], result["recompute"]) for case, result in cases.items() if "recompute" in result}
    assert kinds >= {("full", True), ("full", False), ("lora", True), ("lora", False), ("draft", False)}
