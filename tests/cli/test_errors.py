"""Bad input: one ValueError with the key, the value given and what is allowed, before weights are loaded or written.

The tables hold overrides, since each of them could stand in the YAML file as well. What a recipe makes of odd values
for all keys that it has is tried at the end.
"""

import re
import shutil
import traceback
from pathlib import Path

import pytest
from helpers.configs import MODEL, finetune_config
from helpers.refusals import KEYS, RECIPES, check, refusal
from omegaconf import OmegaConf

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.config.names import PACKAGE
from layerskip_recipes.generation.recipe import LayerSkipGenerate

# Overrides, the key at the message's start (or the section that it is in), the value given, what is allowed.
ANY = [
    ("device=xpu", "device", "'xpu'", "Allowed here: cpu"),
    ("device=0", "device", "0", "device=cpu"),
    ("device=cpu:7", "device", "'cpu:7'", "Allowed here: cpu"),
    ("dtype=fp16", "dtype", "'fp16'", "fp32, bf16"),
    ("dtype=[fp32]", "dtype", "['fp32']", "fp32, bf16"),
    ("seed=-1", "seed", "-1", "0 to 2147483647"),
    ("seed=1.5", "seed", "1.5", "integer"),
    ("seed=4294967295", "seed", "4294967295", "2147483647"),
    ("float32_matmul_precision=low", "float32_matmul_precision", "'low'", "highest, high, medium"),
    ("model=null", "model", "None", "_component_"),
    ("model=3", "model", "3", "_component_"),
    ("model=[1]", "model", "[1]", "_component_"),
    ("model=torchtune.models.llama3_2.lama", "model._component_", "'torchtune.models.llama3_2.lama'", "lama"),
    ("model=no_such_package.model", "model._component_", "'no_such_package.model'", "installed"),
    ("model=json", "model._component_", "'json'", ""),
    ("model=os.getcwd", "model", "os.getcwd builds a str", "TransformerDecoder"),
    ("model.num_layer=3", "model.num_layer", "no such argument", "Nearest: num_layers"),
    ("~model.num_layers", "model.num_layers", "missing", "model.num_layers="),
    ("model.num_heads=3", "model", "(3)", "divisible"),
    ("model.num_layers=two", "model", "llama3_2", "integer"),
    ("model.num_layers=0", "model", "0", "1"),
    ("tokenizer=null", "tokenizer", "None", "_component_"),
    ("tokenizer.pth=x", "tokenizer.pth", "no such argument", "Nearest: path"),
    ("tokenizer.path=/nowhere", "tokenizer.path", "/nowhere", "no folder"),
    ("tokenizer.path=null", "tokenizer", "None", ""),
    ("tokenizer.max_seq_len=0", "tokenizer.max_seq_len", "0", "2048"),
    ("tokenizer.max_seq_len=abc", "tokenizer.max_seq_len", "'abc'", "2048"),
    (
        "tokenizer=torchtune.models.llama3.llama3_tokenizer; tokenizer.path=/nowhere",
        "tokenizer",
        "/nowhere",
        "No such file",
    ),
    ("checkpointer=null", "checkpointer", "None", "_component_"),
    ("checkpointer.checkpoint_dir=/nowhere", "checkpointer.checkpoint_dir", "'/nowhere'", "folder"),
    ("checkpointer.checkpoint_dir=null", "checkpointer.checkpoint_dir", "missing", "folder"),
    ("checkpointer.checkpoint_files=[a.bin, model.safetensors]", "checkpointer.checkpoint_files", "a.bin", "There: "),
    ("checkpointer.checkpoint_files=model.safetensors", "checkpointer.checkpoint_files", "'model.safetensors'", "list"),
    ("checkpointer.checkpoint_files=3", "checkpointer.checkpoint_files", "3", "list"),
    ("checkpointer.checkpoint_files=[3]", "checkpointer.checkpoint_files", "3", "a list of names"),
    ("checkpointer.model_type=LLAMA9", "checkpointer.model_type", "'LLAMA9'", "LLAMA3_2"),
    ("checkpointer.model_type=null", "checkpointer.model_type", "None", "LLAMA3_2"),
    ("checkpointer.recipe_checkpoint=a.pt", "checkpointer.recipe_checkpoint", "'a.pt'", "resume_from_checkpoint=true"),
    ("checkpointer.foo=1", "checkpointer.foo", "no such argument", "checkpoint_dir"),
    ("zzz=1", "zzz", "unknown key", "Allowed: "),
    ("toknizer.path=x", "toknizer", "unknown key", "Nearest: tokenizer"),
    ("seed=${nowhere}", "seed", "'nowhere'", "not found"),
]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("overrides", "key", "given", "allowed"), ANY)
def test_in_any_recipe(recipe, overrides, key, given, allowed, paths):
    check(recipe, paths[recipe], overrides, key, given, allowed)


