"""Validation while training, the logged config, the warning for the last layer, the stop at a loss that is not finite.

Expected values: plain PyTorch on single samples without padding; the order of samples by torch.randperm.
"""

import json
import logging
import math
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.adapters import EveryExit, adapted_section, make_start, plain_section, read_hf, reader
from helpers.commands import last_line, run_tune
from helpers.configs import MODEL, finetune_config, make_checkpoint
from helpers.refusals import check
from helpers.resuming import COSINE, checkpoints, final_weights
from helpers.training import losses, read_log, train
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torchtune.training import FullModelHFCheckpointer
from torchtune.utils import get_logger

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.training.early_exit import EarlyExitLoss
from layerskip_recipes.training.recipe import LayerSkipFinetune

VALIDATION = {
    "_component_": "layerskip_recipes.quickstart.StdlibDataset", "split": "heldout", "seq_len": 48, "max_samples": 5,
}  # fmt: skip
EXITS = (1, 2, 3, 4)


def whole_log(out: Path) -> dict[int, dict[str, float]]:
    """The disk logger's numbers by step: those of the training and those of the validation."""
    lines: dict[int, dict[str, float]] = {}
    for line in (out / "logs" / "log.txt").read_text().splitlines():
        step, _, rest = line.partition(" | ")
        pairs = (pair.rsplit(":", 1) for pair in rest.split())
        lines.setdefault(int(step.split()[1]), {}).update({k: float(v) for k, v in pairs})
    return lines


def validated(out: Path) -> dict[int, dict[str, float]]:
    """Of each step the validation's numbers, if there are any."""
    lines = {s: {k: v for k, v in line.items() if k.startswith("val_")} for s, line in whole_log(out).items()}
    return {step: line for step, line in lines.items() if line}


@pytest.fixture(scope="module")
def start(tmp_path_factory, tokenizer_folder) -> Path:
    """A checkpoint whose exits differ."""
    return make_checkpoint(tmp_path_factory.mktemp("validation") / "start", tokenizer_folder)


# ------------------------------------------------------------------------------------------------------------ values


def chats(folder: Path) -> dict:
    """A dataset of 7 chats of several lengths, where only the answers count."""
    talks = [
        [{"from": "human", "value": f"what is {n} + {n}?"}, {"from": "gpt", "value": "it is " + f"{2 * n} " * (n + 1)}]
        for n in range(7)
    ]
    (folder / "chats.json").write_text(json.dumps([{"conversations": talk} for talk in talks]))
    return {
        "_component_": "torchtune.datasets.chat_dataset", "source": "json", "split": "train",
        "data_files": str(folder / "chats.json"), "conversation_column": "conversations",
        "conversation_style": "sharegpt", "train_on_input": False,
    }  # fmt: skip


def quality(weights: dict[str, torch.Tensor], samples: list[dict], exits: tuple[int, ...]) -> dict[str, float]:
    """Loss, perplexity and agreement of each exit over the labels of all samples, one sample after the other."""
    plain, count = EveryExit(MODEL), 0
    loss, agreement = dict.fromkeys(exits, 0.0), dict.fromkeys(exits, 0)
    for sample in samples:
        labels = torch.tensor(sample["labels"][1:])
        counts = labels != -100
        count += int(counts.sum())
        with torch.no_grad():
            by_exit = [x[0, :-1][counts] for x in plain.logits(weights, torch.tensor([sample["tokens"]]))]
        for e in exits:
            loss[e] += F.cross_entropy(by_exit[e - 1], labels[counts], reduction="sum").item()
            agreement[e] += int((by_exit[e - 1].argmax(-1) == by_exit[-1].argmax(-1)).sum())
    expected = {"val_loss_final": loss[max(exits)] / count}
    for e in exits:
        expected[f"val_loss_exit_{e}"] = loss[e] / count
        expected[f"val_perplexity_exit_{e}"] = math.exp(loss[e] / count)
        expected[f"val_agreement_exit_{e}"] = agreement[e] / count
    return expected


