"""Tensor parallelism by torchtune's plans: config checks, and splitting the decoder."""

import math
from collections.abc import Mapping
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle, PrepareModuleInput, PrepareModuleOutput, parallelize_module
from torchtune import training
from torchtune.modules import MultiHeadAttention, TiedLinear, TransformerDecoder

from layerskip_recipes.config.components import Component
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.processes import num_processes

Plan = Mapping[str, ParallelStyle]
EXAMPLE_PLAN = "{_component_: torchtune.models.llama3.base_llama_tp_plan}"


def check_processes(
    model: TransformerDecoder, dim: int | None, plan: Component | None, device: str | None = None
) -> int:
    """The number of ranks that share each matrix; raises a ConfigError if the model cannot be split.

    `dim` and `plan` are `tensor_parallel_dim` and `tensor_parallel_plan`; a plan without a dim means all ranks.
    """
    processes, styles = num_processes(), read_plan(plan)
    dim = dim or (1 if styles is None else processes)
    attn = model.layers[0].attn
    divided = {"processes": processes, "model.num_heads": attn.num_heads, "model.num_kv_heads": attn.num_kv_heads}
    largest = math.gcd(*divided.values())
    for what, number in divided.items():
        if number % dim:
            allowed = ", ".join(str(d) for d in range(1, largest + 1) if largest % d == 0)
            raise _wrong("tensor_parallel_dim", f"{dim} does not divide {what}, {number}", allowed, largest)
    if dim > 1 and not isinstance(attn, MultiHeadAttention):
        raise _wrong("tensor_parallel_dim", f"{dim} cannot split a {type(attn).__name__}", "1", 1)
    if dim > 1 and styles is None:
        raise _wrong("tensor_parallel_plan", f"missing with tensor_parallel_dim {dim}", "a component", EXAMPLE_PLAN)
    if processes > 1 and device not in (None, "cpu", "cuda"):
        raise _wrong("device", f"{device!r} with {processes} processes", "cpu, cuda (a GPU for each)", "cuda")
    return dim


def read_plan(section: Component | None) -> Plan | None:
    """The plan of `tensor_parallel_plan`; raises a ConfigError if the component builds something else."""
    if section is None:
        return None
    plan = section.build()
    if not isinstance(plan, dict) or not all(isinstance(style, ParallelStyle) for style in plan.values()):
        given = f"{section.path} makes a {type(plan).__name__}"
        raise _wrong("tensor_parallel_plan", given, "a dict of module names to ParallelStyle", EXAMPLE_PLAN)
    return plan


def _wrong(key: str, given: str, allowed: str, example: Any) -> ConfigError:
    return ConfigError(f"{key}: {given}. Allowed: {allowed}; for example {key}={example}")


def parallelize(model: LayerSkipDecoder, mesh: DeviceMesh, plan: Plan) -> None:
    """Split heads and matrices by torchtune's plan; a tied head, which it cannot name, is split with the embedding."""
    tied = isinstance(model.output, TiedLinear)
    training.prepare_mha_for_tp(model, mesh)
    parallelize_module(model, mesh, {name: style for name, style in plan.items() if not (tied and name == "output")})
    if tied and isinstance(model.tok_embeddings.weight, DTensor):
        layouts = (Replicate(), None)  # of the hidden state, and of the embedding's already sharded weight
        for style in (
            PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts),
            PrepareModuleOutput(output_layouts=Shard(-1), desired_output_layouts=Replicate()),
        ):
            parallelize_module(model.output.linear, mesh, style)
