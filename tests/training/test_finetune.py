"""The finetune recipe: training, its log, resume, checkpoints, data forms, and the options of torchtune."""

import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.commands import run_tune
from helpers.configs import MODEL, finetune_config, make_checkpoint
from helpers.training import UNTIED, losses, read_log, train
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torchao.optim.subclass_8bit import OptimState8bit
from torchtune import config as tune_config
from torchtune.data import padded_collate_packed
from torchtune.models.convert_weights import tune_to_meta
from torchtune.training import FullModelHFCheckpointer
from torchtune.utils import get_logger

from layerskip_recipes.config.components import Component
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.training.batches import limit_samples, packed_with_dense_mask
from layerskip_recipes.training.config import FinetuneConfig
from layerskip_recipes.training.early_exit import enabled_exits, exit_weights
from layerskip_recipes.training.recipe import LayerSkipFinetune


def test_first_step_is_the_papers_loss(tmp_path, tokenizer_folder):
    """J of the first step from the initial weights, by plain PyTorch, without dropout."""
    path = finetune_config(tmp_path, tokenizer_folder, layer_dropout=None, shuffle=False)
    recipe = LayerSkipFinetune(load_config(str(path)))
    recipe.setup()
    base, dataset = recipe.model, recipe.data.dataset
    tokens = torch.tensor([dataset[i]["tokens"] for i in range(2)])
    labels = F.pad(tokens[:, 1:], (0, 1), value=-100).flatten()
    with torch.no_grad():
        h, by_exit = base.tok_embeddings(tokens), []
        for layer in base.layers:
            h = layer(h)
            by_exit.append(F.cross_entropy(base.output(base.norm(h)).flatten(0, 1), labels, ignore_index=-100).item())
    recipe.train()
    first = read_log(tmp_path / "out")[1]
    # Rotational with R = 2 at t = 0: layers 0 and 2, and the last. e(0) = 0, e(2) = 0.5 * 3, e(3) = 3 + 0.5 * 3.
    assert {k for k in first if k.startswith("loss_exit")} == {"loss_exit_1", "loss_exit_3", "loss_exit_4"}
    assert first["loss"] == pytest.approx((1.5 * by_exit[2] + 4.5 * by_exit[3]) / 6.0, abs=1e-4)
    assert first["loss_final"] == first["loss_exit_4"] == pytest.approx(by_exit[3], abs=1e-4)
    assert first["loss_exit_1"] == pytest.approx(by_exit[0], abs=1e-4)
    assert first["layer_dropout_rate"] == 0
    assert first["lr"] == 1e-3 and first["tokens_per_second_per_gpu"] > 0


def test_resume_gives_the_losses_of_the_run_that_never_stopped(tmp_path, tokenizer_folder):
    """Data order, dropout (also S(t)), curriculum, lr schedule, optimizer: all of them move in this config."""
    changes = {
        "epochs": 3,
        "layer_dropout": {"prob": 0.5, "schedule": "exp"},
        "early_exit_loss": {"scale": 0.5, "curriculum": "gradual"},
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 2,
        },
    }
    path = finetune_config(tmp_path, tokenizer_folder, **changes)
    train(path)
    whole = losses(tmp_path / "out")
    assert sorted(whole) == [1, 2, 3, 4, 5, 6]
    # The same folder as it was after epoch 2.
    shutil.rmtree(tmp_path / "out" / "epoch_2")
    (tmp_path / "out" / "logs" / "log.txt").unlink()
    train(path, "resume_from_checkpoint=true")
    assert losses(tmp_path / "out") == {step: whole[step] for step in (5, 6)}
    assert (tmp_path / "out" / "epoch_2").is_dir()


