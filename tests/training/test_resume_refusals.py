"""What may change between a run and the run that resumes it, and what is refused with the old and the new value."""

import json
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.configs import HF_CONFIG, finetune_config
from helpers.resuming import checkpoints, resumed, written
from helpers.training import json_data, losses, set_up, text_data, train
from torchtune.utils import get_logger

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.data import chat_template
from layerskip_recipes.training.config import FinetuneConfig
from layerskip_recipes.training.fingerprint import check_resumable
from layerskip_recipes.training.recipe import LayerSkipFinetune
from layerskip_recipes.training.resuming import stored_choices

pytestmark = pytest.mark.slow


def test_a_resumed_run_with_another_end_warns_once(finetune, caplog):
    """What follows t/T, as a gradual curriculum, goes another way then: allowed, and told once."""
    path = finetune(early_exit_loss={"curriculum": "gradual"})
    train(path)
    for said in (1, 0):
        caplog.clear()
        with caplog.at_level("WARNING", logger=get_logger().name):
            train(path, "resume_from_checkpoint=true", "epochs=2")
        assert sum("ends at step 4 now, before at 2" in message for message in caplog.messages) == said


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, tokenizer_folder) -> Path:
    """The config of a run that has a checkpoint to resume."""
    path = finetune_config(tmp_path_factory.mktemp("stopped"), tokenizer_folder, epochs=2)
    train(path, "epochs=1")
    return path


DEEPER = ["model.num_layers=5", f"checkpointer.hf_config={json.dumps(HF_CONFIG | {'num_hidden_layers': 5})}"]
CHOSEN = (
    "batch_size",
    "gradient_accumulation_steps",
    "tokenizer.max_seq_len",
    "optimizer.lr",
    "early_exit_loss.interval",
)
SAMPLES = "batch_size x gradient_accumulation_steps x data-parallel ranks"


