"""A draft trained on two processes (gloo, FSDP2) has the losses and weights of one; resume too, also with the other."""

import pytest
import torch
from helpers import training_ranks
from helpers.configs import finetune_config, make_checkpoint
from helpers.ranks import check_success, run_on_ranks
from helpers.resuming import keep_only
from helpers.training import losses, start_section, texts, train
from safetensors.torch import load_file

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.training.recipe import LayerSkipFinetune

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def same(one, other, steps):
    """What both logged from some step on, and the draft at the end."""
    ours, theirs = losses(one), losses(other)
    assert sorted(theirs)[-1] == sorted(ours)[-1] == 8
    for step in steps:
        assert theirs[step] == pytest.approx(ours[step], abs=1e-5, rel=2e-6)
    weights, others = (load_file(out / "epoch_1" / "draft.safetensors") for out in (one, other))
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("kind", ["copy", "adapter"])
def test_two_processes_train_what_one_trains(kind, tmp_path, tokenizer_folder):
    """The copy keeps gathered weights; the adapter has its layers checkpointed, and half of its batches are own text;
    from shards one process goes on, and two do."""
    base = make_checkpoint(tmp_path / "base", tokenizer_folder)
    section = {"kind": kind, "exit_layer": 2, "own_text": 0.5 if kind == "adapter" else 0}
    path = finetune_config(
        tmp_path, tokenizer_folder, draft=section, layer_dropout=None, early_exit_loss=None,
        checkpointer=start_section(base), dataset=texts(tmp_path), dataset_val=texts(tmp_path) | {"split": "train[:5]"},
        epochs=2, max_steps_per_epoch=4, clip_grad_norm=1.0, save_every_n_steps=2, enable_async_checkpointing=True,
    )  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    train(path, f"output_dir={one}", "batch_size=4")
    how = "fsdp_reshard_after_forward=false" if kind == "copy" else "ac_mode=full"
    arguments = ("train", tmp_path, "--config", path, f"output_dir={two}", "batch_size=2", how)
    check_success(run_on_ranks(training_ranks.__file__, *arguments, cwd=tmp_path))
    if kind == "adapter":
        assert (one / "own_text.jsonl").read_text() == (two / "own_text.jsonl").read_text()
    same(one, two, range(1, 9))

    resumed = ["resume_from_checkpoint=true"]
    again = keep_only(two, "step_6", tmp_path / "again")
    train(path, f"output_dir={again}", "batch_size=4", *resumed)
    same(one, again, range(7, 9))
    again = keep_only(one, "epoch_0", tmp_path / "once_more")
    arguments = ("train", tmp_path, "--config", path, f"output_dir={again}", "batch_size=2", *resumed)
    check_success(run_on_ranks(training_ranks.__file__, *arguments, cwd=tmp_path))
    same(one, again, range(5, 9))


def test_kept_states_want_one_process(tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun does
    base = make_checkpoint(tmp_path / "base", tokenizer_folder)
    path = finetune_config(
        tmp_path, tokenizer_folder, draft={"exit_layer": 2, "keep_states": True}, layer_dropout=None,
        early_exit_loss=None, checkpointer=start_section(base),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"^draft\.keep_states: True works with one process\. Set "):
        LayerSkipFinetune(load_config(str(path)))