def test_resume_from_numbered_files_after_a_kill_between_two_renames(tmp_path, tokenizer_folder):
    """A start from {filename_format, max_filename}; then a checkpoint that was set aside to be replaced, and nothing
    in its place yet: resume puts it back."""
    start = make_checkpoint(tmp_path / "start", tokenizer_folder)
    (start / "model.safetensors").rename(start / "model-00001-of-00001.safetensors")
    files = {"filename_format": "model-{}-of-{}.safetensors", "max_filename": "00001"}
    section = {
        "_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": str(start),
        "checkpoint_files": files, "output_dir": "${output_dir}", "model_type": "LLAMA3_2",
    }  # fmt: skip
    path = finetune_config(tmp_path, tokenizer_folder, checkpointer=section, optimizer_in_bwd=True, lr_scheduler={
        "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_warmup_steps": 1,
    })  # fmt: skip
    train(path, "epochs=2")
    whole = losses(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "epoch_1")
    (tmp_path / "out" / ".incomplete").mkdir()
    (tmp_path / "out" / "epoch_0").rename(tmp_path / "out" / ".incomplete" / "replaced_epoch_0")
    (tmp_path / "out" / "logs" / "log.txt").unlink()
    train(path, "epochs=2", "resume_from_checkpoint=true")
    assert losses(tmp_path / "out") == {step: whole[step] for step in (3, 4)}
    assert sorted(p.name for p in (tmp_path / "out").glob("epoch_*")) == ["epoch_0", "epoch_1"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloading_and_bf16_on_a_gpu(tmp_path, tokenizer_folder):
    """Several exits and chunks under the offloading hooks; the losses are those without."""
    exits = {"scale": 0.5, "curriculum": None, "chunk_tokens": 50}
    path = finetune_config(tmp_path, tokenizer_folder, early_exit_loss=exits, device="cuda", dtype="bf16")
    train(path, f"output_dir={tmp_path}/plain")
    on = ["enable_activation_checkpointing=true", "enable_activation_offloading=true"]
    train(path, f"output_dir={tmp_path}/other", *on)
    plain, other = losses(tmp_path / "plain"), losses(tmp_path / "other")
    for step in plain:
        assert plain[step]["loss"] == pytest.approx(other[step]["loss"], rel=2e-2)  # bf16


def test_gradient_accumulation_changes_nothing(tmp_path, tokenizer_folder):
    """Two micro-batches of 2 are one batch of 4, also where the samples have different lengths."""
    dataset = {
        "_component_": "torchtune.datasets.text_completion_dataset",
        "source": "json",
        "data_files": str(tmp_path / "texts.json"),
        "column": "text",
        "split": "train",
    }
    (tmp_path / "texts.json").write_text(json.dumps([{"text": "import os\n" * n} for n in (1, 9, 2, 5, 7, 3, 8, 1)]))
    logs = []
    for name, batch, accumulation in (("one", 4, 1), ("two", 2, 2)):
        path = finetune_config(
            tmp_path / name, tokenizer_folder, dataset=dataset, layer_dropout=None, shuffle=False,
            batch_size=batch, gradient_accumulation_steps=accumulation, max_steps_per_epoch=None, clip_grad_norm=1.0,
        )  # fmt: skip
        train(path)
        logs.append(losses(tmp_path / name / "out"))
    assert sorted(logs[0]) == [1, 2]
    for step in logs[0]:
        assert logs[0][step] == pytest.approx(logs[1][step], rel=1e-4)


@pytest.mark.parametrize(
    "override",
    [
        ["enable_activation_checkpointing=true"],
        ["loss=torch.nn.CrossEntropyLoss"],
        ["optimizer_in_bwd=true"],
    ],
    ids=lambda override: override[0],
)
def test_what_saves_memory_changes_no_loss(tmp_path, tokenizer_folder, override):
    path = finetune_config(tmp_path, tokenizer_folder)
    train(path, f"output_dir={tmp_path}/plain")
    train(path, f"output_dir={tmp_path}/other", *override)
    plain, other = losses(tmp_path / "plain"), losses(tmp_path / "other")
    for step in plain:
        assert plain[step] == pytest.approx(other[step], abs=1e-4)


def test_compile_changes_no_loss_and_no_gradient(tmp_path, tokenizer_folder):
    """With dropout, checkpointing and smoothing. The losses after step 1 and the norms follow from the gradients."""
    override = ["layer_dropout.prob=0.5", "ac_mode=full"]
    override += ["loss=torch.nn.CrossEntropyLoss", "loss.label_smoothing=0.1"]
    path = finetune_config(tmp_path, tokenizer_folder, max_steps_per_epoch=3, clip_grad_norm=0.5)
    train(path, f"output_dir={tmp_path}/plain", *override)
    train(path, f"output_dir={tmp_path}/other", "compile=true", *override)
    plain, other = read_log(tmp_path / "plain"), read_log(tmp_path / "other")
    assert sorted(plain) == [1, 2, 3] and all(plain[step]["grad_norm"] > 0.5 for step in plain)
    for step in plain:
        for key in plain[step].keys() - {"tokens_per_second_per_gpu"}:
            assert plain[step][key] == pytest.approx(other[step][key], rel=1e-4), key


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


def test_a_folder_without_its_weights_is_trained_from_scratch(tmp_path, tokenizer_folder):
    """With torchtune's checkpointer: it gives the architecture, init_std the spread of the first weights."""
    make_checkpoint(tmp_path / "model", tokenizer_folder)
    checkpointer = {
        "_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": str(tmp_path / "model"),
        "checkpoint_files": [], "model_type": "LLAMA3_2", "output_dir": "${output_dir}",
    }  # fmt: skip
    path = finetune_config(tmp_path, tokenizer_folder, checkpointer=checkpointer, init_std=0.001)
    recipe = LayerSkipFinetune(load_config(str(path)))
    recipe.setup()
    assert recipe.model.tok_embeddings.weight.std().item() == pytest.approx(0.001, rel=0.05)
    recipe.cleanup()


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
    ours, theirs = packed_with_dense_mask(samples), padded_collate_packed(samples)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_training_from_a_hugging_face_checkpoint_in_bf16(tmp_path, tokenizer_folder):
    """Starts from the checkpoint's loss, writes its dtype and file form, and the result opens in transformers."""
    transformers = pytest.importorskip("transformers")
    checkpoint = make_checkpoint(tmp_path / "start", tokenizer_folder)
    section = {
        "_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": str(checkpoint),
        "checkpoint_files": ["model.safetensors"], "output_dir": "${output_dir}", "model_type": "LLAMA3_2",
    }  # fmt: skip
    path = finetune_config(tmp_path, tokenizer_folder, checkpointer=section, dtype="bf16")
    train(path, "tokenizer.path=" + str(checkpoint))
    folder = tmp_path / "out" / "epoch_0"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert {t.dtype for file in folder.glob("*.safetensors") for t in load_file(file).values()} == {torch.bfloat16}
    ours = tune_config.instantiate(OmegaConf.create(MODEL))
    files = [p.name for p in folder.glob("*.safetensors")]
    ours.load_state_dict(
        FullModelHFCheckpointer(str(folder), files, "LLAMA3_2", str(tmp_path / "no")).load_checkpoint()["model"]
    )
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs.float()(tokens).logits, atol=1e-3, rtol=1e-3)


