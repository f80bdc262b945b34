"""Block sizes of NF4 for matrices of real models, in one process and sharded over several."""

import pytest
import torch
from torch import nn
from torchao.dtypes.nf4tensor import to_nf4
from torchtune.models.llama3_2._component_builders import llama3_2
from torchtune.models.qwen2_5 import qwen2_5_0_5b

from layerskip_recipes.errors import ConfigError
from layerskip_recipes.families.hf_decoder import Lora, build_decoder
from layerskip_recipes.families.reading import parse_hf_config
from layerskip_recipes.model.nf4 import check_nf4, scales_per_block

# Rows and columns of the layers' matrices.
SHAPES = {
    "SmolLM2 135M": [(576, 576), (192, 576), (1536, 576), (576, 1536)],
    "SmolLM2 360M": [(960, 960), (320, 960), (2560, 960), (960, 2560)],
    "Qwen2.5 0.5B": [(896, 896), (128, 896), (4864, 896), (896, 4864)],
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", [shape for shapes in SHAPES.values() for shape in shapes], ids=str)
def test_real_shapes_are_packed_and_sharded(shape):
    """Over 1 to 8 processes, each shard's values being those of the whole; errors are NF4's, a tenth of the values."""
    torch.manual_seed(0)
    weight = torch.randn(shape)
    packed = to_nf4(weight, scaler_block_size=scales_per_block(*shape))
    whole = packed.get_original_weight()
    assert ((whole - weight).square().mean() / weight.square().mean()).sqrt() < 0.12
    for shards in (2, 4, 8):
        parts = torch.chunk(packed, shards)
        assert torch.equal(torch.cat([part.get_original_weight() for part in parts]), whole), shards
    for large in ((4096, 4096), (1024, 4096), (1024, 1024), (14336, 4096)):
        assert scales_per_block(*large) == 256  # torchao's own


def smollm2(lora: Lora | None) -> nn.Module:
    config = parse_hf_config(
        {
            "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 9,
            "num_key_value_heads": 3, "hidden_size": 576, "intermediate_size": 1536, "max_position_embeddings": 64,
        },
        "smollm2",
    )  # fmt: skip
    return build_decoder(config, 64, lora)


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_a_decoder_of_smollm2s_shape_is_packed(dora):
    """Matrices with adapters and without; plain weights are packed when they are loaded."""
    lora = Lora(rank=4, attn_modules=["q_proj"], apply_lora_to_mlp=False, use_dora=dora, quantize_base=True)
    model, plain = smollm2(lora), smollm2(None)
    model.load_state_dict(plain.state_dict(), strict=False)
    for name in ("q_proj", "k_proj", "output_proj"):
        weight, expected = getattr(model.layers[0].attn, name).weight, getattr(plain.layers[0].attn, name).weight
        error = (weight.get_original_weight() - expected).norm() / expected.norm()
        assert error < 0.12, name
    assert torch.isfinite(model(torch.zeros(1, 3, dtype=torch.long))).all()


@pytest.mark.parametrize(
    ("build", "shards", "any_size", "message"),
    [
        (qwen2_5_0_5b, 1, False, None),
        (qwen2_5_0_5b, 2, False, r"layers\.0\.attn\.q_proj\.weight \[896, 896\] cannot be packed in NF4 over 2 proc"),
        (lambda: smollm2(None), 1, False, r"layers\.0\.attn\.q_proj\.weight \[576, 576\] cannot be packed in NF4, "),
        (lambda: smollm2(None), 8, True, None),
        (lambda: smollm2(None), 5, True, r"layers\.0\.attn\.q_proj\.weight .* over 5 processes"),
        (lambda: llama3_2(64, 1, 2, 1, 24, 64, intermediate_dim=64), 1, True, "multiples of 16384"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_loaded(build, shards, any_size, message):
    with torch.device("meta"):
        model = build()
    if message is None:
        check_nf4(model, shards, any_size)
    else:
        with pytest.raises(ConfigError, match=rf"^model: .*{message}"):
            check_nf4(model, shards, any_size)
