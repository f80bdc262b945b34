"""Tensor parallelism by torchtune's plans: config checks, and splitting the decoder."""

import math
from collections.abc import Mapping

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle, PrepareModuleInput, PrepareModuleOutput, parallelize_module
from torchtune import training
from torchtune.modules import MultiHeadAttention, TiedLinear, TransformerDecoder

from layerskip_recipes.config.components import Component
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.families.attention import NormOfAllHeads
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.processes import num_processes

Plan = Mapping[str, ParallelStyle]
EXAMPLE_PLAN = "{_component_: torchtune.models.llama3.base_llama_tp_plan}"


def ranks_per_matrix(dim: int | None, plan: Component | None) -> int:
    """The number of ranks that share each matrix, by `tensor_parallel_dim` and `tensor_parallel_plan`.

    A plan without a dim means all ranks.
    """
    return dim or (1 if plan is None else num_processes())


def check_processes(model: TransformerDecoder, dim: int | None, plan: Component | None) -> int:
    """`ranks_per_matrix`; raises a ConfigError if the model cannot be split over that many."""
    processes, dim = num_processes(), ranks_per_matrix(dim, plan)
    kinds = [layer.attn for layer in model.layers]
    attn = next((attn for attn in kinds if not isinstance(attn, MultiHeadAttention)), kinds[0])
    divided = {"processes": processes, "model.num_heads": attn.num_heads, "model.num_kv_heads": attn.num_kv_heads}
    part = attn.q_norm if isinstance(attn, MultiHeadAttention) else attn
    if part is attn or isinstance(part, NormOfAllHeads):
        divided[f"the parts that a {type(part).__name__} can be split into"] = 1
    largest = math.gcd(*divided.values())
    for what, number in divided.items():
        if number % dim:
            allowed = ", ".join(str(d) for d in range(1, largest + 1) if largest % d == 0)
            raise ConfigError(
                f"tensor_parallel_dim: {dim} does not divide {what}, {number}. Allowed: {allowed}; for example "
                f"tensor_parallel_dim={largest}"
            )
    if dim > 1 and plan is None:
        raise ConfigError(
            f"tensor_parallel_plan: missing with tensor_parallel_dim {dim}. Allowed: a component; for example "
            f"tensor_parallel_plan={EXAMPLE_PLAN}"
        )
    return dim


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