@pytest.mark.parametrize(
    ("changes", "count", "exits"),
    [
        ({"run_val_every_n_steps": 1, "batch_size_val": 3}, 7, EXITS),
        ({"run_val_every_n_steps": 2, "batch_size_val": 2, "max_batches_val": 2, "layers_val": "0,2"}, 4, (1, 3, 4)),
        ({"layers_val": -1}, 7, (4,)),
        ({"layers_val": None, "max_batches_val": None}, 7, EXITS),
    ],
    ids=["all", "some batches, some layers", "the last layer, at start and end", "null is all"],
)
def test_the_values_are_those_of_plain_pytorch(changes, count, exits, start, tmp_path, tokenizer_folder):
    """Before the training from the start's weights, after that from the checkpoints of the same steps."""
    path = finetune_config(
        tmp_path, tokenizer_folder, checkpointer=reader(start, "llama3_2"), dataset_val=chats(tmp_path),
        max_steps_per_epoch=4, save_every_n_steps=1, optimizer={"_component_": "torch.optim.AdamW", "lr": 1e-2},
        **changes,
    )  # fmt: skip
    recipe = train(path, "tokenizer.max_seq_len=100")
    measured, every = validated(tmp_path / "out"), changes.get("run_val_every_n_steps", 4)
    assert sorted(measured) == list(range(0, 5, every))
    dataset = recipe.validation.batches.dataset
    samples = [dataset[i] for i in range(count)]
    assert len({len(sample["tokens"]) for sample in samples}) > 2 and any(
        -100 in sample["labels"] for sample in samples
    )
    for step, values in measured.items():
        folder = {0: start, 4: tmp_path / "out" / "epoch_0"}.get(step, tmp_path / "out" / f"step_{step}")
        expected = quality(read_hf(folder, "llama3_2"), samples, exits)
        assert set(values) == set(expected)
        for name, value in expected.items():
            assert values[name] == pytest.approx(value, rel=1e-4), f"{name} after {step} steps"
        assert values["val_agreement_exit_4"] == 1
    if exits == EXITS:
        assert 0 < measured[0]["val_agreement_exit_2"] < 1
        assert len({line["val_loss_exit_2"] for line in measured.values()}) == len(measured)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"tokens": [[1, 2, 3]], "labels": [[-100] * 3]}, "no label counts"),
        ({"tokens": [[1, 2, 2**20]], "labels": [[1, 2, 3]]}, "a sample has token 1048576"),
        ({"tokens": [[1] * 999], "labels": [[1] * 999]}, "a sample has 999 tokens"),
    ],
)
def test_bad_validation_data_are_told_by_their_key(batch, message, tmp_path, tokenizer_folder):
    """Also where the first sample is fine, by which the config is checked."""
    recipe = LayerSkipFinetune(load_config(str(finetune_config(tmp_path, tokenizer_folder, dataset_val=VALIDATION))))
    recipe.setup()
    recipe.validation.batches = [{key: torch.tensor(value) for key, value in batch.items()}]
    with pytest.raises(ValueError, match=f"^dataset_val: {message}"):
        recipe.validation.measure(recipe.model, torch.device("cpu"), 0)


def test_validation_changes_no_training(tmp_path, tokenizer_folder):
    """Not a random number is moved: attention dropout, layer dropout, the adapters' dropout and the order go on."""
    make_start(tmp_path / "start", "llama3_2", tokenizer_folder)
    model = adapted_section("llama3_2", lora_dropout=0.3, attn_dropout=0.2)
    path = finetune_config(
        tmp_path, tokenizer_folder, model=model, checkpointer=reader(tmp_path / "start", "llama3_2"), epochs=2,
        layer_dropout={"prob": 0.5, "schedule": "exp"}, shuffle=True,
    )  # fmt: skip
    train(path, f"output_dir={tmp_path}/without")
    section = json.dumps(VALIDATION)
    train(path, f"dataset_val={section}", "run_val_every_n_steps=1", "batch_size_val=3")
    without, with_it = losses(tmp_path / "without"), whole_log(tmp_path / "out")
    for step, line in without.items():
        assert {name: with_it[step][name] for name in line} == line
    end = final_weights(tmp_path / "without" / "epoch_1")
    assert all(torch.equal(end[name], value) for name, value in final_weights(tmp_path / "out" / "epoch_1").items())
    assert len(validated(tmp_path / "out")) == 5


