"""What a family must have beside its file, and that a family of known parts needs nothing else."""

from typing import Any, ClassVar

import pytest
import torch
from helpers.compiled import compiles
from helpers.hf_folders import MODELS
from helpers.speculation import PROMPTS, run
from helpers.tiny import QWEN3, widen
from torchtune.models.gemma.rms_norm import GemmaRMSNorm

from layerskip_recipes import layerskip_decoder
from layerskip_recipes.config.schema import PositiveInt
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.families import reading
from layerskip_recipes.families.attention import NormFirstAttention
from layerskip_recipes.families.gemma import Gemma
from layerskip_recipes.families.hf_decoder import build_decoder
from layerskip_recipes.families.hf_names import from_files, to_files
from layerskip_recipes.families.reading import FAMILIES, parse_hf_config
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.kernels.cpp_decoder import head_parts, layer_parts
from layerskip_recipes.model.head import head_of

# Keys without which a family is refused.
NEEDED = {"GraniteMoeHybridForCausalLM": {"num_local_experts": 0, "layer_types": ["attention"] * 6}}


def decoder_of(architecture: str, **changes: Any):
    """A small random decoder with heads of 16 numbers."""
    torch.manual_seed(0)
    raw = QWEN3 | {"num_attention_heads": 2, "num_key_value_heads": 1} | changes | {"architectures": [architecture]}
    raw |= NEEDED.get(architecture, {})
    config = parse_hf_config(raw, "config.json")
    return config, layerskip_decoder(widen(build_decoder(config, 128))).eval()


def test_every_family_is_compared_with_transformers():
    assert {f"{name.removesuffix('Text')}ForCausalLM" for name, _ in MODELS.values()} == FAMILIES.keys()


def test_the_decoding_loop_for_transformers_runs_every_family():
    transformers = pytest.importorskip("transformers")
    loop = pytest.importorskip("layerskip_recipes.custom_generate.generate")
    runs = {
        name: FAMILIES[f"{name.removesuffix('Text')}ForCausalLM"].IN_TRANSFORMERS_LOOP for name, _ in MODELS.values()
    }
    model_types = {getattr(transformers, f"{name}Config").model_type for name, in_loop in runs.items() if in_loop}
    assert model_types == set(loop.MODEL_TYPES)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_cpp_knows_the_parts_of_every_family(architecture):
    _, model = decoder_of(architecture)
    for layer in model.layers:
        assert layer_parts(layer).tensors
    assert head_parts(model.norm, head_of(model), model.logit_cap).tensors


class MadeUp(Gemma):
    """Gemma 2's norms around attention and MLP, Qwen 3's norms of heads, Phi's joined matrices, SmolLM3's layers
    without positions, and a key, a default and weight names that no other family has."""

    hidden_size: PositiveInt = 48
    leap: int = 2
    LAYER_NAMES = Gemma.LAYER_NAMES | {"mlp_scale.scale": "norm_behind.weight", "sa_scale.scale": "norm_between.weight"}
    OUTER_NAMES = Gemma.OUTER_NAMES | {"layers": "text.blocks", "norm.scale": "text.norm.weight"}
    JOINED: ClassVar[dict[str, tuple[str, ...]]] = {"qkv": ("q_proj", "k_proj", "v_proj")}

    def mistakes(self, raw):
        yield from super().mistakes(raw)
        if self.leap > 2:
            yield f"leap: {self.leap} is not supported. Allowed: 1, 2"

    def positions(self, max_seq_len):
        return [table if i % self.leap else None for i, table in enumerate(super().positions(max_seq_len))]

    def norm_after(self):
        return self.norm()

    def attention(self, layer, **parts):
        q_norm, k_norm = (GemmaRMSNorm(self.heads[2], eps=self.rms_norm_eps) for _ in range(2))
        return NormFirstAttention(q_norm=q_norm, k_norm=k_norm, **parts)


@pytest.fixture
def made_up(monkeypatch):
    monkeypatch.setitem(reading.FAMILIES, "MadeUpForCausalLM", MadeUp)
    return "MadeUpForCausalLM"


def test_a_family_reads_its_own_keys_and_defaults(made_up):
    config, model = decoder_of(made_up)
    assert [layer.attn.pos_embeddings is None for layer in model.layers] == [True, False] * 3
    assert config.hidden_size == QWEN3["hidden_size"] and config.hidden_act == "gelu_pytorch_tanh"
    raw = {key: value for key, value in QWEN3.items() if key != "hidden_size"} | {"architectures": [made_up]}
    assert parse_hf_config(raw, "config.json").hidden_size == 48
    with pytest.raises(ConfigError, match=r"^config\.json\.leap: 3 .*Allowed: 1, 2"):
        decoder_of(made_up, leap=3)


def test_a_family_names_its_own_weights(made_up):
    config, model = decoder_of(made_up)
    state = model.state_dict()
    files = to_files(state, config)
    assert files["text.blocks.1.self_attn.qkv.weight"].shape == ((2 + 2) * 16, QWEN3["hidden_size"])
    assert {"text.norm.weight", "text.blocks.0.norm_behind.weight", "model.embed_tokens.weight"} <= files.keys()
    again = from_files(files, state, config)
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)


@compiles
def test_a_family_of_known_parts_decodes_in_cpp(made_up):
    """Drafts change no token, and the C++ gives torch's tokens."""
    _, model = decoder_of(made_up)
    plain = run(model, PROMPTS, 16, rows=2)
    for speculation in (None, Speculation(3, 3)):
        compiled = run(model, PROMPTS, 16, rows=2, speculation=speculation, compile=True)
        assert compiled.context.backend.unknown is None
        assert compiled.generated == plain.generated