EVAL = [
    ("batch_size=0", "batch_size", "0", "1 or more"),
    ("max_batches=0", "max_batches", "0", "1 or more (or null)"),
    ("layers=9", "layers", "9", "0..3"),
    ("layers=2:2", "layers", "2:2", "selects no layer"),
    ("dataset=null", "dataset", "None", "_component_"),
    ("dataset.spit=x", "dataset.spit", "no such argument", "Nearest: split"),
    (
        "collate_fn=torchtune.data.foo",
        "collate_fn._component_",
        "'torchtune.data.foo'",
        "importable",
    ),
    ("picture=3", "picture", "3", ""),
    ("num_speculations=0", "num_speculations", "0", "1 or more"),
    ("compare=3", "compare", "3", "checkpoint_dir"),
    ("compare={a: 3}", "compare", "3", "checkpoint_dir"),
    ("compare={checkpoint: {model_type: LLAMA3}}", "compare.checkpoint", "the name is that of", "compare={before"),
    ("compare={a: {checkpoint_dir: /nowhere}}", "checkpointer.checkpoint_dir", "'/nowhere'", "folder"),
    ("compare={a: {model_type: X}}", "compare", "'X'", "LLAMA3_2"),
    ("checkpointer.checkpoint_files=[]", "checkpointer.checkpoint_files", "missing", "weights"),
]


@pytest.mark.parametrize(("overrides", "key", "given", "allowed"), EVAL)
def test_in_evaluation(overrides, key, given, allowed, paths):
    check("eval", paths["eval"], overrides, key, given, allowed)


