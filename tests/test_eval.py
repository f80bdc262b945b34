"""The config of `layerskip_eval`: what `compare` may say. What it measures: test_generate.py, test_harness.py."""

import pytest
from configs import eval_config, make_checkpoint

from layerskip_recipes.checkpoint import checkpoint_files
from layerskip_recipes.config import load_config
from layerskip_recipes.recipes.eval import LayerSkipEval
from layerskip_recipes.recipes.eval_config import checkpoints

NAMED = ["model-00001-of-00001.safetensors"]
COUNTED = {"filename_format": "model-{}-of-{}.safetensors", "max_filename": "00001"}


@pytest.mark.parametrize(
    ("own", "others"),
    [(NAMED, COUNTED), (COUNTED, NAMED), (COUNTED, {"max_filename": "00001"})],
)
def test_the_files_of_checkpoints_have_either_form(own, others, tmp_path, tokenizer_folder):
    folders = [make_checkpoint(tmp_path / name, tokenizer_folder) for name in ("own", "other")]
    for folder in folders:
        (folder / "model.safetensors").rename(folder / NAMED[0])
    compare = {"before": {"checkpoint_dir": str(folders[1]), "checkpoint_files": others}}
    path = eval_config(tmp_path, folders[0], compare=compare)
    form = [f"checkpointer.checkpoint_files={own}".replace("'", '"')]
    cfg = LayerSkipEval(load_config(str(path), form)).cfg
    found = {name: one.checkpointer for name, one in checkpoints(cfg).items()}
    assert {name: section.checkpoint_dir for name, section in found.items()} == {
        "own": str(folders[0]),
        "before": str(folders[1]),
    }
    assert all(checkpoint_files(section) == NAMED for section in found.values())
    assert found["before"].model_type == "LLAMA3_2"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{checkpoint_fils: [x]}", r"^compare.a.checkpoint_fils: .*Nearest: checkpoint_files"),
        ("{_component_: torchtune.nothing}", r"^compare.a._component_: 'torchtune.nothing' cannot be imported"),
    ],
)
def test_a_typo_in_compare_is_found_before_anything_is_measured(section, message, tmp_path, tokenizer_folder):
    path = eval_config(tmp_path, make_checkpoint(tmp_path / "own", tokenizer_folder))
    with pytest.raises(ValueError, match=message):
        LayerSkipEval(load_config(str(path), [f"compare={{a: {section}}}"]))
