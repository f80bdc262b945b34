"""A user's mistake on two ranks: one line from rank 0, and no traceback from the rank that waits for it."""

import pytest
from helpers.configs import start_section
from helpers.ranks import run_tune_on_ranks
from helpers.training import texts

pytestmark = pytest.mark.distributed

# name: (overrides, how rank 0's last line begins, its later words). Rank 0 alone finds the last two.
WRONG = {
    "replicate": (["data_parallel_replicate_dim=3"], "data_parallel_replicate_dim: 3 ", "processes, 2. Allowed: a "),
    "samples": (["batch_size=21"], "dataset: 40 samples ", "2 data-parallel ranks"),
    "other model": (
        ["model.num_layers=5"],
        "checkpointer: ",
        "it lacks layers.4.attn.q_proj.weight",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_is_one_line_of_rank_zero(name, checkpoint, tmp_path, finetune):
    """Exit status 1, before weights are read (which fails with words of its own) or anything is written."""
    start = tmp_path / "start"
    start.mkdir()
    for file in ("config.json", "model.safetensors"):
        (start / file).write_bytes(b"{}")
    start = checkpoint if name == "other model" else start
    path = finetune(dataset=texts(tmp_path), checkpointer=start_section(start))
    overrides, begins, then = WRONG[name]
    words = ("run", "layerskip_finetune", "--config", str(path), *overrides)
    zero, one = run_tune_on_ranks(*words, cwd=tmp_path)
    *before, last = zero.stderr.splitlines()
    assert last.startswith("ValueError: " + begins) and then in last
    assert not any("Error" in line or "Traceback" in line for line in before)
    assert (zero.returncode, one.returncode) == (1, 1)
    assert "Traceback" not in one.stderr
    if name == "replicate":
        assert one.stderr.splitlines()[-1] == last
    assert name == "other model" or not (tmp_path / "out").exists()
