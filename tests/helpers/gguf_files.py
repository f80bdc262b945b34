"""GGUF files of Llama models with a byte-level BPE tokenizer, as the converter of llama.cpp makes them."""

import json
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from safetensors.torch import load_file

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(folder: Path, file: Path, precision: str = "F32") -> Path:
    """Write the model of a Hugging Face folder (LlamaForCausalLM without rope scaling), its matrices in F32 or BF16."""
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(str(file), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(rope.get("rope_theta") or config["rope_theta"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()), config["vocab_size"])
    kind = GGMLQuantizationType[precision]
    weights = {name: t for part in sorted(folder.glob("model*.safetensors")) for name, t in load_file(part).items()}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if module.startswith("model.layers."):
            layer, _, inner = module.removeprefix("model.layers.").partition(".")
            target = f"blk.{layer}.{NAMES[inner]}.weight"
        else:
            target = f"{NAMES[module]}.weight"
        if "q_proj" in name or "k_proj" in name:
            weight = _interleaved(weight, heads if "q_proj" in name else kv_heads)
        array = weight.float().contiguous().numpy()
        if weight.dim() == 1:
            writer.add_tensor(target, array.astype(np.float32))
        else:
            writer.add_tensor(target, quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbours, Hugging Face the halves of a head: [h * d, d_model], rows in llama.cpp's order."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _add_tokenizer(writer: GGUFWriter, tokenizer: dict, size: int) -> None:
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"] if token["special"]}
    tokens = {i: f"[PAD{i}]" for i in range(size)} | {i: t for t, i in tokenizer["model"]["vocab"].items()} | special
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([tokens[i] for i in range(size)])
    writer.add_token_types([TokenType.CONTROL if i in special else TokenType.NORMAL for i in range(size)])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    if special:
        writer.add_eos_token_id(min(special))
