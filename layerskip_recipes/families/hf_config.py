"""HFConfig: the values of a Hugging Face config.json that define a decoder, its layers and its weight names.

The class itself has what most families share. Each family is a subclass in a file of its own, such as qwen3.py.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict
from torch import nn
from torchtune.modules import FeedForward, MultiHeadAttention, RMSNorm, TransformerSelfAttentionLayer

from layerskip_recipes.config.schema import Fraction, PositiveInt, Section
from layerskip_recipes.families.rope import Positive, Rope, RotaryPositions

# Builds a matrix by torchtune's name in the layer, its numbers of inputs and outputs, and whether it has a bias.
Linear = Callable[[str, int, int, bool], nn.Module]
MLP_MATRICES = ("w1", "w2", "w3")
Activation = Literal["silu", "gelu", "gelu_pytorch_tanh"]
ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh"),
}


class HFConfig(Section):
    """The values of a config.json that define a decoder, by their names there; other keys are ignored.

    A family is a subclass. It declares the keys that only this family has, and the defaults of keys, because
    transformers leaves out some values that equal an architecture's defaults. It overrides the methods for the parts
    that differ.
    """

    model_config = ConfigDict(extra="ignore")

    architecture: str
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    hidden_act: Activation = "silu"
    max_position_embeddings: PositiveInt = 32768
    rms_norm_eps: Positive = 1e-6
    tie_word_embeddings: bool = False
    attention_dropout: Fraction = 0.0
    sliding_window: PositiveInt | None = None
    layer_types: list[str] | None = None
    rope: Rope
    sliding_rope: Rope | None = None
    """The positions in layers with a window; None: those of other layers."""

    @property
    def heads(self) -> tuple[int, int, int]:
        """The number of query heads, the number of key heads, and the head dimension."""
        return (
            self.num_attention_heads,
            self.num_key_value_heads or self.num_attention_heads,
            self.head_dim or self.hidden_size // self.num_attention_heads,
        )

    # ---- reading a config.json ----

    UNSUPPORTED: ClassVar[tuple[str, ...]] = (
        *("quantization_config", "use_bidirectional_attention", "resid_pdrop", "embd_pdrop"),
    )
    """Keys that may only have the values null, false and 0."""
    IN_TRANSFORMERS_LOOP: ClassVar[bool] = True
    """Whether the decoding loop for transformers, custom_generate, runs the family."""
    ROTATES_IN_PART: ClassVar[bool] = False
    """Whether the family honours a partial_rotary_factor below 1."""

    @classmethod
    def values(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The values of this class's fields in a config.json, whose keys may have changed with time."""
        sliding = (raw.get("rope_parameters") or {}).get("sliding_attention")
        return {**raw, "rope": cls.rope_values(raw), "sliding_rope": sliding}

    @classmethod
    def rope_values(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The rotary position settings: one section since transformers 5, several keys before.

        If layers with a window have others, these are the settings of the layers without.
        """
        outer = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
        rope = {key: raw[key] for key in outer if raw.get(key) is not None}
        rope |= raw.get("rope_scaling") or {}
        parameters = raw.get("rope_parameters") or {}
        rope |= parameters.get("full_attention", parameters) or {}
        rope.setdefault("rope_type", rope.get("type", "default"))
        return rope

    def mistakes(self, raw: Mapping[str, Any]) -> Iterator[str]:
        """Yield what would change the model's output and is not supported, and values that do not fit each other."""
        wrong = {key: raw.get(key) for key in self.UNSUPPORTED}
        if not self.ROTATES_IN_PART and self.rope.partial_rotary_factor < 1:
            wrong["partial_rotary_factor"] = self.rope.partial_rotary_factor
        for key, value in wrong.items():
            if value:
                yield f"{key}: {value!r} is not supported. Allowed: a model without it"
        for key in self.rope.missing():
            yield f"rope_parameters.{key}: missing; rope_type {self.rope.rope_type} needs it"
        heads, key_heads, head_dim = self.heads
        if heads % key_heads:
            yield f"num_key_value_heads: {key_heads} does not divide num_attention_heads, {heads}"
        yield from self.not_one_per_layer("layer_types")
        factors = self.rope.short_factor
        if factors is not None and len(factors) != self.rope.width(head_dim) // 2:
            yield f"rope_parameters.short_factor: {len(factors)} values do not fit the heads"

    def not_one_per_layer(self, key: str) -> Iterator[str]:
        """Yield a mistake if the list in `key` has not one value for each layer."""
        values = getattr(self, key)
        if values is not None and len(values) != self.num_hidden_layers:
            yield f"{key}: {len(values)} values for num_hidden_layers {self.num_hidden_layers}"

    # ---- lengths ----

    BUILDS_WINDOWS: ClassVar[bool] = False
    """Whether the family's attention has the window. Without it, texts end at the window."""

    def window(self, layer: int) -> int | None:
        """The attention window of a layer in tokens, the current one included; None for full causal attention."""
        slides = self.slides(layer) if self.layer_types is None else self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if slides else None

    def slides(self, layer: int) -> bool:
        """Whether a layer has the window if the config.json has no layer_types."""
        return True

    @property
    def longest(self) -> tuple[int, str]:
        """The longest text, in tokens, with the same output as in transformers, and the key that limits it."""
        limits = [(self.max_position_embeddings, "max_position_embeddings")]
        if not self.BUILDS_WINDOWS:
            windows = (self.window(layer) for layer in range(self.num_hidden_layers))
            limits += [(window, "sliding_window") for window in windows if window]
        if self.rope.rope_type == "longrope":  # changes its frequencies beyond the original context
            limits.append((self.rope.original_max_position_embeddings, "original_max_position_embeddings"))
        return min(limits)

    # ---- building the decoder ----

    def embedding(self) -> nn.Embedding:
        return nn.Embedding(self.vocab_size, self.hidden_size)

    def norm(self) -> nn.Module:
        """A norm of hidden states."""
        return RMSNorm(self.hidden_size, eps=self.rms_norm_eps)

    def norm_before(self) -> nn.Module | None:
        """The norm of what attention and MLP read."""
        return self.norm()

    def norm_after(self) -> nn.Module | None:
        """A norm of what attention and MLP add to the hidden state."""
        return None

    def final_norm(self) -> nn.Module:
        return self.norm()

    def positions(self, max_seq_len: int) -> list[nn.Module | None]:
        """The rotation of queries and keys in each layer, which layers should share; None for a layer without."""

        def rotation(rope: Rope) -> nn.Module:
            return RotaryPositions(rope.width(self.heads[2]), max_seq_len, rope, self.max_position_embeddings)

        full = rotation(self.rope)
        sliding = full if self.sliding_rope is None else rotation(self.sliding_rope)
        return [sliding if self.window(layer) else full for layer in range(self.num_hidden_layers)]

    def has_bias(self, name: str) -> bool:
        """Whether a matrix has a bias; `name` is torchtune's: q_proj, k_proj, v_proj, output_proj, w1 .. w3."""
        return False

    def layer(self, index: int, positions: nn.Module | None, max_seq_len: int, linear: Linear) -> nn.Module:
        """Layer number `index`. The order of matrix rows is that of Hugging Face's files."""
        heads, key_heads, head_dim = self.heads
        width, inner = self.hidden_size, self.intermediate_size

        def matrix(name: str, inputs: int, outputs: int) -> nn.Module:
            return linear(name, inputs, outputs, self.has_bias(name))

        return TransformerSelfAttentionLayer(
            attn=self.attention(
                index,
                embed_dim=heads * head_dim,  # torchtune requires a multiple of heads, which the width need not be
                num_heads=heads,
                num_kv_heads=key_heads,
                head_dim=head_dim,
                q_proj=matrix("q_proj", width, heads * head_dim),
                k_proj=matrix("k_proj", width, key_heads * head_dim),
                v_proj=matrix("v_proj", width, key_heads * head_dim),
                output_proj=matrix("output_proj", heads * head_dim, width),
                pos_embeddings=positions,
                max_seq_len=max_seq_len,
                attn_dropout=self.attention_dropout,
            ),
            mlp=FeedForward(
                gate_proj=matrix("w1", width, inner),
                down_proj=matrix("w2", inner, width),
                up_proj=matrix("w3", width, inner),
                activation=ACTIVATIONS[self.hidden_act](),
            ),
            sa_norm=self.norm_before(),
            mlp_norm=self.norm_before(),
            sa_scale=self.norm_after(),
            mlp_scale=self.norm_after(),
        )

    def attention(self, layer: int, **parts: Any) -> nn.Module:
        """The attention of a layer, from arguments of torchtune's `MultiHeadAttention`."""
        return MultiHeadAttention(**parts)

    # ---- weight names ----

    LAYER_NAMES: ClassVar[dict[str, str]] = {
        "attn.output_proj": "self_attn.o_proj",
        "attn.q_norm.scale": "self_attn.q_norm.weight",
        "attn.k_norm.scale": "self_attn.k_norm.weight",
        "attn": "self_attn",
        "mlp.w1": "mlp.gate_proj",
        "mlp.w2": "mlp.down_proj",
        "mlp.w3": "mlp.up_proj",
        "sa_norm.scale": "input_layernorm.weight",
        "mlp_norm.scale": "post_attention_layernorm.weight",
    }
    """Name prefixes within a layer: torchtune's and Hugging Face's. The first prefix that matches counts."""
    OUTER_NAMES: ClassVar[dict[str, str]] = {
        "layers": "model.layers",
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "norm.scale": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    """Names outside of layers, and the prefix of layers."""
    JOINED: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Matrices in the files that concatenate others along dim 0, all by Hugging Face's names."""
