"""What a finetune config may say: every key with its check, our two sections, and their names in torchtune."""

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.training import setup_torch_profiler

from layerskip_recipes.checkpoint.checkpointers import check_checkpointer, checkpoint_files, is_scratch
from layerskip_recipes.config.checks import check_number
from layerskip_recipes.config.components import Component
from layerskip_recipes.config.settings import (
    COMMON,
    anything,
    build,
    build_on_meta,
    check_component,
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
from layerskip_recipes.model.adapters import adapter_names, check_adapters, check_lora_arguments
from layerskip_recipes.model.layer_dropout import LayerDropout
from layerskip_recipes.training.batches import PADDED, check_collate_fn, check_dataset, sections_of
from layerskip_recipes.training.early_exit import EarlyExitLoss
from layerskip_recipes.training.optimizers import layers_to_checkpoint
from layerskip_recipes.training.validation import chosen_exits


def _clip_grad_norm(key: str, value: object) -> None:
    # torchtune reads "inf" as: log the norm, clip nothing.
    if value != "inf":
        number(minimum=0, integer=False, optional=True, example=1.0)(key, value)


def _profiler(key: str, value: object) -> None:
    if value is None:
        return
    default = {"_component_": "torchtune.training.setup_torch_profiler"}
    if not isinstance(value, DictConfig):
        raise ConfigError(f"{key}: {value!r} is not allowed. Allowed: a section like torchtune's, or null")
    section = OmegaConf.merge(default, value)
    if check_component(section, key) is not setup_torch_profiler:
        raise ConfigError(
            f"{key}._component_: {section._component_!r} is not allowed. Allowed: {default['_component_']}"
        )


def logged(key: str, value: Any) -> None:
    """What RunLog adds to the config that it logs, which can be run again; a ValueError if it is anything else."""
    if not isinstance(value, DictConfig) or not {"total_steps", "torch"} & value.keys():
        raise ConfigError(f"{key}: {value!r} is no setting; a curriculum is early_exit_loss.curriculum")


POSITIVE = number(minimum=1)
SETTINGS = COMMON | {
    "versions": logged,
    "curriculum": logged,
    "output_dir": text("/tmp/layerskip", optional=False),
    "dataset": check_dataset,
    "shuffle": one_of(True, False),
    "collate_fn": check_collate_fn,
    "init_std": number(minimum=0, above=True, integer=False, optional=True, example=0.02),
    "resume_from_checkpoint": flag,
    "batch_size": POSITIVE,
    "epochs": POSITIVE,
    "max_steps_per_epoch": number(minimum=1, optional=True),
    "gradient_accumulation_steps": POSITIVE,
    "optimizer": component(positional=1),
    "optimizer_in_bwd": flag,
    "lr_scheduler": component(positional=1, given=["num_training_steps", "last_epoch"], optional=True),
    "clip_grad_norm": _clip_grad_norm,
    "loss": component(),
    "layer_dropout": anything,
    "early_exit_loss": anything,
    "compile": flag,
    "enable_activation_checkpointing": flag,
    "enable_activation_offloading": flag,
    "ac_mode": one_of(None, "full", "selective"),
    "ac_option": number(minimum=1, optional=True, example=2),
    "custom_sharded_layers": list_of(str, "[tok_embeddings,output]"),
    "fsdp_cpu_offload": flag,
    "fsdp_reshard_after_forward": flag,
    "data_parallel_shard_dim": number(minimum=-1, optional=True, example=-1),
    "data_parallel_replicate_dim": number(minimum=1, optional=True, example=2),
    "tensor_parallel_dim": number(minimum=1, optional=True, example=2),
    "tensor_parallel_plan": component(optional=True),
    "save_adapter_weights_only": flag,
    "low_cpu_ram": flag,
    "save_every_n_steps": number(minimum=1, optional=True, example=500),
    "keep_last_n_checkpoints": number(minimum=1, optional=True, example=2),
    "enable_async_checkpointing": flag,
    "dataset_val": lambda key, value: None if value is None else check_dataset(key, value),
    "run_val_every_n_steps": number(minimum=1, optional=True, example=200),
    "batch_size_val": number(minimum=1, optional=True),
    "max_batches_val": number(minimum=1, optional=True, example=50),
    "layers_val": anything,
    "val_loss_margin": number(minimum=0, integer=False, example=0.05),
    "cudnn_deterministic_mode": one_of(None, 0, 1, 2, "default", "warn", "error"),
    "metric_logger": component(),
    "log_every_n_steps": POSITIVE,
    "log_peak_memory_stats": flag,
    "profiler": _profiler,
}
REQUIRED = ("output_dir", "dataset", "optimizer", "loss", "metric_logger")
REFUSED = {
    "fsdp": "it is an old name. Offloading is fsdp_cpu_offload",
    "quantizer": "it is for quantisation-aware training",
}


def check_config(cfg: DictConfig) -> None:
    """All of a finetune config that can be wrong on any machine: nothing is loaded, downloaded or written.

    Raises:
        ValueError: the key, what was given, what is allowed.
    """
    check_settings(cfg, SETTINGS, REFUSED, REQUIRED)
    if cfg.get("optimizer_in_bwd"):
        if cfg.get("gradient_accumulation_steps", 1) > 1:
            raise ConfigError(
                f"gradient_accumulation_steps: {cfg.gradient_accumulation_steps} does not go with optimizer_in_bwd, "
                "which steps at each backward. Set gradient_accumulation_steps=1 or optimizer_in_bwd=false"
            )
        if cfg.get("clip_grad_norm") is not None:
            raise ConfigError(
                f"clip_grad_norm: {cfg.clip_grad_norm} does not go with optimizer_in_bwd. Set clip_grad_norm=null"
            )
    for key, needs in (
        ("run_val_every_n_steps", "dataset_val"),
        ("batch_size_val", "dataset_val"),
        ("max_batches_val", "dataset_val"),
        ("layers_val", "dataset_val"),
        ("val_loss_margin", "dataset_val"),
        ("enable_async_checkpointing", "save_every_n_steps"),
        ("ac_option", "ac_mode"),
    ):
        value = cfg.get(key)
        if value is not None and value is not False and cfg.get(needs) is None:
            raise ConfigError(f"{key}: {value!r} does nothing without {needs}; set that, or leave it out: ~{key}")
    if cfg.get("ac_mode") == "selective" and cfg.get("ac_option") is None:
        raise ConfigError("ac_option: missing with ac_mode=selective; for example ac_option=2 (each second layer)")
    if cfg.get("ac_mode") == "full" and cfg.get("ac_option") is not None:
        raise ConfigError(
            f"ac_option: {cfg.ac_option} does nothing with ac_mode=full; ac_mode=selective, or ~ac_option"
        )
    if cfg.get("enable_activation_offloading") and not layers_to_checkpoint(cfg):
        raise ConfigError("enable_activation_offloading: True needs enable_activation_checkpointing=true")
    if cfg.get("enable_activation_offloading") and layers_to_checkpoint(cfg) != 1:
        raise ConfigError(
            "enable_activation_offloading: True needs every layer checkpointed: of the others it would copy weights "
            f"away too. ac_option: {cfg.get('ac_option')}; for example ac_mode=full ac_option=null"
        )
    if cfg.checkpointer.get("output_dir", cfg.output_dir) != cfg.output_dir:
        raise ConfigError(
            f"checkpointer.output_dir: {cfg.checkpointer.output_dir!r} is not output_dir. Checkpoints go there: "
            "checkpointer.output_dir=${output_dir}"
        )
    _check_optimizer(cfg)

    section = cfg.get("model")
    if isinstance(section, DictConfig) and isinstance(section.get("_component_"), str):
        check_lora_arguments(Component(OmegaConf.to_container(section, resolve=True), "model"))
    model = build_on_meta(cfg)
    check_adapters(
        Component(OmegaConf.to_container(section, resolve=True), "model"),
        model,
        save_adapter_weights_only=bool(cfg.get("save_adapter_weights_only")),
        safe_serialization=cfg.checkpointer.get("safe_serialization") is not False,
    )
    check_checkpointer(cfg, model, trains=True)
    from_scratch = is_scratch(cfg.checkpointer) or not checkpoint_files(cfg.checkpointer)
    if cfg.get("init_std") is not None and not from_scratch:
        raise ConfigError(
            f"init_std: {cfg.init_std} does nothing where weights are loaded; ~init_std, or train from scratch: "
            "checkpointer._component_=layerskip_recipes.checkpoint.scratch_checkpointer"
        )
    if adapter_names(model) and from_scratch:
        raise ConfigError(
            f"checkpointer.checkpoint_files: missing, and the adapters of {cfg.model._component_} need weights; "
            "for example [model.safetensors]"
        )
    if adapter_names(model) and cfg.get("optimizer_in_bwd"):
        raise ConfigError("optimizer_in_bwd: True saves nothing with adapters, whose gradients are small. Set it false")
    chosen_exits(cfg, "layers_val", len(model.layers))
    if cfg.get("layer_dropout") is not None and getattr(model, "layer_dropout", None) is not None:
        raise ConfigError("layer_dropout: is set both in the model section and at top level; keep one")
    layer_dropout_section(cfg, len(model.layers), seed=0)
    loss_section(cfg, len(model.layers)).enabled(len(model.layers), 0, 1)


def _check_optimizer(cfg: DictConfig) -> None:
    """Raises a ValueError if the optimizer or the schedule refuses its arguments: both are tried on one number."""
    if "lr" in cfg.optimizer:
        check_number("optimizer.lr", cfg.optimizer.lr, minimum=0, integer=False, example="2e-5")
    optimizer = build(cfg.optimizer, "optimizer", [torch.nn.Parameter(torch.zeros(1))])
    build(cfg.get("lr_scheduler"), "lr_scheduler", optimizer, num_training_steps=1, last_epoch=-1)


def without_effect(cfg: DictConfig, loss: EarlyExitLoss) -> list[str]:
    """Settings that a config may well have, as from the one that it extends, and that change nothing in this run."""
    lines = []
    chunks, default = cfg.loss.get("num_output_chunks"), CEWithChunkedOutputLoss().num_output_chunks
    if chunks not in (None, default):
        lines.append(
            f"loss.num_output_chunks: {chunks} changes nothing here. The logits that exist at a time are those of "
            f"early_exit_loss.chunk_tokens tokens, {loss.chunk_tokens}"
        )
    interval = (cfg.get("early_exit_loss") or {}).get("interval")
    if interval is not None and loss.curriculum != "rotational":
        lines.append(
            f"early_exit_loss.interval: {interval} changes nothing with curriculum {loss.curriculum}, only with "
            "rotational"
        )
    packed = any(section.get("packed") for section in sections_of(cfg, "dataset"))
    if cfg.get("collate_fn") not in (None, PADDED) and packed:
        lines.append(f"collate_fn: {cfg.collate_fn} changes nothing where samples are packed; ~collate_fn")
    return lines


# torchtune's early-exit recipe names these by dotted path; here they have short names.
_UPSTREAM = "torchtune.modules.early_exit_loss."
UPSTREAM_CURRICULA = {
    _UPSTREAM + "RotationalEarlyExitCurriculum": "rotational",
    _UPSTREAM + "GradualEarlyExitCurriculum": "gradual",
}
UPSTREAM_SCALE_FNS = {
    _UPSTREAM + "uniform_loss_scale": "uniform",
    _UPSTREAM + "linear_l_loss_scale": "linear",
    _UPSTREAM + "sum_l_loss_scale": "layerskip",
    _UPSTREAM + "sqrt_l_loss_scale": "sqrt",
    _UPSTREAM + "inv_l_loss_scale": "inverse",
    _UPSTREAM + "inv_sqrt_l_loss_scale": "inverse_sqrt",
}


def layer_dropout_section(cfg: DictConfig, num_layers: int, seed: int, batch_size: int = 1) -> LayerDropout | None:
    """The `layer_dropout` section, checked and built; seed and batch_size are the same on all ranks."""
    given = ["num_layers", "seed", "batch_size"]
    section = cfg.get("layer_dropout")
    if isinstance(section, DictConfig) and "disable_on_eval" in section:
        # Upstream's key. Evaluation without dropout is the only way here.
        if section.disable_on_eval is not True:
            raise ConfigError(f"layer_dropout.disable_on_eval: {section.disable_on_eval!r}; only true is supported")
        section = OmegaConf.masked_copy(section, [key for key in section if key != "disable_on_eval"])
    arguments = check_section(section, "layer_dropout", LayerDropout, given=given)
    if section is None:
        return None
    if "prob" not in arguments:
        raise ConfigError("layer_dropout.prob: missing; for example layer_dropout.prob=0.1")
    return LayerDropout(num_layers, seed=seed, batch_size=batch_size, **arguments)


def loss_section(cfg: DictConfig, num_layers: int) -> EarlyExitLoss:
    """The `early_exit_loss` section over the `loss` section, checked and built. Without the former: the last exit."""
    base = build(cfg.loss, "loss")
    given = {"ignore_index": getattr(base, "ignore_index", -100)}
    if given["ignore_index"] != -100:
        raise ConfigError(
            f"loss.ignore_index: {base.ignore_index}, but torchtune's datasets mask labels with -100; -100"
        )
    if isinstance(base, torch.nn.CrossEntropyLoss):
        check_number("loss.label_smoothing", base.label_smoothing, minimum=0, maximum=1, integer=False)
        given["label_smoothing"] = base.label_smoothing
        if base.weight is not None or base.reduction != "mean":
            raise ConfigError(
                f"loss.reduction: {base.reduction!r}, or class weights, are not supported; use reduction: mean"
            )
    elif not isinstance(base, CEWithChunkedOutputLoss):  # whose chunks are ours: chunk_tokens
        raise ConfigError(
            f"loss._component_: {type(base).__name__} makes no early-exit loss. Allowed: torch.nn.CrossEntropyLoss, "
            "torchtune.modules.loss.CEWithChunkedOutputLoss"
        )
    if cfg.get("early_exit_loss") is None:
        return EarlyExitLoss(curriculum=None, layers=str(num_layers - 1), **given)
    arguments = check_section(
        cfg.early_exit_loss, "early_exit_loss", EarlyExitLoss, given=["ignore_index", "label_smoothing"]
    )
    upstream = str(arguments.get("curriculum")) in UPSTREAM_CURRICULA
    arguments |= {
        key: short[arguments[key]]
        for key, short in (("curriculum", UPSTREAM_CURRICULA), ("scale_fn", UPSTREAM_SCALE_FNS))
        if isinstance(arguments.get(key), str) and arguments[key] in short
    }
    if upstream and arguments["curriculum"] == "rotational" and "interval" not in arguments:
        # There `layers` is the first set, and rotates through the whole model: "0::4" means every 4th layer.
        start, _, step = str(arguments.get("layers", ":")).partition("::")
        if not step.isdigit() or start not in ("", "0"):
            raise ConfigError(
                f"early_exit_loss.layers: {arguments.get('layers')!r} says no interval for the rotation. "
                "Give it: curriculum: rotational, interval: 8"
            )
        arguments |= {"layers": ":", "interval": int(step)}
    return EarlyExitLoss(**arguments, **given)
