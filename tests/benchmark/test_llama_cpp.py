"""llama.cpp as a peer of the benchmark: the same greedy tokens from GGUF files of an exported model and draft."""

import json
from pathlib import Path

import pytest
from helpers.hf_folders import model_with_tokenizer
from helpers.recipes import run_benchmark

from layerskip_recipes.benchmark.llama_cpp import LlamaCppServer
from layerskip_recipes.checkpoint.export import export
from layerskip_recipes.generation.sampling import Sampler

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")

from helpers.gguf_files import write_gguf


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_folder) -> Path:
    """A random Llama of 8 layers as `layerskip export` writes it, its GGUF file in fp32, and its first layers in bf16,
    which draft."""
    base = model_with_tokenizer("llama", tmp_path_factory.mktemp("llama") / "base", tokenizer_folder)
    whole, draft = base.with_name("whole"), base.with_name("draft")
    write_gguf(export(str(base), str(whole), exit_layer=2), base.with_name("model.gguf"))
    write_gguf(export(str(base), str(draft), draft=2), base.with_name("draft.gguf"), "BF16")
    return whole


def run(folder: Path, tmp_path: Path, *overrides: str) -> dict:
    peers = f"peers={{llama_cpp: {{gguf: {folder.parent}/model.gguf, draft: {folder.parent}/draft.gguf}}}}"
    settings = [f"model_dir={folder}", f"report_dir={tmp_path}", "device=cpu", "dtype=fp32", "compile=false", peers]
    settings += ["prompt=[def main(,import os]", "max_new_tokens=8", "repeats=1", "temperatures=[0.0]"]
    settings += ["variants={chain: {exit_layer: 2, num_speculations: 3}}", *overrides]
    return run_benchmark("hf/benchmark", *settings)[1]


def test_it_decodes_the_same_tokens(folder, tmp_path):
    report = run(folder, tmp_path)
    rows = {row["name"]: row for row in report["results"]}
    assert report["peers_left_out"] == {}, report["peers_left_out"]
    assert rows["llama_cpp"]["identical"] and rows["llama_cpp"]["kind"] == "peer"
    assert set(rows["llama_cpp"]["trial_tokens_per_second"]) == {"plain", "2 drafts", "4 drafts", "6 drafts"}
    assert all(isinstance(rate, float) for rate in rows["llama_cpp"]["trial_tokens_per_second"].values())
    assert report["versions"]["xllamacpp"]
    assert json.loads((tmp_path / "benchmark.json").read_text())["config"]["peers"]["llama_cpp"]["gguf"]


def test_without_a_draft_and_with_several_prompts_at_a_time(folder, tmp_path):
    report = run(folder, tmp_path / "plain", "peers.llama_cpp.draft=null", "variants=null")
    assert [row["name"] for row in report["results"]] == ["baseline", "llama_cpp"]
    trial = next(row for row in report["results"] if row["name"] == "llama_cpp")["trial_tokens_per_second"]
    assert list(trial) == ["plain"] and trial["plain"] > 0
    report = run(folder, tmp_path / "batch", "batch_size=2")
    assert "one prompt at a time on a CPU" in report["peers_left_out"]["llama_cpp"]


def test_the_sampler_is_ours(folder):
    """Top 1 of any temperature is greedy, as is min_p 1; a penalty of the whole text never says a token twice."""
    server = LlamaCppServer(str(folder.parent / "model.gguf"), 64, 1)

    def tokens(**settings) -> list[int]:
        return server.complete([5, 6, 7], 12, Sampler(**settings), 0, ignore_end=True)[0]

    greedy = tokens()
    assert len(greedy) == 12
    assert tokens(temperature=5.0, top_k=1) == tokens(temperature=5.0, min_p=1.0) == greedy
    assert tokens(temperature=5.0, top_p=1e-6) == greedy != tokens(temperature=5.0)
    penalised = tokens(repetition_penalty=1e6)
    assert len({5, 6, 7, *penalised}) == 15
