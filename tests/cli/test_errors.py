"""Bad input: one ValueError with the key, the value given and what is allowed, before weights are loaded or written.

The tables hold overrides, since each of them could stand in the YAML file as well. What a recipe makes of odd values
for all keys that it has is tried at the end.
"""

import re
import shutil
import traceback
from pathlib import Path

import pytest
from helpers.configs import MODEL, eval_config, finetune_config, generate_config, make_checkpoint
from helpers.refusals import KEYS, RECIPES, check, refusal
from omegaconf import OmegaConf
from torchtune.training import FullModelHFCheckpointer

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.config.names import PACKAGE
from layerskip_recipes.generation.recipe import LayerSkipGenerate


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer_folder) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("errors") / "checkpoint", tokenizer_folder)


@pytest.fixture
def paths(tmp_path, checkpoint, tokenizer_folder, monkeypatch) -> dict[str, Path]:
    """A config for each recipe, all on one checkpoint whose weights must not be read."""

    def load(self, *args, **kwargs):
        raise AssertionError("the weights are loaded before the mistake is found")

    monkeypatch.setattr(FullModelHFCheckpointer, "load_checkpoint", load)
    monkeypatch.chdir(tmp_path)
    paths = {"generate": generate_config(tmp_path, checkpoint), "eval": eval_config(tmp_path, checkpoint)}
    pretrained = OmegaConf.load(paths["generate"]).checkpointer
    pretrained.output_dir = "${output_dir}"
    paths["finetune"] = finetune_config(tmp_path, tokenizer_folder, checkpointer=pretrained)
    return paths


