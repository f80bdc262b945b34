"""Checkpoints of other models and odd values for every key; test_errors.py has the rules of single keys."""

import re
import traceback
from itertools import takewhile
from pathlib import Path

import pytest
from helpers.configs import finetune_config
from helpers.refusals import KEYS, RECIPES, refusal
from omegaconf import OmegaConf

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.config.names import PACKAGE
from layerskip_recipes.generation.recipe import LayerSkipGenerate


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.num_layers=5"], "lacks layers.4.attn"),
        (["model.num_layers=3"], "has in addition layers.3."),
        (["model.vocab_size=301"], r"tok_embeddings.weight \(300, 32\) instead of \(301, 32\)"),
        (["checkpointer.model_type=PHI3_MINI"], "model_type|PHI3_MINI|does not fit"),
        (["checkpointer.checkpoint_files=[config.json]"], "config.json"),
    ],
)
def test_the_checkpoint_of_another_model_is_refused(overrides, message, paths, monkeypatch):
    """Only this mistake is found after loading: it says what does not fit."""
    monkeypatch.undo()
    monkeypatch.chdir(paths["generate"].parent)
    assert re.search(message, refusal("generate", paths["generate"], *overrides))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.num_kv_heads=2"], "hf_config"),
        # Else the checkpoints would have no tokenizer, and nobody would know before generation.
        (["checkpointer.tokenizer_dir=/nowhere"], "^checkpointer.tokenizer_dir: '/nowhere'"),
        (["checkpointer.hf_config.tie_word_embeddings=false"], "tie_word_embeddings: False does not fit .* has True$"),
    ],
)
def test_mistakes_of_a_training_from_scratch_are_found_at_the_start(changes, message, tmp_path, tokenizer_folder):
    """Found at the start, not when the first checkpoint is written after hours of training."""
    assert re.search(message, refusal("finetune", finetune_config(tmp_path, tokenizer_folder), *changes))


def test_two_processes_are_refused_by_a_recipe_for_one(paths, monkeypatch):
    for key, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    assert "nproc_per_node" in refusal("eval", paths["eval"])


# ---------------------------------------------------------------------------------------------- every key, odd values

ODD = ["null", "true", "-1", "abc", "[1]", "{a: 1}"]


def all_keys(config, prefix: str = "") -> set[str]:
    """The dotted keys of a config, sections and leaves."""
    keys = set()
    for name, value in config.items():
        keys.add(prefix + name)
        if isinstance(value, dict):
            keys |= all_keys(value, f"{prefix}{name}.")
    return keys


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_odd_values_are_taken_or_refused_by_key(recipe, paths):
    """Whatever stands there, the constructor fails with a ValueError of ours that names the key, or not at all.

    A key of several recipes is tried with all values by the first of them, and with the first and last by the others.
    """
    keys = all_keys(OmegaConf.to_container(OmegaConf.load(paths[recipe]))) | KEYS[recipe]
    keys |= {"variants.x"} if recipe == "benchmark" else set()
    tried = set().union(*(KEYS[other] for other in takewhile(lambda other: other != recipe, RECIPES)))
    overrides = [f"{key}={value}" for key in sorted(keys) for value in ODD[:: 5 if key.split(".")[0] in tried else 1]]
    # All keys are resolved together, before any is looked at.
    overrides += ["device=${nowhere}", "tokenizer.path=${nowhere}"]
    wrong = []
    for override in overrides:
        try:
            RECIPES[recipe](load_config(str(paths[recipe]), [override]))
        except ValueError as e:
            key = override.partition("=")[0]
            if not Path(traceback.extract_tb(e.__traceback__)[-1].filename).is_relative_to(PACKAGE):
                wrong.append(f"{override}: a traceback ends in {e}")
            # A model that is changed may no longer fit what another key says.
            elif not key.startswith("model.") and not {key, key.split(".")[0], key.split(".")[-1]} & set(
                str(e).split(":")[0].split(".")
            ):
                wrong.append(f"{override}: names another key: {e}")
        except Exception as e:
            wrong.append(f"{override}: {type(e).__name__}: {e}")
    assert not wrong, "\n".join([f"{len(wrong)} of {len(overrides)}", *wrong])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["prompt=def f(n):"], ["def f(n):"]),
        (["prompt.user=hi"], [{"user": "hi"}]),
        (["prompt=null", "prompt.user=hi"], [{"user": "hi"}]),
        ([], ["a", "b"]),
    ],
)
def test_a_prompt_of_ones_own_replaces_the_configs(overrides, expected, paths, monkeypatch):
    monkeypatch.setattr("layerskip_recipes.quickstart.heldout_prompts", lambda count: ["a", "b"])
    change = ["prompt=null", "prompts._component_=layerskip_recipes.quickstart.heldout_prompts", "prompts.count=2"]
    assert LayerSkipGenerate(load_config(str(paths["generate"]), [*change, *overrides])).prompts == expected
