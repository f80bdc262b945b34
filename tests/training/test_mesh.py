"""The grid of processes and the settings that do not go with it, in this process with torchrun's WORLD_SIZE."""

import pytest
import torch
from helpers.configs import HF_CONFIG, MODEL
from helpers.hf_folders import model_with_tokenizer

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.training.config import FinetuneConfig
from layerskip_recipes.training.parallel import mesh_sizes
from layerskip_recipes.training.recipe import LayerSkipFinetune

PLAN = {"tensor_parallel_plan": {"_component_": "torchtune.models.llama3.base_llama_tp_plan"}}
BACKWARD, OFFLOAD = {"optimizer_in_bwd": True}, {"fsdp_cpu_offload": True}
EIGHT_BIT = {"_component_": "torchao.optim.AdamW8bit", "lr": 1e-3}


@pytest.fixture
def sizes_of(finetune, monkeypatch):
    """The sizes of the grid of a model with two heads for keys and values, and a number of processes."""

    def sizes(keys, processes=2):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        cfg = load_config(str(finetune(model=MODEL | {"num_kv_heads": 2}, **keys)))
        cfg.checkpointer.hf_config = HF_CONFIG | {"num_key_value_heads": 2}
        return mesh_sizes(FinetuneConfig.load(cfg))

    return sizes


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data_parallel_replicate_dim": 3}, "data_parallel_replicate_dim: 3 wrong: "),
        ({"data_parallel_shard_dim": 3}, "data_parallel_shard_dim: 3 wrong: "),
        (OFFLOAD, "fsdp_cpu_offload: True needs device=cuda"),
        (OFFLOAD | BACKWARD, "fsdp_cpu_offload: True does not go with optimizer_in_bwd"),
        (BACKWARD | {"custom_sharded_layers": ["tok_embeddings"]}, "optimizer_in_bwd: True "),
        ({"optimizer": EIGHT_BIT}, "optimizer._component_: "),
        (PLAN, "tensor_parallel_plan: "),
    ],
)
def test_splits_that_would_go_wrong_or_do_nothing_are_refused(keys, message, sizes_of):
    with pytest.raises(ValueError) as error:
        sizes_of(keys)
    assert str(error.value).startswith(message)


def test_packed_weights_of_a_folders_model_are_not_replicated(tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    folder = model_with_tokenizer("qwen3", tmp_path / "Qwen3", tokenizer_folder)
    keys = [f"model_dir={folder}", f"output_dir={tmp_path}/out", "device=cpu", "data_parallel_replicate_dim=2"]
    with pytest.raises(ValueError, match=r"^data_parallel_replicate_dim: 2 .*QLoRA"):
        mesh_sizes(FinetuneConfig.load(load_config("hf/qlora", keys)))


@pytest.mark.parametrize(
    ("processes", "keys", "sizes"),
    [
        (2, PLAN | {"tensor_parallel_dim": 1}, (1, 2, 1)),
        (2, PLAN | {"tensor_parallel_dim": 2}, (1, 1, 2)),
        (4, {"data_parallel_replicate_dim": 2}, (2, 2, 1)),
    ],
)
def test_processes_are_split_into_replicas_shards_and_tensor_parallel_ranks(processes, keys, sizes, sizes_of):
    assert sizes_of(keys, processes) == sizes


def test_all_processes_take_what_rank_zero_chose(finetune, monkeypatch):
    """Each may have found another amount of free memory."""
    monkeypatch.setattr(
        "layerskip_recipes.training.recipe.from_rank_zero",
        lambda value: value | {"batch_size": 7} if isinstance(value, dict) and "batch_size" in value else value,
    )
    monkeypatch.setattr("layerskip_recipes.training.recipe.is_rank_zero", lambda: False)
    sizes = [
        LayerSkipFinetune(load_config(str(finetune()), ["device=cpu", f"batch_size={given}"])).cfg.batch_size
        for given in ("auto", 8)
    ]
    assert sizes == [7, 8]  # what is given stays


def test_processes_do_not_share_one_device(finetune, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("layerskip_recipes.config.recipe_config.devices_here", lambda: ["cuda", "cpu"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cfg = FinetuneConfig.load(load_config(str(finetune()), ["device=cuda:0", "dtype=fp32"]))
    with pytest.raises(ValueError, match=r"^device: 'cuda:0' .*device=cuda$"):
        cfg.find_device()
