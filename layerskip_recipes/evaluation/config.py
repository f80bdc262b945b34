"""What may stand in an evaluation config, what has to, and what it means where a plain value would not say."""

from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from layerskip_recipes.config.components import Component
from layerskip_recipes.config.schema import Section, check
from layerskip_recipes.config.settings import COMMON, anything, component, flag, number, one_of, text
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.drafting.section import FILTERS
from layerskip_recipes.training.batches import CollateFn, Datasets


def check_tasks(key: str, value: Any) -> None:
    """Raises a ValueError unless value is null or a list of names."""
    names = list(value) if isinstance(value, ListConfig) else []
    if value is not None and (not names or not all(isinstance(name, str) and name for name in names)):
        raise ConfigError(f"{key}: {value!r} is not allowed. Allowed: a list of names; for example {key}=[arc_easy]")
    if len(set(names)) < len(names):
        raise ConfigError(f"{key}: {value!r} has a name twice. Allowed: each once; for example {key}=[arc_easy]")


def task_folders(key: str, value: Any) -> list[str]:
    """`task_path` as a list; raises a ValueError unless it is null, a folder or a list of folders."""
    folders = list(value) if isinstance(value, ListConfig) else [] if value is None else [value]
    for folder in folders:
        if not isinstance(folder, str) or not Path(folder).is_dir():
            raise ConfigError(
                f"{key}: {folder!r} is no folder. Allowed: folders of task files; for example {key}=tasks"
            )
    return folders


def harness() -> ModuleType:
    """Our harness.py, which imports lm-eval; raises a ValueError if that is not installed."""
    try:
        from layerskip_recipes.evaluation import harness
    except ImportError as e:
        raise ConfigError(f'tasks: lm-eval is missing ({e}). For example: pip install "lm-eval>=0.4.12,<0.5"') from e
    return harness


class _Data(Section):
    dataset: Datasets | None


def datasets_of(value: Any) -> list[Component]:
    """The datasets of the `dataset` section; raises a ConfigError for a wrong one."""
    plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    datasets = _Data.parse({"dataset": plain}).dataset or []
    for dataset in datasets:
        dataset.key = "dataset"
        dataset.check()
    return datasets


SETTINGS = COMMON | {
    "quantizer": component(optional=True),
    "dataset": lambda key, value: datasets_of(value),
    "collate_fn": lambda key, value: check(key, value, CollateFn),
    "batch_size": number(minimum=1),
    "max_batches": number(minimum=1, optional=True),
    "layers": anything,
    "num_speculations": number(minimum=1, optional=True, example=6),
    "tasks": check_tasks,
    "task_path": task_folders,
    "num_fewshot": number(minimum=0, optional=True),
    "limit": number(minimum=1, optional=True),
    "apply_chat_template": flag,
    "human_eval": anything,
    "exit_layer": anything,
    "self_speculation": anything,
    "max_new_tokens": number(minimum=1, optional=True, example=256),
    "compare": anything,
    "picture": text("exits.png"),
    "report": text("exits.json"),
    "enable_kv_cache": one_of(True, None),
}
REFUSED = {
    **dict.fromkeys(("prompt", "prompts", "prompt_file"), "it measures a dataset, tasks or human_eval"),
    "temperature": "tasks say it themselves, for HumanEval it is human_eval.temperature",
    "on_bad_prompt": "it answers no prompts of a config",
    "benchmark": "a comparison is for layerskip_generate or layerskip_benchmark",
    **dict.fromkeys(("stream", "output_file"), "it prints figures, no texts"),
    **dict.fromkeys(FILTERS, "tasks say it themselves"),
    **dict.fromkeys(("stop_tokens", "stop_strings"), "tasks say it themselves"),
    **dict.fromkeys(("tensor_parallel_plan", "tensor_parallel_dim"), "it measures on one device"),
    "system_prompt": "it has no conversation",
    "compile": "its steps are not compiled",
    "log_level": "it says little",
    "cudnn_deterministic_mode": "it trains nothing",
}
# What is measured, and the settings that mean nothing without it.
MEASURED = ("dataset", "tasks", "human_eval")
OF = {
    ("dataset",): ("collate_fn", "max_batches", "layers", "num_speculations", "picture"),
    ("tasks",): ("task_path", "num_fewshot", "limit", "apply_chat_template"),
    ("tasks", "human_eval"): ("exit_layer", "self_speculation", "max_new_tokens"),
}


def check_measured(cfg: DictConfig) -> None:
    """Raises a ValueError if nothing is to be measured, or a setting would be ignored."""
    if all(cfg.get(key) is None for key in MEASURED):
        raise ConfigError(
            "dataset: None, and neither tasks nor human_eval: nothing to measure. Allowed: one or more of "
            "dataset={_component_: ...}, tasks=[arc_easy], human_eval={file: HumanEval.jsonl.gz, execute: true}"
        )
    for needed, keys in OF.items():
        for key in keys:
            if cfg.get(key) is not None and all(cfg.get(need) is None for need in needed):
                raise ConfigError(f"{key}: {cfg[key]} needs {' or '.join(needed)}, which is not there. Set {key}=null")
    if cfg.get("exit_layer") is not None and cfg.get("self_speculation") is not None:
        raise ConfigError(
            f"exit_layer: {cfg.exit_layer} is set beside self_speculation. For all answers from that exit: "
            f"exit_layer={cfg.exit_layer} self_speculation=null"
        )


def checkpoints(cfg: DictConfig) -> dict[str, DictConfig]:
    """The config once for its own checkpoint, and once for each of `compare`, by name.

    Raises:
        ValueError: if `compare` is no mapping of names to parts of the checkpointer section.
    """
    compare = OmegaConf.create({}) if cfg.get("compare") is None else cfg.compare
    if not isinstance(compare, DictConfig) or not all(isinstance(part, DictConfig) for part in compare.values()):
        raise ConfigError(
            f"compare: {compare!r} is not allowed. Allowed: names with what differs in the checkpointer section; for "
            'example "compare={before: {checkpoint_dir: /tmp/model, checkpoint_files: [model.safetensors]}}"'
        )
    others = {str(name): _with_checkpointer(cfg, section) for name, section in compare.items()}
    own = Path(str(cfg.checkpointer.get("checkpoint_dir"))).name
    if own in others:
        raise ConfigError(f"compare.{own}: the name is that of the config's own checkpoint. Give another; for example "
                         f'"compare={{before: ...}}"')  # fmt: skip
    return {own: cfg} | others


def _with_checkpointer(cfg: DictConfig, section: DictConfig) -> DictConfig:
    """The config with other values in its checkpointer section."""
    other = cfg.copy()
    for key, value in section.items():
        before = cfg.checkpointer.get(key)
        # checkpoint_files may be a list in one, and a mapping in the other.
        both = isinstance(before, DictConfig) and isinstance(value, DictConfig)
        other.checkpointer[key] = OmegaConf.merge(before, value) if both else value
    return other
