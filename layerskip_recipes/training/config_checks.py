"""The rules of a finetune config that involve several keys. Each mistake is one message."""

from collections.abc import Iterator

import torch
from torchtune.modules import TiedLinear

from layerskip_recipes.checkpoint.checkpointer_checks import check_checkpointer
from layerskip_recipes.checkpoint.checkpointers import starts_from_scratch
from layerskip_recipes.config.layer_strings import select_exits
from layerskip_recipes.config.schema import nearest
from layerskip_recipes.errors import mistakes_of
from layerskip_recipes.families.hf_decoder import is_hf_decoder
from layerskip_recipes.model.adapters import adapter_mistakes, adapter_names
from layerskip_recipes.model.nf4 import check_nf4, packs_weights
from layerskip_recipes.processes import num_processes
from layerskip_recipes.training.draft_loss import DraftSection
from layerskip_recipes.training.keys import FinetuneKeys


def conflicts(cfg: FinetuneKeys) -> Iterator[str]:
    """A message for each conflict between keys."""
    yield from _check_offloading(cfg)
    yield from _check_optimizer_in_backward(cfg)
    yield from _check_parallelism(cfg)
    yield from _check_what_is_trained(cfg)
    # A rule that fails to build a part of the config must not hide the mistakes of other rules.
    yield from mistakes_of(_build_optimizer, cfg)
    yield from mistakes_of(_check_adapters, cfg)
    yield from mistakes_of(check_checkpointer, cfg, trains=True)
    yield from mistakes_of(_check_sections, cfg)
    if cfg.draft is not None:
        yield from _check_draft(cfg, cfg.draft)


def _check_offloading(cfg: FinetuneKeys) -> Iterator[str]:
    on_gpu = cfg.device.startswith("cuda")
    if cfg.enable_activation_offloading and not (on_gpu and cfg.checkpoint_every_layers == 1):
        yield (
            f"enable_activation_offloading: True on {cfg.device} needs device=cuda, and every layer checkpointed, "
            "since it would also copy the weights of the other layers; for example "
            "enable_activation_checkpointing=true ac_mode=null"
        )


def _check_optimizer_in_backward(cfg: FinetuneKeys) -> Iterator[str]:
    if not cfg.optimizer_in_bwd:
        return
    if cfg.gradient_accumulation_steps > 1:
        yield (
            f"gradient_accumulation_steps: {cfg.gradient_accumulation_steps} does not go with optimizer_in_bwd, which "
            "steps at each backward. Set gradient_accumulation_steps=1 or optimizer_in_bwd=false"
        )
    if cfg.clip_grad_norm is not None:
        yield (
            f"clip_grad_norm: {cfg.clip_grad_norm} does not go with optimizer_in_bwd, which steps at each backward. "
            "Set clip_grad_norm=null or optimizer_in_bwd=false"
        )
    if cfg.fsdp_cpu_offload:  # offloaded gradients may still be on their way when the optimizer steps (pytorch 180666)
        yield (
            "fsdp_cpu_offload: True does not go with optimizer_in_bwd, which steps at each backward. "
            "Set fsdp_cpu_offload=false or optimizer_in_bwd=false"
        )
    if adapter_names(cfg.meta_model):
        yield (
            "optimizer_in_bwd: True does not go with adapters, whose gradients are small. Set optimizer_in_bwd=false"
        )
    if num_processes() == 1:
        return
    if cfg.draft is not None and cfg.draft.kind == "adapter":
        yield (
            "optimizer_in_bwd: True does not go with draft.kind=adapter on several processes, whose layers run twice "
            "in a step. Set optimizer_in_bwd=false"
        )
    if isinstance(cfg.meta_model.output, TiedLinear) and "tok_embeddings" in (cfg.custom_sharded_layers or ()):
        yield (
            "optimizer_in_bwd: True does not go with custom_sharded_layers: [tok_embeddings] and a tied head: their "
            "weight would step twice. Set optimizer_in_bwd=false, or leave tok_embeddings out"
        )


def _check_parallelism(cfg: FinetuneKeys) -> Iterator[str]:
    if num_processes() > 1 and cfg.optimizer.path.startswith("torchao."):
        yield (
            f"optimizer._component_: does not go with several processes: torch cannot gather the state of "
            f"{cfg.optimizer.path} for a checkpoint. Set optimizer._component_=torch.optim.AdamW"
        )
    replicas = cfg.data_parallel_replicate_dim or 1
    if replicas > 1 and packs_weights(cfg.model):
        yield (
            f"data_parallel_replicate_dim: {replicas} does not go with QLoRA, whose packed weights are sharded over "
            "all ranks. Set data_parallel_replicate_dim=1"
        )
    ranks_per_matrix = cfg.tensor_parallel_dim or 1
    if ranks_per_matrix > 1 and adapter_names(cfg.meta_model):
        yield (
            f"tensor_parallel_dim: {ranks_per_matrix} does not go with adapters, which torchtune's plans do not split. "
            "Set tensor_parallel_dim=1"
        )
    if ranks_per_matrix > 1 and cfg.draft is not None:
        yield (
            f"tensor_parallel_dim: {ranks_per_matrix} does not go with draft, which FSDP shards. "
            "Set tensor_parallel_dim=null"
        )


