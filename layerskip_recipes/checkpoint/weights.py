"""Weights: reading, checking, starting from scratch, quantising."""

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationInt4WeightConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)
from torchao.quantization.quant_primitives import MappingType
from torchtune import training
from torchtune.modules import TiedLinear

from layerskip_recipes.checkpoint.checkpointer_checks import warn_of_contradictions
from layerskip_recipes.checkpoint.checkpointers import reading_checkpointer
from layerskip_recipes.config.components import Component
from layerskip_recipes.config.recipe_config import RecipeConfig
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.adapters import check_tensors, read_adapters, without_adapters
from layerskip_recipes.model.decoder import LayerSkipDecoder, layerskip_decoder
from layerskip_recipes.model.head import head_of, linear_of_rows
from layerskip_recipes.model.memory import tensor_bytes

M = TypeVar("M", bound=nn.Module)


def read_weights(checkpointer: Any) -> dict[str, torch.Tensor]:
    """Read the model's state_dict from a torchtune checkpointer."""
    try:
        return checkpointer.load_checkpoint()[training.MODEL_KEY]
    except ConfigError:
        raise
    except Exception as e:
        model_type = getattr(checkpointer, "_model_type", None)  # of torchtune's checkpointers
        how = "" if model_type is None else f" as model_type {model_type}"
        name = type(checkpointer).__name__
        raise ConfigError(f"checkpointer: {name} cannot read the files{how}: {e!r}. Check that section's keys") from e


