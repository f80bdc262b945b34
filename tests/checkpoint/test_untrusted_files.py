"""Files that travel with weights are data: none of them can make this package run a stranger's code."""

import json
from pathlib import Path

import pytest
import torch
from helpers.configs import generate_config, make_checkpoint, start_section
from jinja2.exceptions import TemplateError
from safetensors.torch import load_file, save_file
from torchtune.training.quantization import Int8DynActInt4WeightQuantizer

from layerskip_recipes import hf_checkpointer, hf_tokenizer
from layerskip_recipes.checkpoint.drafts import FORMAT
from layerskip_recipes.checkpoint.export import export
from layerskip_recipes.checkpoint.weights import load_decoder
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.config import GenerateConfig


@pytest.fixture
def ran(tmp_path) -> Path:
    """A file that exists once hostile code has run."""
    return tmp_path / "ran"


class Hostile:
    """An object whose pickle creates a file when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.fixture
def checkpoint(tmp_path, tokenizer_folder) -> Path:
    return make_checkpoint(tmp_path / "model", tokenizer_folder)


def loaded(tmp_path, checkpoint, **changes):
    cfg = GenerateConfig.load(load_config(str(generate_config(tmp_path, checkpoint, **changes))))
    return load_decoder(cfg, torch.device("cpu"), cfg.quantizer)


# ---- layerskip.json ----

BASE = {"checkpointer": "FullModelHFCheckpointer", "files": ["model.safetensors"], "model_type": "LLAMA3_2"}
# What a file may say in place of a name or a value.
CODE = {"_component_": "pathlib.Path.touch", "self": {"_component_": "pathlib.Path", "_args_": ["RAN"]}}


KEYS = ["kind", "exit_layer", "vocabulary", "base"]
KEYS_OF_BASE = ["folder", "hash", "checkpointer", "files", "model_type", "_component_", "output_dir"]


@pytest.mark.parametrize("key", [*KEYS, *(f"base.{key}" for key in KEYS_OF_BASE)])
@pytest.mark.parametrize("code", [CODE, "torch.hub.load", [CODE]], ids=["component", "path", "list"])
def test_code_in_a_drafts_description_is_refused(key, code, checkpoint, ran, tmp_path):
    base = BASE | {"folder": str(checkpoint), "hash": "0"}
    description = {"format": FORMAT, "kind": "copy", "exit_layer": 2, "vocabulary": None, "base": base}
    part = base if key.startswith("base.") else description
    part[key.removeprefix("base.")] = code
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "layerskip.json").write_text(json.dumps(description).replace("RAN", str(ran)))
    save_file({}, tmp_path / "draft" / "draft.safetensors")
    with pytest.raises(ConfigError, match=None if part is base else rf"layerskip\.json.*{key}"):
        export(str(tmp_path / "draft"), str(tmp_path / "out"), draft=0)
    assert not ran.exists() and not (tmp_path / "out").exists()


# ---- pickles ----


def as_torchtune(folder, state):
    """The checkpointer of a model in torchtune's own format."""
    folder.mkdir()
    torch.save(state, folder / "model.pt")
    return start_section(folder, "TorchTune", "model.pt") | {"output_dir": str(folder / "out")}


QUANTIZER = {"_component_": "torchtune.training.quantization.Int8DynActInt4WeightQuantizer", "groupsize": 32}


@pytest.mark.parametrize("quantizer", [None, QUANTIZER], ids=["plain", "quantised"])
def test_a_hostile_pickle_of_weights_runs_no_code(quantizer, checkpoint, ran, tmp_path):
    section = as_torchtune(tmp_path / "hostile", {"norm.scale": Hostile(ran)})
    with pytest.raises(ConfigError, match="FullModelTorchTuneCheckpointer"):
        loaded(tmp_path, checkpoint, checkpointer=section, quantizer=quantizer)
    assert not ran.exists()


def test_quantised_weights_are_read_as_torchtune_writes_them(checkpoint, tmp_path):
    quantised = Int8DynActInt4WeightQuantizer(groupsize=32).quantize(loaded(tmp_path, checkpoint, dtype="bf16"))
    section = as_torchtune(tmp_path / "quantised", quantised.state_dict())
    again = loaded(tmp_path, checkpoint, checkpointer=section, quantizer=QUANTIZER, dtype="bf16")
    kinds = set()
    for name, value in again.state_dict().items():
        expected = quantised.state_dict()[name]
        kinds.add(type(value).__name__)
        if "Quantized" in type(expected).__name__:
            value, expected = (x.original_weight_tensor.dequantize() for x in (value, expected))
        assert torch.equal(value, expected), name
    assert kinds == {"Tensor", "LinearActivationQuantizedTensor"}


# ---- what names code for transformers ----


def test_a_written_folder_names_no_code(checkpoint, tmp_path):
    """`auto_map` sends transformers to modules, of another repository too, that `trust_remote_code` then allows."""
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        content = json.loads((checkpoint / name).read_text()) if (checkpoint / name).exists() else {}
        (checkpoint / name).write_text(json.dumps(content | {"auto_map": {"AutoModel": "evil/repo--code.Model"}}))
    (checkpoint / "code.py").touch()
    checkpointer = hf_checkpointer(str(checkpoint), str(tmp_path / "run"))
    checkpointer.save_checkpoint(checkpointer.load_checkpoint())
    for folder in (export(str(checkpoint), str(tmp_path / "out")), tmp_path / "run" / "epoch_0"):
        assert not list(folder.rglob("*.py"))
        assert all("auto_map" not in json.loads(file.read_text()) for file in folder.glob("*.json")), folder
        assert load_file(folder / "model.safetensors").keys() == load_file(checkpoint / "model.safetensors").keys()


ESCAPES = ["{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__.os.system('true') }}",
           "{{ messages.append(1) }}", "{% include '/etc/passwd' %}", "{% import 'os' as os %}"]  # fmt: skip


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_stays_in_its_sandbox(template, checkpoint):
    (checkpoint / "chat_template.jinja").write_text(template)
    with pytest.raises((TemplateError, TypeError)):
        hf_tokenizer(str(checkpoint)).template.render([{"role": "user", "content": "?"}])
