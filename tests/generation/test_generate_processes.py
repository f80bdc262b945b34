"""The generation recipe on several processes, and what has to fit the memory of each."""

import json
import logging
import re

import pytest
import torch
from helpers.configs import LAYER, MODEL, REST, SLOT
from helpers.generating import run
from helpers.ranks import check_success, run_tune_on_ranks
from omegaconf import OmegaConf
from torchtune import config as tune_config
from torchtune.utils import get_logger

from layerskip_recipes import layerskip_decoder
from layerskip_recipes.checkpoint.weights import quantised_bytes
from layerskip_recipes.cli.run import logs_here
from layerskip_recipes.config.components import Component
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.generation.config import GenerateConfig
from layerskip_recipes.generation.recipe import LayerSkipGenerate
from layerskip_recipes.model.limits import weight_bytes


def test_prompts_that_differ_between_ranks_are_refused(path, monkeypatch):
    compared = []
    monkeypatch.setattr("layerskip_recipes.generation.recipe.same_on_all", lambda value: compared.append(value) or True)
    recipe = LayerSkipGenerate(load_config(str(path)))
    assert compared == [([0], recipe.prompt_tokens)]
    monkeypatch.setattr("layerskip_recipes.generation.recipe.same_on_all", lambda value: False)
    with pytest.raises(ValueError, match=r"^prompts: differ between ranks\. .*prompt_file="):
        LayerSkipGenerate(load_config(str(path)))


def test_other_ranks_log_errors_only(monkeypatch):
    def logged(rank, level):
        monkeypatch.setenv("RANK", rank)
        return logs_here(logging.makeLogRecord({"levelno": level}))

    assert logged("0", logging.INFO) and logged("1", logging.ERROR) and logged("3", logging.CRITICAL)
    assert not logged("1", logging.INFO) and not logged("1", logging.WARNING)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_give_the_output_of_one(path, tmp_path, capsys):
    """Sharded over two gloo processes, with drafts and without: the same text, printed once, as what is logged."""
    overrides = ["benchmark.compare=true", "prompts._component_=layerskip_recipes.quickstart.heldout_prompts"]
    _, alone = run(path, *overrides)
    text = capsys.readouterr().out.split("\n--- ")[1].replace("\r\n", "\n").replace("\r", "\n")  # as from a process
    ranks = run_tune_on_ranks("run", "layerskip_generate", "--config", str(path), *overrides, cwd=tmp_path)
    check_success(ranks)
    done, silent = ranks
    assert done.stdout.split("\n--- ")[1] == text and done.stdout.count("--- prompt 1 of 1") == 1
    assert not silent.stdout
    report = json.loads(done.stdout.splitlines()[-1])
    for key in ("identical", "tokens", "rounds", "accepted", "baseline_tokens"):
        assert report[key] == alone[key]
    assert report["identical"] is True
    assert [rank.stderr.count("prompt: takes the place of prompts") for rank in ranks] == [1, 0]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("compile=true", "compile"),
        ("prompt=interactive", "prompt"),
        ("prompt_file=-", "prompt_file"),
        (
            "self_speculation.draft_quantizer._component_=torchao.quantization.Int8WeightOnlyConfig",
            "self_speculation.draft_quantizer",
        ),
    ],
)
def test_what_works_in_one_process_only_is_refused_in_several(path, monkeypatch, override, key):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}: .*one process, and there are 2"):
        LayerSkipGenerate(load_config(str(path), [override]))


