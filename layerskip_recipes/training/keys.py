"""FinetuneKeys: every key of a finetune config, its default and meaning, and the values that follow from the keys."""

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params

from layerskip_recipes.acceptance.measuring import exits_to_measure
from layerskip_recipes.config.components import Component, Takes
from layerskip_recipes.config.layer_strings import select_exits
from layerskip_recipes.config.recipe_config import RecipeConfig
from layerskip_recipes.config.schema import (
    AUTO,
    Auto,
    Exits,
    Flag,
    Fraction,
    PositiveInt,
    Text,
    check,
)
from layerskip_recipes.data.datasets import CollateFn, Datasets
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.adapters import adapter_names
from layerskip_recipes.model.decoder import layerskip_decoder
from layerskip_recipes.model.layer_dropout import LayerDropout, LayerDropoutSection
from layerskip_recipes.model.memory import weight_bytes
from layerskip_recipes.training.draft_loss import DraftSection
from layerskip_recipes.training.early_exit import EarlyExitLoss, EarlyExitLossSection


def _with_default_component(section: Any) -> Any:
    if isinstance(section, Mapping):
        return {"_component_": "torchtune.training.setup_torch_profiler", **section}
    return section


class FinetuneKeys(RecipeConfig):
    """The keys of `layerskip_finetune`: torchtune's, plus `layer_dropout` and `early_exit_loss`, or `draft`."""

    # `RunLog` adds `versions` to the logged config, which can be run again. `low_cpu_ram` is in torchtune's configs.
    IGNORED: ClassVar[Mapping[str, type]] = {"versions": dict, "low_cpu_ram": bool}
    REFUSED: ClassVar[Mapping[str, str]] = {
        "fsdp": "sharding needs no section. Offloading is fsdp_cpu_offload",
        "quantizer": "it is for quantisation-aware training",
    }
    REQUIRES: ClassVar = {
        "dataset_val": ("run_val_every_n_steps", "exits_val"),
        "save_every_n_steps": ("enable_async_checkpointing",),
        "ac_mode": ("ac_option",),
        "tensor_parallel_dim": ("tensor_parallel_plan",),
    }

    output_dir: Annotated[Text, Field(examples=["/tmp/layerskip"])]
    """Folder for checkpoints and logs."""

    layer_dropout: LayerDropoutSection | None = None
    """Layer dropout; null trains every layer on every sample."""
    early_exit_loss: EarlyExitLossSection | None = None
    """Early-exit losses; null trains on the last layer's loss only."""
    draft: DraftSection | None = None
    """Train a draft for the model, which is frozen or finetuned beside it."""
    loss: Annotated[Component, Takes()]
    """`torchtune.modules.loss.CEWithChunkedOutputLoss`, or `torch.nn.CrossEntropyLoss` with its `label_smoothing`.
    `early_exit_loss.chunk_tokens` replaces `num_output_chunks`."""

    dataset: Datasets
    """A torchtune dataset or a list of them, packed or padded."""
    collate_fn: CollateFn = None
    """Pads the samples of a batch unless they are packed; null is `torchtune.data.padded_collate_sft`."""
    shuffle: bool = True
    """Shuffle the samples anew in each epoch."""
    batch_size: Annotated[PositiveInt, Auto()] = 1
    """Samples per micro-batch and process; auto: as many as fit into memory, at most 8."""
    compute_dtype: Annotated[Literal["fp32", "bf16"], Auto()] = "fp32"
    """With `dtype: fp32`, `bf16` multiplies in bf16 (auto: if the GPU or CPU has instructions for it). Weights,
    gradients and optimizer state stay in fp32; with AdamW they take 16 bytes per weight. `dtype: bf16` takes 8 bytes
    but loses small steps: near 0.02, bf16 numbers lie 1.2e-4 apart, so a step of 2e-5 does not move a weight."""
    gradient_accumulation_steps: Annotated[PositiveInt, Auto()] = 1
    """Micro-batches per optimizer step; auto: enough for 8 samples."""
    epochs: PositiveInt = 1
    """Passes over the dataset."""
    max_steps_per_epoch: PositiveInt | None = None
    """At most this many optimizer steps per epoch."""

    optimizer: Annotated[Component, Takes(positional=1)]
    """An optimizer of torch, torchao or bitsandbytes. `lr: auto` is 3e-4 for adapters. If all weights are trained, it
    is 3e-5 at the width of Llama 2 7B, and more for narrower models; if only a `copy` is trained, four times that. If
    `dtype: auto` then becomes bf16 in a training of all weights, `StochasticAdamW` replaces AdamW."""
    optimizer_in_bwd: Flag = False
    """Update each weight as soon as its gradient is computed, so that only one gradient exists at a time."""
    lr_scheduler: Annotated[Component, Takes("num_training_steps", "last_epoch", positional=1)] | None = None
    """One of `torchtune.training.lr_schedulers`; null keeps the learning rate."""
    clip_grad_norm: Annotated[float, Field(ge=0, examples=[1.0])] | Literal["inf"] | None = None
    """Largest norm of the gradient, of a model and of the draft beside it separately; "inf" logs the norm without
    clipping."""
    compile: Flag = False
    """Compile the layers and the loss; a GPU always compiles the loss."""

    enable_activation_checkpointing: Annotated[bool, Auto()] = False
    """Recompute every layer's activations in the backward pass; auto: if a sample does not fit otherwise."""
    ac_mode: Literal["full", "selective"] | None = None
    """`full` checkpoints every layer, `selective` every `ac_option`-th layer."""
    ac_option: Annotated[int, Field(ge=1, examples=[2])] | None = None
    """With `ac_mode: selective`, checkpoint every layer whose number is a multiple of this; null is 2."""
    enable_activation_offloading: Flag = False
    """Keep the inputs of checkpointed layers in CPU memory; needs a GPU."""

    data_parallel_replicate_dim: Annotated[int, Field(ge=1, examples=[2])] | None = None
    """Number of copies of the sharded model (HSDP)."""
    data_parallel_shard_dim: Literal[-1] | PositiveInt | None = None
    """Number of ranks over which each copy is sharded; -1 takes all remaining ranks."""
    tensor_parallel_dim: Annotated[int, Field(ge=1, examples=[2])] | None = None
    """Number of ranks that share each matrix; needs `tensor_parallel_plan`."""
    tensor_parallel_plan: Annotated[Component, Takes()] | None = None
    """torchtune's plan, such as `{_component_: torchtune.models.llama3.base_llama_tp_plan}`."""
    custom_sharded_layers: Annotated[list[Text], Field(examples=["[tok_embeddings,output]"])] | None = None
    """Modules to shard separately; the loss gathers the head once for all exits."""
    fsdp_cpu_offload: Flag = False
    """Keep parameters, gradients and optimizer state in CPU memory."""
    fsdp_reshard_after_forward: bool | None = True
    """Free gathered weights after the forward pass, and gather them again for the backward pass."""

    save_adapter_weights_only: Flag = False
    """Save only the adapters, without the merged model."""

    save_every_n_steps: Annotated[int, Field(ge=1, examples=[500])] | None = None
    """Number of steps between checkpoints `step_N`; `epoch_N` is always written after each epoch."""
    keep_last_n_checkpoints: Annotated[int, Field(ge=1, examples=[2])] | None = None
    """Keep this many of the newest checkpoints and delete older ones. A fresh run refuses an earlier run's folder."""
    answer_tokens: Annotated[int, Field(ge=0, examples=[2000000])] = 0
    """Write the answers of `dataset`, as at most so many token ids, beside each checkpoint (`answers.npz`). Generation
    then drafts from them too. They are training data: set 0, or delete the file, where these must stay private."""
    enable_async_checkpointing: Flag = False
    """Write each `step_N` in the background, with each rank writing its shards. Such checkpoints only serve to resume.
    With torchao's optimizers training waits for the write."""
    resume_from_checkpoint: Flag = False
    """Resume from the newest complete checkpoint under `output_dir`: data order, dropout, curriculum, schedules,
    optimizer. The number of processes may change if `batch_size` x `gradient_accumulation_steps` x processes stays the
    same. `epochs` may grow; a changed dataset, curriculum or model is refused."""

    dataset_val: Datasets | None = None
    """Held-out data, like `dataset`; measured before the first step and after the last, `batch_size` samples at a
    time."""
    run_val_every_n_steps: Annotated[int, Field(ge=1, examples=[200])] | None = None
    """Number of steps between further measurements of `dataset_val`."""
    exits_val: Exits | None = None
    """The exits that are measured; null: those with a loss, at most four of them. The last one is always measured."""

    cudnn_deterministic_mode: Literal[0, 1, 2, "default", "warn", "error"] | None = None
    """torch's `set_deterministic_debug_mode`."""
    metric_logger: Annotated[Component, Takes()]
    """One of `torchtune.training.metric_logging`."""
    log_every_n_steps: PositiveInt = 1
    """Number of steps between log lines."""
    log_peak_memory_stats: Flag = False
    """Also log the GPU's peak memory."""
    profiler: Annotated[Component, BeforeValidator(_with_default_component), Takes()] | None = None
    """torchtune's profiler section; records if `enabled: true`."""

    # Values that follow from the keys.

    @property
    def multiplies_in_bf16(self) -> bool:
        """Whether fp32 weights are multiplied in bf16."""
        return self.dtype == "fp32" and self.compute_dtype == "bf16"

    @cached_property
    def exit_loss(self) -> EarlyExitLoss:
        """The loss of the sections `loss` and `early_exit_loss`; without the second, only the last layer's."""
        base = self.loss.build()
        smoothing = 0.0
        if (ignored := getattr(base, "ignore_index", -100)) != -100:
            raise ConfigError(f"loss.ignore_index: {ignored}, but torchtune's datasets mask labels with -100; -100")
        if isinstance(base, torch.nn.CrossEntropyLoss):
            check("loss.label_smoothing", base.label_smoothing, Fraction)
            smoothing = base.label_smoothing
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
            chunk = AUTO if self.draft is None else self.draft.chunk_tokens
            return EarlyExitLoss(curriculum=None, exits=-1, chunk_tokens=chunk, label_smoothing=smoothing)
        return EarlyExitLoss(**dict(self.early_exit_loss), label_smoothing=smoothing)

    def build_layer_dropout(self) -> LayerDropout | None:
        return None if self.layer_dropout is None else LayerDropout(self.num_layers, **dict(self.layer_dropout))

    @property
    def num_layers(self) -> int:
        return len(self.meta_model.layers)

    @property
    def freezes_model(self) -> bool:
        """Whether only a draft is trained."""
        return self.draft is not None and not self.draft.finetune_model

    def _state_bytes(self, weight_itemsize: int) -> int:
        """Bytes of the optimizer's state for each trained weight: of Adam's averages; of other optimizers none."""
        name = self.optimizer.path.rpartition(".")[2]
        if "Adam" not in name:
            return 0
        return 2 if "8bit" in name or "Fp8" in name else 1 if "4bit" in name else 2 * weight_itemsize

    @property
    def trained_weights(self) -> tuple[int, int]:
        """The number of trained weights of the model, which may be adapters, and of the draft."""
        model = self.meta_model
        learned = [] if self.freezes_model else get_adapter_params(model).values() or model.parameters()
        draft = [] if self.draft is None else self.draft.build(layerskip_decoder(model)).parameters()
        return sum(p.numel() for p in learned), sum(p.numel() for p in draft)

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint: weights, adapters, the draft in fp32, and the optimizer's state of trained weights."""
        size, model_bytes = self.torch_dtype.itemsize, weight_bytes(self.meta_model, self.torch_dtype)
        trained, of_draft = self.trained_weights
        weights = 0 if self.freezes_model or self.save_adapter_weights_only else model_bytes
        weights += size * trained if adapter_names(self.meta_model) else 0
        return weights + trained * self._state_bytes(size) + of_draft * (4 + self._state_bytes(4))

    @property
    def checkpoint_every_layers(self) -> int:
        """Activation checkpointing of every n-th layer, 0 for none; torchtune has two ways to ask for it."""
        if self.ac_mode == "selective":
            return self.ac_option or 2
        return int(self.ac_mode == "full" or self.enable_activation_checkpointing)

    @property
    def validated_exits(self) -> list[int]:
        """The exits that validation measures, in ascending order."""
        if self.exits_val is not None:
            return sorted({*select_exits(self.exits_val, self.num_layers, key="exits_val"), self.num_layers})
        loss = self.early_exit_loss
        trained = [] if loss is None else select_exits(loss.exits, self.num_layers, key="early_exit_loss.exits")
        return [*exits_to_measure(trained, self.num_layers), self.num_layers]
