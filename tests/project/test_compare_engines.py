"""tools/compare_engines.py: other engines decode the same tokens, and the table follows from the turns."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.hf_folders import model_with_tokenizer
from helpers.tools import load
from safetensors.torch import load_file

from layerskip_recipes.checkpoint.export import export
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.stats import GenerationStats

script = load("compare_engines")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_folder) -> Path:
    """A random Llama of 8 layers, exported with an exit; the folder `draft` beside it has its first layers."""
    base = model_with_tokenizer("llama", tmp_path_factory.mktemp("llama") / "base", tokenizer_folder)
    export(str(base), str(base.with_name("draft")), draft=2)
    return export(str(base), str(base.with_name("whole")), exit_layer=2)


def compare(folder: Path, capsys, *engines: str, settings: tuple[str, ...] = ()) -> dict[str, dict]:
    """The rows of the table by engine."""
    config = [f"model_dir={folder}", "device=cpu", "dtype=fp32", "compile=false", "max_new_tokens=8", "repeats=1"]
    config += ["prompt=[def main(,import os]", "variants={chain: {exit_layer: 2, num_speculations: 3}}", *settings]
    script.main(["hf/benchmark", *config, *(word for engine in engines for word in ("--engine", engine))])
    page = capsys.readouterr().out
    table = json.loads(page.splitlines()[-1])
    assert all(f"| {row['engine']} |" in page for row in table)
    return {row["engine"]: row for row in table}


OURS = ["ours: baseline", "ours: chain"]


@pytest.mark.slow
def test_torchtune_and_transformers_decode_the_same_tokens(folder, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    engines = [
        "torchtune",
        "transformers",
        "transformers exit_layer=2 drafts=3",
        f"transformers draft={folder.parent / 'draft'} drafts=4 confidence=0.4",
        f"transformers path={folder} custom_generate=true",
    ]
    rows = compare(folder, capsys, *engines, "ours seed=1")
    assert [*rows] == [*OURS, *engines, "ours seed=1: baseline", "ours seed=1: chain"]
    for row in rows.values():
        assert (row["same"], row["outputs"]) == (2, 2), row
        assert row["tokens_per_second"]["median"] > 0 and row["tokens_per_processor_second"] > 0
        assert row["answer_tokens_per_second"]["median"] > 0 and row["first_token_s"] > 0
    assert rows["ours: baseline"]["speedup"]["median"] == 1 and rows["ours: chain"]["accepted"] is not None


@pytest.mark.slow
def test_engines_decode_batches_and_sample(folder, capsys):
    """Their noise is not ours, so sampled outputs are not compared."""
    rows = compare(folder, capsys, "torchtune", "transformers", settings=("batch_size=2", "temperatures=[0.0]"))
    assert {name: row["same"] for name, row in rows.items()} == dict.fromkeys([*OURS, "torchtune", "transformers"], 2)
    sampled = compare(folder, capsys, "torchtune", "transformers", settings=("temperatures=[0.8]", "top_k=5"))
    assert {row["same"] for row in sampled.values()} == {None}


@pytest.mark.slow
def test_an_engine_that_cannot_do_what_the_config_asks_for_ends_the_comparison(folder, capsys):
    with pytest.raises(ValueError, match="torchtune has no top_p"):
        compare(folder, capsys, "torchtune", settings=("temperatures=[0.8]", "top_p=0.9"))
    with pytest.raises(ValueError, match=r"--engine: 'vllm' .*ours, torchtune, transformers, llama\.cpp"):
        compare(folder, capsys, "vllm model")


def turns_of(outputs: list, seconds: float) -> list:
    """Of two repeats of one prompt."""
    stats = [GenerationStats(tokens=11, first_tokens=1, prefill_s=0.1, decode_s=n * seconds) for n in (1, 2)]
    return [script.Turn(n, [output], stats[n], seconds) for n, output in enumerate(outputs)]


def test_the_figures_follow_from_the_turns():
    """Speed-ups compare with the first engine, turn by turn. An answer without tokens is compared as a text."""
    text_of = dict(zip([(1, 2), (3, 4)], ["ab", "cd"], strict=True)).get
    turns = {"plain": turns_of([[1, 2], [3, 4]], 2.0), "ik_llama.cpp x": turns_of(["ab", "xy"], 1.0)}
    plain, other = script.rows(turns, 0.0, lambda tokens: text_of(tuple(tokens)))
    assert (plain["same"], other["same"], other["outputs"]) == (2, 1, 2)
    assert plain["tokens_per_second"] == {"median": 3.75, "min": 2.5, "max": 5.0}
    assert other["speedup"] == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert other["answer_speedup"]["max"] == pytest.approx(4.1 / 2.1)
    assert plain["tokens_per_processor_second"] == 22 / 4 and other["tokens_per_processor_second"] is None
    assert next(script.rows(turns, 0.8, str))["same"] is None


def test_engines_take_turns_after_a_warm_up():
    """The shortest and the longest prompts first; then all engines decode a batch before the next one."""
    calls = []

    def engine(name):
        def decode(batch, temperature, seed):
            calls.append((name, len(batch[0]), seed))
            return [[7]], GenerationStats(tokens=1)

        return decode

    turns = script.take_turns({"a": engine("a"), "b": engine("b")}, [[[1, 2]], [[1]]], 0.0, repeats=2, seed=5)
    lengths = [1, 2, 2, 1, 2, 1]
    assert calls == [(name, length, 5 + n) for n, length in enumerate(lengths) for name in "ab"]
    assert [[turn.repeat for turn in turns[name]] for name in "ab"] == [[0, 0, 1, 1]] * 2


# ---- servers ----

SERVER = """
import http.server, json, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, content):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())
    def do_GET(self):
        self.answer({"status": "ok"})
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        times = {"predicted_n": request["n_predict"], "prompt_ms": 10, "predicted_ms": 100, "draft_n": 4}
        self.answer({"content": "no such text", "timings": times | {"draft_n_accepted": 3}})
    def log_message(self, *args):
        pass

