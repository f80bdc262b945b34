"""Where a training starts, and what its checkpoints are: scratch, Hugging Face, torchtune's and Meta's forms."""

import math
import shutil

import pytest
import torch
from helpers.adapters import read_hf
from helpers.configs import MODEL, make_checkpoint, start_section
from helpers.resuming import COSINE, WEIGHTS, resumed, same_tensors
from helpers.training import UNTIED, losses, set_up, train
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torchao.optim.subclass_8bit import OptimState8bit
from torchtune import config as tune_config
from torchtune.models.convert_weights import tune_to_meta

pytestmark = pytest.mark.slow


def test_resume_puts_back_a_checkpoint_that_was_being_replaced(tmp_path, tokenizer_folder, finetune):
    """A checkpoint was set aside to be replaced, and nothing is in its place yet: resume puts it back."""
    start = make_checkpoint(tmp_path / "start", tokenizer_folder)
    (start / "model.safetensors").rename(start / WEIGHTS)
    files = {"filename_format": "model-{}-of-{}.safetensors", "max_filename": "00001"}
    section = start_section(start) | {"checkpoint_files": files}
    path = finetune(checkpointer=section, epochs=2, optimizer_in_bwd=True, lr_scheduler=COSINE)
    train(path)
    out = tmp_path / "out"
    whole = losses(out)
    shutil.rmtree(out / "epoch_1")
    (out / ".incomplete").mkdir()
    (out / "epoch_0").rename(out / ".incomplete" / "replaced_epoch_0")
    (out / "logs" / "log.txt").unlink()
    train(path, "resume_from_checkpoint=true")
    assert losses(out) == {step: whole[step] for step in (3, 4)}
    assert sorted(p.name for p in out.glob("epoch_*")) == ["epoch_0", "epoch_1"]


@pytest.mark.parametrize("ours", [True, False])
def test_weights_from_scratch_are_drawn_as_gpt_2s(ours, checkpoint, finetune):
    """As GPT-2: normal(0, .02), what writes into the residual stream of L layers divided by sqrt(2 L). torchtune's
    checkpointer without files gives the architecture."""
    recipe = set_up(finetune(**{} if ours else {"checkpointer": start_section(checkpoint) | {"checkpoint_files": []}}))
    recipe.cleanup()
    for name, parameter in recipe.model.named_parameters():
        if parameter.dim() == 2:
            into_residual = "output_proj" in name or "mlp.w2" in name
            assert parameter.std().item() == pytest.approx(0.02 / math.sqrt(8) if into_residual else 0.02, rel=0.1)


def test_a_training_in_bf16_starts_from_and_writes_hugging_face_checkpoints(checkpoint, tmp_path, finetune):
    transformers = pytest.importorskip("transformers")
    train(finetune(checkpointer=start_section(checkpoint), dtype="bf16"), f"tokenizer.path={checkpoint}")
    folder = tmp_path / "out" / "epoch_0"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert {t.dtype for file in folder.glob("*.safetensors") for t in load_file(file).values()} == {torch.bfloat16}
    ours = tune_config.instantiate(OmegaConf.create(MODEL))
    ours.load_state_dict(read_hf(folder, "llama3_2"))
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs.float()(tokens).logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("form", ["TorchTune", "Meta"])
def test_other_checkpoint_forms_resume_with_torchao_and_tensorboard(form, tmp_path, finetune, eager):
    """Weights in torchtune's or Meta's form, torchao's 8-bit AdamW (its state too), tensorboard, the profiler."""
    pytest.importorskip("tensorboard")
    (tmp_path / "start").mkdir()
    model = UNTIED | {"vocab_size": 320}  # whose embedding is whole blocks of 8-bit state
    state = tune_config.instantiate(OmegaConf.create(model)).state_dict()
    torch.save(tune_to_meta(state) if form == "Meta" else state, tmp_path / "start" / "model.pt")
    path = finetune(
        model=model, checkpointer=start_section(tmp_path / "start", form, "model.pt", "LLAMA2"), epochs=2,
        max_steps_per_epoch=4, optimizer={"_component_": "torchao.optim.AdamW8bit", "lr": 1e-3},
        profiler={"enabled": True, "output_dir": str(tmp_path / "traces"), "cpu": True, "cuda": False, "wait_steps": 1,
                  "warmup_steps": 1, "active_steps": 1, "num_cycles": 1},
        metric_logger={"_component_": "torchtune.training.metric_logging.TensorBoardLogger",
                       "log_dir": str(tmp_path / "tb")},
    )  # fmt: skip
    recipe = train(path)
    assert OptimState8bit in {type(state["exp_avg"]) for state in recipe.optimizers.all[0].state.values()}
    again = resumed(path, "epoch_0")
    ends = [torch.load(out / "epoch_1" / "model-00001-of-00001.bin") for out in (tmp_path / "out", again)]
    assert same_tensors(*ends)
    assert list((tmp_path / "tb").rglob("events*")) and list((tmp_path / "traces").rglob("*trace.json*"))


def test_a_checkpoint_without_adapters_has_no_config_of_adapters(checkpoint, tmp_path, finetune):
    """As of a LoRA training that the run began with: transformers would look for the adapters."""
    start = shutil.copytree(checkpoint, tmp_path / "start")
    (start / "adapter_config.json").write_text("{}")
    train(finetune(checkpointer=start_section(start)))
    files = {file.name for file in (tmp_path / "out" / "epoch_0").iterdir()}
    assert "config.json" in files and "adapter_config.json" not in files
