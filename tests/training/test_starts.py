"""Where a training starts, and what its checkpoints are: scratch, Hugging Face, torchtune's and Meta's forms."""

import math
import shutil

import pytest
import torch
from helpers.configs import MODEL, finetune_config, make_checkpoint
from helpers.training import UNTIED, losses, train
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torchao.optim.subclass_8bit import OptimState8bit
from torchtune import config as tune_config
from torchtune.models.convert_weights import tune_to_meta
from torchtune.training import FullModelHFCheckpointer

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.training.recipe import LayerSkipFinetune

pytestmark = pytest.mark.slow


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


def test_the_weights_from_scratch(tmp_path, tokenizer_folder):
    """As GPT-2: normal(0, .02), what writes into the residual stream of L layers divided by sqrt(2 L)."""
    recipe = LayerSkipFinetune(load_config(str(finetune_config(tmp_path, tokenizer_folder))))
    recipe.setup()
    recipe.cleanup()
    for name, parameter in recipe.model.named_parameters():
        if parameter.dim() == 2:
            into_residual = "output_proj" in name or "mlp.w2" in name
            assert parameter.std().item() == pytest.approx(0.02 / math.sqrt(8) if into_residual else 0.02, rel=0.1)
