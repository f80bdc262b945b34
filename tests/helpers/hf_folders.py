"""Shared by tests of Hugging Face folders: random tiny models of transformers, no weight at its first value."""

import shutil
from pathlib import Path
from typing import Any

import torch

VOCAB = 97
SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [2.0] * 6,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "beta_fast": 8.0,
    "original_max_position_embeddings": 64,
}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.25,
    "residual_multiplier": 0.3,
    "logits_scaling": 2.5,
}
DENSE_GRANITE4 = MULTIPLIERS | {
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "shared_intermediate_size": 64,
    "layer_types": ["full_attention"] * 4,
    "mamba_n_heads": 2,
}
# A name for each kind of model: the config class of transformers, and the values that differ from SIZE.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 6}),
    "llama_tied_biased": (
        "Llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    ),
    "llama3_rope": ("Llama", {"rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 1}),
    "llama_linear_rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, "hidden_act": "gelu"},
    ),
    "mistral": ("Mistral", {"sliding_window": None, "hidden_size": 40, "num_attention_heads": 3,
                            "num_key_value_heads": 1, "head_dim": 14}),
    "mistral_window": ("Mistral", {"sliding_window": 64}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3_tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True,
                             "num_key_value_heads": 6}),
    "smollm3": ("SmolLM3", {}),
    "phi3": ("Phi3", {}),
    "phi4_mini": ("Phi3", {"tie_word_embeddings": True, "hidden_size": 96, "rope_parameters": LONGROPE,
                           "original_max_position_embeddings": 64}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 20}),
    "gemma3": ("Gemma3Text", {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 20,
                              "sliding_window_pattern": 3, "num_key_value_heads": 1}),
    "granite": ("Granite", MULTIPLIERS | {"tie_word_embeddings": True}),
    "granite4": ("GraniteMoeHybrid", DENSE_GRANITE4 | {"position_embedding_type": "rope"}),
    "granite4_without_positions": ("GraniteMoeHybrid", DENSE_GRANITE4),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention", "conv", "conv"], "block_multiple_of": 32}),
    "olmo2": ("Olmo2", {"rope_parameters": YARN | {"attention_factor": 1.5, "truncate": False}}),
    "olmo3": ("Olmo3", {"sliding_window": 16, "attention_bias": True,
                        "rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_theta": 1e4}}}),
    "exaone4": ("Exaone4", {"sliding_window": 16, "head_dim": 16}),
    "exaone4_without_windows": ("Exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4,
                                            "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
}  # fmt: skip


def make_hf_folder(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Write a random model of `MODELS` to a folder.

    Returns:
        The model of transformers.
    """
    import transformers  # slow

    name, values = MODELS[kind]
    config = getattr(transformers, f"{name}Config")(**SIZE | values | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model.eval()


def model_with_tokenizer(kind: str, folder: Path, tokenizer: Path) -> Path:
    """A random model of 8 layers that embeds the 300 tokens of a tokenizer, which lies beside it."""
    make_hf_folder(kind, folder, vocab_size=300, num_hidden_layers=8)
    for file in tokenizer.glob("tokenizer*.json"):
        shutil.copy(file, folder)
    return folder
