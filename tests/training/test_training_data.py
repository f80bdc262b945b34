"""Data of a training: packed, several datasets, samples that are cut, broken, or of another form."""

import json
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.resuming import SHORT_TEXTS
from helpers.training import json_data, read_log, set_up, text_data, train
from torchtune.data import padded_collate_packed

from layerskip_recipes.config.components import Component
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.data.datasets import Batches, collate_packed, load_data
from layerskip_recipes.data.tokenizer import hf_tokenizer
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.training.batches import TrainingData
from layerskip_recipes.training.config import FinetuneConfig

pytestmark = pytest.mark.slow


def instructions(folder: Path, rows: list[dict]) -> dict:
    """A dataset of questions and answers, of which only the answers are learned."""
    return json_data(folder / "data.json", rows, "instruct", train_on_input=False)


def cut_off(folder: Path, rows: list[dict]) -> dict:
    """The same, whose file lacks its end."""
    section = instructions(folder, rows)
    (folder / "data.json").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"input": ')
    return section


def conversations(folder: Path, roles: list[str]) -> dict:
    """20 good conversations, and one with these roles."""
    rows = [
        {"messages": [{"role": role, "content": "if"} for role in of]} for of in [["user", "assistant"]] * 20 + [roles]
    ]
    style = {"conversation_column": "messages", "conversation_style": "openai"}
    return json_data(folder / "data.json", rows, "chat", **style)


SHORT = {"input": "if", "output": "else:"}