def test_a_checkpoint_of_another_model_is_refused_by_its_keys(tmp_path, tokenizer_folder):
    checkpoint = make_checkpoint(tmp_path / "start", tokenizer_folder)
    section = {
        "_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": str(checkpoint),
        "checkpoint_files": ["model.safetensors"], "output_dir": "${output_dir}", "model_type": "LLAMA3_2",
    }  # fmt: skip
    path = finetune_config(tmp_path, tokenizer_folder, checkpointer=section, model=MODEL | {"num_layers": 5})
    recipe = LayerSkipFinetune(load_config(str(path)))
    with pytest.raises(ValueError, match=r"not this model's, it lacks layers\.4"):
        recipe.setup()


@pytest.mark.parametrize("form", ["TorchTune", "Meta"])
def test_other_checkpoint_forms_resume_with_torchao_and_tensorboard(form, tmp_path, tokenizer_folder, eager):
    """Weights in torchtune's or Meta's form, torchao's 8-bit AdamW (its state too), tensorboard, the profiler."""
    pytest.importorskip("tensorboard")
    start = tmp_path / "start"
    start.mkdir()
    model = UNTIED | {"vocab_size": 320}  # whose embedding is whole blocks of 8-bit state
    state = tune_config.instantiate(OmegaConf.create(model)).state_dict()
    torch.save(tune_to_meta(state) if form == "Meta" else state, start / "model.pt")
    section = {
        "_component_": f"torchtune.training.FullModel{form}Checkpointer", "checkpoint_dir": str(start),
        "checkpoint_files": ["model.pt"], "output_dir": "${output_dir}", "model_type": "LLAMA2",
    }  # fmt: skip
    path = finetune_config(
        tmp_path, tokenizer_folder, model=model, checkpointer=section, epochs=2, max_steps_per_epoch=4,
        optimizer={"_component_": "torchao.optim.AdamW8bit", "lr": 1e-3},
        profiler={"enabled": True, "output_dir": str(tmp_path / "traces"), "cpu": True, "cuda": False, "wait_steps": 1,
                  "warmup_steps": 1, "active_steps": 1, "num_cycles": 1},
        metric_logger={"_component_": "torchtune.training.metric_logging.TensorBoardLogger",
                       "log_dir": str(tmp_path / "tb")},
    )  # fmt: skip
    recipe = train(path)
    shutil.rmtree(tmp_path / "out" / "epoch_1")
    resumed = train(path, "resume_from_checkpoint=true").model.state_dict()
    whole, kinds = recipe.model.state_dict(), {type(s["exp_avg"]) for s in recipe.optimizers.all[0].state.values()}
    assert OptimState8bit in kinds
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert (tmp_path / "out" / "epoch_1" / "model-00001-of-00001.bin").is_file()
    assert list((tmp_path / "tb").rglob("events*")) and list((tmp_path / "traces").rglob("*trace.json*"))


