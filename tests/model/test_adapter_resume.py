"""A stopped training of adapters goes on as if it had never stopped."""

import shutil

import pytest
import torch
from helpers.adapters import WIDE_HF, WIDE_SHAPE, adapter_config, make_start, plain_section
from helpers.configs import make_checkpoint
from helpers.training import few_texts, losses, read_log, train  # noqa: F401
from torchtune.modules import common_utils

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "builder", "overrides"),
    [
        ("llama3_2", {}, []),
        ("qwen2", {"use_dora": True}, ["save_adapter_weights_only=true"]),
        ("llama2", {"apply_lora_to_output": True}, ["enable_async_checkpointing=true"]),
        ("llama3_2", WIDE_SHAPE | {"quantize_base": True}, []),
        # torchtune's llama3_2 takes no notice of low_cpu_ram.
        ("llama2", WIDE_SHAPE | {"quantize_base": True}, ["low_cpu_ram=true", "enable_async_checkpointing=true"]),
    ],
    ids=["lora", "dora, adapters only", "lora in shards", "qlora", "qlora in shards with little memory"],
)
def test_resume_gives_the_losses_of_the_run_that_never_stopped(
    family, builder, overrides, tmp_path, tokenizer_folder, monkeypatch
):
    """From the middle of the first epoch, with dropout in the adapters and of layers: the very losses and weights."""
    monkeypatch.setattr(common_utils, "_use_low_cpu_ram", False)  # what the recipe makes of it goes with the test
    wide = "quantize_base" in builder
    start = (plain_section(family) | WIDE_SHAPE, WIDE_HF) if wide else (None, {})
    make_start(tmp_path / "start", family, tokenizer_folder, start[0], **start[1])
    path = adapter_config(
        tmp_path, tokenizer_folder, family, tmp_path / "start", builder | {"lora_dropout": 0.3}, epochs=2, shuffle=True,
        layer_dropout={"prob": 0.5, "schedule": "exp"}, max_steps_per_epoch=3, save_every_n_steps=2, lr_scheduler={
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_warmup_steps": 2,
        },
    )  # fmt: skip
    out = tmp_path / "out"
    train(path, *overrides)
    whole, end = losses(out), torch.load(out / "epoch_1" / "adapter_model.pt", weights_only=True)
    assert sorted(path.name for path in out.glob("*_*[0-9]")) == ["epoch_0", "epoch_1", "step_2", "step_4"]
    for name in ("epoch_0", "epoch_1", "step_4"):
        shutil.rmtree(out / name)
    (out / "logs" / "log.txt").unlink()
    train(path, *overrides, "resume_from_checkpoint=true")
    assert losses(out) == {step: whole[step] for step in (3, 4, 5, 6)}
    again = torch.load(out / "epoch_1" / "adapter_model.pt", weights_only=True)
    assert set(again) == set(end) and all(torch.equal(again[name], end[name]) for name in end)


def test_resume_on_other_weights_is_refused(tmp_path, tokenizer_folder):
    """The adapters were trained on others."""
    make_start(tmp_path / "start", "llama3_2", tokenizer_folder)
    make_checkpoint(tmp_path / "other", tokenizer_folder)
    path = adapter_config(tmp_path, tokenizer_folder, "llama3_2", tmp_path / "start")
    train(path)
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .*checkpoint_dir.*start.*other"):
        train(path, "resume_from_checkpoint=true", "epochs=2", f"checkpointer.checkpoint_dir={tmp_path}/other")
