"""Reads the config.json of a Hugging Face folder, with the defaults of each architecture.

It refuses values that would change the model's output and that `hf_decoder` does not support.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field

from layerskip_recipes.config.paths import read_json
from layerskip_recipes.config.schema import Fraction, PositiveInt, Section, nearest
from layerskip_recipes.errors import ConfigError

Positive = Annotated[float, Field(gt=0)]

# Values of missing keys: transformers omits some values that equal the architecture's defaults.
GEMMA = {
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"max_position_embeddings": 2048},
    "MistralForCausalLM": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "Qwen2ForCausalLM": {"num_key_value_heads": 32, "sliding_window": 4096},
    "Qwen3ForCausalLM": {"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
    "SmolLM3ForCausalLM": {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 2e6},
    "Phi3ForCausalLM": {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    "GemmaForCausalLM": {**GEMMA, "num_key_value_heads": 16},
    "Gemma2ForCausalLM": {
        **GEMMA,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
}
HAVE_ATTENTION_BIAS = DEFAULTS.keys() - {"MistralForCausalLM", "Qwen2ForCausalLM", "Phi3ForCausalLM"}
HAVE_MLP_BIAS = ("LlamaForCausalLM", "SmolLM3ForCausalLM")
ASK_FOR_WINDOWS = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM")  # need use_sliding_window: true


class Rope(Section):
    """The rotary position settings of a config.json."""

    model_config = ConfigDict(extra="ignore")

    rope_type: Literal["default", "linear", "llama3", "longrope"] = "default"
    rope_theta: Positive = 10_000.0
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    factor: Positive = 1.0
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    original_max_position_embeddings: PositiveInt = 8192
    short_factor: list[float] | None = None
    attention_factor: Positive | None = None

    def frequencies(self, dim: int) -> torch.Tensor:
        """The rotation angle of each channel pair per position, [dim / 2] in fp32."""
        plain = 1.0 / self.rope_theta ** (torch.arange(0, dim, 2).float() / dim)
        if self.rope_type == "linear":
            return plain / self.factor
        if self.rope_type == "longrope":
            return plain / torch.tensor(self.short_factor, dtype=plain.dtype, device=plain.device)
        if self.rope_type == "llama3":
            # Keep short wavelengths, stretch long ones by `factor`, and interpolate in between. `waves` is the number
            # of wavelengths that fit into the original context.
            waves = self.original_max_position_embeddings * plain / (2 * math.pi)
            kept = ((waves - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
            return kept * plain + (1 - kept) * plain / self.factor
        return plain

    def scale(self, max_positions: int) -> float:
        """The factor of the rotated queries and keys; above 1 only for longrope."""
        if self.rope_type != "longrope":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        original = self.original_max_position_embeddings
        stretch = self.factor if "factor" in self.model_fields_set else max_positions / original
        return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0


class HFConfig(Section):
    """The values of a config.json that define a decoder, by their names there."""

    model_config = ConfigDict(extra="ignore")

    architecture: str
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    hidden_act: Literal["silu", "gelu", "gelu_pytorch_tanh"] = "silu"
    max_position_embeddings: PositiveInt = 32768
    rms_norm_eps: Positive = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: Fraction = 0.0
    sliding_window: PositiveInt | None = None
    use_sliding_window: bool = False
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: PositiveInt = 4
    query_pre_attn_scalar: Positive | None = None
    final_logit_softcapping: Positive | None = None
    attn_logit_softcapping: Positive | None = None
    rope: Rope

    @property
    def heads(self) -> tuple[int, int, int]:
        """The number of query heads, the number of key heads, and the head dimension."""
        return (
            self.num_attention_heads,
            self.num_key_value_heads or self.num_attention_heads,
            self.head_dim or self.hidden_size // self.num_attention_heads,
        )

    @property
    def is_gemma(self) -> bool:
        """Whether embeddings are scaled, and norms multiply by 1 + weight."""
        return self.architecture.startswith("Gemma")

    def has_bias(self, name: str) -> bool:
        """Whether a linear layer has a bias; `name` is torchtune's: q_proj, k_proj, v_proj, output_proj, w1 .. w3."""
        if name in ("w1", "w2", "w3"):
            return self.mlp_bias and self.architecture in HAVE_MLP_BIAS
        if self.architecture == "Qwen2ForCausalLM":
            return name != "output_proj"
        return self.attention_bias and self.architecture in HAVE_ATTENTION_BIAS

    def has_positions(self, layer: int) -> bool:
        """Whether a layer rotates queries and keys by their positions."""
        if self.architecture != "SmolLM3ForCausalLM":
            return True
        if self.no_rope_layers is not None:
            return bool(self.no_rope_layers[layer])
        return (layer + 1) % self.no_rope_layer_interval != 0

    def window(self, layer: int) -> int | None:
        """The attention window of a layer in tokens, the current one included; None for full causal attention."""
        if self.architecture in ASK_FOR_WINDOWS and not self.use_sliding_window:
            return None
        if self.layer_types is not None:
            slides = self.layer_types[layer] == "sliding_attention"
        elif self.architecture == "Gemma2ForCausalLM":
            slides = layer % 2 == 0
        elif self.architecture == "SmolLM3ForCausalLM":
            slides = not self.has_positions(layer)
        elif self.architecture in ASK_FOR_WINDOWS:
            slides = layer >= self.max_window_layers
        else:
            slides = True
        return self.sliding_window if slides else None

    @property
    def longest(self) -> tuple[int, str]:
        """The longest text, in tokens, with the same output as in transformers, and the key that limits it.

        Our attention has no window, which matters only for texts longer than the window. longrope changes its
        frequencies beyond the original context.
        """
        limits = [(self.max_position_embeddings, "max_position_embeddings")]
        if self.architecture != "Gemma2ForCausalLM":  # its attention in torchtune has the window
            windows = (self.window(layer) for layer in range(self.num_hidden_layers))
            limits += [(window, "sliding_window") for window in windows if window]
        if self.rope.rope_type == "longrope":
            limits.append((self.rope.original_max_position_embeddings, "original_max_position_embeddings"))
        return min(limits)