@pytest.mark.parametrize("launcher", [[], ["--nnodes", "1", "--nproc_per_node", "1"]], ids=["plain", "torchrun"])
def test_tune_run_from_another_directory(tmp_path, tokenizer_folder, launcher):
    path = finetune_config(tmp_path, tokenizer_folder)
    (tmp_path / "elsewhere").mkdir()
    run = run_tune(
        "run", *launcher, "layerskip_finetune", "--config", str(path), "batch_size=1", cwd=tmp_path / "elsewhere"
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "batch_size: 1" in run.stderr  # the resolved config is logged
    assert sorted(read_log(tmp_path / "out")) == [1, 2]
    assert not os.listdir(tmp_path / "elsewhere")


def test_every_step_trains_the_last_layer(tmp_path, tokenizer_folder):
    path = finetune_config(tmp_path, tokenizer_folder, layer_dropout=None)
    recipe = LayerSkipFinetune(load_config(str(path)))
    recipe.setup()
    before = recipe.model.layers[-1].mlp.w1.weight.clone()
    batches = recipe.data.batches(0)
    recipe.progress = type("Progress", (), {"set_postfix_str": lambda self, text: None})()
    for _ in range(3):
        recipe._train_step(batches)
        assert not torch.equal(before, recipe.model.layers[-1].mlp.w1.weight)
        before = recipe.model.layers[-1].mlp.w1.weight.clone()


def test_weights_of_the_log_are_the_papers(tmp_path, tokenizer_folder):
    """`loss` is the weighted sum of the logged exits, at each step of the curriculum."""
    path = finetune_config(tmp_path, tokenizer_folder, epochs=2)
    train(path)
    for step, line in read_log(tmp_path / "out").items():
        on = enabled_exits("rotational", step - 1, 4, 4, interval=2)
        weights = exit_weights(4, on, 0.5)
        expected = sum(weights[e].item() * line[f"loss_exit_{e + 1}"] for e in range(4) if on[e])
        assert line["loss"] == pytest.approx(expected, abs=1e-5)


def pictures(tokenizer):
    """Samples with a token that only a model of images embeds."""
    return [{"tokens": [1, 2, 300], "labels": [1, 2, 300]}] * 8


def test_a_token_that_the_model_does_not_embed(tmp_path, tokenizer_folder):
    path = finetune_config(tmp_path, tokenizer_folder, dataset={"_component_": "test_finetune.pictures"})
    with pytest.raises(ValueError, match=r"^dataset: a sample has token 300, and the model embeds 300"):
        train(path)


@pytest.mark.parametrize(
    ("rows", "what"), [(torch.zeros(8, 4), "a Tensor"), ([[1]], "a list"), ([{}], "empty"), ([{"a": 1}], "a")]
)
def test_samples_of_another_form(rows, what, tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.setattr("test_finetune.pictures", lambda tokenizer: rows)
    path = finetune_config(tmp_path, tokenizer_folder, dataset={"_component_": "test_finetune.pictures"})
    with pytest.raises(ValueError, match=rf"^dataset: samples of test_finetune.pictures are {what}\. Allowed: "):
        train(path)


@pytest.mark.parametrize(("chunks", "said"), [(None, 0), (8, 0), (9, 1)])
def test_a_number_of_chunks_that_changes_nothing_is_said(chunks, said, tmp_path, tokenizer_folder, caplog):
    """It is a setting of torchtune's own loss."""
    path = finetune_config(tmp_path, tokenizer_folder)
    overrides = [f"loss.num_output_chunks={chunks}"] if chunks else []
    with caplog.at_level("WARNING", logger=get_logger().name):
        LayerSkipFinetune(load_config(str(path), overrides)).setup()
    line = "loss.num_output_chunks: 9 changes nothing here. The logits that exist at a time are those of "
    found = [message for message in caplog.messages if message.startswith("loss.num_output_chunks")]
    assert found == [line + "early_exit_loss.chunk_tokens tokens, 512"] * said


PACKED = "dataset={_component_: torchtune.datasets.text_completion_dataset, source: json, packed: true}"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["early_exit_loss.curriculum=gradual"], "early_exit_loss.interval: 2 changes nothing with curriculum gradual"),
        (["early_exit_loss.curriculum=null"], "early_exit_loss.interval: 2 changes nothing with curriculum None"),
        (["early_exit_loss.curriculum=rotational"], None),
        (
            [PACKED, "collate_fn=torchtune.data.padded_collate_dpo"],
            "collate_fn: torchtune.data.padded_collate_dpo changes nothing where samples are packed",
        ),
        ([PACKED, "collate_fn=torchtune.data.padded_collate_sft"], None),
    ],
)
def test_a_setting_that_changes_nothing_is_said(overrides, said, tmp_path, tokenizer_folder):
    cfg = FinetuneConfig.load(load_config(str(finetune_config(tmp_path, tokenizer_folder)), overrides))
    lines = cfg.unused_setting_warnings()
    assert [line[: len(said)] for line in lines] == [said] if said else lines == []


