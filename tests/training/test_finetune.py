"""The finetune recipe: its losses, its log, the options of torchtune."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.resuming import resumed
from helpers.tiny import exit_logits
from helpers.training import losses, read_log, set_up, text_data, train
from omegaconf import OmegaConf


def test_first_step_is_the_papers_loss(tmp_path, finetune):
    recipe = set_up(finetune(layer_dropout=None, shuffle=False))
    base, dataset = recipe.model, recipe.data.dataset
    tokens = torch.tensor([dataset[i]["tokens"] for i in range(2)])
    labels = F.pad(tokens[:, 1:], (0, 1), value=-100).flatten()
    with torch.no_grad():
        by_exit = [
            F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=-100).item()
            for logits in exit_logits(base, tokens)
        ]
    recipe.train()
    first = read_log(tmp_path / "out")[1]
    # Rotational with R = 2 at t = 0: layers 0 and 2, and the last. e(0) = 0, e(2) = 0.5 * 3, e(3) = 3 + 0.5 * 3.
    assert {k for k in first if k.startswith("loss_exit")} == {"loss_exit_1", "loss_exit_3", "loss_exit_4"}
    assert first["loss"] == pytest.approx((1.5 * by_exit[2] + 4.5 * by_exit[3]) / 6.0, abs=1e-4)
    assert first["loss_final"] == first["loss_exit_4"] == pytest.approx(by_exit[3], abs=1e-4)
    assert first["loss_exit_1"] == pytest.approx(by_exit[0], abs=1e-4)
    assert first["layer_dropout_rate"] == 0
    assert first["lr"] == 1e-3 and first["tokens_per_second_per_gpu"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloading_on_a_gpu_changes_no_loss(tmp_path, finetune):
    """Several exits and chunks under the offloading hooks; the losses are those without."""
    exits = {"scale": 0.5, "curriculum": None, "chunk_tokens": 50}
    path = finetune(early_exit_loss=exits, device="cuda", dtype="bf16")
    train(path, f"output_dir={tmp_path}/plain")
    on = ["enable_activation_checkpointing=true", "enable_activation_offloading=true"]
    train(path, f"output_dir={tmp_path}/other", *on)
    plain, other = losses(tmp_path / "plain"), losses(tmp_path / "other")
    for step in plain:
        assert plain[step]["loss"] == pytest.approx(other[step]["loss"], rel=2e-2)  # bf16


@pytest.mark.slow
def test_gradient_accumulation_changes_nothing(tmp_path, finetune):
    """Two micro-batches of 2 are one batch of 4, also where the samples have different lengths."""
    dataset = text_data(tmp_path / "t.json", ["import os\n" * n for n in (1, 9, 2, 5, 7, 3, 8, 1)])
    path = finetune(dataset=dataset, layer_dropout=None, shuffle=False, max_steps_per_epoch=None, clip_grad_norm=1.0)
    train(path, f"output_dir={tmp_path}/one", "batch_size=4")
    train(path, f"output_dir={tmp_path}/two", "batch_size=2", "gradient_accumulation_steps=2")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert sorted(one) == [1, 2]
    for step in one:
        assert one[step] == pytest.approx(two[step], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "override", ["enable_activation_checkpointing=true", "loss=torch.nn.CrossEntropyLoss", "optimizer_in_bwd=true"]
)
def test_what_saves_memory_changes_no_loss(override, tmp_path, finetune):
    path = finetune()
    train(path, f"output_dir={tmp_path}/plain")
    train(path, f"output_dir={tmp_path}/other", override)
    plain, other = losses(tmp_path / "plain"), losses(tmp_path / "other")
    for step in plain:
        assert plain[step] == pytest.approx(other[step], abs=1e-4)


@pytest.mark.slow
def test_compile_changes_no_loss_and_no_gradient(tmp_path, finetune):
    """With dropout, checkpointing and smoothing. The losses after step 1 and the norms follow from the gradients."""
    override = ["layer_dropout.prob=0.5", "layer_dropout.inverted=true", "ac_mode=full"]
    override += ["loss=torch.nn.CrossEntropyLoss", "loss.label_smoothing=0.1"]
    override += ["model.num_layers=2", "checkpointer.hf_config.num_hidden_layers=2"]  # inductor takes its time for each
    path = finetune(max_steps_per_epoch=3, clip_grad_norm=0.5)
    train(path, f"output_dir={tmp_path}/plain", *override)
    train(path, f"output_dir={tmp_path}/other", "compile=true", *override)
    plain, other = read_log(tmp_path / "plain"), read_log(tmp_path / "other")
    assert sorted(plain) == [1, 2, 3] and all(plain[step]["grad_norm"] > 0.5 for step in plain)
    for step in plain:
        for key in plain[step].keys() - {"tokens_per_second_per_gpu"}:
            assert plain[step][key] == pytest.approx(other[step][key], rel=1e-4), key


@pytest.mark.slow
def test_layer_dropout_of_the_model_section_is_that_of_the_top_level(tmp_path, finetune):
    """With the draws of the run's seed, for the run's batches."""
    dropout = {"prob": 0.7}
    path = finetune(seed=7, layer_dropout=dropout)
    model = {"_component_": "layerskip_recipes.layerskip_decoder", "layer_dropout": dropout}
    model["base"] = OmegaConf.to_container(OmegaConf.load(path).model)
    assert train(path).model.layer_dropout.generator.initial_seed() == 7
    train(finetune(seed=7, layer_dropout=None, model=model), f"output_dir={tmp_path}/model")
    assert losses(tmp_path / "model") == losses(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "scales"),
    [("exp", [math.exp(t * math.log(2) / 5) - 1 for t in range(6)]), ("linear_decay", [1 - t / 5 for t in range(6)])],
)
def test_the_dropout_follows_its_schedule_over_the_whole_run(schedule, scales, tmp_path, finetune):
    """Eq. 4, with t and T in optimizer steps of all epochs, not in micro-batches."""
    path = finetune(
        layer_dropout={"prob": 0.8, "schedule": schedule, "inverted": True}, epochs=2, max_steps_per_epoch=3,
        batch_size=1, gradient_accumulation_steps=2,
    )  # fmt: skip
    train(path)
    whole = losses(tmp_path / "out")
    rates = [line["layer_dropout_rate"] for line in whole.values()]
    assert rates == pytest.approx([0.8 * scale for scale in scales], abs=1e-6)
    assert losses(resumed(path, "epoch_0")) == {step: whole[step] for step in (4, 5, 6)}


@pytest.mark.parametrize("clip", [1e-3, None])
def test_the_gradient_is_clipped(clip, tmp_path, finetune):
    """One step of SGD with lr 1 moves all weights together by the gradient's norm, or by what it is clipped to."""
    sgd = {"_component_": "torch.optim.SGD", "lr": 1.0}
    recipe = set_up(finetune(optimizer=sgd, layer_dropout=None, max_steps_per_epoch=1, clip_grad_norm=clip))
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
