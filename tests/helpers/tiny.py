"""Tiny models of each family, and plain walks through their layers."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from helpers.hf_folders import MULTIPLIERS
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune.models.gemma._component_builders import gemma
from torchtune.models.gemma2._component_builders import Gemma2FinalNorm, gemma2
from torchtune.models.llama2._component_builders import llama2
from torchtune.models.llama3._component_builders import llama3
from torchtune.models.llama3_1._component_builders import llama3_1
from torchtune.models.llama3_2._component_builders import llama3_2
from torchtune.models.mistral._component_builders import mistral
from torchtune.models.phi3._component_builders import phi3
from torchtune.models.qwen2._component_builders import qwen2

from layerskip_recipes.families.hf_decoder import build_decoder
from layerskip_recipes.families.reading import parse_hf_config

VOCAB = 97
SIZE = {
    "vocab_size": VOCAB,
    "num_layers": 6,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "intermediate_dim": 64,
    "max_seq_len": 128,
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": VOCAB,
    "num_hidden_layers": SIZE["num_layers"],
    "num_attention_heads": SIZE["num_heads"],
    "num_key_value_heads": SIZE["num_kv_heads"],
    "head_dim": 16,
    "hidden_size": SIZE["embed_dim"],
    "intermediate_size": SIZE["intermediate_dim"],
}
GEMMA3 = (
    QWEN3
    | {"architectures": ["Gemma3ForCausalLM"], "num_key_value_heads": 1, "sliding_window": 8}
    | {"query_pre_attn_scalar": 20, "sliding_window_pattern": 3}
)
GRANITE = QWEN3 | MULTIPLIERS | {"architectures": ["GraniteForCausalLM"], "tie_word_embeddings": True}
OLMO3 = QWEN3 | {"architectures": ["Olmo3ForCausalLM"], "sliding_window": 8}
EXAONE4 = QWEN3 | {"architectures": ["Exaone4ForCausalLM"], "sliding_window": 8}
LFM2 = QWEN3 | {
    "architectures": ["Lfm2ForCausalLM"],
    "layer_types": ["conv", "conv", "full_attention", "conv", "conv", "full_attention"],
    "block_auto_adjust_ff_dim": False,
}

# code_llama2, 3.3, qwen2_5 and phi4 are the same builders with other numbers.
FAMILIES = {
    "llama2": lambda: llama2(**SIZE),
    "llama3": lambda: llama3(**SIZE),
    "llama3_1": lambda: llama3_1(**SIZE),
    "llama3_2": lambda: llama3_2(**SIZE),
    "mistral": lambda: mistral(**SIZE),
    "qwen2": lambda: qwen2(**SIZE),
    "qwen2_tied": lambda: qwen2(**SIZE, tie_word_embeddings=True),
    "gemma": lambda: gemma(**SIZE, head_dim=8),
    "gemma2": lambda: gemma2(**SIZE, head_dim=8, sliding_window_size=64),
    "phi3": lambda: phi3(**SIZE),
    **{
        name: lambda raw=raw, name=name: build_decoder(parse_hf_config(raw, name), SIZE["max_seq_len"])
        for name, raw in {"qwen3": QWEN3, "gemma3": GEMMA3, "granite": GRANITE, "lfm2": LFM2, "olmo3": OLMO3}.items()
    },
}


def slow_except(names: Iterable[str], *quick: str) -> list:
    """Parameters of a test, of which only `quick` are in the quick tier."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


# Those whose decoders differ for what runs them, by head, embedding, norms, windows, factors or layers. In the quick
# tier an ordinary one, one with windows, caps and norms after its parts, and one with layers without attention.
SAME = ("llama3", "llama3_1", "mistral", "qwen2_tied", "qwen3")
EVERY_FAMILY = slow_except((name for name in FAMILIES if name not in SAME), "llama3_2", "gemma2", "lfm2")


def widen(model: torch.nn.Module, std: float = 0.3) -> Any:
    """Draw all matrices anew: a fresh model's are near zero, and its greedy output hardly varies."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)
    return model


def make_tiny(family: str = "llama3_2"):
    """A small model of a family with wide weights."""
    torch.manual_seed(0)
    return widen(FAMILIES[family]()).eval()


def unembedded(model: Any, h: torch.Tensor) -> torch.Tensor:
    """Norm and head of a decoder, written without them being called as one; Gemma 2's cap of 30 is on the logits."""
    if not isinstance(model.norm, Gemma2FinalNorm):
        return model.output(model.norm(h)).float()
    return 30.0 * torch.tanh(model.output(model.norm.rms_norm(h)).float() / 30.0)


def walk(model: Any, tokens: torch.Tensor, layers: Any, factors: Any = None, **inputs: Any) -> torch.Tensor:
    """g(x) [b, s, v] after the given layers only, written without the decoder's forward; `factors` of what they add."""
    h = model.tok_embeddings(tokens)
    for layer in layers:
        x, h = h, model.layers[layer](h, **inputs)
        if factors is not None:
            h = x + factors[layer] * (h - x)
    return unembedded(model, h)


def exit_logits(model: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    """The logits [b, s, v] of each exit, from the first layer on."""
    h, logits = model.tok_embeddings(tokens), []
    for layer in model.layers:
        h = layer(h)
        logits.append(unembedded(model, h))
    return logits


def logits_of(base: Any, tokens: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """What a torchtune decoder gives, of Gemma 2 with the cap of 30 on the logits; torchtune has it on the state."""
    if not isinstance(base.norm, Gemma2FinalNorm):
        return base(tokens, **inputs)
    capping, base.norm.logit_capping = base.norm.logit_capping, torch.nn.Identity()
    logits, base.norm.logit_capping = base(tokens, **inputs), capping
    return 30.0 * torch.tanh(logits / 30.0)


class CountedCollectives(TorchDispatchMode):
    """Counts this rank's collectives in a `with` block: `counts` by kind, {"all_gather": 8}. Slow: not for timed runs.

    torch's own CommDebugMode fails on a decoder whose parts are called one by one.
    """

    KINDS = ("all_gather", "all_reduce", "reduce_scatter", "broadcast")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor makes plain operations of it, and those come here
        if getattr(func, "namespace", None) in ("c10d", "_c10d_functional"):
            # A kind has many names: _allgather_base_, all_gather_into_tensor, ...
            name = func.__name__.replace("allgather", "all_gather").replace("allreduce", "all_reduce")
            self.counts.update(kind for kind in self.KINDS if kind in name)
        return func(*args, **(kwargs or {}))
