"""Validation while training: its values by plain PyTorch on single samples, and the warning for the last layer."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers.adapters import EveryExit, adapted_section, make_start, read_hf
from helpers.configs import MODEL, finetune_config, start_section
from helpers.resuming import WEIGHTS, final_weights, same_tensors
from helpers.training import VALIDATION, json_data, losses, read_log, set_up, train
from torchtune.utils import get_logger

from layerskip_recipes.acceptance import measuring
from layerskip_recipes.acceptance.trained_exits import read_trained_exits


def validated(out: Path) -> dict[int, dict[str, float]]:
    """The validation's numbers of each step that has some."""
    lines = {s: {k: v for k, v in line.items() if k.startswith("val_")} for s, line in read_log(out).items()}
    return {step: line for step, line in lines.items() if line}


pytestmark = pytest.mark.slow

EXITS = (1, 2, 3, 4)


def chats(folder: Path) -> dict:
    """A dataset of 7 chats of several lengths, where only the answers count."""
    talks = [
        [{"from": "human", "value": f"what is {n} + {n}?"}, {"from": "gpt", "value": "it is " + f"{2 * n} " * (n + 1)}]
        for n in range(7)
    ]
    style = {"conversation_column": "conversations", "conversation_style": "sharegpt", "train_on_input": False}
    return json_data(folder / "chats.json", [{"conversations": talk} for talk in talks], "chat", **style)


def quality(weights: dict[str, torch.Tensor], samples: list[dict], exits: tuple[int, ...]) -> dict[str, float]:
    """Loss, perplexity, agreement and overlap of each exit over the labels of all samples, each computed alone."""
    plain, parts, labels = EveryExit(MODEL), [], []
    for sample in samples:
        shifted = torch.tensor(sample["labels"][1:])
        with torch.no_grad():
            by_exit = torch.cat(plain.logits(weights, torch.tensor([sample["tokens"]])))
        parts.append(by_exit[:, :-1][:, shifted != -100])
        labels.append(shifted[shifted != -100])
    logits, labels = torch.cat(parts, 1), torch.cat(labels)
    last = logits[-1]
    expected = {"val_loss_final": F.cross_entropy(last, labels)}
    for e in exits:
        expected[f"val_loss_exit_{e}"] = loss = F.cross_entropy(logits[e - 1], labels)
        expected[f"val_perplexity_exit_{e}"] = loss.exp()
        expected[f"val_agreement_exit_{e}"] = (logits[e - 1].argmax(-1) == last.argmax(-1)).float().mean()
        expected[f"val_overlap_exit_{e}"] = torch.minimum(logits[e - 1].softmax(-1), last.softmax(-1)).sum(-1).mean()
    return {name: value.item() for name, value in expected.items()}


@pytest.mark.parametrize(
    ("changes", "count", "exits"),
    [
        ({"run_val_every_n_steps": 1, "exits_val": ":"}, 7, EXITS),
        ({"run_val_every_n_steps": 2, "exits_val": "1,3"}, 7, (1, 3, 4)),
        ({"exits_val": -1}, 7, (4,)),
        ({"early_exit_loss": {"exits": 2, "curriculum": None}}, 7, (2, 4)),
    ],
    ids=["all", "some layers", "the last layer, at start and end", "the exit with a loss"],
)
def test_the_values_are_those_of_plain_pytorch(changes, count, exits, checkpoint, tmp_path, finetune, caplog):
    """Before the training from the start's weights, after that from the checkpoints of the same steps."""
    path = finetune(
        checkpointer=start_section(checkpoint), dataset_val=chats(tmp_path), max_steps_per_epoch=4,
        save_every_n_steps=1, optimizer={"_component_": "torch.optim.AdamW", "lr": 1e-2}, **changes,
    )  # fmt: skip
    with caplog.at_level(logging.INFO, logger=get_logger().name):
        recipe = train(path, "tokenizer.max_seq_len=100")
    measured, every = validated(tmp_path / "out"), changes.get("run_val_every_n_steps", 4)
    assert sorted(measured) == list(range(0, 5, every))
    dataset = recipe.validation.batches.dataset
    samples = [dataset[i] for i in range(count)]
    assert len({len(sample["tokens"]) for sample in samples}) > 2
    assert any(-100 in sample["labels"] for sample in samples)
    for step, values in measured.items():
        (told,) = [message for message in caplog.messages if message.startswith(f"Validation after step {step}: ")]
        assert f"val_loss_final {values['val_loss_final']:.3f}" in told and "exit_4" not in told
        assert all(f"val_agreement_exit_{e} {values[f'val_agreement_exit_{e}']:.3f}" in told for e in exits[:-1])
        folder = {0: checkpoint, 4: tmp_path / "out" / "epoch_0"}.get(step, tmp_path / "out" / f"step_{step}")
        expected = quality(read_hf(folder, "llama3_2"), samples, exits)
        assert set(values) == set(expected)
        for name, value in expected.items():
            assert values[name] == pytest.approx(value, rel=1e-4), f"{name} after {step} steps"
        assert values["val_agreement_exit_4"] == 1
    if exits == EXITS:
        assert 0 < measured[0]["val_agreement_exit_2"] < 1
        assert len({line["val_loss_exit_2"] for line in measured.values()}) == len(measured)


