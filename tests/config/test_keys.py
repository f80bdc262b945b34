"""The keys of all recipes are frozen here, so that a new key is a decision: the commit that adds one to KEYS says which
measurement or which user needs it."""

import inspect
from collections.abc import Iterator
from typing import Any, get_args

from layerskip_recipes.cli.configs import RECIPES, config_class
from layerskip_recipes.config.recipe_config import RecipeConfig
from layerskip_recipes.config.schema import Section, alternatives

KEYS = {
    "FinetuneConfig": """
        ac_mode ac_option answer_tokens batch_size checkpointer clip_grad_norm collate_fn compile compute_dtype
        cudnn_deterministic_mode custom_sharded_layers data_dir data_parallel_replicate_dim
        data_parallel_shard_dim dataset dataset_val device draft dtype early_exit_loss enable_activation_checkpointing
        enable_activation_offloading enable_async_checkpointing epochs exits_val float32_matmul_precision
        fsdp_cpu_offload fsdp_reshard_after_forward gradient_accumulation_steps keep_last_n_checkpoints layer_dropout
        log_every_n_steps log_peak_memory_stats loss lr_scheduler
        max_steps_per_epoch metric_logger model model_dir optimizer optimizer_in_bwd output_dir profiler
        resume_from_checkpoint run_val_every_n_steps save_adapter_weights_only save_every_n_steps seed shuffle
        tensor_parallel_dim tensor_parallel_plan tokenizer
    """,
    "LayerDropoutSection": """
        inverted layers layers_scale prob schedule
    """,
    "EarlyExitLossSection": """
        chunk_tokens curriculum exits interval label_rows_only scale scale_fn
    """,
    "DraftSection": """
        chunk_tokens exit_layer finetune_model kind vocabulary
    """,
    "GenerateConfig": """
        batch_size benchmark checkpointer compile data_dir device dtype exit_layer float32_matmul_precision log_level
        max_new_tokens min_p model model_dir on_bad_prompt output_dir output_file prompt prompt_file prompts
        quantizer repetition_penalty seed self_speculation stop_strings stop_tokens stream system_prompt
        temperature tensor_parallel_dim tensor_parallel_plan tokenizer top_k top_p
    """,
    "ServeConfig": """
        allowed_origins host max_waiting port
    """,
    "SelfSpeculation": """
        answers draft draft_int8 draft_vocabulary exit_layer min_confidence num_speculations prompt_lookup
    """,
    "Comparison": """
        compare
    """,
    "EvalConfig": """
        batch_size checkpointer collate_fn compare data_dir dataset device dtype exits float32_matmul_precision
        max_batches model model_dir num_speculations output_dir picture quantizer report seed tokenizer
    """,
    "BenchmarkConfig": """
        batch_size checkpointer compile data_dir device dtype float32_matmul_precision max_new_tokens metrics min_p
        model model_dir output_dir picture prompt prompt_file prompt_tokens prompts quantizer random_weights
        repeats repetition_penalty report_dir seed self_speculation stop_strings stop_tokens temperature
        temperatures tokenizer top_k top_p tune tune_extends variants
    """,
}
MOST = 161  # the keys of every recipe count once


def sections_in(annotation: Any) -> Iterator[type[Section]]:
    """The sections of an annotation, and those in them."""
    for kind, _ in alternatives(annotation):
        if inspect.isclass(kind) and issubclass(kind, Section):
            yield kind
            for field in kind.model_fields.values():
                yield from sections_in(field.annotation)
        for item in get_args(kind):
            yield from sections_in(item)


def test_the_keys_are_those_that_were_decided_on():
    sections = {section.__name__: section for recipe in RECIPES for section in sections_in(config_class(recipe))}
    found = {name: {*section.model_fields} for name, section in sections.items() if section.model_fields}
    found["ServeConfig"] -= found["GenerateConfig"]  # which it extends
    assert found == {name: set(keys.split()) for name, keys in KEYS.items()}
    common = len(RecipeConfig.model_fields) * (len(RECIPES) - 2)  # of ServeConfig they are gone already
    assert sum(map(len, found.values())) - common <= MOST