http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.mark.slow
def test_a_server_of_the_users_is_started_and_ended(folder, tmp_path, capsys):
    """As that of ik_llama.cpp, which returns no tokens."""
    (tmp_path / "server.py").write_text(SERVER)
    engine = f"ik_llama.cpp {sys.executable} {tmp_path / 'server.py'} -m model.gguf"
    row = compare(folder, capsys, engine)[engine]
    assert (row["same"], row["outputs"], row["accepted"], row["first_token_s"]) == (0, 2, 0.75, 0.01)
    assert row["tokens_per_second"]["median"] == 70
    process = script.RUNNING.pop()
    assert process.wait(timeout=60) is not None
    (tmp_path / "broken.py").write_text("raise SystemExit('no such model')")
    with pytest.raises(RuntimeError, match="no such model"):
        compare(folder, capsys, f"llama.cpp {sys.executable} {tmp_path / 'broken.py'}")


# ---- llama.cpp ----

GGUF_NAMES = {
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


def write_gguf(folder: Path, file: Path, precision: str = "F32") -> None:
    """Write the model of a Hugging Face folder (LlamaForCausalLM without rope scaling) as llama.cpp's
    converter does, its matrices in F32 or BF16."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

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
    add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()), config["vocab_size"])
    kind = GGMLQuantizationType[precision]
    weights = {name: t for part in sorted(folder.glob("model*.safetensors")) for name, t in load_file(part).items()}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if module.startswith("model.layers."):
            layer, _, inner = module.removeprefix("model.layers.").partition(".")
            target = f"blk.{layer}.{GGUF_NAMES[inner]}.weight"
        else:
            target = f"{GGUF_NAMES[module]}.weight"
        if "q_proj" in name or "k_proj" in name:
            weight = interleaved(weight, heads if "q_proj" in name else kv_heads)
        array = weight.float().contiguous().numpy()
        if weight.dim() == 1:
            writer.add_tensor(target, array.astype(np.float32))
        else:
            writer.add_tensor(target, quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbours, Hugging Face the halves of a head: [h * d, d_model], rows in llama.cpp's order."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def add_tokenizer(writer, tokenizer: dict, size: int) -> None:
    from gguf import TokenType

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


@pytest.fixture(scope="module")
def gguf(folder) -> Path:
    """The model's GGUF file in fp32; `draft.gguf` beside it has the first layers in bf16."""
    pytest.importorskip("xllamacpp"), pytest.importorskip("gguf")
    write_gguf(folder.parent / "draft", folder.with_name("draft.gguf"), "BF16")
    write_gguf(folder, folder.with_name("model.gguf"))
    return folder.with_name("model.gguf")


@pytest.mark.slow
def test_llama_cpp_decodes_the_same_tokens(folder, gguf, capsys):
    engines = [f"llama.cpp -m {gguf}"]
    engines.append(f"{engines[0]} -md {gguf.with_name('draft.gguf')} --spec-draft-n-max 4")
    rows = compare(folder, capsys, *engines)
    assert {name: row["same"] for name, row in rows.items()} == dict.fromkeys([*OURS, *engines], 2)
    assert rows[engines[0]]["accepted"] is None and rows[engines[1]]["accepted"] >= 0


@pytest.mark.slow
def test_llama_cpp_samples_with_our_settings(gguf):
    """Top 1 of any temperature is greedy, as is min_p 1; a penalty of the whole text never says a token twice."""
    settings = {}
    recipe = SimpleNamespace(prompts=[[5, 6, 7]], limit=12, llm=SimpleNamespace(stop_tokens=[]))
    recipe.cfg = SimpleNamespace(sampler=lambda temperature, seed: Sampler(temperature, **settings, seed=seed))
    decode = script.llama_server(script.Job(recipe), "-m", str(gguf))

    def tokens(temperature: float = 0.0, **changes) -> list[int]:
        settings.clear()
        settings.update(changes)
        return decode([[5, 6, 7]], temperature, 0)[0][0]

    greedy = tokens()
    assert len(greedy) == 12
    assert tokens(5.0, top_k=1) == tokens(5.0, min_p=1.0) == greedy
    assert tokens(5.0, top_p=1e-6) == greedy != tokens(5.0)
    assert len({5, 6, 7, *tokens(repetition_penalty=1e6)}) == 15
    script.RUNNING.pop().terminate()