def test_several_datasets_train(tmp_path, finetune):
    datasets = [instructions(tmp_path, [SHORT] * 20), text_data(tmp_path / "t.json", SHORT_TEXTS)]
    recipe = train(finetune(dataset=datasets), "tokenizer.max_seq_len=100")
    assert len(recipe.data.dataset) == 20 + len(SHORT_TEXTS)
    assert all(line["loss"] > 0 for line in read_log(tmp_path / "out").values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there torchtune's mask is a BlockMask")
def test_packed_batches_are_torchtunes():
    samples = [
        {
            "tokens": torch.arange(6) + 10 * row,
            "labels": torch.arange(6) + 10 * row + 1,
            "input_pos": torch.tensor([i for length in lengths for i in range(length)]),
            "seq_lens": torch.tensor(lengths),
        }
        for row, lengths in enumerate([[2, 4], [1, 2, 3]])
    ]
    for sample in samples:  # a text's first token cannot be predicted: its mask hides the text before
        sample["labels"][sample["seq_lens"].cumsum(0)[:-1]] = -100
    ours, theirs = collate_packed(samples, flex=False), padded_collate_packed(samples)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_packed_text_learns_nothing_of_the_next_one(tmp_path, tokenizer_folder, finetune):
    """Without a bos token, as many labels count as in texts that are not packed."""
    tokenizer = hf_tokenizer(str(tokenizer_folder), max_seq_len=48)
    model = FinetuneConfig.load(load_config(str(finetune()))).meta_model
    section = text_data(tmp_path / "t.json", SHORT_TEXTS, add_eos=False, split_across_pack=False)
    lengths = [len(row["tokens"]) for row in Component(section, "dataset").build(tokenizer)]
    packed = Component(section | {"packed": True}, "dataset")
    dataset, collate = load_data([packed], None, tokenizer, model, torch.device("cpu"))
    labels = collate([dataset[i] for i in range(len(dataset))])["labels"][:, 1:]
    assert (labels != -100).sum() == sum(lengths) - len(lengths)


def test_what_is_cut_off_is_said(tmp_path, finetune, caplog):
    """128 positions: of two samples the answer is lost, which makes a step that learns nothing; once each."""
    long = {"input": "if x: " * 200, "output": "else:"}
    dataset = instructions(tmp_path, [SHORT, SHORT, long, long, long, long])
    path = finetune(dataset=dataset, shuffle=False, max_steps_per_epoch=3, lr_scheduler=None)
    after = dict(train(path).model.named_parameters())
    lines = [record.message for record in caplog.records if record.levelname == "WARNING"]
    cut = [line for line in lines if "some samples have tokenizer.max_seq_len=128 tokens or more" in line]
    nothing = [line for line in lines if "no label counts" in line]
    assert len(cut) == 1 and len(nothing) == 1
    assert nothing[0].startswith("step 2 learns nothing: no label counts in samples [2, 3] of the dataset.")
    assert sorted(read_log(tmp_path / "out")) == [1]
    # Without labels, AdamW's momentum does not move the weights either.
    before = train(path, "max_steps_per_epoch=1", f"output_dir={tmp_path}/one_step").model.named_parameters()
    assert all(torch.equal(after[name], value) for name, value in before)


def test_a_training_in_which_no_label_counts_fails(tmp_path, finetune):
    """And writes no checkpoint: the model is what it was."""
    long = {"input": "if x: " * 200, "output": "else:"}
    path = finetune(dataset=instructions(tmp_path, [long] * 8), lr_scheduler=None, save_every_n_steps=2)
    with pytest.raises(ConfigError, match=r"^dataset: .*no label counts"):
        train(path)
    assert not [*(tmp_path / "out").glob("*/model*")]


@pytest.mark.parametrize(
    ("samples", "chosen", "batch"),
    [
        (5, "batch_size gradient_accumulation_steps", (4, 1)),
        (3, "batch_size gradient_accumulation_steps", (3, 1)),
        (3, "batch_size", (1, 2)),
        (5, "gradient_accumulation_steps", (4, 1)),
        (9, "batch_size gradient_accumulation_steps", (4, 2)),
        (5, "", None),
    ],
)
def test_a_chosen_batch_fits_few_samples(tmp_path, finetune, samples, chosen, batch):
    path = finetune(dataset=instructions(tmp_path, [SHORT] * samples), batch_size=4, gradient_accumulation_steps=2)
    cfg = FinetuneConfig.load(load_config(str(path)))
    cfg._chosen = dict.fromkeys(chosen.split())
    mesh = SimpleNamespace(data_size=1, data_rank=0)
    if batch is None:
        with pytest.raises(ConfigError, match=r"^dataset: 5 samples "):
            TrainingData(cfg, cfg.tokenizer.build(), torch.device("cpu"), mesh, seed=0)
    else:
        data = TrainingData(cfg, cfg.tokenizer.build(), torch.device("cpu"), mesh, seed=0)
        assert (data.cfg.batch_size, data.cfg.gradient_accumulation_steps) == batch
        assert data.samples_per_step <= samples


class Numbered:
    """Samples with their number and the process that reads them; the last one is broken."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, i: int) -> dict:
        if i == 10:
            raise ConfigError("dataset: sample 10 is broken")
        return {"tokens": [i] * (1 + i % 3), "mask": torch.tensor([i]), "pid": os.getpid()}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_for_a_gpu_other_processes_read_ahead(device, monkeypatch):
    """In the same order, with the same last batch and the same errors. The batch is made in this process."""
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    makers = []

    def collate(samples: list[dict]) -> list:
        makers.append(os.getpid())
        assert all(torch.equal(s["mask"], torch.tensor(s["tokens"][:1])) for s in samples)
        return samples

    def read(samples: list[int], drop_last: bool = False) -> tuple[list, set]:
        batches = [*Batches(Numbered(), samples, 3, collate, torch.device(device), drop_last)]
        return [[s["tokens"][0] for s in batch] for batch in batches], {s["pid"] for batch in batches for s in batch}

    order = [7, 1, 8, 2, 0, 9, 3, 4]
    assert read(order)[0] == [[7, 1, 8], [2, 0, 9], [3, 4]]
    numbers, readers = read(order, drop_last=True)
    assert numbers == [[7, 1, 8], [2, 0, 9]]
    assert {*makers} == {os.getpid()} and (os.getpid() in readers) == (device == "cpu")
    assert len(readers) == (1 if device == "cpu" else 2)
    with pytest.raises(ConfigError, match=r"^dataset: sample 10 is broken$"):
        read([1, 2, 3, 4, 10, 5])
    assert not multiprocessing.active_children()


def test_samples_are_read_once_at_the_start(tmp_path, finetune, monkeypatch):
    """For the hash of 4 samples and the vocabulary of 8 labels together, by the first rank alone."""
    from layerskip_recipes.training import batches

    monkeypatch.setattr(batches, "MOST_HASHED", 4)
    monkeypatch.setattr(batches, "MOST_COUNTED", 8)
    rows = [{"input": "if", "output": f"f{i}"} for i in range(20)]
    cfg = FinetuneConfig.load(load_config(str(finetune(dataset=instructions(tmp_path, rows)))))
    mesh = SimpleNamespace(data_size=1, data_rank=0)
    data = TrainingData(cfg, cfg.tokenizer.build(), torch.device("cpu"), mesh, seed=0)
    read, samples = [], [data.dataset[i] for i in range(20)]

    class Counted:
        def __getitem__(self, i: int) -> dict:
            read.append(i)
            return samples[i]

    data.dataset = Counted()
    _, frequent = data.summary(labels_only=False, num_frequent=3)
    assert sorted(read) == [0, 3, 5, 6, 9, 10, 12, 15, 18]
    assert len(frequent) == 3 and frequent == sorted(frequent)
    read.clear()
    data.summary(labels_only=True)
    assert read == [0, 5, 10, 15]
    monkeypatch.setattr(batches, "is_rank_zero", lambda: False)
    data.summary(labels_only=False, num_frequent=3)
    assert read == [0, 5, 10, 15]


# ---- mistakes ----

MADE = {
    "token": [{"tokens": [1, 2, 300], "labels": [1, 2, 300]}] * 8,  # which only a model of images embeds
    "tensor": torch.zeros(8, 4),
    "others": [{"a": 1}],
}


def made(tokenizer, kind: str):
    """A dataset of a user."""
    return MADE[kind]


def of_a_user(kind: str) -> dict:
    return {"_component_": "test_training_data.made", "kind": kind}


FORM = r"\S* makes no tokens and labels of samples of test_training_data.made"


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            lambda at: text_data(at / "t.json", ["x"] * 8, column="content"),
            r".*KeyError.*content.*Its columns: text; .*dataset.column=text",
        ),
        (lambda at: text_data(at / "t.json", ["x"] * 8, column="content", packed=True), r".*KeyError.*content"),
        (
            lambda at: instructions(at, [SHORT] * 3 + [{"input": "if", "output": None}]),
            r".* sample 3, .*: TypeError",
        ),
        (lambda at: instructions(at, [SHORT] * 30 + [{"input": "if", "output": None}]), r".* sample 30, .*: TypeError"),
        (
            lambda at: conversations(at, ["user", "user", "assistant"]),
            r".* sample 20, .*: ValueError.*consecutive user",
        ),
        (
            lambda at: instructions(at, [{"question": "if", "answer": "else:"}]),
            r".*KeyError\('input'\).*for example \"dataset.column_map={input: question, output: answer}\"",
        ),
        (lambda at: cut_off(at, [SHORT] * 3), r"torchtune\S* cannot read its data: (?!.*column).*JSON"),
        (
            lambda at: [text_data(at / f"{on}.json", SHORT_TEXTS, packed=on) for on in (True, False)],
            "some datasets of the list are packed, others not",
        ),
        (lambda at: of_a_user("token"), "a sample has token 300, and the model embeds 300"),
        (lambda at: of_a_user("tensor"), rf"{FORM} \(a Tensor\)\. Allowed: "),
        (lambda at: of_a_user("others"), rf"{FORM} \(a\)\. Allowed: "),
    ],
)
def test_a_dataset_that_makes_no_samples_is_refused(dataset, message, tmp_path, finetune):
    with pytest.raises(ConfigError, match=f"^(dataset|collate_fn): {message}"):
        train(finetune(dataset=dataset(tmp_path), shuffle=False), "tokenizer.max_seq_len=32")


class Broken:
    """A user's own dataset, with an error in its code."""

    def __init__(self, tokenizer, built: bool) -> None:
        if not built:
            raise ValueError("mine")

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict:
        raise ValueError("mine")


@pytest.mark.parametrize(("built", "place"), [(False, "__init__"), (True, "__getitem__")])
def test_an_error_in_a_users_own_dataset_keeps_its_traceback(built, place, finetune):
    path = finetune(dataset={"_component_": "test_training_data.Broken", "built": built})
    with pytest.raises(ValueError, match=r"^mine$") as caught:
        set_up(path)
    assert not isinstance(caught.value, ConfigError) and caught.traceback[-1].name == place
