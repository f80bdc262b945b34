"""Generation on several processes under torchrun: late layers sharded, draft layers whole, or tensor parallelism.

A draft step runs the layers below exit E, token by token: were those sharded, each drafted token would wait for E
gathers. So embeddings, draft layers, norm and head are whole on every rank, and only the layers from E up are sharded:
a verification gathers each of them once for all the tokens it verifies. All ranks decode the same prompts.
"""

import math
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle, PrepareModuleInput, PrepareModuleOutput, parallelize_module
from torchtune import training
from torchtune.modules import MultiHeadAttention, TiedLinear, TransformerDecoder

from layerskip_recipes.checkpoint.checkpointers import reading_checkpointer
from layerskip_recipes.checkpoint.weights import check_state_dict, load_decoder, read_weights
from layerskip_recipes.config.components import Component
from layerskip_recipes.config.recipe_config import RecipeConfig
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.local_shards import split_locally
from layerskip_recipes.model.adapters import adapter_names, without_adapters
from layerskip_recipes.model.decoder import LayerSkipDecoder, layerskip_decoder
from layerskip_recipes.processes import (
    is_rank_zero,
    num_processes,
    wait_for_all,
)

Plan = Mapping[str, ParallelStyle]
EXAMPLE_PLAN = "{_component_: torchtune.models.llama3.base_llama_tp_plan}"


def check_processes(
    model: TransformerDecoder,
    tensor_parallel_dim: int | None,
    tensor_parallel_plan: Component | None,
    quantizer: Component | None = None,
    device: str | None = None,
) -> int:
    """Check what can be wrong with several processes, before anything is loaded.

    Args:
        model: the decoder, on any device, not yet split.
        tensor_parallel_dim, tensor_parallel_plan: of the config. As in torchtune's generation, a plan without a number
            means all ranks.
        quantizer, device: of the config.

    Returns:
        T, the ranks that share each matrix.

    Raises:
        ConfigError: the key, what was given, what is allowed.
    """
    processes, plan = num_processes(), read_plan(tensor_parallel_plan)
    dim = tensor_parallel_dim or (1 if plan is None else processes)
    attn = model.layers[0].attn
    divided = {"processes": processes, "model.num_heads": attn.num_heads, "model.num_kv_heads": attn.num_kv_heads}
    largest = math.gcd(*divided.values())
    for what, number in divided.items():
        if number % dim:
            allowed = ", ".join(str(d) for d in range(1, largest + 1) if largest % d == 0)
            raise _wrong("tensor_parallel_dim", f"{dim} does not divide {what}, {number}", allowed, largest)
    if dim > 1 and not isinstance(attn, MultiHeadAttention):
        raise _wrong("tensor_parallel_dim", f"{dim} cannot split a {type(attn).__name__}", "1", 1)
    if dim > 1 and plan is None:
        raise _wrong("tensor_parallel_plan", f"missing with tensor_parallel_dim {dim}", "a component", EXAMPLE_PLAN)
    if processes > 1 and quantizer is not None:
        raise _wrong("quantizer", f"{quantizer} with {processes} processes", "null", "null")
    if processes > 1 and device not in (None, "cpu", "cuda"):
        raise _wrong("device", f"{device!r} with {processes} processes", "cpu, cuda (a GPU for each)", "cuda")
    return dim


def read_plan(section: Component | None) -> Plan | None:
    """The plan of `tensor_parallel_plan`; raises a ConfigError if the component makes something else."""
    if section is None:
        return None
    plan = section.build()
    if not isinstance(plan, dict) or not all(isinstance(style, ParallelStyle) for style in plan.values()):
        given = f"{section.path} makes a {type(plan).__name__}"
        raise _wrong("tensor_parallel_plan", given, "a dict of module names to ParallelStyle", EXAMPLE_PLAN)
    return plan


def _wrong(key: str, given: str, allowed: str, example: Any) -> ConfigError:
    return ConfigError(f"{key}: {given}. Allowed: {allowed}; for example {key}={example}")


def load_sharded_decoder(
    cfg: RecipeConfig,
    device: torch.device,
    kept_layers: int = 0,
    tensor_parallel_dim: int = 1,
    plan: Plan | None = None,
) -> LayerSkipDecoder:
    """`load_decoder` for several processes: rank 0 reads the checkpoint, the others get their parts only.

    Args:
        cfg: sections model and checkpointer, and the dtype of the weights.
        kept_layers: the layers below it are whole on every rank: the exit E that drafts, 0 for plain decoding.
        tensor_parallel_dim, plan: T of `check_processes`, and the plan of `read_plan`.

    Raises:
        ConfigError: on rank 0, if the checkpoint is not this model's.
    """
    model, state = layerskip_decoder(cfg.build_on_meta()), {}
    if is_rank_zero():
        if adapter_names(model):
            # As one process merges them: onto weights in this dtype, and with QLoRA onto what NF4 left of them.
            state = load_decoder(cfg, torch.device("cpu")).state_dict()
        else:
            state = read_weights(reading_checkpointer(cfg))
            check_state_dict(model, state)
    wait_for_all()  # rank 0 reads its files for longer than a collective may take
    without_adapters(model)
    return shard_decoder(model, state, device, cfg.torch_dtype, kept_layers, tensor_parallel_dim, plan)