# Overrides, the key at the message's start (or the section that it is in), the value given, what is allowed.
ANY = [
    ("device=xpu", "device", "'xpu'", "On this machine: cpu"),
    ("device=0", "device", "0", "device=cpu"),
    ("device=cpu:7", "device", "'cpu:7'", "On this machine: cpu"),
    ("dtype=fp16", "dtype", "'fp16'", "fp32, bf16"),
    ("dtype=null", "dtype", "None", "fp32, bf16"),
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


COSINE = "lr_scheduler._component_=torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup"
FINETUNE = [
    *(
        (f"{key}={value}", key, shown, f"of 1 or more; for example {key}=1")
        for key in ("batch_size", "epochs", "gradient_accumulation_steps", "log_every_n_steps")
        for value, shown in {"0": "0", "-1": "-1", "null": "None", "true": "True", "2.5": "2.5", "two": "'two'"}.items()
    ),
    ("batch_size=[2]", "batch_size", "[2]", "integer"),
    ("batch_size=", "batch_size", "None", "integer"),
    ("max_steps_per_epoch=0", "max_steps_per_epoch", "0", "1 or more (or null)"),
    ("output_dir=null", "output_dir", "None", "output_dir="),
    ("output_dir=3", "output_dir", "3", "output_dir="),
    ("init_std=-1", "init_std", "-1", "0"),
    ("init_std=abc", "init_std", "'abc'", "0.02"),
    ("init_std=0", "init_std", "0", "0.02"),
    # Optimizer, schedule, clipping.
    ("optimizer=null", "optimizer", "None", "_component_"),
    ("optimizer=3", "optimizer", "3", "_component_"),
    ("optimizer=torch.optim.Adamw", "optimizer._component_", "'torch.optim.Adamw'", "torch.optim"),
    ("optimizer.lr=abc", "optimizer.lr", "'abc'", "a number of 0 or more; for example optimizer.lr=2e-5"),
    ("optimizer.lr=-1", "optimizer.lr", "-1", "0 or more"),
    ("optimizer.lr=null", "optimizer.lr", "None", "2e-5"),
    ("optimizer.lr=true", "optimizer.lr", "True", "2e-5"),
    ("optimizer.lr=.nan", "optimizer.lr", "nan", "2e-5"),
    ("optimizer.learning_rate=1", "optimizer.learning_rate", "no such argument", "lr"),
    ("optimizer.betas=[2,2]", "optimizer", "2", "beta"),
    ("optimizer.betas=0.9", "optimizer", "AdamW", ""),
    ("optimizer.weight_decay=abc", "optimizer", "AdamW", ""),
    ("lr_scheduler=cosine", "lr_scheduler", "'cosine'", "_component_"),
    (COSINE, "lr_scheduler.num_warmup_steps", "missing", "num_warmup_steps="),
    (
        f"{COSINE}; lr_scheduler.num_warmup_steps=abc",
        "lr_scheduler",
        "get_cosine_schedule_with_warmup",
        "",
    ),
    (
        "lr_scheduler._component_=torch.optim.lr_scheduler.StepLR; lr_scheduler.step_size=1",
        "lr_scheduler",
        "torch.optim.lr_scheduler.StepLR",
        "num_training_steps",
    ),
    ("clip_grad_norm=-1", "clip_grad_norm", "-1", "0 or more (or null)"),
    ("clip_grad_norm=abc", "clip_grad_norm", "'abc'", "1.0"),
    ("optimizer_in_bwd=true; clip_grad_norm=1.5", "clip_grad_norm", "1.5", "null"),
    ("optimizer_in_bwd=true; gradient_accumulation_steps=2", "gradient_accumulation_steps", "2", "=1 or"),
    # Data, loss, logger, profiler.
    ("dataset=null", "dataset", "None", "_component_"),
    ("dataset=[]", "dataset", "[]", "_component_"),
    ("dataset=json", "dataset._component_", "'json'", ""),
    ("dataset=torchtune.datasets.alpaca", "dataset._component_", "'torchtune.datasets.alpaca'", "importable"),
    ("dataset.packd=true", "dataset.packd", "no such argument", "Allowed"),
    ("dataset.split=test", "dataset", "'test'", "train, heldout"),
    ("dataset.seq_len=0", "dataset", "0", "1"),
    (
        "dataset={_component_: torchtune.datasets.text_completion_dataset, source: json, streaming: true}",
        "dataset.streaming",
        "True",
        "=false",
    ),
    ("dataset={_component_: test_errors.preferences}", "dataset", "chosen_input_ids", "chat_dataset"),
    ("collate_fn=torchtune.data.padded_collate_dpo", "collate_fn", "'torchtune.data.padded_collate_dpo'", "_sft"),
    ("curriculum=gradual", "curriculum", "'gradual'", "early_exit_loss.curriculum"),
    ("dataset.max_samples=-1", "dataset", "-1", "1"),
    ("dataset.seq_len=1000", "dataset", "1000", "128"),
    ("model.vocab_size=200", "tokenizer", "200", "own tokenizer"),
    ("gradient_accumulation_steps=99", "dataset", "99", "lower"),
    ("collate_fn=torchtune.data.foo", "collate_fn._component_", "'torchtune.data.foo'", "importable"),
    ("collate_fn=torchtune.data.left_pad_sequence", "collate_fn", "left_pad_sequence", "padded_collate_sft"),
    ("collate_fn=json", "collate_fn", "json", ""),
    (
        "dataset=[{_component_: layerskip_recipes.quickstart.StdlibDataset}, "
        "{_component_: torchtune.datasets.text_completion_dataset, source: json, packed: true}]",
        "dataset",
        "packed",
        "all or none",
    ),
    ("loss=null", "loss", "None", "_component_"),
    ("loss=torch.nn.MSELoss", "loss._component_", "MSELoss", "torch.nn.CrossEntropyLoss"),
    ("loss=torch.nn.CrossEntropyLoss; loss.reduction=sum", "loss", "'sum'", "mean"),
    ("loss=torch.nn.CrossEntropyLoss; loss.label_smoothing=2", "loss", "2", "1"),
    ("metric_logger=null", "metric_logger", "None", "_component_"),
    ("metric_logger.log_dir=null", "metric_logger", "DiskLogger", ""),
    ("~metric_logger.log_dir", "metric_logger.log_dir", "missing", "metric_logger.log_dir="),
    ("profiler=true", "profiler", "True", "null"),
    ("profiler={enabled: true, foo: 1}", "profiler.foo", "no such argument", "Allowed: active_steps"),
    ("profiler.enabld=true", "profiler.enabld", "no such argument", "Nearest: enabled"),
    # Flags: a word that is none would count as true.
    *(
        (f"{key}=flase", key, "'flase'", "true, false")
        for key in (
            "shuffle",
            "compile",
            "optimizer_in_bwd",
            "enable_activation_checkpointing",
            "enable_activation_offloading",
            "log_peak_memory_stats",
            "resume_from_checkpoint",
        )
    ),
    ("enable_activation_offloading=true", "enable_activation_offloading", "True", "checkpointing=true"),
    (
        "enable_activation_offloading=true; enable_activation_checkpointing=true",
        "enable_activation_offloading",
        "cpu",
        "cuda",
    ),
    # Torchtune keys of other recipes.
    ("custom_sharded_layers=[outputx]", "custom_sharded_layers", "'outputx'", "tok_embeddings"),
    ("custom_sharded_layers=[layers]", "custom_sharded_layers", "'layers'", "tok_embeddings"),
    ("custom_sharded_layers=output", "custom_sharded_layers", "'output'", "[tok_embeddings,output]"),
    ("fsdp_cpu_offload=true", "fsdp_cpu_offload", "True", "fsdp_cpu_offload=false"),
    ("fsdp={cpu_offload: true}", "fsdp", "True", "fsdp_cpu_offload"),
    ("tensor_parallel_dim=2", "tensor_parallel_dim", "2", "Allowed: 1"),
    ("data_parallel_replicate_dim=2", "data_parallel_replicate_dim", "2", "data_parallel_replicate_dim=1"),
    ("data_parallel_shard_dim=0", "data_parallel_shard_dim", "0", "data_parallel_shard_dim=-1"),
    ("data_parallel_shard_dim=2", "data_parallel_shard_dim", "2", "data_parallel_shard_dim=-1"),
    ("ac_mode=selective", "ac_option", "missing", "ac_option=2"),
    ("ac_mode=op", "ac_mode", "'op'", "full, selective"),
    ("ac_option=2", "ac_option", "2", "ac_mode"),
    ("ac_mode=full; ac_option=2", "ac_option", "2", "ac_mode=selective"),
    ("loss={_component_: torch.nn.CrossEntropyLoss, ignore_index: 0}", "loss.ignore_index", "0", "-100"),
    (
        "checkpointer._component_=torchtune.training.DistributedCheckpointer",
        "checkpointer._component_",
        "DistributedCheckpointer",
        "FullModelHFCheckpointer",
    ),
    ("init_std=0.02", "init_std", "0.02", "scratch_checkpointer"),
    ("save_adapter_weights_only=true", "save_adapter_weights_only", "True", "save_adapter_weights_only=false"),
    ("save_every_n_steps=0", "save_every_n_steps", "0", "1 or more"),
    ("keep_last_n_checkpoints=0", "keep_last_n_checkpoints", "0", "1 or more"),
    ("enable_async_checkpointing=true", "enable_async_checkpointing", "True", "save_every_n_steps"),
    ("run_val_every_n_steps=5", "run_val_every_n_steps", "5", "dataset_val"),
    ("dataset_val=3", "dataset_val", "3", "_component_"),
    (
        "dataset_val={_component_: layerskip_recipes.quickstart.StdlibDataset, split: test}",
        "dataset_val",
        "'test'",
        "train, heldout",
    ),
    ("layers_val=0::9x", "layers_val", "'0::9x'", "dataset_val"),
    ("layers_val=0", "layers_val", "0", "dataset_val"),
    ("val_loss_margin=-1", "val_loss_margin", "-1", "0 or more"),
    ("fsdp_cpu_offload=${nowhere}", "fsdp_cpu_offload", "'nowhere'", "not found"),
    (
        "model=torchtune.models.llama3_2.lora_llama3_2_1b; model.lora_attn_modules=[]",
        "model",
        "[]",
        "Must pass one or more",
    ),
    ("checkpointer.output_dir=other", "checkpointer.output_dir", "'other'", "output_dir"),
    ("resume_from_checkpoint=true", "resume_from_checkpoint", "out", "resume_from_checkpoint=false"),
    # Our sections.
    ("layer_dropuot.prob=0.3", "layer_dropuot", "unknown key", "Nearest: layer_dropout"),
    ("layer_dropout=3", "layer_dropout", "3", "layer_dropout=null"),
    ("layer_dropout=[1]", "layer_dropout", "[1]", "layer_dropout=null"),
    ("layer_dropout.prb=0.3", "layer_dropout.prb", "unknown key", "Nearest: prob"),
    ("layer_dropout.seed=3", "layer_dropout.seed", "unknown key", "Allowed: layers"),
    ("~layer_dropout.prob", "layer_dropout.prob", "missing", "layer_dropout.prob=0.1"),
    *(
        (f"layer_dropout.prob={value}", "layer_dropout.prob", shown, "0 to 1")
        for value, shown in {"1.5": "1.5", "-0.1": "-0.1", "10%": "'10%'", "null": "None", "true": "True"}.items()
    ),
    ("layer_dropout.layers_scale=expo", "layer_dropout.layers_scale", "'expo'", "exp, uniform, linear"),
    ("layer_dropout.layers_scale=[exp]", "layer_dropout.layers_scale", "['exp']", "exp, uniform"),
    ("layer_dropout.schedule=linear", "layer_dropout.schedule", "'linear'", "constant, exp"),
    ("early_exit_loss=[1]", "early_exit_loss", "[1]", "early_exit_loss=null"),
    ("early_exit_loss.e_scale=1", "early_exit_loss.e_scale", "unknown key", "Nearest: scale"),
    ("early_exit_loss.scale=-1", "early_exit_loss.scale", "-1", "0 or more"),
    ("early_exit_loss.scale=.inf", "early_exit_loss.scale", "inf", "0 or more"),
    ("early_exit_loss.interval=0", "early_exit_loss.interval", "0", "integer of 1 or more"),
    ("early_exit_loss.interval=1.5", "early_exit_loss.interval", "1.5", "integer of 1 or more"),
    ("early_exit_loss.curriculum=rotation", "early_exit_loss.curriculum", "'rotation'", "rotational, gradual, null"),
    (
        "early_exit_loss.curriculum=[gradual]",
        "early_exit_loss.curriculum",
        "['gradual']",
        "rotational",
    ),
    ("early_exit_loss.scale_fn=cubic", "early_exit_loss.scale_fn", "'cubic'", "layerskip, uniform, linear"),
    ("early_exit_loss.scale_fn=[linear]", "early_exit_loss.scale_fn", "['linear']", "layerskip"),
    ("early_exit_loss.chunk_tokens=0", "early_exit_loss.chunk_tokens", "0", "1 or more"),
    ("early_exit_loss.chunk_tokens=-1", "early_exit_loss.chunk_tokens", "-1", "1 or more"),
    *(
        (f"{section}.layers={value}", f"{section}.layers", shown, 'for example ":"')
        for section in ("layer_dropout", "early_exit_loss")
        for value, shown in {
            "9": "9",
            "4": "4",
            "0,9": "'0,9'",
            "-5": "-5",
            "2:2": "2:2",
            "0::0": "'0::0'",
            "1-2": "'1-2'",
            "first": "'first'",
            "[]": "[]",
            "null": "None",
            "1.5": "1.5",
        }.items()
    ),
]


def preferences(tokenizer) -> list[dict]:
    """A dataset of torchtune's preference recipes."""
    return [{"chosen_input_ids": [1, 2], "chosen_labels": [1, 2]}] * 8


@pytest.mark.parametrize(("overrides", "key", "given", "allowed"), FINETUNE)
def test_in_finetuning(overrides, key, given, allowed, paths):
    check("finetune", paths["finetune"], overrides, key, given, allowed)


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
        for value, shown in {"0": "0", "null": "None", "1.5": "1.5", "many": "'many'", "true": "True"}.items()
    ),
    ("max_new_tokens=1000", "max_new_tokens", "1000", "up to 12"),
    *(
        (f"self_speculation.exit_layer={value}", "self_speculation.exit_layer", shown, "1..4")
        for value, shown in {"0": "0", "5": "5", "-1": "-1", "2.0": "2.0", "two": "'two'", "true": "True"}.items()
    ),
    *(
        (f"exit_layer={value}; self_speculation=null", "exit_layer", shown, "1..4")
        for value, shown in {"0": "0", "5": "5", "two": "'two'", "2.0": "2.0", "true": "True"}.items()
    ),
    *(
        (f"self_speculation.num_speculations={value}", "self_speculation.num_speculations", shown, "=6")
        for value, shown in {"0": "0", "1.5": "1.5", "six": "'six'", "true": "True"}.items()
    ),
    ("~self_speculation.num_speculations", "self_speculation.num_speculations", "missing", "num_speculations=6"),
    ("self_speculation.num_speculation=3", "self_speculation.num_speculation", "unknown", "Nearest: num_speculations"),
    ("self_speculation=4", "self_speculation", "4", "self_speculation=null"),
    ("self_speculation=[2,3]", "self_speculation", "[2, 3]", "self_speculation=null"),
    ("exit_layer=2", "exit_layer", "2", "self_speculation=null"),
    ("stop_tokens=3", "stop_tokens", "3", "list of int"),
    ("stop_tokens=[a]", "stop_tokens", "['a']", "list of int"),
    ("stop_tokens=[true]", "stop_tokens", "[True]", "list of int"),
    ("stop_strings=END", "stop_strings", "'END'", "list of str"),
    ("stop_strings=['']", "stop_strings", "['']", "list of str"),
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
    ("self_speculation.exit_layer=[]", "self_speculation.exit_layer", "[]", "[4,8]"),
    ("self_speculation.exit_layer=[2,2]", "self_speculation.exit_layer", "[2, 2]", "[4,8]"),
    ("self_speculation.exit_layer=[2,9]", "self_speculation.exit_layer", "9", "1..4"),
    ("self_speculation.tree_width=0", "self_speculation.tree_width", "0", "1 or more"),
    ("self_speculation.tree_children=x", "self_speculation.tree_children", "'x'", "1 or more"),
    ("self_speculation.threshold=1.5", "self_speculation.threshold", "1.5", "0 to 1"),
    ("self_speculation.threshold=high", "self_speculation.threshold", "'high'", "self_speculation.threshold=0.4"),
    (
        "self_speculation.threshold=0.5; self_speculation.tree_width=2",
        "self_speculation.threshold",
        "0.5",
        "self_speculation.threshold=null",
    ),
    ("self_speculation.prompt_lookup=0", "self_speculation.prompt_lookup", "0", "1 or more"),
    (
        "quantizer._component_=torchao.quantization.Int8WeightOnlyConfig; "
        "self_speculation.draft_quantizer._component_=torchao.quantization.Int8WeightOnlyConfig",
        "self_speculation.draft_quantizer",
        "beside quantizer",
        "quantizer=null",
    ),
    ("self_speculation.draft_vocabulary=0", "self_speculation.draft_vocabulary", "0", "1 or more"),
    ("self_speculation.draft_vocabulary=[]", "self_speculation.draft_vocabulary", "0 ids", "at least 1"),
    ("self_speculation.draft_vocabulary=[1,300]", "self_speculation.draft_vocabulary", "300", "0..299"),
    ("self_speculation.draft_vocabulary=[-1]", "self_speculation.draft_vocabulary", "-1", "0..299"),
    (
        "self_speculation.draft_vocabulary=[5]; self_speculation.tree_width=2",
        "self_speculation.draft_vocabulary",
        "1 ids",
        "at least 2",
    ),
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
    ("output_file=nowhere/a.jsonl", "output_file", "'nowhere/a.jsonl'", "answers.jsonl"),
    (
        "self_speculation.draft_vocabulary=1; self_speculation.tree_width=2",
        "self_speculation.draft_vocabulary",
        "1 ids",
        "at least 2",
    ),
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
        ({"base": MODEL, "layer_dropout": {"prb": 0.1}}, "^model: .*prb"),
        ({"base": MODEL, "layer_dropout": {"prob": 2}}, "^model: .*layer_dropout.prob: 2 .*0 to 1"),
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

ODD = ["null", "true", "3", "-1", "1.5", "abc", "[]", "[1]", "{}", "{a: 1}"]


def all_keys(config, prefix: str = "") -> set[str]:
    """The dotted keys of a config, sections and leaves."""
    keys = set()
    for name, value in config.items():
        keys.add(prefix + name)
        if isinstance(value, dict):
            keys |= all_keys(value, f"{prefix}{name}.")
    return keys


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
