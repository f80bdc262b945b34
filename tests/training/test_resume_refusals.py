"""What may change between a run and the run that resumes it, and what is refused with the old and the new value."""

import json
from pathlib import Path

import pytest
import torchtune.training.checkpointing._checkpointer as torchtune_checkpointer
from helpers.configs import HF_CONFIG, MODEL, finetune_config
from helpers.resuming import checkpoints, keep_only, packed, written
from helpers.training import losses, train
from torchtune.utils import get_logger

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.training.recipe import LayerSkipFinetune


def test_another_end_is_said(tmp_path, tokenizer_folder, caplog):
    """What follows t/T, as a gradual curriculum, goes another way then: allowed, and told once."""
    path = finetune_config(tmp_path, tokenizer_folder, early_exit_loss={"curriculum": "gradual"})
    train(path)
    for overrides, said in ((["epochs=2"], 1), (["epochs=2"], 0)):
        caplog.clear()
        with caplog.at_level("WARNING", logger=get_logger().name):
            train(path, "resume_from_checkpoint=true", *overrides)
        assert sum("ends at step 4 now, before at 2" in message for message in caplog.messages) == said


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, tokenizer_folder) -> Path:
    """The config of a run that has a checkpoint to resume."""
    path = finetune_config(tmp_path_factory.mktemp("stopped"), tokenizer_folder, epochs=2)
    train(path, "epochs=1")
    return path