def _check_what_is_trained(cfg: FinetuneKeys) -> Iterator[str]:
    """A draft goes with neither layer dropout nor early exits, and layer dropout has one section."""
    has_draft = cfg.draft is not None
    dropout_of_model = getattr(cfg.meta_model, "layer_dropout", None)
    if has_draft and cfg.layer_dropout is not None:
        yield "layer_dropout: does not go with draft. Set layer_dropout=null"
    if dropout_of_model is not None and cfg.layer_dropout is not None:
        yield "layer_dropout: does not go with layer_dropout in the model section. Set layer_dropout=null"
    if has_draft and dropout_of_model is not None:
        yield "model.layer_dropout: does not go with draft. Set model.layer_dropout=null"
    if has_draft and cfg.early_exit_loss is not None:
        yield "early_exit_loss: does not go with draft. Set early_exit_loss=null"
    if has_draft and cfg.exits_val is not None:
        yield f"exits_val: {cfg.exits_val} does not go with draft. Set exits_val=null"


def _build_optimizer(cfg: FinetuneKeys) -> None:
    """Build optimizer and schedule once for a single weight: they may refuse their arguments."""
    optimizer = cfg.optimizer.build([torch.nn.Parameter(torch.zeros(1))])
    if cfg.lr_scheduler is not None:
        cfg.lr_scheduler.build(optimizer, num_training_steps=1, last_epoch=-1)


def _check_adapters(cfg: FinetuneKeys) -> Iterator[str]:
    yield from adapter_mistakes(cfg.model, cfg.meta_model, cfg.save_adapter_weights_only)
    if packs_weights(cfg.model):
        check_nf4(cfg.meta_model, num_processes(), any_size=is_hf_decoder(cfg.meta_model))
    if not adapter_names(cfg.meta_model):
        return
    if cfg.checkpointer.get("safe_serialization") is False:
        yield (
            "checkpointer.safe_serialization: False, but adapters for PEFT are written as safetensors only; set "
            "checkpointer.safe_serialization=true"
        )
    if starts_from_scratch(cfg.checkpointer):
        yield (
            f"checkpointer.checkpoint_files: missing, but the adapters of {cfg.model.path} need base weights; "
            "for example [model.safetensors]"
        )


def _check_sections(cfg: FinetuneKeys) -> Iterator[str]:
    """Layers, exits and modules must exist in the model."""
    assert cfg.validated_exits
    # FSDP gathers weights in a forward pass, which a ModuleList lacks. `output` may name a tied head.
    modules = {n for n, m in cfg.meta_model.named_modules() if not isinstance(m, torch.nn.ModuleList)} | {"output"}
    for name in (name for name in cfg.custom_sharded_layers or () if name not in modules):
        yield (
            f"custom_sharded_layers: {name!r} is no module of the model. "
            f"{nearest(name, {m for m in modules if m and 'layers' not in m})}; for example "
            "custom_sharded_layers=[tok_embeddings,output]"
        )
    cfg.build_layer_dropout()
    cfg.exit_loss.enabled(cfg.num_layers, 0, 1)
    section, num_layers = cfg.early_exit_loss, cfg.num_layers
    early = [] if section is None else [e for e in select_exits(section.exits, num_layers) if e < num_layers]
    if section is not None and section.scale > 0 and 0 < len(early) < num_layers - 1:
        steps = section.interval  # of a whole rotation
        if cfg.exit_loss.trained(num_layers, steps, steps) == [num_layers]:
            yield (
                f"early_exit_loss.exits: {section.exits!r} trains no early exit, because scale_fn "
                f"{section.scale_fn!r} gives exit 1 no weight; for example early_exit_loss.scale_fn=uniform"
            )


def _check_draft(cfg: FinetuneKeys, draft: DraftSection) -> Iterator[str]:
    trains_model = draft.finetune_model
    if not trains_model and (smoothing := getattr(cfg.loss.build(), "label_smoothing", 0)):
        yield f"loss.label_smoothing: {smoothing} does nothing with draft, which learns no labels. Set it to 0"
    reader = cfg.checkpointer.target
    if not (isinstance(reader, type) or starts_from_scratch(cfg.checkpointer)):
        yield (
            f"checkpointer._component_: {cfg.checkpointer.path} is a function, and a draft's layerskip.json "
            "names a class. Allowed: layerskip_recipes.hf_checkpointer, torchtune's checkpointers, or draft=null"
        )
    if starts_from_scratch(cfg.checkpointer):
        yield (
            "draft: copies layers of a trained model, and this one has no weights. Allowed: a checkpointer that reads "
            "weights; or draft=null"
        )
    if adapter_names(cfg.meta_model):
        if not trains_model:
            yield (
                "draft.finetune_model: False, and so the model's adapters would learn nothing. Set "
                "draft.finetune_model=true, or leave LoRA out (model.lora=null)"
            )
        if cfg.save_adapter_weights_only:
            yield (
                "save_adapter_weights_only: True, but a draft is for a whole model beside it. Set "
                "save_adapter_weights_only=false"
            )