@pytest.mark.parametrize(
    ("overrides", "key", "was", "now"),
    [
        (["dataset.seq_len=32"], "dataset.seq_len", "64", "32"),
        (["early_exit_loss.curriculum=gradual"], "early_exit_loss.curriculum", "'rotational'", "'gradual'"),
        (["early_exit_loss=null"], "early_exit_loss", "'rotational'", "None"),
        (["layer_dropout.prob=0.3"], "layer_dropout.prob", "0.2", "0.3"),
        (["batch_size=1"], SAMPLES, "2", "1"),
        (["max_steps_per_epoch=3"], "steps in an epoch", "2", "3"),
        (["shuffle=false"], "shuffle", "True", "False"),
        (["model.norm_eps=1e-4"], "model.norm_eps", "None", "0.0001"),
        (DEEPER, "model.num_layers", "4", "5"),
        (["optimizer_in_bwd=true"], "optimizer_in_bwd", "False", "True"),
        (["optimizer=torch.optim.SGD"], "optimizer._component_", "AdamW", "SGD"),
        (["loss=torch.nn.CrossEntropyLoss"], "loss._component_", "CEWithChunkedOutputLoss", "CrossEntropyLoss"),
        (["tokenizer.max_seq_len=100"], "tokenizer.max_seq_len", "128", "100"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_another_run_is_refused(overrides, key, was, now, stopped, no_weights):
    """One ValueError that says what it was and what it is now, before weights are read; no file changes."""
    before = written(stopped.parent)
    with pytest.raises(ValueError) as caught:
        set_up(stopped, "resume_from_checkpoint=true", *overrides)
    message = " ".join(str(caught.value).split())
    assert message.startswith(f"resume_from_checkpoint: {key} was ")
    said_before, _, said_now = message.partition(" and is ")
    assert was in said_before and now in said_now.partition(" now. ")[0]
    assert message.endswith("set resume_from_checkpoint=false and another output_dir")
    assert written(stopped.parent) == before


def test_changed_data_of_equal_length_is_refused(tmp_path, finetune):
    """The same data may lie elsewhere."""
    data = text_data(tmp_path / "data" / "texts.json", texts := [f"x{n} = {n}" for n in range(10, 30)])
    path = finetune(dataset=data)
    train(path)
    again = ["resume_from_checkpoint=true", "epochs=2"]
    text_data(tmp_path / "moved" / "texts.json", texts)
    set_up(path, *again, f"dataset.data_files={tmp_path}/moved/texts.json")
    text_data(tmp_path / "data" / "texts.json", [text.replace("x17 = 17", "x17 = 71") for text in texts])
    message = "^resume_from_checkpoint: .*tokens and labels"
    with pytest.raises(ValueError, match=message):
        set_up(path, *again)


@pytest.mark.parametrize("date", ["", "{{ strftime_now('%d %B') }}"], ids=["plain", "with today's date"])
def test_a_changed_chat_template_is_refused(date, tmp_path, finetune, monkeypatch):
    lines = [{"input": f"{n}?", "output": str(n)} for n in range(8)]
    data = json_data(tmp_path / "qa.json", lines, "instruct")
    template = date + "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    path = finetune(dataset=data, max_steps_per_epoch=None)
    train(path, f"tokenizer.chat_template={json.dumps(template)}")
    again = ["resume_from_checkpoint=true", "epochs=2"]
    monkeypatch.setattr(chat_template, "datetime", SimpleNamespace(now=lambda: datetime(2020, 2, 2)))
    set_up(path, *again, f"tokenizer.chat_template={json.dumps(template)}")
    changed = template.replace("[", "<")
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .*chat template"):
        set_up(path, *again, f"tokenizer.chat_template={json.dumps(changed)}")


def test_settings_that_change_no_loss_may_differ_on_resume(stopped):
    """Logging, saving, clipping, memory, a batch made otherwise of as many samples, and defaults that are spelt out."""
    again = resumed(
        stopped, "epoch_0", "batch_size=1", "gradient_accumulation_steps=2", "log_every_n_steps=2",
        "save_every_n_steps=1", "keep_last_n_checkpoints=2", "clip_grad_norm=1.0", "early_exit_loss.chunk_tokens=16",
        "loss.num_output_chunks=16", "shuffle=true", "layer_dropout.schedule=constant", "tokenizer.max_seq_len=128",
    )  # fmt: skip
    assert sorted(losses(again)) == [4]
    assert checkpoints(again) == ["step_3", "epoch_1"]


def test_what_is_auto_is_that_of_the_stopped_run(stopped, monkeypatch):
    """Also on another number of ranks, of which each then takes fewer samples."""
    config = load_config(str(stopped), ["resume_from_checkpoint=true", *(f"{key}=auto" for key in CHOSEN)])
    recipe = LayerSkipFinetune(config)
    recipe.lock.release()
    cfg = recipe.cfg
    given = FinetuneConfig.load(load_config(str(stopped)))
    assert cfg.values == given.values | {"device": "cpu"}
    assert cfg.chosen.keys() == {*CHOSEN, "early_exit_loss.chunk_tokens"}
    monkeypatch.setenv("WORLD_SIZE", "2")
    stored = stored_choices(stopped.parent / "out" / "epoch_0")
    assert FinetuneConfig.load(config, stored).batch_size == given.batch_size // 2


def test_an_exit_may_be_given_as_the_log_prints_it():
    check_resumable({"early_exit_loss": {"exits": "3"}}, {"early_exit_loss": {"exits": 3}})
    with pytest.raises(ValueError, match=r"early_exit_loss\.exits .*'3'.* 4 "):
        check_resumable({"early_exit_loss": {"exits": "3"}}, {"early_exit_loss": {"exits": 4}})


def test_a_run_resumes_whose_checkpoint_notes_other_keys_of_the_model():
    """Earlier versions noted the keys of all families, and not all keys of RoPE."""
    noted = {"architecture": "LlamaForCausalLM", "vocab_size": 97, "no_rope_layer_interval": 4, "rope": {"theta": 1e4}}
    now = {"architecture": "LlamaForCausalLM", "vocab_size": 97, "rope": {"theta": 1e4, "beta_fast": 32.0}}
    check_resumable({"config.json": noted}, {"config.json": now})
    for key, change in {"vocab_size": {"vocab_size": 98}, "rope.theta": {"rope": {"theta": 5e5}}}.items():
        with pytest.raises(ValueError, match=rf"config\.json\.{key} was"):
            check_resumable({"config.json": noted}, {"config.json": now | change})


def test_a_new_run_throws_away_no_earlier_runs_checkpoints(stopped):
    message = r"^keep_last_n_checkpoints: 1 .*Allowed: "
    with pytest.raises(ValueError, match=message):
        LayerSkipFinetune(load_config(str(stopped), ["keep_last_n_checkpoints=1"]))


def test_a_run_does_not_begin_where_it_writes(stopped):
    """Its first checkpoint would take the place of what it began with."""
    out = stopped.parent / "out"
    section = "_component_: torchtune.training.FullModelHFCheckpointer, model_type: LLAMA3_2"
    files = f"checkpoint_dir: {out}/epoch_0, checkpoint_files: [model-00001-of-00001.safetensors]"
    before = written(stopped.parent)
    for own in (out, out / "epoch_0", out / "epoch_0" / "new"):  # what is suggested lies outside of the run
        overrides = [f"checkpointer={{{section}, {files}}}", f"output_dir={own}"]
        with pytest.raises(ValueError, match=rf"^output_dir: .*output_dir={out}_2$"):
            LayerSkipFinetune(load_config(str(stopped), overrides))
    assert written(stopped.parent) == before


def test_a_seed_that_a_resumed_run_does_not_take_is_said(stopped, caplog):
    with caplog.at_level("WARNING", logger=get_logger().name):
        set_up(stopped, "resume_from_checkpoint=true", "seed=77")
    assert [m for m in caplog.messages if m.startswith("seed: 77 changes nothing here")]
