"""What a generation config may say: every key with its check, and what goes together."""

import os
from pathlib import Path

import torch
from omegaconf import DictConfig

from layerskip_recipes.checkpoint.checkpointers import check_checkpointer
from layerskip_recipes.config.checks import check_choice, check_file
from layerskip_recipes.config.settings import (
    COMMON,
    anything,
    build_on_meta,
    check_section,
    check_settings,
    component,
    flag,
    list_of,
    number,
    one_of,
    text,
)
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.parallel import check_processes
from layerskip_recipes.generation.prompts import INTERACTIVE
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.speculation_section import check_draft_fits, check_speculation, sampler_of
from layerskip_recipes.model.decoder import layerskip_decoder
from layerskip_recipes.processes import num_processes

SETTINGS = COMMON | {
    "quantizer": component(optional=True),
    "cudnn_deterministic_mode": one_of(None, 0, 1, 2, "default", "warn", "error"),
    "prompt": anything,
    "prompts": component(optional=True),
    "prompt_file": text("prompts.jsonl"),
    "system_prompt": text("Answer briefly."),
    "on_bad_prompt": one_of("error", "skip", None),
    "output_file": text("answers.jsonl"),
    "batch_size": number(minimum=1, example=8),
    "max_new_tokens": number(minimum=1, example=128),
    "temperature": anything,
    "top_k": anything,
    "top_p": anything,
    "min_p": anything,
    "repetition_penalty": anything,
    "stop_tokens": list_of(int, "[2]"),
    "stop_strings": list_of(str, "[END]"),
    "stream": one_of(True, False, "draft"),
    "exit_layer": anything,
    "self_speculation": anything,
    "benchmark": anything,
    "compile": flag,
    "enable_kv_cache": one_of(True, None),
    "tensor_parallel_plan": component(optional=True),
    "tensor_parallel_dim": number(minimum=1, optional=True, example=2),
    "log_level": one_of("INFO", "DEBUG", "WARNING", "ERROR"),
}
REQUIRED = ()
REFUSED: dict[str, str] = {}


def benchmark(compare: bool = False) -> bool:
    """The `benchmark` section: whether the autoregressive baseline runs too."""
    check_choice("benchmark.compare", compare, (True, False))
    return compare


def make_sampler(cfg: DictConfig, rng: torch.Generator | None = None) -> Sampler:
    """The sampler of a config; raises a ValueError for a setting out of range."""
    return sampler_of(cfg, cfg.get("temperature", 0.0), rng)


def check_config(cfg: DictConfig) -> None:
    """All of a generation config that can be wrong on any machine.

    Raises:
        ValueError: the key, what was given, what is allowed.
    """
    check_settings(cfg, SETTINGS, REFUSED)
    make_sampler(cfg)
    benchmark(**check_section(cfg.get("benchmark"), "benchmark", benchmark))
    model = layerskip_decoder(build_on_meta(cfg))
    check_checkpointer(cfg, model)
    if cfg.get("self_speculation") is not None:
        check_speculation(cfg.self_speculation, model)
        if cfg.get("exit_layer") is not None:
            raise ConfigError(
                f"exit_layer: {cfg.exit_layer} is set beside self_speculation. For all tokens from that exit: "
                f"exit_layer={cfg.exit_layer} self_speculation=null"
            )
    elif cfg.get("exit_layer") is not None:
        model.check_exit(cfg.exit_layer)
    if all(cfg.get(key) is None for key in ("prompt", "prompts", "prompt_file")):
        raise ConfigError(
            'prompt: missing. Give prompt="text", prompt.user="question", prompt=interactive, or prompt_file=FILE '
            "(- reads stdin)"
        )
    _check_conversation(cfg)
    check_output_file(cfg)
    parallel = check_processes(cfg, model)
    check_draft_fits(cfg, model, parallel)
    if num_processes() > 1:
        _check_alone(cfg)


def is_conversation(cfg: DictConfig) -> bool:
    """Whether the prompts are typed."""
    return cfg.get("prompt") == INTERACTIVE and cfg.get("prompt_file") is None


def _check_conversation(cfg: DictConfig) -> None:
    """Raises a ValueError for what goes only with a conversation, or not with one."""
    if not is_conversation(cfg):
        if cfg.get("system_prompt") is not None:
            raise ConfigError(
                f"system_prompt: {cfg.system_prompt!r} is for prompt=interactive. For one prompt: prompt.user=QUESTION "
                f"prompt.system={cfg.system_prompt!r}"
            )
        return
    if (cfg.get("batch_size") or 1) > 1:
        raise ConfigError(f"batch_size: {cfg.batch_size} does not go with prompt=interactive; batch_size=1")
    if cfg.get("output_file") is not None:
        raise ConfigError(
            f"output_file: {cfg.output_file!r} does not go with prompt=interactive; output_file=null, or a prompt_file"
        )
    speculation = cfg.get("self_speculation") or {}
    if isinstance(speculation.get("draft_vocabulary"), int) and speculation.get("draft_vocabulary_file") is None:
        raise ConfigError(
            f"self_speculation.draft_vocabulary: {speculation.draft_vocabulary} tokens are counted in the prompts, and "
            "prompt=interactive has none yet; for example self_speculation.draft_vocabulary_file=corpus.txt"
        )


def check_output_file(cfg: DictConfig) -> None:
    """Raises a ValueError if `output_file` cannot be written, or is a file that the run reads."""
    name = cfg.get("output_file")
    if name is None:
        return
    if Path(name).is_dir() or not Path(name).absolute().parent.is_dir():
        raise ConfigError(f"output_file: {name!r} cannot be written (no such folder); for example answers.jsonl")
    check_file("output_file", name)
    speculation = cfg.get("self_speculation") or {}
    inputs = {
        "prompt_file": cfg.get("prompt_file"),
        "self_speculation.draft_vocabulary_file": speculation.get("draft_vocabulary_file"),
        # Whatever a component calls its file: path, source, shots, ...
        **{f"prompts.{key}": value for key, value in (cfg.get("prompts") or {}).items()},
    }
    for key, read in inputs.items():
        if isinstance(read, str) and os.path.exists(read) and os.path.exists(name) and os.path.samefile(read, name):
            raise ConfigError(f"output_file: {name!r} would overwrite {key}. Allowed: another file; for example "
                             "output_file=answers.jsonl")  # fmt: skip


def _check_alone(cfg: DictConfig) -> None:
    """Raises a ValueError for what works in one process only."""
    quantizer = cfg.self_speculation.get("draft_quantizer") if cfg.get("self_speculation") is not None else None
    alone = {
        "compile": cfg.get("compile") or None,
        "self_speculation.draft_quantizer": quantizer,
        "prompt": INTERACTIVE if is_conversation(cfg) else None,
        "prompt_file": "-" if cfg.get("prompt_file") == "-" else None,
    }
    for key, value in alone.items():
        if value is not None:
            raise ConfigError(f"{key}: {value} works with one process, and there are {num_processes()}. Leave it out")