def test_a_checkpoint_without_adapters_has_no_config_of_adapters(tmp_path, tokenizer_folder):
    """As of a LoRA training that the run began with: transformers would look for the adapters."""
    path = finetune_config(tmp_path, tokenizer_folder)
    train(path)
    start = tmp_path / "out" / "epoch_0"
    (start / "adapter_config.json").write_text("{}")
    checkpointer = {
        "_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": str(start),
        "checkpoint_files": ["model-00001-of-00001.safetensors"], "model_type": "LLAMA3_2",
        "output_dir": "${output_dir}",
    }  # fmt: skip
    train(finetune_config(tmp_path, tokenizer_folder, checkpointer=checkpointer), f"output_dir={tmp_path}/full")
    files = {file.name for file in (tmp_path / "full" / "epoch_0").iterdir()}
    assert "config.json" in files and "adapter_config.json" not in files


def test_the_logged_config_is_one_that_trains(tmp_path, tokenizer_folder):
    train(finetune_config(tmp_path, tokenizer_folder))
    logged = tmp_path / "out" / "torchtune_config.yaml"
    assert "curriculum" in OmegaConf.load(logged)
    assert train(logged, f"output_dir={tmp_path / 'again'}").step == 2


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
    cut = [line for line in lines if "tokenizer.max_seq_len=128 tokens or more" in line]
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


