"""The folder of `layerskip export` in transformers: it finds the decoding loop, also where our package is missing."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.configs import make_checkpoint
from helpers.json_lines import change_json
from safetensors.torch import load_file, save_file

from layerskip_recipes.checkpoint.export import DECODING_LOOP, export

transformers = pytest.importorskip("transformers")
load = transformers.AutoModelForCausalLM.from_pretrained
SETTINGS = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
TOKENS = torch.arange(4, 12)[None]

IN_A_BARE_ENVIRONMENT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("layerskip_recipes", "torchtune"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
prompts = torch.tensor([[0, 0, 9, 4], [5, 6, 7, 8]])
settings = {"attention_mask": (prompts > 0).long(), "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
plain = type(model).generate(model, prompts, **settings, assistant_early_exit=None)
assert torch.equal(model.generate(prompts, **settings), plain)
assert not any(name.startswith(("layerskip_recipes", "torchtune")) for name in sys.modules)
print(model.generate.func.__module__)
"""
FROM_THE_HUB = """
import torch, transformers
load = transformers.AutoModelForCausalLM.from_pretrained
settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
prompt, trust = torch.tensor([[5, 6, 7, 8]]), {"trust_remote_code": True}
model = load("someone/model", revision="v2", **trust)
plain = type(model).generate(model, prompt, **settings)
assert torch.equal(model.generate(prompt, **settings), plain)
where = {"revision": "v2", "subfolder": "inner", "token": "secret"}
model, loop = load("someone/model", **where), {"custom_generate": "someone/model"}
assert torch.equal(model.generate(prompt, **settings, **trust, **where, **loop), plain)
"""


@pytest.fixture
def folder(tmp_path, tokenizer_folder, monkeypatch):
    """An exported folder with exit 2; transformers keeps its copies of loaded code in a folder of the test."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    return export(str(make_checkpoint(tmp_path / "model", tokenizer_folder)), str(tmp_path / "out"), exit_layer=2)


def test_transformers_finds_the_loop(folder):
    expected = load(folder).generate(TOKENS, **SETTINGS, assistant_early_exit=None)
    model = load(folder, trust_remote_code=True)
    calls = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append("below"))
    model.model.layers[3].register_forward_hook(lambda *_: calls.append("above"))
    assert torch.equal(model.generate(TOKENS, **SETTINGS, num_speculations=3), expected)
    assert calls.count("below") > calls.count("above")
    plain = load(folder)
    plain.generation_config.assistant_early_exit = None
    arguments = {"custom_generate": str(folder), "trust_remote_code": True}
    assert torch.equal(plain.generate(TOKENS, **SETTINGS, **arguments, exit_layer=3), expected)
    with pytest.raises(ValueError, match="no exit"):
        plain.generate(TOKENS, **SETTINGS, **arguments)


def test_only_an_exit_brings_the_loop(folder, tmp_path):
    """Without one the loop refuses to run, and transformers takes it wherever `trust_remote_code` is set. An exit that
    stayed would come before an `assistant_model`."""
    files = sorted(file.name for file in (folder / "custom_generate").iterdir())
    assert files == sorted(file.name for file in DECODING_LOOP.iterdir() if file.is_file())
    for name, options in (("again", {}), ("draft", {"draft": 2})):
        plain = export(str(folder), str(tmp_path / name), **options)
        assert not (plain / "custom_generate").exists()
        assert load(plain).generation_config.assistant_early_exit is None
        tokens = load(plain, trust_remote_code=True).generate(TOKENS, **SETTINGS)
        assert torch.equal(tokens, load(plain).generate(TOKENS, **SETTINGS))


@pytest.mark.slow
def test_the_draft_comes_from_the_models_revision_and_subfolder(folder, tmp_path):
    """On the hub, here a cache of it: the branch main has no draft."""
    weights = {name: value for name, value in load_file(folder / "model.safetensors").items() if ".layers.0." in name}
    weights["model.norm.weight"] = load_file(folder / "model.safetensors")["model.norm.weight"]
    described = {"num_layers": 1, "vocabulary": None, "num_speculations": 3, "min_confidence": 0.0}
    change_json(folder / "generation_config.json", assistant_early_exit=None)
    repository = tmp_path / "home" / "hub" / "models--someone--model"
    for branch, commit in (("main", "1" * 40), ("v2", "2" * 40)):
        snapshot = shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    shutil.copytree(folder, snapshot / "inner")
    for place in (snapshot, snapshot / "inner"):
        (place / "draft").mkdir()
        save_file(weights, place / "draft" / "model.safetensors")
        (place / "draft" / "draft.json").write_text(json.dumps(described))
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    env = {name: value for name, value in env.items() if name not in ("HF_HUB_CACHE", "HF_MODULES_CACHE")}
    done = subprocess.run([sys.executable, "-c", FROM_THE_HUB], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_the_exported_loop_decodes_where_this_package_is_missing(folder, tmp_path):
    env = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    env["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # no entry point of this package, which would be missing there
    command = [sys.executable, "-c", IN_A_BARE_ENVIRONMENT, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("custom_generate.generate")
