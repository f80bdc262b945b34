"""Training on a fake GPU: how often the host waits for it in a step of each kind."""

from pathlib import Path

import pytest
from stand_in_gpu import needs_fake_gpu, run

pytestmark = [pytest.mark.slow, needs_fake_gpu]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    found = run(Path(__file__).with_name("training.py"), str(tmp_path_factory.mktemp("fake")))
    return {result.pop("kind"): result for result in found}


def test_every_kind_of_training_runs_on_one_device(kinds):
    """A tensor on the wrong device is an error."""
    assert {kind: result["error"] for kind, result in kinds.items() if "error" in result} == {}
    assert len(kinds) == 9


def test_the_host_waits_only_for_what_a_step_reads(kinds):
    """The sums of the step, which stop a run that is not finite, and the values of a log line."""
    for kind, result in kinds.items():
        lines = [wait.partition(" at ")[2].rpartition(":")[0] for wait in result["step"]]
        norm = ["layerskip_recipes/training/recipe.py"] if kind == "autocast" else []  # the only one that clips
        expected = [*norm, "layerskip_recipes/training/recipe.py", "layerskip_recipes/training/run_log.py"]
        assert lines == expected, (kind, result["step"])