def test_the_dropout_follows_its_schedule_over_the_whole_run(tmp_path, tokenizer_folder):
    """Paper, eq. 4: S(t) = exp(t ln 2 / (T - 1)) - 1 with t and T in optimizer steps of all epochs; D(L-1) = 1. Each of
    them has two micro-batches; a stop after 3 of the 6 steps changes nothing."""
    dropout = {"prob": 0.8, "schedule": "exp", "layers_scale": "exp"}
    path = finetune_config(
        tmp_path, tokenizer_folder, layer_dropout=dropout, epochs=2, max_steps_per_epoch=3, batch_size=1,
        gradient_accumulation_steps=2, save_every_n_steps=1,
    )  # fmt: skip
    train(path)
    rates = [line["layer_dropout_rate"] for line in read_log(tmp_path / "out").values()]
    assert rates == pytest.approx([0.8 * (math.exp(t * math.log(2) / 5) - 1) for t in range(6)], abs=1e-6)
    expected = losses(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    recipe = LayerSkipFinetune(load_config(str(path)))
    recipe.setup()
    step, recipe._train_step = recipe._train_step, lambda batches: (stop(recipe), step(batches))

    def stop(recipe):
        if recipe.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recipe.train()
    recipe.cleanup()
    train(path, "resume_from_checkpoint=true")
    assert losses(tmp_path / "out") == expected


@pytest.mark.parametrize("clip", [1e-3, None])
def test_the_gradient_is_clipped(clip, tmp_path, tokenizer_folder):
    """One step of SGD with lr 1 moves all weights together by the gradient's norm, or by what it is clipped to."""
    sgd = {"_component_": "torch.optim.SGD", "lr": 1.0}
    path = finetune_config(
        tmp_path, tokenizer_folder, optimizer=sgd, layer_dropout=None, max_steps_per_epoch=1, clip_grad_norm=clip
    )
    recipe = LayerSkipFinetune(load_config(str(path)))
    recipe.setup()
    before = [parameter.detach().clone() for parameter in recipe.model.parameters()]
    recipe.train()
    recipe.cleanup()
    after = recipe.model.parameters()
    moved = torch.stack([(b - a).norm() for a, b in zip(before, after, strict=True)]).norm().item()
    (line,) = read_log(tmp_path / "out").values()
    if clip is None:
        assert moved > 0.01 and "grad_norm" not in line
    else:
        assert moved == pytest.approx(clip, rel=1e-3) and line["grad_norm"] > 10 * clip


def test_the_weights_from_scratch(tmp_path, tokenizer_folder):
    """As GPT-2: normal(0, .02), what writes into the residual stream of L layers divided by sqrt(2 L)."""
    recipe = LayerSkipFinetune(load_config(str(finetune_config(tmp_path, tokenizer_folder))))
    recipe.setup()
    recipe.cleanup()
    for name, parameter in recipe.model.named_parameters():
        if parameter.dim() == 2:
            into_residual = "output_proj" in name or "mlp.w2" in name
            assert parameter.std().item() == pytest.approx(0.02 / math.sqrt(8) if into_residual else 0.02, rel=0.1)