def read_hf_config(folder: Path, key: str = "path") -> HFConfig:
    """The config of a Hugging Face folder; `key` is the folder's config key in messages."""
    return parse_hf_config(read_json(folder / "config.json", key), str(folder / "config.json"))


def parse_hf_config(raw: Mapping[str, Any], name: str) -> HFConfig:
    """The config from the content of a config.json; `name` is the file's in messages."""
    architecture = next(iter(raw.get("architectures") or ["missing"]))
    if architecture not in DEFAULTS:
        supported = nearest(architecture, DEFAULTS)
        raise ConfigError(f"{name}: the architecture {architecture} is not supported. {supported}")
    content: dict[str, Any] = {**DEFAULTS[architecture], **raw, "architecture": architecture}
    if architecture == "Gemma2ForCausalLM":  # in transformers, Gemma 1 and 2 read different keys
        content["hidden_act"] = raw.get("hidden_activation") or GEMMA["hidden_act"]
    if architecture == "GemmaForCausalLM" and content["hidden_act"] == "gelu":
        content["hidden_act"] = "gelu_pytorch_tanh"  # as transformers does for the first releases
    content["rope"] = _rope(content)
    config = HFConfig.parse(content, name)
    if mistakes := [f"{name}.{mistake}" for mistake in _mistakes(raw, config)]:
        raise ConfigError(*mistakes)
    return config


def _rope(content: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary position settings: one section since transformers 5, several keys before."""
    own = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    rope = {key: content[key] for key in own if content.get(key) is not None}
    rope |= content.get("rope_scaling") or {}
    rope |= content.get("rope_parameters") or {}
    rope.setdefault("rope_type", rope.get("type", "default"))
    if content["architecture"] == "Phi3ForCausalLM" and rope["rope_type"] in ("su", "yarn"):
        rope["rope_type"] = "longrope"  # older names
    return rope


def _mistakes(raw: Mapping[str, Any], config: HFConfig) -> Iterator[str]:
    # Unsupported features.
    rope = config.rope
    unsupported = ("quantization_config", "use_bidirectional_attention", "resid_pdrop", "embd_pdrop")
    wrong: dict[str, Any] = {key: raw.get(key) for key in unsupported}
    if config.architecture != "Phi3ForCausalLM" and rope.partial_rotary_factor < 1:
        wrong["partial_rotary_factor"] = rope.partial_rotary_factor
    yield from (
        f"{key}: {value!r} is not supported. Allowed: a model without it" for key, value in wrong.items() if value
    )
    # Values that a rope_type needs.
    needed = {
        "linear": ("factor",),
        "llama3": ("factor", "original_max_position_embeddings"),
        "longrope": ("short_factor", "original_max_position_embeddings"),
    }
    for key in needed.get(rope.rope_type, ()):
        if key not in rope.model_fields_set:
            yield f"rope_parameters.{key}: missing; rope_type {rope.rope_type} needs it"
    # Numbers that must fit each other.
    heads, key_heads, _ = config.heads
    if heads % key_heads:
        yield f"num_key_value_heads: {key_heads} does not divide num_attention_heads, {heads}"
    for key in ("layer_types", "no_rope_layers"):
        values = getattr(config, key)
        if values is not None and len(values) != config.num_hidden_layers:
            yield f"{key}: {len(values)} values for num_hidden_layers {config.num_hidden_layers}"
    if rope.short_factor is not None and len(rope.short_factor) != rotary_width(config) // 2:
        yield f"rope_parameters.short_factor: {len(rope.short_factor)} values do not fit the heads"


def rotary_width(config: HFConfig) -> int:
    """The number of rotated channels per head."""
    return int(config.heads[2] * config.rope.partial_rotary_factor)
