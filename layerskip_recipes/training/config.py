"""FinetuneConfig: every key of a finetune config with its default and meaning, and the rules about several keys."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params
from torchtune.training import setup_torch_profiler

from layerskip_recipes.checkpoint.checkpointers import check_checkpointer, starts_from_scratch
from layerskip_recipes.config.choices import Choices
from layerskip_recipes.config.components import Component, Takes
from layerskip_recipes.config.layer_strings import select_exits
from layerskip_recipes.config.recipe_config import RecipeConfig
from layerskip_recipes.config.schema import (
    Auto,
    Flag,
    Fraction,
    Layers,
    PositiveInt,
    Text,
    check,
    nearest,
)
from layerskip_recipes.data.datasets import CollateFn, Datasets
from layerskip_recipes.errors import ConfigError, mistakes_of
from layerskip_recipes.model.adapters import adapter_names, check_adapters, check_lora_arguments
from layerskip_recipes.model.decoder import layerskip_decoder
from layerskip_recipes.model.hf_decoder import is_hf_decoder
from layerskip_recipes.model.layer_dropout import LayerDropout, LayerDropoutSection
from layerskip_recipes.model.memory import weight_bytes
from layerskip_recipes.model.nf4 import check_nf4, packs_weights
from layerskip_recipes.processes import num_processes
from layerskip_recipes.training.draft.loss import DraftSection
from layerskip_recipes.training.early_exit import EarlyExitLoss, EarlyExitLossSection
from layerskip_recipes.training.plan import choose_training


def _with_default_component(section: Any) -> Any:
    if not isinstance(section, Mapping):
        raise ConfigError(f": {section!r} is not allowed. Allowed: a section like torchtune's, or null")
    return {"_component_": "torchtune.training.setup_torch_profiler", **section}


def _is_torchtunes_profiler(profiler: Component) -> Component:
    if profiler.target is not setup_torch_profiler:
        allowed = "torchtune.training.setup_torch_profiler"
        raise ConfigError(f"._component_: {profiler.path!r} is not allowed. Allowed: {allowed}")
    return profiler


Count = PositiveInt | None


class FinetuneConfig(RecipeConfig):
    """The keys of `layerskip_finetune`: torchtune's, and `layer_dropout` and `early_exit_loss`, or `draft`."""

    # `RunLog` adds these to the config that it logs, which can be run again.
    IGNORED: ClassVar[Mapping[str, type]] = {"versions": dict, "curriculum": dict}
    REFUSED: ClassVar[Mapping[str, str]] = {
        "fsdp": "sharding needs no section. Offloading is fsdp_cpu_offload",
        "quantizer": "it is for quantisation-aware training",
    }
    REQUIRES: ClassVar = {
        "dataset_val": ("run_val_every_n_steps", "batch_size_val", "max_batches_val", "layers_val"),
        "save_every_n_steps": ("enable_async_checkpointing",),
        "ac_mode": ("ac_option",),
    }

    output_dir: Annotated[Text, Field(examples=["/tmp/layerskip"])]
    """Where checkpoints and logs go."""

    layer_dropout: LayerDropoutSection | None = None
    """Layer dropout; null trains every layer with every sample."""
    early_exit_loss: EarlyExitLossSection | None = None
    """The losses of early exits; null trains the last layer's alone."""
    draft: DraftSection | None = None
    """Train a draft for the model, which stays as it is."""
    loss: Annotated[Component, Takes()]
    """`torchtune.modules.loss.CEWithChunkedOutputLoss`, or `torch.nn.CrossEntropyLoss` with its `label_smoothing`. In
    place of `num_output_chunks`, `early_exit_loss.chunk_tokens` says for how many tokens logits exist at a time."""

    dataset: Datasets
    """A torchtune dataset or a list of them, packed or padded."""
    collate_fn: CollateFn = None
    """What pads the samples of a batch, where they are not packed; null is `torchtune.data.padded_collate_sft`."""
    shuffle: bool = True
    """Draw the order of the samples for each epoch."""
    batch_size: Annotated[PositiveInt, Auto()] = 1
    """Samples of a micro-batch in each process; null: as many as fit into memory, at most 8."""
    compute_dtype: Annotated[Literal["fp32", "bf16"], Auto()] = "fp32"
    """With `dtype: fp32`, `bf16` multiplies in bf16 (null: on a GPU), while weights, gradients and the optimizer's
    state stay in fp32, with AdamW 16 bytes per weight. `dtype: bf16` takes 8, but rounds steps away: near 0.02 its
    numbers lie 1.2e-4 apart, so a step of 2e-5 does not move a weight."""
    gradient_accumulation_steps: Annotated[PositiveInt, Auto()] = 1
    """Micro-batches of an optimizer step; null: as many as make 8 samples."""
    epochs: PositiveInt = 1
    """Passes over the dataset."""
    max_steps_per_epoch: Count = None
    """The most optimizer steps of an epoch."""

    optimizer: Annotated[Component, Takes(positional=1)]
    """An optimizer of torch, torchao or bitsandbytes. `lr: null` takes 3e-4 for adapters; for all weights 3e-5 at the
    width of Llama 2 7B, and in inverse proportion to the width. Where `dtype: null` becomes bf16 for all weights,
    `StochasticAdamW` takes the place of AdamW."""
    optimizer_in_bwd: Flag = False
    """Update each weight as soon as its gradient is there, so that no two gradients exist at a time."""
    lr_scheduler: Annotated[Component, Takes("num_training_steps", "last_epoch", positional=1)] | None = None
    """One of `torchtune.training.lr_schedulers`; null keeps the learning rate."""
    clip_grad_norm: Annotated[float, Field(ge=0, examples=[1.0])] | Literal["inf"] | None = None
    """The largest norm of the gradient; "inf" logs the norm and clips nothing."""
    init_std: Annotated[float, Field(gt=0, examples=[0.02])] | None = None
    """The standard deviation of weights from scratch, 0.02 by default."""
    compile: Flag = False
    """Compile the layers and the loss; on a GPU the loss is compiled in any case."""

    enable_activation_checkpointing: Annotated[bool, Auto()] = False
    """Compute the activations of every layer again in the backward pass; null: where a sample only fits so."""
    ac_mode: Literal["full", "selective"] | None = None
    """`full` checkpoints every layer, `selective` each `ac_option`-th."""
    ac_option: Annotated[int, Field(ge=1, examples=[2])] | None = None
    """Every how many layers one is checkpointed, with `ac_mode: selective`; null is 2."""
    enable_activation_offloading: Flag = False
    """Keep the checkpointed layers' inputs in the memory of the CPU; needs a GPU."""

    data_parallel_replicate_dim: Annotated[int, Field(ge=1, examples=[2])] | None = None
    """Copies of the sharded model (HSDP)."""
    data_parallel_shard_dim: Literal[-1] | PositiveInt | None = None
    """Ranks over which each copy is sharded; -1 takes those that are left."""
    tensor_parallel_dim: Annotated[int, Field(ge=1, examples=[2])] | None = None
    """Ranks that share each matrix; needs `tensor_parallel_plan`."""
    tensor_parallel_plan: Annotated[Component, Takes()] | None = None
    """torchtune's plan, such as `{_component_: torchtune.models.llama3.base_llama_tp_plan}`."""
    custom_sharded_layers: Annotated[list[Text], Field(examples=["[tok_embeddings,output]"])] | None = None
    """Modules that are sharded by themselves; the loss gathers the head once for all exits."""
    fsdp_cpu_offload: Flag = False
    """Keep parameters, gradients and the optimizer's state in the memory of the CPU."""
    fsdp_reshard_after_forward: bool | None = True
    """Let go of gathered weights after the forward pass, and gather them again for the backward pass."""

    save_adapter_weights_only: Flag = False
    """Checkpoints hold the adapters without the merged model."""
    low_cpu_ram: Flag = False
    """Unpack QLoRA's weights into a file when a checkpoint is written."""

    save_every_n_steps: Annotated[int, Field(ge=1, examples=[500])] | None = None
    """Write a checkpoint `step_N` too, beside the `epoch_N` after each epoch."""
    keep_last_n_checkpoints: Annotated[int, Field(ge=1, examples=[2])] | None = None
    """Keep the newest so many and delete older ones; a run that starts anew refuses a folder with an earlier run's."""
    enable_async_checkpointing: Flag = False
    """Write each `step_N` in the background, by every rank its shards; only to resume from. With torchao's optimizers
    training waits for it."""
    resume_from_checkpoint: Flag = False
    """Go on from the newest complete checkpoint under `output_dir`: data order, dropout, curriculum, schedules,
    optimizer. The number of processes may change if `batch_size` x `gradient_accumulation_steps` x processes stays. A
    changed dataset, curriculum or model is refused; more `epochs` are allowed."""

    dataset_val: Datasets | None = None
    """Held-out data, like `dataset`: measured before the first step and after the last."""
    run_val_every_n_steps: Annotated[int, Field(ge=1, examples=[200])] | None = None
    """Measure `dataset_val` after every so many steps too."""
    batch_size_val: Count = None
    """Samples of a batch of `dataset_val`; null is `batch_size`."""
    max_batches_val: Annotated[int, Field(ge=1, examples=[50])] | None = None
    """The most batches of `dataset_val` in each process."""
    layers_val: Layers | None = None
    """The layers whose exits are measured; null measures all."""
    val_loss_margin: Annotated[float, Field(ge=0, examples=[0.05])] = 0.05
    """Warn if the last layer's loss on `dataset_val` exceeds that at the start by more than this share."""

    cudnn_deterministic_mode: Literal[0, 1, 2, "default", "warn", "error"] | None = None
    """torch's `set_deterministic_debug_mode`."""
    metric_logger: Annotated[Component, Takes()]
    """One of `torchtune.training.metric_logging`."""
    log_every_n_steps: PositiveInt = 1
    """Log the metrics of every so many steps."""
    log_peak_memory_stats: Flag = False
    """Log the GPU's peak memory too."""
    profiler: (
        Annotated[Component, BeforeValidator(_with_default_component), AfterValidator(_is_torchtunes_profiler), Takes()]
        | None
    ) = None
    """torchtune's profiler section; it records with `enabled: true`."""

    def choose(self, choices: Choices) -> None:
        # The choices build the model and the draft.
        check_lora_arguments(self.model)
        if self.draft is not None:
            self.draft.check_against(self.meta_model)
        choose_training(self, choices)

    # ---- derived from the keys ----

    @property
    def multiplies_in_bf16(self) -> bool:
        """Whether products of weights in fp32 are calculated in bf16."""
        return self.dtype == "fp32" and self.compute_dtype == "bf16"

    @cached_property
    def exit_loss(self) -> EarlyExitLoss:
        """The early-exit loss over the `loss` section; without `early_exit_loss` only the last layer has one."""
        base = self.loss.build()
        given: dict[str, Any] = {}
        if (ignored := getattr(base, "ignore_index", -100)) != -100:
            raise ConfigError(f"loss.ignore_index: {ignored}, but torchtune's datasets mask labels with -100; -100")
        if isinstance(base, torch.nn.CrossEntropyLoss):
            check("loss.label_smoothing", base.label_smoothing, Fraction)
            given["label_smoothing"] = base.label_smoothing
            if base.weight is not None or base.reduction != "mean":
                raise ConfigError(
                    f"loss.reduction: {base.reduction!r}, or class weights, are not supported; use reduction: mean"
                )
        elif not isinstance(base, CEWithChunkedOutputLoss):  # its chunks are early_exit_loss.chunk_tokens here
            raise ConfigError(
                f"loss._component_: {type(base).__name__} makes no early-exit loss. Allowed: "
                "torch.nn.CrossEntropyLoss, torchtune.modules.loss.CEWithChunkedOutputLoss"
            )
        if self.early_exit_loss is None:
            return EarlyExitLoss(curriculum=None, layers=str(self.num_layers - 1), **given)
        return EarlyExitLoss(**dict(self.early_exit_loss), **given)

    def build_layer_dropout(self) -> LayerDropout | None:
        """The dropout of the `layer_dropout` section, if there is one."""
        return None if self.layer_dropout is None else LayerDropout(self.num_layers, **dict(self.layer_dropout))

    @property
    def num_layers(self) -> int:
        return len(self.meta_model.layers)

    @property
    def checkpoint_bytes(self) -> int:
        """The bytes of a checkpoint's weights."""
        if self.save_adapter_weights_only:
            adapters = get_adapter_params(self.meta_model).values()
            return sum(parameter.numel() for parameter in adapters) * self.torch_dtype.itemsize
        if self.draft is None:
            return weight_bytes(self.meta_model, self.torch_dtype)
        draft = self.draft.build(layerskip_decoder(self.build_on_meta()))
        return sum(parameter.numel() for parameter in draft.parameters()) * torch.float32.itemsize

    @property
    def checkpoint_every_layers(self) -> int:
        """Every how many layers one's activations are computed again, 0 for none; torchtune has two ways to ask."""
        if self.ac_mode == "selective":
            return self.ac_option or 2
        return int(self.ac_mode == "full" or self.enable_activation_checkpointing)

    @property
    def validated_exits(self) -> list[int]:
        """The exits that validation measures, in order."""
        return select_exits(":" if self.layers_val is None else self.layers_val, self.num_layers, key="layers_val")

    # ---- rules about several keys ----

    def check_together(self) -> Iterator[str]:
        if self.enable_activation_offloading and self.checkpoint_every_layers != 1:
            yield (
                "enable_activation_offloading: True needs every layer checkpointed, since it would also copy the "
                "weights of the other layers; for example enable_activation_checkpointing=true ac_mode=null"
            )
        for rule in (
            self._check_optimizer,
            self._check_adapters,
            self._check_checkpointer,
            self._check_sharded_layers,
            self._check_draft,
            self._check_sections,
        ):
            yield from mistakes_of(rule)

    def _check_optimizer(self) -> None:
        """Optimizer and schedule may refuse their arguments, so both are built once for a single number."""
        beside = {
            "gradient_accumulation_steps": self.gradient_accumulation_steps > 1,
            "clip_grad_norm": self.clip_grad_norm is not None,
            # Its gradients may still be on their way when the optimizer steps (pytorch 180666).
            "fsdp_cpu_offload": self.fsdp_cpu_offload,
        }
        for key in (key for key, given in beside.items() if given and self.optimizer_in_bwd):
            off = {"gradient_accumulation_steps": 1, "clip_grad_norm": "null"}.get(key, "false")
            raise ConfigError(
                f"{key}: {getattr(self, key)} does not go with optimizer_in_bwd, which steps at each backward. Set "
                f"{key}={off} or optimizer_in_bwd=false"
            )
        optimizer = self.optimizer.build([torch.nn.Parameter(torch.zeros(1))])
        if self.lr_scheduler is not None:
            self.lr_scheduler.build(optimizer, num_training_steps=1, last_epoch=-1)

    def _check_adapters(self) -> None:
        safe = self.checkpointer.get("safe_serialization") is not False
        adapters_only = self.save_adapter_weights_only
        check_adapters(self.model, self.meta_model, save_adapter_weights_only=adapters_only, safe_serialization=safe)
        if packs_weights(self.model):
            check_nf4(self.meta_model, num_processes(), any_size=is_hf_decoder(self.meta_model))
        if adapter_names(self.meta_model) and starts_from_scratch(self.checkpointer):
            raise ConfigError(
                f"checkpointer.checkpoint_files: missing, and the adapters of {self.model.path} need weights; "
                "for example [model.safetensors]"
            )
        if adapter_names(self.meta_model) and self.optimizer_in_bwd:
            raise ConfigError(
                "optimizer_in_bwd: True saves nothing with adapters, whose gradients are small. Set it false"
            )

    def _check_checkpointer(self) -> None:
        check_checkpointer(self, trains=True)

    def _check_sections(self) -> None:
        """Layers and exits must be the model's."""
        assert self.validated_exits
        if self.layer_dropout is not None and getattr(self.meta_model, "layer_dropout", None) is not None:
            raise ConfigError("layer_dropout: is set both in the model section and at top level; keep one")
        self.build_layer_dropout()
        self.exit_loss.enabled(self.num_layers, 0, 1)

    def _check_draft(self) -> None:
        """A draft is trained beside a model that stays as it is."""
        if self.draft is None:
            return
        for key in ("layer_dropout", "early_exit_loss", "layers_val"):
            if getattr(self, key) is not None:
                raise ConfigError(f"{key}: does nothing beside draft, where the model stays as it is. Set {key}=null")
        if adapter_names(self.meta_model) or starts_from_scratch(self.checkpointer):
            what = "adapters" if adapter_names(self.meta_model) else "no weights"
            raise ConfigError(
                f"draft: needs a model that stays as it is, and this one has {what}. Allowed: a model section without "
                "LoRA, and a checkpointer that reads weights; or draft=null"
            )
        if (self.tensor_parallel_dim or 1) > 1:
            raise ConfigError(
                f"tensor_parallel_dim: {self.tensor_parallel_dim} does not go with draft; FSDP shards it: "
                "tensor_parallel_dim=null"
            )

    def _check_sharded_layers(self) -> None:
        """FSDP gathers in a forward, which a list of layers lacks. torchtune's configs name a tied head too."""
        modules = {n for n, m in self.meta_model.named_modules() if not isinstance(m, torch.nn.ModuleList)} | {"output"}
        for name in (name for name in self.custom_sharded_layers or () if name not in modules):
            raise ConfigError(
                f"custom_sharded_layers: {name!r} is no module of the model. "
                f"{nearest(name, {m for m in modules if m and 'layers' not in m})}; for example "
                "custom_sharded_layers=[tok_embeddings,output]"
            )
