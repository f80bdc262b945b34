"""Wrong settings of a benchmark: each is one error that names the key, before a weight is loaded."""

import re
from pathlib import Path

import pytest
from helpers.configs import benchmark_config, generate_config, unknown_suggestions
from torchtune.training import FullModelHFCheckpointer

from layerskip_recipes.benchmark.config import BenchmarkConfig
from layerskip_recipes.benchmark.recipe import LayerSkipBenchmark
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.config import GenerateConfig


@pytest.fixture
def path(tmp_path, checkpoint) -> Path:
    return benchmark_config(tmp_path, checkpoint, prompt_tokens=8)


def test_every_key_of_generation_is_known():
    """Honoured or refused by name: a benchmark config extends a generation config."""
    known = {*BenchmarkConfig.model_fields, *BenchmarkConfig.REFUSED, *BenchmarkConfig.IGNORED}
    assert {*GenerateConfig.model_fields} <= known


# Overrides, the key at the message's start, the value given, what is allowed.
WRONG = [
    ("temperatures=[]", "temperatures", "[]", "[0.0,0.8]"),
    ("temperatures=0.8", "temperatures", "0.8", "[0.0,0.8]"),
    ("temperatures=[0.0, -1]", "temperatures", "-1", "0 or more"),
    ("temperatures=[hot]", "temperatures", "'hot'", "0 or more"),
    ("temperature=0.8", "temperature", "0.8", "temperatures lists them"),
    ("repeats=0", "repeats", "0", "1 or more"),
    ("max_new_tokens=1", "max_new_tokens", "1", "2 or more"),
    ("max_new_tokens=1000", "max_new_tokens", "1000", "up to "),
    ("batch_size=0", "batch_size", "0", "1 or more"),
    ("prompt=[a, b, c]; batch_size=2", "batch_size", "2", "batch_size=1"),
    ("compile=yes please", "compile", "'yes please'", "true, false"),
    ("top_k=0", "top_k", "0", "1 or more"),
    ("min_p=2", "min_p", "2", "0 to 1"),
    ("repetition_penalty=0", "repetition_penalty", "0", "above 0"),
    ("report_dir=null", "report_dir", "None", "text"),
    ("~report_dir", "report_dir", "None", "text"),
    ("report_dir=benchmark.yaml/x", "report_dir", "'benchmark.yaml/x'", "in the way"),
    ("picture=3", "picture", "3", "text"),
    ("picture=benchmark.yaml/x.png", "picture", "'benchmark.yaml'", "in the way"),
    ("prompt=null", "prompt", "missing", "prompt_file=FILE"),
    ("prompt=interactive", "prompt", "'interactive'", "prompt=["),
    ("stop_strings=[END]", "stop_strings", "END", "needs metrics"),
    ("stream=true", "stream", "True", "stream=null"),
    ("picture=benchmark.txt", "picture", "'benchmark.txt'", "benchmark.png"),
    ("quantizer=3", "quantizer", "3", "_component_"),
    ("variant=3", "variant", "unknown key", "Nearest: variants"),
    ("~variants", "variants", "None", "variants.chain.exit_layer=3"),
    ("variants=chain", "variants", "'chain'", "variants.chain.exit_layer=3"),
    ("variants.chain=null; variants.short=null", "variants", "None", "variants.chain.exit_layer=3"),
    ("~variants; peers={torchtune: null}", "variants", "None", "or peers"),
    ("variants.chain=3", "variants.chain", "3", "self_speculation"),
    ("variants.chain.exit_layer=9", "variants.chain.exit_layer", "9", "1..4"),
    ("variants.chain.num_speculations=0", "variants.chain.num_speculations", "0", "1 or more"),
    ("variants.chain.num_speculation=3", "variants.chain.num_speculation", "unknown key", "Nearest: num_speculations"),
    ("variants.chain.early_exit=2", "variants.chain.exit_layer", "unknown key", "early_exit"),
    ("variants.x.early_exit=5", "variants.x.early_exit", "5", "1..4"),
    ("variants.x.early_exit=null", "variants.x.early_exit", "None", "1 or more"),
    ("variants.baseline.early_exit=2", "variants.baseline", "taken", "variants.chain"),
    ("variants.torchtune.early_exit=2", "variants.torchtune", "taken", "variants.chain"),
    ("peers=torchtune", "peers", "'torchtune'", "[torchtune]"),
    ("peers=[vllm]", "peers.vllm", "unknown key", "llama_cpp, torchtune, transformers, transformers_early_exit"),
    ("peers=[llama_cpp]", "peers.llama_cpp.gguf", "missing", "peers.llama_cpp.gguf=model.gguf"),
    ("peers={llama_cpp: {gguf: none.gguf}}", "peers.llama_cpp.gguf", "'none.gguf' is not a file", "a GGUF file"),
    ("metrics=[rogueL]", "metrics", "rogueL", "rouge1, rouge2, rougeL, bleu, exact_match"),
    ("self_speculation={exit_layer: 2, num_speculations: 2}", "self_speculation", "2", "variants"),
]


