"""What several processes can do, checked before anything is loaded, and the group that they join."""

import pytest
from helpers.tiny import make_tiny

from layerskip_recipes.config.components import Component
from layerskip_recipes.distributed import tensor_parallel

SPLIT = {"tensor_parallel_plan": {"_component_": "torchtune.models.llama3.base_llama_tp_plan"}}


def check_processes(keys, model):
    values = {key: Component(value, key) if isinstance(value, dict) else value for key, value in keys.items()}
    names = ("tensor_parallel_dim", "tensor_parallel_plan")
    return tensor_parallel.check_processes(model, *(values.get(name) for name in names))


@pytest.mark.parametrize(
    ("processes", "keys", "dim"),
    [
        (1, {}, 1),
        (3, {}, 1),
        (1, SPLIT, 1),
        (2, SPLIT, 2),
        (2, SPLIT | {"tensor_parallel_dim": 1}, 1),
        (4, SPLIT | {"tensor_parallel_dim": 2}, 2),
    ],
)
def test_matrices_are_shared_among_all_processes_or_the_number_that_is_set(processes, keys, dim, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert check_processes(keys, make_tiny("llama3")) == dim


@pytest.mark.parametrize(
    ("processes", "family", "keys", "message"),
    [
        (2, "llama3", {"tensor_parallel_dim": 2}, "tensor_parallel_plan: missing"),
        (3, "llama3", {"tensor_parallel_dim": 2}, "tensor_parallel_dim: 2 does not divide processes, 3. Allowed: 1; "),
        (8, "llama3", SPLIT, "tensor_parallel_dim: 8 does not divide model.num_heads, 4. Allowed: 1, 2; "),
        (4, "llama3", SPLIT, "tensor_parallel_dim: 4 does not divide model.num_kv_heads, 2. Allowed: 1, 2; "),
        (2, "gemma2", SPLIT, "tensor_parallel_dim: 2 "),
        (2, "olmo3", SPLIT, "tensor_parallel_dim: 2 "),
    ],
)
def test_models_and_numbers_that_cannot_be_shared_are_refused(processes, family, keys, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(ValueError) as error:
        check_processes(keys, make_tiny(family))
    assert str(error.value).startswith(message) and "; for example " in str(error.value)