class _LateLayers(nn.Module):
    """The FSDP root of the sharded layers, no part of the decoder's own tree.

    The decoder cannot be the root: walks begin and end anywhere, and may call its layers directly. Layers without a
    common root would each have streams of their own, so on a GPU memory that no other layer can use.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, _: None) -> None:
        """Called once, for FSDP's hook before it, which makes this the root. Then each layer gathers itself.

        With an argument, since on a GPU the hook of torch before 2.13 looks at the first one.
        """


def shard_decoder(
    model: LayerSkipDecoder,
    state: Mapping[str, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
    kept_layers: int = 0,
    tensor_parallel_dim: int = 1,
    plan: Plan | None = None,
) -> LayerSkipDecoder:
    """Split a decoder over a grid of (ranks / T) x T, and give each rank its part of rank 0's weights.

    T ranks share each matrix and compute with their part of it; over ranks / T the layers from `kept_layers` up are
    sharded, and gathered when they run.

    Args:
        model: on the meta device, in `dtype`; changed in place.
        state: the whole state_dict on rank 0; not looked at on other ranks.
        device, dtype: of the weights.
        kept_layers: 0 .. L.
        tensor_parallel_dim, plan: T, and which matrices to split how.

    Returns:
        The model in eval mode.
    """
    shards = dist.get_world_size() // tensor_parallel_dim
    mesh = init_device_mesh(device.type, (shards, tensor_parallel_dim), mesh_dim_names=("shards", "parallel"))
    if tensor_parallel_dim > 1:
        assert plan is not None
        parallelize(model, mesh["parallel"], plan)
    late = _LateLayers(model.layers[kept_layers:] if shards > 1 else [])
    for module in (*late.layers, late):
        fully_shard(module, mesh=mesh["shards"], reshard_after_forward=True)
    for layer, following in pairwise(late.layers):
        # The next layer is gathered while this one runs.
        layer.set_modules_to_forward_prefetch([following])  # type: ignore[operator]
    init_rope(model, device, dtype)
    broadcast_state_dict(model, state, dtype)
    if plan is not None and shards == 1:
        split_locally(model, mesh["parallel"], plan)
    late(None)
    for layer in late.layers:
        # The buffer for the gathered weights is made here and kept. One made in inference mode, where decoding runs,
        # could not be written outside of it.
        layer.unshard()  # type: ignore[operator]
        layer.reshard()  # type: ignore[operator]
    return model.eval()


def init_rope(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Compute the position tables of a model that was on the meta device: they are in no checkpoint."""
    with training.set_default_dtype(dtype), device:
        for module in model.modules():
            rope_init: Any = getattr(module, "rope_init", None)
            if rope_init is not None:
                rope_init()


def broadcast_state_dict(
    model: nn.Module, state: Mapping[str, torch.Tensor], dtype: torch.dtype, offload: bool = False
) -> None:
    """Give each rank its part of rank 0's weights: one tensor after the other is broadcast whole, and cut on arrival.

    Args:
        model: sharded, on the meta device.
        state: the whole state_dict on rank 0; ignored on other ranks.
        dtype: of the weights.
        offload: the weights live on the CPU.
    """
    weights: dict[str, Any] = {name: value.to(dtype) for name, value in state.items()} if is_rank_zero() else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True, cpu_offload=offload)
    with suppress_dcp_warnings():
        set_model_state_dict(model, weights, options=options)
    training.validate_no_params_on_meta_device(model)


@contextmanager
def suppress_dcp_warnings():
    """Without the warnings of torch's distributed checkpointing about its own calls."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(_get_pg_default_device|Multiple backends)")
        yield


def parallelize(model: LayerSkipDecoder, mesh: DeviceMesh, plan: Plan) -> None:
    """Split heads and matrices by torchtune's plan; and a tied head, which is no module that a plan could name."""
    tied = isinstance(model.output, TiedLinear)
    training.prepare_mha_for_tp(model, mesh)
    parallelize_module(model, mesh, {name: style for name, style in plan.items() if not (tied and name == "output")})
    if tied and isinstance(model.tok_embeddings.weight, DTensor):
        layouts = (Replicate(), None)  # of the hidden state, and of the embedding's weight: split already
        for style in (
            PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts),
            PrepareModuleOutput(output_layouts=Shard(-1), desired_output_layouts=Replicate()),
        ):
            parallelize_module(model.output.linear, mesh, style)
