"""Weights in 4 bits: their rounding and the head."""

import pytest
import torch
from helpers.decoding import make_model
from torch import nn

from layerskip_recipes.checkpoint.weights import quantise, quantise_decoder
from layerskip_recipes.config.components import Component

INT4 = Component({"_component_": "torchao.quantization.Int8DynamicActivationInt4WeightConfig"}, "quantizer")


def test_no_weight_in_4_bits_is_off_by_more_than_half_a_step():
    """Numbers from -8 to 7 times a step per 32 weights: the smallest step with which none of them is cut off."""
    weight = torch.randn(24, 64)
    linear = nn.Linear(64, 24, bias=False)
    linear.weight = nn.Parameter(weight.clone())
    rounded = quantise(nn.Sequential(linear), INT4)[0].weight.original_weight_tensor.dequantize()
    groups = weight.view(24, 2, 32)
    step = torch.maximum(groups.amax(-1) / 7, -groups.amin(-1) / 8)
    assert ((rounded - weight).abs().view(24, 2, 32) <= step[..., None] * 0.5001).all()


@pytest.mark.parametrize("family", ["llama3_2", "llama3"])  # with a tied head, and with a matrix of its own
def test_the_head_of_a_model_in_4_bits_has_8(family):
    model = quantise_decoder(make_model(family), INT4)
    head = model.output.weight
    assert type(head).__name__ == "Int8Tensor" and type(model.layers[0].mlp.w1.weight).__name__ != "Int8Tensor"
    assert type(model.tok_embeddings.weight) is nn.Parameter