@pytest.mark.parametrize("trains_on_input", [False, True])
def test_acceptance_is_that_of_generated_tokens(trains_on_input, checkpoint, tmp_path, finetune, monkeypatch):
    """Each reply and its end, without its header and the line break after its end, in the log and in layerskip.json."""
    template = (
        "{% for m in messages %}{{ m.role + ':\\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
    )
    monkeypatch.setattr(measuring, "ENOUGH_SAMPLES", 64)
    data = chats(tmp_path) | {"train_on_input": trains_on_input}
    path = finetune(
        checkpointer=start_section(checkpoint), dataset=data, dataset_val=data, max_steps_per_epoch=2, exits_val=":",
        layer_dropout=None, early_exit_loss={"exits": 2, "curriculum": None},
    )  # fmt: skip
    config = yaml.safe_load(path.read_text())
    config["tokenizer"] |= {"chat_template": template, "max_seq_len": 128}
    path.write_text(yaml.safe_dump(config))
    recipe = train(path)
    tokenizer, samples = recipe.cfg.tokenizer.build(), []
    for n in range(7):
        reply = "it is " + f"{2 * n} " * (n + 1)
        header = tokenizer.encode(f"user:\nwhat is {n} + {n}?<|endoftext|>\nassistant:\n", add_eos=False)
        tokens = [*header, *tokenizer.encode(reply, add_bos=False, add_eos=True)]
        samples.append({"tokens": tokens, "labels": [-100] * len(header) + tokens[len(header) :]})
    expected = quality(read_hf(tmp_path / "out" / "epoch_0", "llama3_2"), samples, EXITS)
    found = validated(tmp_path / "out")[2]
    for name in (f"val_{kind}_exit_{e}" for kind in ("agreement", "overlap") for e in EXITS):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    measured = read_trained_exits(tmp_path / "out" / "epoch_0").measured
    assert measured.labels == sum(label != -100 for sample in samples for label in sample["labels"])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"tokens": [[1, 2, 3]], "labels": [[-100] * 3]}, "no label counts"),
        ({"tokens": [[1, 2, 2**20]], "labels": [[1, 2, 3]]}, "a sample has token 1048576"),
        ({"tokens": [[1] * 999], "labels": [[1] * 999]}, "a sample has 999 tokens"),
    ],
)
def test_bad_validation_data_are_told_by_their_key(batch, message, finetune):
    recipe = set_up(finetune(dataset_val=VALIDATION))
    recipe.validation.batches = [{key: torch.tensor(value) for key, value in batch.items()}]
    with pytest.raises(ValueError, match=f"^dataset_val: {message}"):
        recipe.validation.measure(recipe.model, 0)


def test_validation_data_without_a_sample_are_refused(finetune, monkeypatch):
    monkeypatch.setattr("layerskip_recipes.training.validation.load_data", lambda *args: ([], None))
    with pytest.raises(ValueError, match=r"^dataset_val: "):
        set_up(finetune(dataset_val=VALIDATION))


def test_validation_changes_no_training(tmp_path, tokenizer_folder, finetune):
    """Not a random number is moved: attention dropout, layer dropout, the adapters' dropout and the order go on."""
    make_start(tmp_path / "start", "llama3_2", tokenizer_folder)
    path = finetune(
        model=adapted_section("llama3_2", lora_dropout=0.3, attn_dropout=0.2), epochs=2, shuffle=True,
        checkpointer=start_section(tmp_path / "start"), layer_dropout={"prob": 0.5, "schedule": "exp"},
    )  # fmt: skip
    train(path, f"output_dir={tmp_path}/without")
    train(path, f"dataset_val={json.dumps(VALIDATION)}", "run_val_every_n_steps=1")
    with_it = read_log(tmp_path / "out")
    for step, line in losses(tmp_path / "without").items():
        assert {name: with_it[step][name] for name in line} == line
    ends = [final_weights(tmp_path / out / "epoch_1") for out in ("without", "out")]
    assert same_tensors(*ends)
    assert len(validated(tmp_path / "out")) == 5


@pytest.fixture(scope="module")
def good(tmp_path_factory, tokenizer_folder) -> Path:
    """A config on a start that has learned something: another step at a low rate leaves it, at a high one ruins it."""
    folder = tmp_path_factory.mktemp("good")
    path = finetune_config(
        folder, tokenizer_folder, layer_dropout=None, epochs=10, max_steps_per_epoch=4,
        optimizer={"_component_": "torch.optim.AdamW", "lr": 1e-2},
    )  # fmt: skip
    train(path)
    learned = start_section(folder / "out" / "epoch_9", file=WEIGHTS)
    changes = {"checkpointer": learned, "dataset_val": VALIDATION, "layer_dropout": None}
    return finetune_config(folder / "next", tokenizer_folder, **changes)


def warnings_of(caplog, path: Path, *overrides: str) -> list[str]:
    """The warnings about the last layer in a run."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger=get_logger().name):
        train(path, *overrides)
    return [message for message in caplog.messages if message.startswith("val_loss_final: ")]


def test_a_last_layer_that_gets_worse_is_warned_of(good, tmp_path, caplog):
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
        assert f"({first:.4f}). Lower early_exit_loss.scale" in message
        assert "early_exit_loss.scale, layer_dropout.prob or optimizer.lr to keep it" in message


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


def test_a_last_layer_that_is_not_finite_at_the_end_is_warned_of(good, tmp_path, caplog):
    """The update of the very last step ruins it; there is no step after it that would stop."""
    overrides = ["optimizer.lr=1e18", "max_steps_per_epoch=1", f"output_dir={tmp_path}/out"]
    messages = warnings_of(caplog, good, *overrides)
    assert not math.isfinite(validated(tmp_path / "out")[1]["val_loss_final"])
    assert read_trained_exits(tmp_path / "out" / "epoch_0").measured is None
    assert messages
