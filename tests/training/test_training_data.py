"""Data of a training: packed, several datasets, samples that are cut, broken, or of another form."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.configs import finetune_config
from helpers.resuming import packed
from helpers.training import read_log, train
from torchtune.data import padded_collate_packed

from layerskip_recipes.config.components import Component
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.data.datasets import collate_packed, limit_samples, load_data
from layerskip_recipes.data.tokenizer import hf_tokenizer
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.training.config import FinetuneConfig
from layerskip_recipes.training.recipe import LayerSkipFinetune


def test_packed_and_several_datasets_train_with_dropout(tmp_path, tokenizer_folder):
    (tmp_path / "texts.json").write_text(json.dumps([{"text": f"x{n} = {n}\n" * 6} for n in range(40)]))
    (tmp_path / "chat.json").write_text(
        json.dumps(
            [
                {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": f"four {n}"}]}
                for n in range(20)
            ]
        )
    )
    packed = {
        "_component_": "torchtune.datasets.text_completion_dataset", "source": "json", "split": "train",
        "data_files": str(tmp_path / "texts.json"), "column": "text", "packed": True,
    }  # fmt: skip
    path = finetune_config(tmp_path / "packed", tokenizer_folder, dataset=packed, layer_dropout={"prob": 0.6})
    train(path, "tokenizer.max_seq_len=100")
    assert all(line["loss"] > 0 for line in read_log(tmp_path / "packed" / "out").values())

    chat = {
        "_component_": "torchtune.datasets.chat_dataset", "source": "json", "split": "train",
        "data_files": str(tmp_path / "chat.json"), "conversation_column": "conversations",
        "conversation_style": "sharegpt",
    }  # fmt: skip
    path = finetune_config(tmp_path / "two", tokenizer_folder, dataset=[chat, packed | {"packed": False}])
    recipe = train(path, "tokenizer.max_seq_len=100")
    assert len(recipe.data.dataset) == 60
    assert all(line["loss"] > 0 for line in read_log(tmp_path / "two" / "out").values())


@pytest.mark.parametrize("packed", [False, True])
def test_a_column_that_is_not_there(packed, tmp_path, tokenizer_folder):
    """torchtune looks for it with the first sample."""
    (tmp_path / "texts.json").write_text(json.dumps([{"content": "x = 1\n"}] * 8))
    dataset = {
        "_component_": "torchtune.datasets.text_completion_dataset", "source": "json", "split": "train",
        "data_files": str(tmp_path / "texts.json"), "column": "text", "packed": packed,
    }  # fmt: skip
    path = finetune_config(tmp_path, tokenizer_folder, dataset=dataset)
    with pytest.raises(ValueError, match=r"^dataset: .*KeyError.*text") as caught:
        LayerSkipFinetune(load_config(str(path), ["tokenizer.max_seq_len=32"])).setup()
    assert packed or "Its columns: content." in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("limit", "packed", "expected"),
    [(None, False, 64), (None, True, None), (40, False, 40), (64, True, 64), (65, False, ValueError)],
)
def test_samples_are_cut_at_the_models_length(limit, packed, expected):
    """Not so packs, whose length the user has to say."""
    plain, packed = (Component({"_component_": "a.dataset", "packed": on}) for on in (False, packed))
    tokenizer, model = SimpleNamespace(max_seq_len=limit), SimpleNamespace(max_seq_len=64)
    if expected is ValueError:
        with pytest.raises(ValueError, match=r"^tokenizer\.max_seq_len: 65 is more than .* 64; for example"):
            limit_samples([packed], tokenizer, model)
    else:
        limit_samples([packed], tokenizer, model)
        assert tokenizer.max_seq_len == expected
        tokenizer.max_seq_len = limit
        limit_samples([plain, packed], tokenizer, model)
        assert tokenizer.max_seq_len == expected


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


def test_a_packed_text_learns_nothing_of_the_next_one(tmp_path, tokenizer_folder):
    """Of plain text without a bos token: as many labels count as in texts that are not packed."""
    tokenizer = hf_tokenizer(str(tokenizer_folder), max_seq_len=48)
    model = FinetuneConfig.load(load_config(str(finetune_config(tmp_path, tokenizer_folder)))).meta_model
    section = packed(tmp_path) | {"add_eos": False, "split_across_pack": False}
    lengths = [len(row["tokens"]) for row in Component(section | {"packed": False}, "dataset").build(tokenizer)]
    dataset, collate = load_data([Component(section, "dataset")], None, tokenizer, model, torch.device("cpu"))
    labels = collate([dataset[i] for i in range(len(dataset))])["labels"][:, 1:]
    assert (labels != -100).sum() == sum(lengths) - len(lengths)


def pictures(tokenizer):
    """Samples with a token that only a model of images embeds."""
    return [{"tokens": [1, 2, 300], "labels": [1, 2, 300]}] * 8


def test_a_token_that_the_model_does_not_embed(tmp_path, tokenizer_folder):
    path = finetune_config(tmp_path, tokenizer_folder, dataset={"_component_": "test_training_data.pictures"})
    with pytest.raises(ValueError, match=r"^dataset: a sample has token 300, and the model embeds 300"):
        train(path)


@pytest.mark.parametrize(
    ("rows", "what"), [(torch.zeros(8, 4), "a Tensor"), ([[1]], "a list"), ([{}], "empty"), ([{"a": 1}], "a")]
)
def test_samples_of_another_form(rows, what, tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.setattr("test_training_data.pictures", lambda tokenizer: rows)
    path = finetune_config(tmp_path, tokenizer_folder, dataset={"_component_": "test_training_data.pictures"})
    with pytest.raises(ValueError, match=rf"^dataset: samples of test_training_data.pictures are {what}\. Allowed: "):
        train(path)


def instructions(folder: Path, rows: list[dict]) -> dict[str, str]:
    """A dataset of questions and answers, of which only the answers are learned."""
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "_component_": "torchtune.datasets.instruct_dataset",
        "source": "json",
        "data_files": str(folder / "data.jsonl"),
        "split": "train",
        "train_on_input": False,
    }


def test_what_is_cut_off_is_said(tmp_path, tokenizer_folder, caplog):
    """128 positions: of two samples the answer is lost, which makes a step that learns nothing; once each."""
    short, long = {"input": "if", "output": "else:"}, {"input": "if x: " * 200, "output": "else:"}
    dataset = instructions(tmp_path, [short, short, long, long, long, long])
    path = finetune_config(tmp_path, tokenizer_folder, dataset=dataset, shuffle=False, max_steps_per_epoch=3)
    train(path)
    lines = [record.message for record in caplog.records if record.levelname == "WARNING"]
    cut = [line for line in lines if "some samples have tokenizer.max_seq_len=128 tokens or more" in line]
    nothing = [line for line in lines if "no label counts" in line]
    assert len(cut) == 1 and len(nothing) == 1
    assert nothing[0].startswith("step 2 learns nothing: no label counts in samples [2, 3] of the dataset.")
    assert [line["loss"] > 0 for line in read_log(tmp_path / "out").values()] == [True, False, False]


def test_a_sample_that_cannot_be_read_is_named(tmp_path, tokenizer_folder):
    rows = [{"input": "if", "output": "else:"}] * 3 + [{"input": "if", "output": None}]
    path = finetune_config(tmp_path, tokenizer_folder, dataset=instructions(tmp_path, rows), shuffle=False)
    with pytest.raises(ValueError, match=r"^dataset: its sample 3, counted from 0, cannot be read: TypeError\("):
        train(path)


def test_a_broken_file_is_not_about_columns(tmp_path, tokenizer_folder):
    dataset = instructions(tmp_path, [{"input": "if", "output": "else:"}])
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write('\n{"input": ')
    path = finetune_config(tmp_path, tokenizer_folder, dataset=dataset)
    with pytest.raises(ValueError, match=r"^dataset: torchtune.datasets.instruct_dataset cannot read its files: ") as e:
        train(path)
    assert "JSON" in str(e.value) and "column" not in str(e.value)


@pytest.mark.parametrize("error", ["ValueError('mine')", "TypeError('mine')", "OSError('mine')"])
@pytest.mark.parametrize("built", [False, True])
def test_an_error_in_a_users_own_dataset_keeps_its_traceback(built, error, tmp_path, tokenizer_folder, monkeypatch):
    """It is no mistake in the config, and the traceback shows the line."""
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"own_{abs(hash((built, error)))}"
    code = f"    def __init__(self, tokenizer):\n        {'pass' if built else f'raise {error}'}\n"
    code += f"    def __len__(self):\n        return 8\n    def __getitem__(self, i):\n        raise {error}\n"
    (tmp_path / f"{name}.py").write_text(f"class Own:\n{code}")
    path = finetune_config(tmp_path, tokenizer_folder, dataset={"_component_": f"{name}.Own"})
    with pytest.raises(Exception, match=r"^mine$") as caught:
        LayerSkipFinetune(load_config(str(path))).setup()
    assert not isinstance(caught.value, ConfigError) and caught.traceback[-1].path.name == f"{name}.py"
