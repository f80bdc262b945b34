"""Bad input of layerskip_generate: the key, the value given, what is allowed; see test_errors.py."""

import pytest
from helpers.refusals import check

# Overrides, the key at the message's start (or the section that it is in), the value given, what is allowed.
GENERATE = [
    ("temperature=-1", "temperature", "-1", "0 or more"),
    ("temperature=hot", "temperature", "'hot'", "0 or more"),
    ("temperature=null", "temperature", "None", "0 or more"),
    ("temperature=.nan", "temperature", "nan", "0 or more"),
    ("temperature=.inf", "temperature", "inf", "0 or more"),
    ("top_k=0", "top_k", "0", "1 or more (or null)"),
    ("top_k=1.5", "top_k", "1.5", "1 or more (or null)"),
    ("top_k=true", "top_k", "True", "1 or more (or null)"),
    ("top_p=0", "top_p", "0", "above 0 to 1"),
    ("top_p=1.1", "top_p", "1.1", "above 0 to 1"),
    ("top_p=true", "top_p", "True", "above 0 to 1"),
    *(
        (f"max_new_tokens={value}", "max_new_tokens", shown, "integer of 1 or more")
        for value, shown in {"0": "0", "1.5": "1.5", "many": "'many'", "true": "True"}.items()
    ),
    ("max_new_tokens=1000", "max_new_tokens", "1000", "up to 12"),
    *(
        (f"self_speculation.exit_layer={value}", "self_speculation.exit_layer", value, "1..4")
        for value in ("0", "5", "-1")
    ),
    *(
        (f"self_speculation.exit_layer={value}", "self_speculation.exit_layer", shown, "an integer")
        for value, shown in {"2.0": "2.0", "two": "'two'", "true": "True"}.items()
    ),
    *((f"exit_layer={value}; self_speculation=null", "exit_layer", value, "1..4") for value in ("0", "5")),
    *(
        (f"exit_layer={value}; self_speculation=null", "exit_layer", shown, "an integer")
        for value, shown in {"two": "'two'", "2.0": "2.0", "true": "True"}.items()
    ),
    *(
        (f"self_speculation.num_speculations={value}", "self_speculation.num_speculations", shown, "=6")
        for value, shown in {"0": "0", "1.5": "1.5", "six": "'six'", "true": "True"}.items()
    ),
    ("self_speculation.num_speculation=3", "self_speculation.num_speculation", "unknown", "Nearest: num_speculations"),
    ("self_speculation=4", "self_speculation", "4", "self_speculation=null"),
    ("self_speculation=[2,3]", "self_speculation", "[2, 3]", "self_speculation=null"),
    ("exit_layer=2", "exit_layer", "2", "self_speculation=null"),
    ("stop_tokens=3", "stop_tokens", "3", "list of int"),
    ("stop_tokens=[a]", "stop_tokens", "['a']", "list of int"),
    ("stop_tokens=[true]", "stop_tokens", "[True]", "list of int"),
    ("stop_strings=END", "stop_strings", "'END'", "a list of texts"),
    ("stop_strings=['']", "stop_strings", "['']", "a list of texts"),
    ("benchmark=true", "benchmark", "True", "benchmark=null"),
    ("benchmark.compare=yep", "benchmark.compare", "'yep'", "true, false"),
    ("benchmark.comp=true", "benchmark.comp", "unknown key", "Nearest: compare"),
    ("stream=flase", "stream", "'flase'", "true, false"),
    ("log_level=LOUD", "log_level", "'LOUD'", "INFO"),
    ("batch_size=0", "batch_size", "0", "1 or more"),
    ("batch_size=two", "batch_size", "'two'", "1 or more"),
    ("tensor_parallel_dim=2", "tensor_parallel_dim", "2", "Allowed: 1"),
    ("tensor_parallel_dim=0", "tensor_parallel_dim", "0", "1 or more"),
    ("min_p=1.5", "min_p", "1.5", "0 to 1"),
    ("repetition_penalty=0", "repetition_penalty", "0", "above 0"),
    ("compile=maybe", "compile", "'maybe'", "true, false"),
    ("self_speculation.exit_layer=[2,9]", "self_speculation.exit_layer", "[2, 9]", "an integer"),
    ("self_speculation.prompt_lookup=0", "self_speculation.prompt_lookup", "0", "1 or more"),
    (
        "quantizer._component_=torchao.quantization.Int8WeightOnlyConfig; "
        "self_speculation.draft_quantizer._component_=torchao.quantization.Int8WeightOnlyConfig",
        "self_speculation.draft_quantizer",
        "no effect with quantizer",
        "quantizer=null",
    ),
    ("self_speculation.draft_vocabulary=0", "self_speculation.draft_vocabulary", "0", "1 or more"),
    ("self_speculation.draft_vocabulary=[]", "self_speculation.draft_vocabulary", "no list", "0..299"),
    ("self_speculation.draft_vocabulary=[1,300]", "self_speculation.draft_vocabulary", "300", "0..299"),
    ("self_speculation.draft_vocabulary=[-1]", "self_speculation.draft_vocabulary", "-1", "0..299"),
    (
        "self_speculation.draft_vocabulary_file=a.txt",
        "self_speculation.draft_vocabulary_file",
        "'a.txt'",
        "draft_vocabulary=4096",
    ),
    (
        "self_speculation.draft_vocabulary_file=a.txt; self_speculation.draft_vocabulary=9",
        "self_speculation.draft_vocabulary_file",
        "'a.txt'",
        "not a file",
    ),
    ("self_speculation.draft_quantizer=int4", "self_speculation.draft_quantizer", "'int4'", "_component_"),
    (
        "self_speculation.draft_quantizer._component_=torchao.quantization.Int9",
        "self_speculation.draft_quantizer._component_",
        "Int9",
        "",
    ),
    ("output_dir=3", "output_dir", "3", ""),
    ("quantizer=3", "quantizer", "3", "_component_"),
    ("quantizer._component_=torch.nn.Relu", "quantizer._component_", "'torch.nn.Relu'", "Relu"),
    ("checkpointer.checkpoint_files=[]", "checkpointer.checkpoint_files", "missing", "weights"),
    ("optimizer.lr=1", "optimizer", "unknown key", ""),
    ("system_prompt=be", "system_prompt", "'be'", "prompt.system="),
    ("prompt=interactive; batch_size=2", "batch_size", "2", "batch_size=1"),
    ("prompt=interactive; output_file=a.jsonl", "output_file", "'a.jsonl'", "output_file=null"),
    (
        "prompt=interactive; self_speculation.draft_vocabulary=9",
        "self_speculation.draft_vocabulary",
        "9",
        "self_speculation.draft_vocabulary_file=corpus.txt",
    ),
    ("output_file=generate.yaml/a.jsonl", "output_file", "'generate.yaml'", "in the way"),
    ("prompt=null", "prompt", "missing", "prompt_file=FILE"),
    ("prompt=3", "prompt", "3", "prompt.user="),
    ('prompt=""', "prompt", "''", "prompt.user="),
    ("prompt=[a, '']", "prompt", "''", "prompt.user="),
    ("prompt=[]", "prompt", "token", "at least one"),
    ("prompt={usr: hi}", "prompt", "{'usr': 'hi'}", "user: text"),
    ("prompt={user: 3}", "prompt", "{'user': 3}", "user: text"),
    ("prompt={user: hi, system: 3}", "prompt", "3", "system: text"),
    ("prompt_file=nowhere.txt", "prompt_file", "'nowhere.txt'", "JSONL"),
    ("prompt_file=.", "prompt_file", "'.'", "JSONL"),
    ("prompt_file=3", "prompt_file", "3", ".jsonl"),
]


@pytest.mark.parametrize(("overrides", "key", "given", "allowed"), GENERATE)
def test_in_generation(overrides, key, given, allowed, paths):
    check("generate", paths["generate"], overrides, key, given, allowed)
