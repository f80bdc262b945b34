"""The grid of processes and the settings that do not go with it, in this process with torchrun's WORLD_SIZE."""

import pytest
from helpers.configs import HF_CONFIG, MODEL, finetune_config
from helpers.hf_folders import model_with_tokenizer

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.training.config import FinetuneConfig
from layerskip_recipes.training.parallel import mesh_sizes

PLAN = {"_component_": "torchtune.models.llama3.base_llama_tp_plan"}
TWO_HEADS = {"num_kv_heads": 2}


@pytest.fixture
def sizes_of(tmp_path, tokenizer_folder, monkeypatch):
    """The sizes of the grid for a model's changes, other keys, and a number of processes."""

    def sizes(model, keys, processes=2):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        cfg = load_config(str(finetune_config(tmp_path, tokenizer_folder, model=MODEL | model, **keys)))
        cfg.checkpointer.hf_config = HF_CONFIG | {"num_key_value_heads": model.get("num_kv_heads", 1)}
        return mesh_sizes(FinetuneConfig.load(cfg))

    return sizes


@pytest.mark.parametrize(
    ("model", "keys", "message"),
    [
        ({}, {"data_parallel_replicate_dim": 3}, "data_parallel_replicate_dim: 3 wrong: "),
        ({}, {"data_parallel_shard_dim": 3}, "data_parallel_shard_dim: 3 wrong: "),
        ({}, {"tensor_parallel_dim": 3}, "tensor_parallel_dim: 3 does not divide processes, 2. Allowed: 1; "),
        ({}, {"fsdp_cpu_offload": True}, "fsdp_cpu_offload: True needs several processes with device=cuda"),
        (
            TWO_HEADS,
            {"tensor_parallel_dim": 2, "tensor_parallel_plan": PLAN, "fsdp_cpu_offload": True},
            "fsdp_cpu_offload: True needs processes to shard over, and tensor_parallel_dim 2 takes all 2; ",
        ),
        (
            {},
            {"optimizer_in_bwd": True, "custom_sharded_layers": ["tok_embeddings"]},
            "optimizer_in_bwd: True does not go with custom_sharded_layers: [tok_embeddings]",
        ),
        (
            {},
            {"optimizer_in_bwd": True, "fsdp_cpu_offload": True},
            "fsdp_cpu_offload: True does not go with optimizer_in_bwd",
        ),
        (
            {},
            {"optimizer": {"_component_": "torchao.optim.AdamW8bit", "lr": 1e-3}},
            "optimizer: torchao.optim.AdamW8bit works with one process",
        ),
        ({}, {"low_cpu_ram": True}, "low_cpu_ram: True works with one process"),
        (
            {},
            {"tensor_parallel_plan": PLAN},
            "tensor_parallel_plan: torchtune.models.llama3.base_llama_tp_plan does nothing without tensor_parallel_dim",
        ),
    ],
)
def test_splits_that_would_go_wrong_or_do_nothing_are_refused(model, keys, message, sizes_of):
    with pytest.raises(ValueError) as error:
        sizes_of(model, keys)
    assert str(error.value).startswith(message)


def test_packed_weights_of_a_folders_model_are_not_replicated(tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    folder = model_with_tokenizer("qwen3", tmp_path / "Qwen3", tokenizer_folder)
    keys = [f"model_dir={folder}", f"output_dir={tmp_path}/out", "device=cpu", "data_parallel_replicate_dim=2"]
    with pytest.raises(ValueError, match=r"^data_parallel_replicate_dim: 2 does not go with QLoRA"):
        mesh_sizes(FinetuneConfig.load(load_config("hf/qlora", keys)))


@pytest.mark.parametrize(
    ("processes", "keys", "sizes"),
    [
        (2, {"tensor_parallel_plan": PLAN, "tensor_parallel_dim": 1}, (1, 2, 1)),
        (2, {"tensor_parallel_plan": PLAN, "tensor_parallel_dim": 2}, (1, 1, 2)),
        (1, {"tensor_parallel_plan": PLAN}, (1, 1, 1)),  # on one device the plan waits for more
        (4, {"data_parallel_replicate_dim": 2}, (2, 2, 1)),
    ],
)
def test_a_plan_and_how_many_ranks_share_a_matrix(processes, keys, sizes, sizes_of):
    assert sizes_of(TWO_HEADS, keys, processes) == sizes
