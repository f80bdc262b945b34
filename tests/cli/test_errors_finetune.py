"""Bad input of layerskip_finetune: the key, the value given, what is allowed; see test_errors.py."""

import pytest
from helpers.refusals import check

# Overrides, the key at the message's start (or the section that it is in), the value given, what is allowed.
COSINE = "lr_scheduler._component_=torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup"
FINETUNE = [
    *(
        (f"{key}={value}", key, shown, f"of 1 or more; for example {key}=1")
        for key in ("epochs", "log_every_n_steps")
        for value, shown in {"0": "0", "null": "None", "true": "True", "2.5": "2.5"}.items()
    ),
    ("batch_size=[2]", "batch_size", "[2]", "integer"),
    ("batch_size=0", "batch_size", "0", "1 or more"),
    ("gradient_accumulation_steps=2.5", "gradient_accumulation_steps", "2.5", "1 or more"),
    ("max_steps_per_epoch=0", "max_steps_per_epoch", "0", "1 or more (or null)"),
    ("output_dir=null", "output_dir", "None", "output_dir="),
    ("output_dir=3", "output_dir", "3", "output_dir="),
    ("init_std=-1", "init_std", "-1", "0"),
    # Optimizer, schedule, clipping.
    ("optimizer=null", "optimizer", "None", "_component_"),
    ("optimizer=torch.optim.Adamw", "optimizer._component_", "'torch.optim.Adamw'", "torch.optim"),
    ("optimizer.lr=abc", "optimizer", "abc", ""),
    ("optimizer.lr=-1", "optimizer", "-1", "Invalid learning rate"),
    ("optimizer.lr=.nan", "optimizer", "nan", "Invalid learning rate"),
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
    ("clip_grad_norm=-1", "clip_grad_norm", "-1", "0 or more or inf (or null)"),
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
    ("dataset={_component_: test_errors_finetune.preferences}", "dataset", "chosen_input_ids", "chat_dataset"),
    ("collate_fn=torchtune.data.padded_collate_dpo", "collate_fn", "'torchtune.data.padded_collate_dpo'", "_sft"),
    ("curriculum=gradual", "curriculum", "unknown key", "Allowed: "),
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
    ("ac_mode=op", "ac_mode", "'op'", "full, selective"),
    ("ac_option=2", "ac_option", "2", "ac_mode"),
    ("loss={_component_: torch.nn.CrossEntropyLoss, ignore_index: 0}", "loss.ignore_index", "0", "-100"),
    (
        "checkpointer._component_=torchtune.training.DistributedCheckpointer",
        "checkpointer._component_",
        "DistributedCheckpointer",
        "FullModelHFCheckpointer",
    ),
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
    ("resume_from_checkpoint=true", "resume_from_checkpoint", "out", "resume_from_checkpoint=false"),
    # Our sections.
    ("layer_dropuot.prob=0.3", "layer_dropuot", "unknown key", "Nearest: layer_dropout"),
    ("layer_dropout=3", "layer_dropout", "3", "layer_dropout=null"),
    ("layer_dropout.prb=0.3", "layer_dropout.prb", "unknown key", "Nearest: prob"),
    ("layer_dropout.seed=3", "layer_dropout.seed", "unknown key", "Allowed: layers"),
    ("~layer_dropout.prob", "layer_dropout.prob", "missing", "layer_dropout.prob=0.1"),
    *(
        (f"layer_dropout.prob={value}", "layer_dropout.prob", shown, "0 to 1")
        for value, shown in {"1.5": "1.5", "-0.1": "-0.1", "10%": "'10%'", "null": "None", "true": "True"}.items()
    ),
    ("layer_dropout.layers_scale=expo", "layer_dropout.layers_scale", "'expo'", "exp, uniform, linear"),
    ("layer_dropout.schedule=linear", "layer_dropout.schedule", "'linear'", "constant, exp"),
    ("early_exit_loss.e_scale=1", "early_exit_loss.e_scale", "unknown key", "Nearest: scale"),
    ("early_exit_loss.scale=-1", "early_exit_loss.scale", "-1", "0 or more"),
    ("early_exit_loss.scale=.inf", "early_exit_loss.scale", "inf", "0 or more"),
    ("early_exit_loss.interval=0", "early_exit_loss.interval", "0", "integer of 1 or more"),
    ("early_exit_loss.interval=1.5", "early_exit_loss.interval", "1.5", "integer of 1 or more"),
    ("early_exit_loss.curriculum=rotation", "early_exit_loss.curriculum", "'rotation'", "rotational, gradual"),
    ("early_exit_loss.scale_fn=cubic", "early_exit_loss.scale_fn", "'cubic'", "layerskip, uniform, linear"),
    ("early_exit_loss.chunk_tokens=0", "early_exit_loss.chunk_tokens", "0", "1 or more"),
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
        }.items()
    ),
    *(
        (f"{section}.layers={value}", f"{section}.layers", shown, f"for example {section}.layers=:")
        # A null early_exit_loss.layers is chosen by the recipe.
        for section, value, shown in (
            ("layer_dropout", "null", "None"),
            ("layer_dropout", "1.5", "1.5"),
            ("early_exit_loss", "1.5", "1.5"),
        )
    ),
]


def preferences(tokenizer) -> list[dict]:
    """A dataset of torchtune's preference recipes."""
    return [{"chosen_input_ids": [1, 2], "chosen_labels": [1, 2]}] * 8


@pytest.mark.parametrize(("overrides", "key", "given", "allowed"), FINETUNE)
def test_in_finetuning(overrides, key, given, allowed, paths):
    check("finetune", paths["finetune"], overrides, key, given, allowed)