# ------------------------------------------------------------------------------------------------ files and folders


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt: "b"}\n', 'prompt_file line 3: .*"prompt: "b"'),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "prompt_file line 2: .*text"),
        ("p.jsonl", '["a"]\n', "prompt_file line 1: "),
        ("p.jsonl", 'a\n{"prompt": "a"}\nb\nc\n', r"prompt_file line 1: 'a' .*also lines 3, 4"),
        ("p.jsonl", '{"prompt": ""}\n', "prompt_file line 1: ''"),
        ("p.jsonl", '{"prompt": 3}\n', "prompt_file line 1: 3"),
        ("p.jsonl", "\n\n", "prompt_file: .*no prompt"),
        ("p.txt", "", "prompt_file: ''"),
        ("p.txt", b"\xff\xfe\x00", "prompt_file: .*cannot be read"),
    ],
)
def test_a_broken_prompt_file(name, content, message, paths, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert re.match(message, refusal("generate", paths["generate"], f"prompt_file={name}"))


def test_a_prompt_longer_than_the_model(paths, tmp_path):
    """128 positions. The message counts the prompt's tokens, since nobody knows them by heart."""
    (tmp_path / "long.txt").write_text("x " * 200)
    message = refusal("generate", paths["generate"], "prompt_file=long.txt")
    assert message.startswith("prompt: its ") and "128 (max_seq_len)" in message


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_checkpoint_folder_that_lacks_files(recipe, paths, checkpoint, tmp_path):
    """It names those that are missing, and those that are there."""
    shutil.copytree(checkpoint, tmp_path / "half")
    (tmp_path / "half" / "config.json").unlink()
    files = "checkpointer.checkpoint_files=[model-00001-of-00002.safetensors, model.safetensors]"
    message = refusal(recipe, paths[recipe], "checkpointer.checkpoint_dir=half", files)
    missing, _, there = message.partition("There: ")
    assert message.startswith("checkpointer.checkpoint_files: ")
    assert "model-00001-of-00002.safetensors" in missing and "config.json" in missing
    assert there == "model.safetensors"


@pytest.mark.parametrize("recipe", ["generate", "eval"])
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
def test_the_checkpoint_of_another_model(recipe, overrides, message, paths, monkeypatch):
    """Only this mistake is found after loading: it says what does not fit."""
    monkeypatch.undo()
    monkeypatch.chdir(paths[recipe].parent)
    assert re.search(message, refusal(recipe, paths[recipe], *overrides))


def test_output_inside_of_the_checkpoint(paths, checkpoint):
    """The run's checkpoints would stand among the files that it started from."""
    assert refusal("finetune", paths["finetune"], f"output_dir={checkpoint}/out").startswith("output_dir: ")


def test_output_where_nothing_can_be_written(paths, tmp_path):
    (tmp_path / "file").touch()
    assert refusal("finetune", paths["finetune"], "output_dir=file/out").startswith("output_dir: ")


def test_from_scratch_with_another_models_hf_config(tmp_path, tokenizer_folder):
    """Found at the start, not when the first checkpoint is written after hours of training."""
    path = finetune_config(tmp_path, tokenizer_folder, model=MODEL | {"num_kv_heads": 2})
    assert "hf_config" in refusal("finetune", path)


def test_from_scratch_with_a_tokenizer_folder_that_is_not_there(tmp_path, tokenizer_folder):
    """Else the checkpoints would have no tokenizer, and nobody would know before generation."""
    path = finetune_config(tmp_path, tokenizer_folder)
    message = refusal("finetune", path, "checkpointer.tokenizer_dir=/nowhere")
    assert message.startswith("checkpointer.tokenizer_dir: '/nowhere'")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"base": None}, "^model: .*NoneType"),
        ({"base": {"vocab_size": 300}}, "^model: .*_component_"),
        ({"base": MODEL | {"num_layer": 3}}, "^model: .*num_layer"),
        ({"base": MODEL, "layer_dropout": {"prb": 0.1}}, "^model.layer_dropout.prb: unknown key"),
        ({"base": MODEL, "layer_dropout": {"prob": 2}}, "^model.layer_dropout.prob: 2 .*0 to 1"),
        ({"base": MODEL, "layer_dropout": {"prob": 0.1}}, "^layer_dropout: .*both"),
    ],
)
def test_our_decoder_as_the_model(section, message, tmp_path, tokenizer_folder):
    """The base and the dropout inside of the model section; the dropout is also at top level in this config."""
    model = {"_component_": "layerskip_recipes.layerskip_decoder", **section}
    assert re.match(message, refusal("finetune", finetune_config(tmp_path, tokenizer_folder, model=model)))


# ----------------------------------------------------------------------------------------------------- other configs


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("text", ["", "# nothing\n", "{}\n"])
def test_an_empty_config(recipe, text, tmp_path):
    (tmp_path / "empty.yaml").write_text(text)
    assert refusal(recipe, tmp_path / "empty.yaml").split(":")[0] in ("config", "model", "output_dir")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("other", RECIPES)
def test_a_config_of_another_recipe(recipe, other, paths):
    """A key that only the other recipe has, or one that only this recipe needs."""
    if recipe == other:
        RECIPES[recipe](load_config(str(paths[recipe])))
        return
    own = set(load_config(str(paths[recipe])))
    message = refusal(recipe, paths[other])
    key = message.split(":")[0]
    refused = "unknown key" in message or "is not honoured by this recipe" in message
    assert (refused and key not in own) or (key in own and key not in load_config(str(paths[other])))


def test_two_processes_on_a_recipe_for_one(paths, monkeypatch):
    """As torchrun sets the environment with --nproc_per_node 2."""
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
    """Whatever stands there, the constructor fails with a ValueError of ours that names the key, or not at all."""
    keys = all_keys(OmegaConf.to_container(OmegaConf.load(paths[recipe]))) | KEYS[recipe]
    overrides = [f"{key}={value}" for key in sorted(keys) for value in ODD]
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
    """Also where the config takes its prompts from a component, as the quickstart does."""
    monkeypatch.setattr("layerskip_recipes.quickstart.heldout_prompts", lambda count: ["a", "b"])
    change = ["prompt=null", "prompts._component_=layerskip_recipes.quickstart.heldout_prompts", "prompts.count=2"]
    assert LayerSkipGenerate(load_config(str(paths["generate"]), [*change, *overrides])).prompts == expected
