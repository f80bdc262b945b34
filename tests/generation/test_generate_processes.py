"""The generation recipe on several processes."""

import json
import re

import pytest
from helpers.generating import run
from helpers.ranks import check_success, run_tune_on_ranks

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.generation.recipe import LayerSkipGenerate


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


INT8 = "_component_=torchao.quantization.Int8WeightOnlyConfig"


@pytest.mark.parametrize(
    "override",
    [
        *("compile=true", "prompt=interactive", "prompt_file=-"),
        *(f"quantizer.{INT8}", f"self_speculation.draft_quantizer.{INT8}"),
    ],
)
def test_what_works_in_one_process_only_is_refused_in_several(path, monkeypatch, override):
    monkeypatch.setenv("WORLD_SIZE", "2")
    key = re.split(r"=|\._component_", override)[0]
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}: .*one process.*there are 2"):
        LayerSkipGenerate(load_config(str(path), [override]))
