"""The generation recipe on several processes."""

import json
import logging
import re

import pytest
import torch
from helpers.configs import LAYER, REST
from helpers.generating import run
from helpers.ranks import check_success, run_tune_on_ranks
from torchtune.utils import get_logger

from layerskip_recipes import layerskip_decoder
from layerskip_recipes.cli.run import logs_here
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.generation.config import GenerateConfig
from layerskip_recipes.generation.recipe import LayerSkipGenerate


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
    for key in ("identical", "tokens", "baseline_tokens"):  # times decide which rounds draft
        assert report[key] == alone[key]
    assert report["identical"] is True
    assert [rank.stderr.count("prompt: is used instead of prompts") for rank in ranks] == [1, 0]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("compile=true", "compile"),
        ("prompt=interactive", "prompt"),
        ("prompt_file=-", "prompt_file"),
        ("quantizer._component_=torchao.quantization.Int8WeightOnlyConfig", "quantizer"),
        (
            "self_speculation.draft_quantizer._component_=torchao.quantization.Int8WeightOnlyConfig",
            "self_speculation.draft_quantizer",
        ),
    ],
)
def test_what_works_in_one_process_only_is_refused_in_several(path, monkeypatch, override, key):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}: .*one process.*there are 2"):
        LayerSkipGenerate(load_config(str(path), [override]))


def test_a_prompt_file_beside_prompt_interactive_is_for_several_processes(path, monkeypatch, tmp_path):
    """The file takes the place of the conversation."""
    (tmp_path / "one.txt").write_text("x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    GenerateConfig.load(load_config(str(path), ["prompt=interactive", f"prompt_file={tmp_path / 'one.txt'}"]))


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
