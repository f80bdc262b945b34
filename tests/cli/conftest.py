"""A config for each recipe on one checkpoint, for the tests of refusals."""

from pathlib import Path

import pytest
from helpers.configs import benchmark_config, eval_config, finetune_config, generate_config
from omegaconf import OmegaConf


@pytest.fixture
def paths(tmp_path, checkpoint, tokenizer_folder, monkeypatch, no_weights) -> dict[str, Path]:
    """A config for each recipe, all on one checkpoint whose weights must not be read."""
    monkeypatch.chdir(tmp_path)
    paths = {"generate": generate_config(tmp_path, checkpoint), "eval": eval_config(tmp_path, checkpoint)}
    pretrained = OmegaConf.load(paths["generate"]).checkpointer
    pretrained.output_dir = "${output_dir}"
    paths["finetune"] = finetune_config(tmp_path, tokenizer_folder, checkpointer=pretrained)
    paths["benchmark"] = benchmark_config(tmp_path, checkpoint, prompt_tokens=8)
    return paths