def test_a_prompt_file_beside_prompt_interactive_is_for_several_processes(path, monkeypatch, tmp_path):
    """The file takes the place of the conversation."""
    (tmp_path / "one.txt").write_text("x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    GenerateConfig.load(load_config(str(path), ["prompt=interactive", f"prompt_file={tmp_path / 'one.txt'}"]))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("draft", ["", "self_speculation.num_speculations=5", "self_speculation=null"])
def test_weights_caches_and_drafts_must_fit_the_memory(path, monkeypatch, compiled, draft):
    """To the byte: two rows of the prompt, 24 new tokens, and the draft; compiled, of the size that steps know. A layer
    reads the prompt of one token with three states of the feed-forward network's width, 48, and six of the model's; a
    step has three results in fp32 for each token of a verification."""
    overrides = ["batch_size=2", "prompt=[a, b]", f"compile={str(compiled).lower()}", *filter(None, [draft])]
    nodes = {"": 4, "self_speculation=null": 1}.get(draft, 6)
    slots = 256 + 128 if compiled else 1 + 24 + nodes
    weights, row = 4 * (4 * LAYER + REST), slots * SLOT + 4 * (3 * 48 + 6 * 32) + nodes * 3 * 4 * MODEL["vocab_size"]

    def with_memory(memory):
        monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": memory, "SC_PAGE_SIZE": 1}.get)
        return LayerSkipGenerate(load_config(str(path), overrides))

    with_memory(weights + 2 * row)
    message = r"^batch_size: caches, prompts and steps of 2 rows .* weights take .* up to 1; for example batch_size=1$"
    with pytest.raises(ValueError, match=message):
        with_memory(weights + 2 * row - 1)
    message = rf"^max_new_tokens: .* Allowed here: up to {slots - 1} positions"
    with pytest.raises(ValueError, match=message):
        with_memory(weights + row - 1)
    with pytest.raises(ValueError, match=r"^model: its weights take .* for example dtype=bf16"):
        with_memory(weights)


def test_quantised_weights_must_fit_the_memory(path, monkeypatch):
    """Matrices have a byte for each weight, and for each row a scale in fp32 and torchao's zero point in int64; the
    embedding, whose copy is the head, and the norms stay in fp32."""
    matrices, rows = 4 * (LAYER - 64) + REST - 32, 4 * (32 + 16 + 16 + 32 + 48 + 48 + 32) + MODEL["vocab_size"]
    weights = matrices + (4 + 8) * rows + 4 * (REST + 4 * 64)
    row = (1 + 100 + 4) * SLOT + 4 * (3 * 48 + 6 * 32) + 4 * 3 * 4 * MODEL["vocab_size"]
    quantizer = "quantizer._component_=torchao.quantization.Int8WeightOnlyConfig"

    def with_memory(memory):
        monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": memory, "SC_PAGE_SIZE": 1}.get)
        LayerSkipGenerate(load_config(str(path), ["prompt=[a, b]", "batch_size=2", "max_new_tokens=100", quantizer]))

    with_memory(weights + 2 * row)
    with pytest.raises(ValueError, match=r"^batch_size: .* weights take .* up to 1; for example batch_size=1$"):
        with_memory(weights + 2 * row - 1)
    with pytest.raises(ValueError, match=r"^model: its weights take .* until they are quantised, .* dtype=bf16"):
        with_memory(4 * (4 * LAYER + REST) - 1)


def test_adapters_are_merged_before_weights_are_quantised():
    quantizer = Component({"_component_": "torchao.quantization.Int8WeightOnlyConfig"}, "quantizer")
    lora = {"lora_attn_modules": ["q_proj"], "apply_lora_to_mlp": True, "lora_rank": 4, "lora_alpha": 8}
    builders = "torchtune.models.llama3_2._component_builders."
    models = [MODEL, MODEL | lora | {"_component_": f"{builders}lora_llama3_2"}]
    with torch.device("meta"):
        plain, adapted = (layerskip_decoder(tune_config.instantiate(OmegaConf.create(model))) for model in models)
    assert quantised_bytes(adapted, quantizer) == quantised_bytes(plain, quantizer) > 0


def test_a_gpu_that_would_hold_the_model_needs_no_shards(path, monkeypatch, caplog):
    """1.5 times the weights are free, or a byte less; with tensor parallelism alone nothing is gathered."""
    recipe = LayerSkipGenerate(load_config(str(path)))
    model, whole = layerskip_decoder(recipe.cfg.meta_model), 4 * (4 * LAYER + REST)
    recipe.device = torch.device("cuda")
    monkeypatch.setattr("layerskip_recipes.generation.recipe.num_processes", lambda: 2)
    for free, parallel, warned in ((1.5 * whole + 1, 1, True), (1.5 * whole, 1, False), (9 * whole, 2, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        recipe.parallel = parallel
        caplog.clear()
        with caplog.at_level("WARNING", logger=get_logger().name):
            recipe._warn_of_needless_shards(model)
        assert ("one GPU would hold this model" in caplog.text) is warned


@pytest.mark.parametrize(("kept", "shards", "parallel", "bytes_"), [
    (0, 1, 1, 2 * (4 * LAYER + REST)),
    (2, 1, 1, 2 * (4 * LAYER + REST)),
    (2, 2, 1, 2 * (2 * LAYER + REST + LAYER)),
    (0, 4, 1, 2 * (REST + LAYER)),
    (2, 2, 2, 2 * (2 * LAYER + REST + LAYER) // 2),
])  # fmt: skip
def test_the_weights_of_each_process(kept, shards, parallel, bytes_):
    """In bf16: layers below the exit whole, the others sharded; matrices split by tensor parallelism."""
    with torch.device("meta"):
        model = tune_config.instantiate(OmegaConf.create(MODEL))
    assert weight_bytes(model, torch.bfloat16, kept, shards, parallel) == bytes_