@pytest.mark.parametrize(
    ("overrides", "key", "was", "now"),
    [
        (["dataset.seq_len=32"], "dataset.seq_len", "64", "32"),
        (["dataset.max_samples=6"], "dataset.max_samples", "8", "6"),
        (["early_exit_loss.curriculum=gradual"], "early_exit_loss.curriculum", "'rotational'", "'gradual'"),
        (["early_exit_loss.interval=3"], "early_exit_loss.interval", "2", "3"),
        (["early_exit_loss=null"], "early_exit_loss", "'rotational'", "None"),
        (["layer_dropout.prob=0.3"], "layer_dropout.prob", "0.2", "0.3"),
        (["layer_dropout=null"], "layer_dropout", "'prob': 0.2", "None"),
        (["batch_size=1"], "batch_size x gradient_accumulation_steps x data-parallel ranks", "2", "1"),
        (["gradient_accumulation_steps=2"], "batch_size x gradient_accumulation_steps x data-parallel ranks", "2", "4"),
        (["max_steps_per_epoch=3"], "steps in an epoch", "2", "3"),
        (["shuffle=false"], "shuffle", "True", "False"),
        (["model.norm_eps=1e-4"], "model.norm_eps", "None", "0.0001"),
        (["optimizer_in_bwd=true"], "optimizer_in_bwd", "False", "True"),
        (["loss=torch.nn.CrossEntropyLoss"], "loss._component_", "CEWithChunkedOutputLoss", "CrossEntropyLoss"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_another_run_is_refused(overrides, key, was, now, stopped):
    """One ValueError that says what it was and what it is now; checkpoints and log stay as they were."""
    before = written(stopped.parent)
    with pytest.raises(ValueError) as caught:
        LayerSkipFinetune(load_config(str(stopped), ["resume_from_checkpoint=true", *overrides])).setup()
    message = " ".join(str(caught.value).split())
    assert message.startswith(f"resume_from_checkpoint: {key} was ")
    said_before, _, said_now = message.partition(" and is ")
    assert was in said_before and now in said_now.partition(" now. ")[0]
    assert message.endswith("set resume_from_checkpoint=false and another output_dir")
    assert written(stopped.parent) == before


def test_what_saves_memory_may_change_and_defaults_be_spelt_out(tmp_path, tokenizer_folder):
    """Less memory is what a run needs that ended for want of it."""
    path = finetune_config(tmp_path, tokenizer_folder)
    train(path, "early_exit_loss.chunk_tokens=64")
    smaller = ["early_exit_loss.chunk_tokens=16", "loss.num_output_chunks=16"]
    defaults = ["shuffle=true", "layer_dropout.schedule=constant"]
    assert train(path, "resume_from_checkpoint=true", "epochs=2", *smaller, *defaults).step == 4


def test_a_refused_resume_leaves_the_runs_config(stopped):
    config = stopped.parent / "out" / "torchtune_config.yaml"
    before = config.read_text()
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: layer_dropout.prob was"):
        LayerSkipFinetune(load_config(str(stopped), ["resume_from_checkpoint=true", "layer_dropout.prob=0.7"])).setup()
    assert config.read_text() == before


def test_a_new_run_throws_away_no_earlier_runs_checkpoints(stopped):
    with pytest.raises(
        ValueError, match=r"^keep_last_n_checkpoints: 1 would throw away .* epoch_0\. Allowed: another "
    ):
        LayerSkipFinetune(load_config(str(stopped), ["keep_last_n_checkpoints=1"]))


def test_a_run_does_not_begin_where_it_writes(stopped):
    """Its first checkpoint would take the place of what it began with."""
    out = stopped.parent / "out"
    section = "_component_: torchtune.training.FullModelHFCheckpointer, model_type: LLAMA3_2"
    files = f"checkpoint_dir: {out}/epoch_0, checkpoint_files: [model-00001-of-00001.safetensors]"
    overrides = [f"checkpointer={{{section}, {files}}}"]
    before = written(stopped.parent)
    with pytest.raises(ValueError, match=r"^output_dir: '.*' holds epoch_0, where this run begins .*output_dir=.*_2$"):
        LayerSkipFinetune(load_config(str(stopped), overrides))
    assert written(stopped.parent) == before


def test_a_seed_that_a_resumed_run_does_not_take_is_said(stopped, caplog):
    with caplog.at_level("WARNING", logger=get_logger().name):
        LayerSkipFinetune(load_config(str(stopped), ["resume_from_checkpoint=true", "seed=77"])).setup()
    assert [m for m in caplog.messages if m.startswith("seed: 77 changes nothing here")]


def test_another_optimizer_is_refused(stopped):
    overrides = ["resume_from_checkpoint=true", "optimizer={_component_: torch.optim.SGD, lr: 0.1}"]
    with pytest.raises(
        ValueError, match=r"^resume_from_checkpoint: optimizer\._component_ was '.*AdamW' and is '.*SGD'"
    ):
        LayerSkipFinetune(load_config(str(stopped), overrides)).setup()


def test_the_models_length_said_or_not_is_the_same_run(stopped):
    """Without a limit of the tokenizer's own, samples are cut at the model's length."""
    limit = [f"tokenizer.max_seq_len={MODEL['max_seq_len']}"]
    LayerSkipFinetune(load_config(str(stopped), ["resume_from_checkpoint=true", *limit])).setup()


def test_a_deeper_model_is_refused(stopped):
    hf_config = json.dumps(HF_CONFIG | {"num_hidden_layers": 5})
    overrides = ["resume_from_checkpoint=true", "model.num_layers=5", f"checkpointer.hf_config={hf_config}"]
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: model\.num_layers was 4 and is 5 now"):
        LayerSkipFinetune(load_config(str(stopped), overrides)).setup()


def test_another_run_is_refused_before_weights_are_read(stopped, monkeypatch):
    def load(self, *args, **kwargs):
        raise AssertionError("the weights are loaded before the mistake is found")

    monkeypatch.setattr(torchtune_checkpointer.FullModelHFCheckpointer, "load_checkpoint", load)
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: shuffle"):
        LayerSkipFinetune(load_config(str(stopped), ["resume_from_checkpoint=true", "shuffle=false"])).setup()


def test_another_tokenizer_is_refused(tmp_path, tokenizer_folder):
    """As many samples as before, cut shorter."""
    dataset = packed(tmp_path) | {"packed": False}
    path = finetune_config(tmp_path, tokenizer_folder, dataset=dataset, epochs=2)
    train(path, "epochs=1")
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .*tokenizer.* was .* and is 10 "):
        train(path, "resume_from_checkpoint=true", "tokenizer.max_seq_len=10")


def test_what_may_change_on_resume(stopped, tmp_path):
    """Logging, saving, clipping, and a batch made otherwise of as many samples."""
    again = keep_only(stopped.parent / "out", "epoch_0", tmp_path / "again")
    train(
        stopped, f"output_dir={again}", "resume_from_checkpoint=true", "batch_size=1", "gradient_accumulation_steps=2",
        "log_every_n_steps=2", "save_every_n_steps=1", "keep_last_n_checkpoints=2", "clip_grad_norm=1.0",
    )  # fmt: skip
    assert sorted(losses(again)) == [4]
    assert checkpoints(again) == ["step_3", "epoch_1"]