def check_state_dict(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Check that a checkpoint has the keys and shapes of the model."""
    check_tensors(model.state_dict(), state, "checkpointer: the checkpoint is not this model's, it")


@torch.no_grad()
def initialise(model: LayerSkipDecoder, seed: int, std: float = 0.02) -> None:
    """Initialise as GPT-2 does: matrices with normal(0, std), biases with 0; norms keep torchtune's values.

    Matrices that write into the residual stream get std / sqrt(2 L). The numbers are drawn on the CPU in fp32, so they
    are the same on every device, up to rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            into_residual = name.endswith(("attn.output_proj.weight", "attn.out_proj.weight", "mlp.w2.weight"))
            scale = std / math.sqrt(2 * model.num_layers) if into_residual else std
            drawn = torch.randn(parameter.shape, generator=generator, device="cpu", dtype=torch.float32)
            parameter.copy_(scale * drawn)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def load_decoder(cfg: RecipeConfig, device: torch.device, quantizer: Component | None = None) -> LayerSkipDecoder:
    """Build `cfg.model` with the weights of `cfg.checkpointer`, in eval mode, for generation and evaluation.

    A quantizer quantises after loading. A `FullModelTorchTuneCheckpointer` reads weights that torchtune's `quantize`
    recipe has quantised already.
    """
    checkpointer, dtype = reading_checkpointer(cfg), cfg.torch_dtype
    path = cfg.checkpointer.get("adapter_checkpoint")
    adapters = read_adapters(path, cfg.meta_model) if path is not None else {}
    read_quantised = quantizer is not None and isinstance(checkpointer, training.FullModelTorchTuneCheckpointer)
    state = read_weights(checkpointer)
    with training.set_default_dtype(dtype), device:
        model = layerskip_decoder(cfg.model.build())
    if read_quantised:
        model = quantizer.build().quantize(model).to(device=device, dtype=dtype)
        model.load_state_dict({name: value.to(device) for name, value in state.items()}, assign=True)
        return model.eval()
    warn_of_contradictions(checkpointer, model)
    state = {**state, **adapters}
    check_state_dict(model, state)
    model.load_state_dict(state)
    without_adapters(model)
    return (model if quantizer is None else quantise_decoder(model, quantizer)).eval()


def quantise_decoder(model: LayerSkipDecoder, quantizer: Component) -> LayerSkipDecoder:
    """Quantise the model's linear layers and its head, see `quantise`; the head of an int4 model to int8."""
    if isinstance(model.output, TiedLinear):
        model.output = linear_head(model)  # gets quantised; embedding lookups stay in full precision
    if quantizer.target is not Int8DynamicActivationInt4WeightConfig:
        return quantise(model, quantizer)
    # An int4 head alone would change the logits a quarter as much as all other matrices in int4 do.
    head, model.output = nn.ModuleList([model.output]), nn.Identity()
    model = quantise(model, quantizer)
    int8 = {"_component_": "torchao.quantization.Int8DynamicActivationInt8WeightConfig"}
    (model.output,) = quantise(head, Component(int8, quantizer.key))
    return model


def quantised_bytes(model: LayerSkipDecoder, quantizer: Component) -> int:
    """Bytes of the weights after quantisation, for a model on the meta device; 0 if unknown."""
    try:
        model = quantise_decoder(without_adapters(deepcopy(model)), quantizer)
    except ConfigError:
        return 0
    return sum(map(tensor_bytes, model.parameters()))


def linear_head(model: LayerSkipDecoder) -> nn.Linear:
    """The head as a plain linear layer, which a quantizer can replace; it shares its parameters."""
    parameters = dict(head_of(model).named_parameters(recurse=False))
    return linear_of_rows({name: parameters[name] for name in ("weight", "bias") if name in parameters})


def quantise(module: M, quantizer: Component) -> M:
    """Quantise linear layers with a torchao configuration or a torchtune quantizer, mostly in place."""
    method, key = newest_version(quantizer).build(), quantizer.key
    if isinstance(method, Int8DynamicActivationInt4WeightConfig) and method.mapping_type is MappingType.SYMMETRIC:
        # Its own scale, the largest |w| / 7.5, cuts off the largest weight of each group.
        method.mapping_type = MappingType.SYMMETRIC_NO_CLIPPING_ERR
    old_kinds = _weight_kinds(module)
    device, dtype = next(module.parameters()).device, next(module.parameters()).dtype
    # torchao changes inductor's settings and the fp32 matmul precision. Restore both, so that all decoding methods of a
    # process run alike.
    precision, compiler = torch.get_float32_matmul_precision(), torch._inductor.config.save_config()
    try:
        if hasattr(method, "quantize"):
            module = method.quantize(module)
        else:
            quantize_(module, method)
        # Run one layer: a missing kernel only fails when it runs.
        linear = next((part for part in module.modules() if isinstance(part, nn.Linear)), None)
        if linear is not None:
            with torch.inference_mode():
                linear(torch.zeros(1, linear.in_features, device=device, dtype=dtype))
    except Exception as e:  # torchao's kernels fail in many ways
        raise ConfigError(f"{key}: {quantizer.path} does not work on {device.type} ({e!r}); {key}=null") from e
    finally:
        torch.set_float32_matmul_precision(precision)
        torch._inductor.config.load_config(compiler)
    if _weight_kinds(module) == old_kinds:
        raise ConfigError(
            f"{key}: {quantizer.path} changes no weight of this model. "
            f"Set its group size to a divisor of the layers' widths, or {key}=null"
        )
    return module


def newest_version(quantizer: Component) -> Component:
    """torchao's int8 weights in version 2, which replaces the deprecated version 1; torchao 0.15 has both."""
    int8 = quantizer.target in (Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig)
    only_in_old = {"version", "group_size", "layout", "weight_only_decode"}
    both = int8 and quantizer.takes("version") and not only_in_old & set(quantizer.arguments)
    return quantizer.replace(version=2) if both else quantizer


def _weight_kinds(module: nn.Module) -> list[tuple[type, type, torch.dtype]]:
    """(module type, weight type, weight dtype) of each module with a weight."""
    parts = ((part, getattr(part, "weight", None)) for part in module.modules())
    return [(type(part), type(weight), weight.dtype) for part, weight in parts if isinstance(weight, torch.Tensor)]
