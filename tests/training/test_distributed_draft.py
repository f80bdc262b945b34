"""A draft trained on two processes (gloo, FSDP2) has the losses and weights of one; resume too, also with the other."""

import pytest
import torch
from helpers.configs import start_section
from helpers.ranks import train_on_ranks
from helpers.resuming import keep_only
from helpers.training import losses, texts, train
from safetensors.torch import load_file

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def same(one, other, steps):
    """What both logged from some step on, and the draft at the end, with its model if that was trained too."""
    ours, theirs = losses(one), losses(other)
    assert sorted(theirs)[-1] == sorted(ours)[-1] == 8
    for step in steps:
        assert theirs[step] == pytest.approx(ours[step], abs=1e-5, rel=2e-5)
    files = [file.relative_to(one) for file in (one / "epoch_1").rglob("*.safetensors")]
    assert files
    for file in files:
        torch.testing.assert_close(load_file(other / file), load_file(one / file), atol=1e-5, rtol=0)


# The copy keeps gathered weights. The adapter checkpoints its layers, and its model learns with it.
CASES = {
    "copy": ({"kind": "copy"}, "fsdp_reshard_after_forward=false"),
    "adapter beside its model": ({"kind": "adapter", "vocabulary": 200, "finetune_model": True}, "ac_mode=full"),
}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_what_one_trains(name, checkpoint, tmp_path, finetune):
    section, override = CASES[name]
    path = finetune(
        draft=section | {"exit_layer": 2}, layer_dropout=None, early_exit_loss=None, clip_grad_norm=1.0,
        checkpointer=start_section(checkpoint), dataset=texts(tmp_path), epochs=2, max_steps_per_epoch=4,
        dataset_val=texts(tmp_path) | {"split": "train[:5]"}, save_every_n_steps=2, enable_async_checkpointing=True,
    )  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    train(path, f"output_dir={one}", "batch_size=4")
    train_on_ranks(path, f"output_dir={two}", "batch_size=2", override)
    same(one, two, range(1, 9))

    again = keep_only(two, "step_6", tmp_path / "again")
    train(path, f"output_dir={again}", "batch_size=4", "resume_from_checkpoint=true")
    same(one, again, range(7, 9))
    again = keep_only(one, "epoch_0", tmp_path / "once_more")
    train_on_ranks(path, f"output_dir={again}", "batch_size=2", "resume_from_checkpoint=true")
    same(one, again, range(5, 9))
