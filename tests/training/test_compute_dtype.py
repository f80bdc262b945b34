"""compute_dtype: products in bf16 with weights in fp32; what weights in bf16 lose."""

import pytest
import torch
from helpers.configs import finetune_config, make_checkpoint, start_section
from helpers.ranks import train_on_ranks
from helpers.training import losses, train
from safetensors.torch import load_file, save_file

STEPS, LR = 12, 2e-5
WEIGHT = 5 / 256  # 0.0195, a number of bf16
KINDS = {"fp32": ["dtype=fp32"], "mixed": ["dtype=fp32", "compute_dtype=bf16"], "bf16": ["dtype=bf16"]}


@pytest.fixture(scope="module")
def path(tmp_path_factory, tokenizer_folder):
    """Twelve steps of AdamW without weight decay from a checkpoint whose matrices are WEIGHT or -WEIGHT everywhere."""
    folder = tmp_path_factory.mktemp("runs")
    file = make_checkpoint(folder / "start", tokenizer_folder) / "model.safetensors"
    save_file({name: t if t.dim() == 1 else WEIGHT * t.sign() for name, t in load_file(file).items()}, file)
    changes = {"checkpointer": start_section(folder / "start"), "layer_dropout": None, "lr_scheduler": None}
    changes |= {"optimizer": {"_component_": "torch.optim.AdamW", "lr": LR, "weight_decay": 0.0}}
    return finetune_config(folder, tokenizer_folder, **changes, epochs=3, max_steps_per_epoch=4)


@pytest.fixture(scope="module")
def moved(path):
    """By kind: how far each weight of the second layer's matrices went, and the losses of the steps."""

    def matrices(file):
        return {n: t.float() for n, t in load_file(file).items() if "layers.1." in n and t.dim() == 2}

    before, found = matrices(path.parent / "start" / "model.safetensors"), {}
    for kind, keys in KINDS.items():
        out = path.parent / kind
        train(path, f"output_dir={out}", *keys)
        (file,) = (out / "epoch_2").glob("*.safetensors")
        after = matrices(file)
        distance = torch.cat([(after[name] - before[name]).abs().flatten() for name in before])
        found[kind] = distance, [line["loss"] for line in losses(out).values()]
    return found


@pytest.mark.slow
def test_small_steps_move_a_weight_as_in_fp32(moved):
    """AdamW moves a weight by about the learning rate at a step. In bf16, neighbours of WEIGHT are 6 steps away."""
    assert moved["bf16"][0].max() == 0
    for kind in ("fp32", "mixed"):
        assert 0.5 * STEPS * LR < moved[kind][0].median() < 1.1 * STEPS * LR, kind
    mean = moved["fp32"][0].mean()
    assert abs(moved["mixed"][0].mean() - mean) < 0.1 * mean
    assert moved["mixed"][1] == pytest.approx(moved["fp32"][1], rel=1e-2)
    assert moved["mixed"][1] != moved["fp32"][1]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_gather_in_bf16_and_move_the_same_weights(path, moved):
    out = path.parent / "two"
    train_on_ranks(path, f"output_dir={out}", *KINDS["mixed"], "batch_size=1")
    found = [line["loss"] for line in losses(out).values()]
    assert found == pytest.approx(moved["fp32"][1], rel=1e-2)
    (file,) = (out / "epoch_2").glob("*.safetensors")
    assert {t.dtype for t in load_file(file).values()} == {torch.float32}