@pytest.mark.parametrize(("overrides", "key", "given", "allowed"), WRONG)
def test_a_wrong_setting_is_one_error_before_the_model_loads(path, monkeypatch, overrides, key, given, allowed):
    def load(self, *args, **kwargs):
        raise AssertionError("the weights are loaded before the mistake is found")

    monkeypatch.setattr(FullModelHFCheckpointer, "load_checkpoint", load)
    monkeypatch.chdir(path.parent)
    with pytest.raises(ValueError) as caught:
        LayerSkipBenchmark(load_config(str(path), overrides.split("; "))).setup()
    message = " ".join(str(caught.value).split())
    assert isinstance(caught.value, ConfigError) and message.startswith(f"{key}: "), message
    assert given in message and allowed in message
    assert not unknown_suggestions(message, BenchmarkConfig.model_fields), message
    assert [p.name for p in path.parent.iterdir()] == ["benchmark.yaml"]


ODD = ["null", "true", "-1", "1.5", "abc", "[1]", "{a: 1}"]


@pytest.mark.slow
def test_odd_values_are_taken_or_refused_by_key(path):
    """Whatever stands there: a ConfigError that names the key, or what it refers to, or nothing is wrong."""
    keys = {*BenchmarkConfig.model_fields, *BenchmarkConfig.REFUSED} - {"model", "checkpointer", "tokenizer"} | {
        "variants.chain",
        "variants.x",
    }
    keys |= {f"variants.chain.{key}" for key in ("exit_layer", "num_speculations", "early_exit")}
    overrides = [f"{key}={value}" for key in sorted(keys) for value in ODD]
    # All keys are resolved together, before any is looked at.
    overrides += ["report_dir=${nowhere}", "variants.chain.exit_layer=${nowhere}"]
    wrong = []
    for override in overrides:
        try:
            LayerSkipBenchmark(load_config(str(path), [override]))
        except ValueError as e:
            key = override.partition("=")[0]
            named = {key, key.split(".")[-1], key.split(".")[0], "nowhere"}
            if not isinstance(e, ConfigError) or not named & set(re.split("[.:]", str(e))):
                wrong.append(f"{override}: {e}")
        except Exception as e:
            wrong.append(f"{override}: {type(e).__name__}: {e}")
    assert not wrong, "\n".join(wrong)


def test_a_generation_config_becomes_a_benchmark(tmp_path, checkpoint):
    """What means nothing here is switched off by null; the stop tokens count."""
    user = generate_config(tmp_path, checkpoint, stop_tokens=[7], stream=False, benchmark={"compare": True})
    own = ["self_speculation=null", "temperature=null", "benchmark=null", "stream=null", f"report_dir={tmp_path}"]
    cfg = load_config(str(user), [*own, "variants.chain={exit_layer: 2, num_speculations: 2}"])
    assert 7 in LayerSkipBenchmark(cfg).stop_tokens