def test_without_validation_nothing_is_measured(tmp_path, tokenizer_folder):
    path = finetune_config(tmp_path, tokenizer_folder)
    train(path)
    assert not validated(tmp_path / "out") and sorted(whole_log(tmp_path / "out")) == [1, 2]


# ----------------------------------------------------------------------------------------------------------- loggers

NAMES = {f"val_{what}_exit_{e}" for what in ("loss", "perplexity", "agreement") for e in EXITS} | {"val_loss_final"}
EVERY_EXIT = {f"loss_exit_{e}" for e in EXITS} | {"loss_final", "layer_dropout_rate"}


def test_wandb_offline_has_every_exit_and_the_config(tmp_path, tokenizer_folder, monkeypatch):
    """wandb for real, offline: the run's file holds the names and the config with versions and curriculum."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = {
        "_component_": "torchtune.training.metric_logging.WandBLogger", "project": "layerskip",
        "log_dir": str(tmp_path),
    }  # fmt: skip
    train(finetune_config(tmp_path, tokenizer_folder, metric_logger=logger, dataset_val=VALIDATION))
    (record,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = record.read_bytes()
    for name in NAMES | EVERY_EXIT | {"versions", "layerskip-recipes", "curriculum"}:
        assert name.encode() in content, name


def test_tensorboard_has_every_exit(tmp_path, tokenizer_folder):
    """At the start, after step 2 and at the end, with the values that the disk logger has."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    component = "torchtune.training.metric_logging.TensorBoardLogger"
    path = finetune_config(
        tmp_path, tokenizer_folder, dataset_val=VALIDATION, run_val_every_n_steps=2, max_steps_per_epoch=3
    )
    train(path)
    logger = json.dumps({"_component_": component, "log_dir": str(tmp_path / "tb")})
    train(path, "~metric_logger.filename", f"metric_logger={logger}", f"output_dir={tmp_path}/other")
    (folder,) = (tmp_path / "tb").iterdir()
    events = accumulator.EventAccumulator(str(folder)).Reload()
    assert set(events.Tags()["tensors"]) >= NAMES | {"loss", "loss_exit_4"}
    for step, line in validated(tmp_path / "out").items():
        for name, value in line.items():
            found = {e.step: e.tensor_proto.float_val[0] for e in events.Tensors(name)}
            assert sorted(found) == [0, 2, 3] and found[step] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "steps", "exits"),
    [
        ({"scale": 0.5, "curriculum": "rotational", "interval": 2}, 8, {"step 1": [1, 3, 4], "step 2": [2, 4]}),
        (
            {"scale": 0.5, "curriculum": "rotational", "interval": 3}, 8,
            {"step 1": [1, 4], "step 2": [2, 4], "step 3": [3, 4]},
        ),
        (
            # One layer more from the last down every T / (2 L) = 2 steps.
            {"scale": 0.5, "curriculum": "gradual"}, 16,
            {"step 1": [4], "step 3": [3, 4], "step 5": [2, 3, 4], "step 7": [1, 2, 3, 4]},
        ),
        ({"scale": 0.5, "curriculum": None, "layers": "0,2"}, 4, {"step 1": [1, 3, 4]}),
        (None, 4, {"step 1": [4]}),
    ],
    ids=["rotational 2", "rotational 3", "gradual", "all of some", "none"],
)  # fmt: skip
def test_the_logged_config_has_versions_and_curriculum(loss, steps, exits, tmp_path, tokenizer_folder):
    """Beside all that the config says; and the training's exits at each step are those."""
    path = finetune_config(tmp_path, tokenizer_folder, early_exit_loss=loss, max_steps_per_epoch=4, epochs=steps // 4)
    train(path)
    logged = OmegaConf.to_container(OmegaConf.load(tmp_path / "out" / "torchtune_config.yaml"))
    assert logged.pop("curriculum") == {"total_steps": steps, "num_layers": 4, "exits": exits}
    versions = logged.pop("versions")
    for name in ("layerskip-recipes", "torch", "torchtune", "torchao"):
        assert versions[name] == version(name)
    assert re.fullmatch(r"3\.\d+\.\d+.*", versions["python"])
    assert logged == OmegaConf.to_container(load_config(str(path)))
    on, sets = [], list(exits.values())
    for step, line in sorted(read_log(tmp_path / "out").items()):
        on = exits.get(f"step {step}", on)
        if loss and loss["curriculum"] == "rotational":
            on = sets[(step - 1) % len(sets)]
        assert sorted(int(name.split("_")[2]) for name in line if name.startswith("loss_exit_")) == on


def test_the_curriculum_of_a_long_gradual_run_is_logged_to_its_end():
    """Sets that appear late too, up to 16 of them: T = 800000 and L = 4 are 100000 steps a layer."""
    from layerskip_recipes.training.run_log import curriculum

    logged = curriculum(EarlyExitLoss(curriculum="gradual"), 4, 800_000)["exits"]
    assert logged == {
        "step 1": [4], "step 100001": [3, 4], "step 200001": [2, 3, 4], "step 300001": [1, 2, 3, 4],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the warning


@pytest.fixture(scope="module")
def good(tmp_path_factory, tokenizer_folder) -> Path:
    """A config on a start that has learned something: another step at a low rate leaves it, at a high one ruins it."""
    folder = tmp_path_factory.mktemp("good")
    train(
        finetune_config(
            folder, tokenizer_folder, layer_dropout=None, epochs=10, max_steps_per_epoch=4,
            optimizer={"_component_": "torch.optim.AdamW", "lr": 1e-2},
        )
    )  # fmt: skip
    return finetune_config(
        folder / "next", tokenizer_folder, checkpointer=reader(folder / "out" / "epoch_9", "llama3_2"),
        dataset_val=VALIDATION, layer_dropout=None,
    )  # fmt: skip


def warnings_of(caplog, path: Path, *overrides: str) -> list[str]:
    """The warnings about the last layer in a run."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger=get_logger().name):
        train(path, *overrides)
    return [message for message in caplog.messages if message.startswith("val_loss_final: ")]


def test_the_warning_if_the_last_layer_gets_worse(good, tmp_path, caplog):
    """By more than the margin: it says by how much, after which step, and what to change. Not otherwise."""
    assert not warnings_of(caplog, good, f"output_dir={tmp_path}/low", "optimizer.lr=1e-5")
    ruin = ["optimizer.lr=0.3", "run_val_every_n_steps=1"]
    messages = warnings_of(caplog, good, f"output_dir={tmp_path}/high", *ruin)
    measured = validated(tmp_path / "high")
    first = measured[0]["val_loss_final"]
    worse = {step: measured[step]["val_loss_final"] / first - 1 for step in (1, 2)}
    assert min(worse.values()) > 0.05
    assert len(messages) == 2
    for step, message in zip((1, 2), messages, strict=True):
        assert f"{measured[step]['val_loss_final']:.4f} after step {step} is {worse[step]:.1%} worse" in message
        assert f"({first:.4f}), more than val_loss_margin=0.05" in message
        assert "early_exit_loss.scale, layer_dropout.prob or lr" in message
    # The margin itself, on both sides of it.
    for name, margin, count in (("under", 0.99 * max(worse.values()), 1), ("over", 1.01 * max(worse.values()), 0)):
        overrides = [*ruin, f"val_loss_margin={margin}", f"output_dir={tmp_path}/{name}"]
        assert len(warnings_of(caplog, good, *overrides)) == count


def test_a_resumed_run_compares_with_the_first_start(good, tmp_path, caplog):
    """Not with what it finds; a new run from the same worse weights does."""
    out = tmp_path / "out"
    assert len(warnings_of(caplog, good, f"output_dir={out}", "optimizer.lr=0.3")) == 1
    first = validated(out)[0]["val_loss_final"]
    (message,) = warnings_of(caplog, good, f"output_dir={out}", "epochs=2", "resume_from_checkpoint=true")
    assert "after step 4" in message and f"at the start ({first:.4f})" in message
    assert 0 in validated(out) and 4 in validated(out)
    worse = f"checkpointer.checkpoint_dir={out}/epoch_0"
    assert not warnings_of(caplog, good, worse, "optimizer.lr=1e-5", f"output_dir={tmp_path}/new")


def test_the_warning_if_the_last_layer_is_not_finite(good, tmp_path, caplog):
    """The update of the very last step ruins it; there is no step after it that would stop."""
    overrides = ["optimizer.lr=1e18", "max_steps_per_epoch=1", f"output_dir={tmp_path}/out"]
    messages = warnings_of(caplog, good, *overrides)
    assert not math.isfinite(validated(tmp_path / "out")[1]["val_loss_final"])
    assert messages


# ------------------------------------------------------------------------------------------------------- not finite


def order(samples: int, seed: int, epoch: int) -> list[int]:
    """The shuffled order of an epoch."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


@pytest.fixture
def poisoned(tmp_path, tokenizer_folder) -> tuple[Path, int]:
    """A config with one poisonous sample, and its number: the embedding of a token that only it has is NaN."""
    sample = order(20, seed=3, epoch=0)[13]  # late in the first epoch, so that there are checkpoints before it
    texts = [{"text": f"x{n} = {n * 37}\n" + "@" * (n == sample)} for n in range(20)]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    dataset = {
        "_component_": "torchtune.datasets.text_completion_dataset", "source": "json", "split": "train",
        "data_files": str(tmp_path / "texts.json"), "column": "text",
    }  # fmt: skip
    make_start(tmp_path / "start", "llama2", tokenizer_folder)  # its head is not the embedding
    path = finetune_config(
        tmp_path, tokenizer_folder, model=plain_section("llama2"), checkpointer=reader(tmp_path / "start", "llama2"),
        dataset=dataset, layer_dropout=None, shuffle=True, gradient_accumulation_steps=2, max_steps_per_epoch=None,
        epochs=2, save_every_n_steps=1, seed=3,
    )  # fmt: skip
    recipe = LayerSkipFinetune(load_config(str(path)))
    recipe.setup()
    recipe.cleanup()
    tokens = [set(recipe.data.dataset[i]["tokens"]) for i in range(20)]
    (token,) = tokens[sample] - set().union(*(tokens[:sample] + tokens[sample + 1 :]))
    weights = load_file(tmp_path / "start" / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = math.nan
    save_file(weights, tmp_path / "start" / "model.safetensors")
    return path, sample


def test_a_poisonous_sample_stops_the_run_and_is_named(poisoned, tmp_path):
    """By the real command: one last line with the step and its samples, exit status 1, and the checkpoint before it."""
    path, sample = poisoned
    places = order(20, seed=3, epoch=0)
    step = places.index(sample) // 4 + 1
    assert step == 4
    run = run_tune("run", "layerskip_finetune", "--config", str(path), cwd=tmp_path)
    assert run.returncode == 1
    last = last_line(run.stderr)
    named = places[4 * (step - 1) : 4 * step]
    assert last.startswith(f"ValueError: loss: not finite at step {step}, with samples {named} of the dataset.")
    assert sample in named and "Traceback" not in run.stderr
    out = tmp_path / "out"
    assert f"The last checkpoint under {str(out)!r} is whole; for example resume_from_checkpoint=true" in last
    assert "optimizer.lr=0.0005" in last
    assert checkpoints(out) == [f"step_{n}" for n in range(1, step)]
    assert sorted(read_log(out)) == list(range(1, step))
    assert all(math.isfinite(line["loss"]) for line in read_log(out).values())
    # It goes on from there, up to the sample.
    recipe = LayerSkipFinetune(load_config(str(path), ["resume_from_checkpoint=true"]))
    recipe.setup()
    assert recipe.step == step - 1
    with pytest.raises(ValueError, match=re.escape(f"not finite at step {step}, with samples {named}")):
        recipe.train()


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_passing_fault_is_forgotten_on_resume(in_backward, start, tmp_path, tokenizer_folder, monkeypatch):
    """A loss that is NaN once, in the second epoch: resumed, the run is the one that never had it."""
    path = finetune_config(
        tmp_path, tokenizer_folder, checkpointer=reader(start, "llama3_2"), epochs=2, max_steps_per_epoch=3,
        save_every_n_steps=1, shuffle=True, optimizer_in_bwd=in_backward, lr_scheduler=COSINE,
        layer_dropout={"prob": 0.5},
    )  # fmt: skip
    train(path, f"output_dir={tmp_path}/whole")
    whole, sound = losses(tmp_path / "whole"), EarlyExitLoss.__call__

    def faulty(self, *args, step, **kwargs):
        loss, exits = sound(self, *args, step=step, **kwargs)
        return (loss * math.inf if step == 4 else loss), exits

    monkeypatch.setattr(EarlyExitLoss, "__call__", faulty)
    recipe = LayerSkipFinetune(load_config(str(path)))
    recipe.setup()
    named = order(8, seed=0, epoch=1)[2:4]
    with pytest.raises(ValueError, match=re.escape(f"loss: not finite at step 5, with samples {named} of the dataset")):
        recipe.train()
    assert checkpoints(tmp_path / "out")[-1] == "step_4"
    monkeypatch.undo()
    train(path, "resume_from_checkpoint=true")
    assert losses(tmp_path / "out") == whole


@pytest.mark.parametrize("weight", ["model.norm.weight", "model.layers.2.mlp.up_proj.weight"])
def test_a_start_that_is_not_finite(weight, start, tmp_path, tokenizer_folder):
    """The first step says it, and nothing is written over or saved."""
    folder = tmp_path / "start"
    folder.mkdir()
    for file in start.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights[weight].flatten()[3] = math.nan
    save_file(weights, folder / "model.safetensors")
    section = reader(folder, "llama3_2")
    path = finetune_config(tmp_path, tokenizer_folder, checkpointer=section, shuffle=False, layer_dropout=None)
    recipe = LayerSkipFinetune(load_config(str(path)))
    recipe.setup()
    with pytest.raises(ValueError, match=r"^loss: not finite at step 1, with samples \[0, 1\] of the dataset"):
        recipe.train()
    assert not checkpoints(tmp_path / "out")


def test_a_learning_rate_that_explodes(start, tmp_path, tokenizer_folder):
    """The step after the update says it, with half the rate as an example."""
    path = finetune_config(tmp_path, tokenizer_folder, checkpointer=reader(start, "llama3_2"), shuffle=False)
    recipe = LayerSkipFinetune(load_config(str(path), ["optimizer.lr=1e18"]))
    recipe.setup()
    with pytest.raises(ValueError, match=r"^loss: not finite at step 2, with samples \[2, 3\].*lr=5e\+17") as error:
        recipe.train()
    assert "There is no checkpoint under" in str(error.value) and "resume_from" not in str(error.value)


def test_the_rate_to_try_next_is_half_of_the_configs_not_of_the_schedules(start, tmp_path, tokenizer_folder):
    warm_up = {"_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_warmup_steps": 9}
    path = finetune_config(
        tmp_path, tokenizer_folder, checkpointer=reader(start, "llama3_2"), shuffle=False, lr_scheduler=warm_up
    )
    recipe = LayerSkipFinetune(load_config(str(path), ["optimizer.lr=1e-3"]))
    recipe.setup()
    with torch.no_grad():
        recipe.model.tok_embeddings.weight.fill_(math.nan)
    with pytest.raises(ValueError, match=r"not finite at step 1.*optimizer.lr=0.0005"):
        recipe.train()


def gradients_explode_at(step: int, monkeypatch) -> None:
    """The gradient of one number is infinite at optimizer step `step` (from 1); the loss is not."""
    sound = LayerSkipFinetune._train_step

    def faulty(self, batches):
        parameter = self.model.layers[1].mlp.w1.weight
        hook = parameter.register_hook(lambda grad: grad * (math.inf if self.step == step - 1 else 1))
        try:
            return sound(self, batches)
        finally:
            hook.remove()

    monkeypatch.setattr(LayerSkipFinetune, "_train_step", faulty)


@pytest.mark.parametrize(
    "clip",
    [
        "1.0",
        "inf",
        "null",
    ],
)  # fmt: skip
def test_a_gradient_that_is_not_finite(clip, start, tmp_path, tokenizer_folder, monkeypatch):
    """Named with its own step and samples, before the weights or a checkpoint have it; the run goes on from there."""
    path = finetune_config(
        tmp_path, tokenizer_folder, checkpointer=reader(start, "llama3_2"), shuffle=False, layer_dropout=None,
        max_steps_per_epoch=4, save_every_n_steps=1,
    )  # fmt: skip
    gradients_explode_at(2, monkeypatch)
    recipe = LayerSkipFinetune(load_config(str(path), [f"clip_grad_norm={clip}"]))
    recipe.setup()
    with pytest.raises(ValueError, match=r"^gradient.*: not finite at step 2, with samples \[2, 3\] of the dataset"):
        recipe.train()
    assert checkpoints(tmp_path / "out") == ["step_1"]
    monkeypatch.undo()
    assert train(path, f"clip_grad_norm={clip}", "resume_from_checkpoint=true").step == 4
    assert all(value.isfinite().all() for value in final_weights(tmp_path / "out" / "epoch_0").values())


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def path(start, tmp_path, tokenizer_folder, monkeypatch) -> Path:
    """A config with validation on a checkpoint whose weights must not be read."""

    def load(self, *args, **kwargs):
        raise AssertionError("the weights are loaded before the mistake is found")

    monkeypatch.setattr(FullModelHFCheckpointer, "load_checkpoint", load)
    monkeypatch.chdir(tmp_path)
    return finetune_config(tmp_path, tokenizer_folder, checkpointer=reader(start, "llama3_2"), dataset_val=VALIDATION)


NO_INTEGER = {"0": "0", "-1": "-1", "true": "True", "1.5": "1.5", "two": "'two'", "[1]": "[1]"}
BAD = [
    *(
        (f"{key}={value}", key, shown, f"an integer of 1 or more (or null); for example {key}=")
        for key in (
            "run_val_every_n_steps", "batch_size_val", "max_batches_val", "save_every_n_steps",
            "keep_last_n_checkpoints",
        )
        for value, shown in NO_INTEGER.items()
    ),
    *(
        (f"{key}=flase", key, "'flase'", "true, false")
        for key in ("enable_async_checkpointing", "save_adapter_weights_only")
    ),
    *(
        (f"val_loss_margin={value}", "val_loss_margin", shown, "a number of 0 or more; for example val_loss_margin=")
        for value, shown in {"-1": "-1", "null": "None", "5%": "'5%'", ".nan": "nan", ".inf": "inf"}.items()
    ),
    *(
        (f"layers_val={value}", "layers_val", shown, "Allowed: indices 0..3 and slices")
        for value, shown in {"9": "9", "[]": "[]", "first": "'first'", "2:2": "2:2"}.items()
    ),
    ("dataset_val=null; layers_val=9", "layers_val", "9", "dataset_val"),
    ("dataset_val=3", "dataset_val", "3", "_component_"),
    ("dataset_val=[]", "dataset_val", "[]", "_component_"),
    ("dataset_val=heldout", "dataset_val._component_", "'heldout'", ""),
    ("dataset_val.sqlen=3", "dataset_val.sqlen", "no such argument", "Nearest: seq_len"),
    ("~dataset_val._component_", "dataset_val", "'heldout'", "_component_"),
    ("dataset_val=null; run_val_every_n_steps=3", "run_val_every_n_steps", "3", "dataset_val"),
    ("enable_async_checkpointing=true", "enable_async_checkpointing", "True", "save_every_n_steps"),
    ("run_val_every_n_step=3", "run_val_every_n_step", "unknown key", "Nearest: run_val_every_n_steps"),
    ("dataset_val.seq_len=0", "dataset_val", "0", "1 or more"),
    ("dataset_val.seq_len=1000", "dataset_val", "1000", "128"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "key", "given", "allowed"), BAD)
def test_bad_input(overrides, key, given, allowed, path):
    """One ValueError with the key, the value and what works, before weights are loaded or anything is written."""
    check("finetune", path, overrides, key, given, allowed)
