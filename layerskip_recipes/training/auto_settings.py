"""Chooses the `auto` keys of a training config from the model and the machine. In the configs `hf/*` all are `auto`.

Keys with a value are kept, and later choices take them into account.
"""

from functools import cached_property
from typing import Annotated

import torch
from torchtune.modules import TransformerDecoder
from torchtune.utils import get_logger

from layerskip_recipes.acceptance.exit_quality import MOST_CHUNK_TOKENS
from layerskip_recipes.acceptance.measuring import MOST_EXITS
from layerskip_recipes.config.auto import Choices, best_device, computes_in_bf16, has_bf16_products
from layerskip_recipes.config.components import Component, parameter_names
from layerskip_recipes.config.layer_strings import default_exit
from layerskip_recipes.config.schema import AUTO, Auto, check, refusal
from layerskip_recipes.data.tokenizer import SampleLength
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.adapters import adapter_names
from layerskip_recipes.model.draft import IN_A_ROW
from layerskip_recipes.model.head import chunk_tokens
from layerskip_recipes.model.memory import (
    adapter_gradient_bytes,
    cast_bytes,
    draft_state_bytes,
    exit_state_bytes,
    free_memory,
    layer_bytes,
    logits_bytes,
    measuring_bytes,
    token_bytes,
    training_bytes,
)
from layerskip_recipes.model.nf4 import packs_weights
from layerskip_recipes.processes import num_local_processes, num_processes
from layerskip_recipes.training.early_exit import enabled_exits
from layerskip_recipes.training.keys import FinetuneKeys

log = get_logger("INFO")

ADAPTER_RATE = 3e-4  # learning rate
DRAFT_RATE = 4  # times the learning rate of all weights, for a copy of layers that is trained as a draft
PER_STEP = "samples per step"  # noted in a checkpoint beside the chosen values
SAMPLES_PER_STEP = 8  # small steps learn most from a given number of tokens
LONGEST = {"cpu": 512}  # tokens per sample; on a CPU the limit is time, not memory
LONGEST_ELSEWHERE = 2048
SHORTEST = 128
ITEMSIZE = {"fp32": 4, "bf16": 2}
SPEED_ARGUMENTS = ("fused", "foreach", "capturable")  # of AdamW; they do not change its steps
ADAMW, ROUNDING = "torch.optim.AdamW", "layerskip_recipes.training.stochastic_adamw.StochasticAdamW"


def choose_training(cfg: FinetuneKeys, choices: Choices) -> None:
    """Choose the `auto` keys, in an order in which each choice may use the earlier ones."""
    if cfg.draft is not None:
        choices.pick("draft.exit_layer", lambda: default_exit(cfg.num_layers))
        choices.cfg.draft.check_against(cfg.meta_model)  # the later choices build the draft
        cfg = choices.cfg
    device = choices.pick("device", best_device)
    for section in ("early_exit_loss", "draft"):
        if getattr(cfg, section) is not None:
            choices.pick(f"{section}.chunk_tokens", lambda: chunk_tokens(device))
    if cfg.early_exit_loss is not None:
        usual = str(default_exit(cfg.num_layers))
        choices.pick("early_exit_loss.exits", lambda: ":" if cfg.early_exit_loss.curriculum else usual)
        # The paper's R for 16 and 32 layers; in deeper models, two exits and the last layer have a loss at each step.
        choices.pick("early_exit_loss.interval", lambda: 8 if cfg.num_layers <= 32 else cfg.num_layers // 2)
    memory = TrainingMemory(choices.cfg, device)
    bf16 = computes_in_bf16(device)

    # In bf16, rounding undoes small steps. Those of adapters are large enough, and drafts are trained in fp32 anyway.
    fits_fp32 = memory.all_weights and memory.fits("fp32", LONGEST["cpu"], recompute=True)
    dtype = choices.pick("dtype", lambda: "fp32" if not bf16 or fits_fp32 else "bf16")
    taken = {name: value for name, value in cfg.optimizer.arguments.items() if name not in SPEED_ARGUMENTS}
    replaceable = cfg.optimizer.path == ADAMW and (parameter_names(ROUNDING) or set()).issuperset(taken)
    if dtype == "bf16" and "dtype" in choices.chosen and memory.all_weights and replaceable:
        choices.set("optimizer", Component({"_component_": ROUNDING, **taken}, "optimizer"))
    choices.pick("compute_dtype", lambda: "bf16" if dtype == "fp32" and has_bf16_products(device) else "fp32")

    # The length of a sample, and the batch.
    length = choices.pick("tokenizer.max_seq_len", lambda: memory.longest_sample(dtype))
    check("tokenizer.max_seq_len", length, SampleLength)
    again = choices.pick(
        "enable_activation_checkpointing",
        lambda: (
            cfg.enable_activation_offloading
            or (cfg.ac_mode is None and not memory.fits(dtype, length or cfg.meta_model.max_seq_len, recompute=False))
        ),
    )
    ranks = max(num_processes() // (cfg.tensor_parallel_dim or 1), 1)  # tensor ranks share samples
    per_step = choices.stored.get(PER_STEP, SAMPLES_PER_STEP)
    if {PER_STEP, "batch_size"} <= choices.stored.keys():  # of a stopped run, which may have had fewer ranks
        choices.stored["batch_size"] = max(min(choices.stored["batch_size"], per_step // ranks), 1)
    size = choices.pick("batch_size", lambda: memory.samples(dtype, length or cfg.meta_model.max_seq_len, again))
    if length is not None and {"tokenizer.max_seq_len", "batch_size"} & choices.chosen.keys():
        wanted = memory.wanted_length if "tokenizer.max_seq_len" in choices.chosen else length
        memory.warn_if_little(dtype, wanted, length)
    if choices.chosen:
        memory.warn_of_saves(dtype, size * (length or cfg.meta_model.max_seq_len))
    more = 1 if cfg.optimizer_in_bwd else max(per_step // (size * ranks), 1)
    choices.pick("gradient_accumulation_steps", lambda: more)

    # Learning rate.
    if "lr" in cfg.optimizer.arguments:
        rate = full_learning_rate(cfg.meta_model.tok_embeddings.embedding_dim)
        if cfg.draft is not None and cfg.draft.kind == "copy" and cfg.freezes_model:
            rate *= DRAFT_RATE
        elif not memory.all_weights:
            rate = ADAPTER_RATE
        if choices.pick("optimizer.lr", lambda: rate) is None:
            raise ConfigError(refusal("optimizer.lr", None, Annotated[float, Auto()]))


def full_learning_rate(width: int) -> float:
    """3e-5 x 4096 / width, at most 1e-3, which is 3e-5 for Llama 2 7B as in the paper.

    The paper uses 2e-5 for 13B and 1e-4 for finetuning 1.5B; the formula gives 2.4e-5 and 6e-5. For SmolLM2 135M it
    gives 2.1e-4; 3.8e-4 and more made the last layer worse.
    """
    return min(float(f"{3e-5 * 4096 / width:.2g}"), 1e-3)


def draft_rate(model: TransformerDecoder) -> float:
    """A draft's learning rate over that of a model which is trained beside it, or of the model's adapters."""
    if not adapter_names(model):
        return DRAFT_RATE
    return DRAFT_RATE * full_learning_rate(model.tok_embeddings.embedding_dim) / ADAPTER_RATE


class TrainingMemory:
    """Estimates what fits into 90% of a GPU's memory, or of the machine's free memory."""

    def __init__(self, cfg: FinetuneKeys, device: str) -> None:
        self.cfg, self.device = cfg, device
        # Whether all weights are trained, not just a draft or adapters.
        self.all_weights = not (cfg.freezes_model or adapter_names(cfg.meta_model))
        self.trained, self.of_draft = cfg.trained_weights

    @cached_property
    def available(self) -> int:
        """Bytes that each process may take."""
        if self.device.startswith("cuda") and torch.cuda.is_available():
            return torch.cuda.get_device_properties(self.device).total_memory * 9 // 10
        return free_memory(torch.device("cpu")) * 9 // 10 // num_local_processes()

    @property
    def chunk(self) -> int:
        """The number of tokens whose logits are in memory at a time."""
        section = self.cfg.early_exit_loss or self.cfg.draft
        value = AUTO if section is None else section.chunk_tokens
        return chunk_tokens(self.device) if value == AUTO else value

    @property
    def enabled(self) -> list[list[bool]]:
        """Which of the model's exits have a loss, in each step that differs from the others."""
        section, num_layers = self.cfg.early_exit_loss, self.cfg.num_layers
        if section is None:
            return [[True]]
        settings = (num_layers, section.interval, section.exits)
        # A rotation repeats after `interval` steps. The gradual curriculum of one step has all exits after it.
        try:
            return [enabled_exits(section.curriculum, step, 1, *settings) for step in range(section.interval + 1)]
        except ConfigError:  # it is reported with the other mistakes, after these choices
            return [[True]]

    @property
    def num_exits(self) -> int:
        """The most exits of the model that have a loss in one step."""
        return max(map(sum, self.enabled))

    @property
    def draft_passes(self) -> int:
        """How often layers of a draft run: an adapter runs its one layer once per unrolled token."""
        draft = self.cfg.draft
        return 0 if draft is None else IN_A_ROW if draft.kind == "adapter" else draft.exit_layer

    def autocasts(self, dtype: str) -> bool:
        """Whether products of fp32 weights are computed in bf16."""
        compute = self.cfg.compute_dtype
        in_bf16 = has_bf16_products(self.device) if compute == AUTO else compute == "bf16"
        return dtype == "fp32" and in_bf16 and not packs_weights(self.cfg.model)

    def state_bytes(self, dtype: str, gradients: bool = True) -> int:
        """Bytes that each process holds throughout: its shards of weights, gradients and averages."""
        cfg = self.cfg
        of_model = training_bytes(cfg.meta_model, ITEMSIZE[dtype], self.trained, packs_weights(cfg.model), gradients)
        # A draft is always in fp32: each weight, its gradient and two averages.
        of_draft = (3 + gradients) * ITEMSIZE["fp32"] * self.of_draft
        shards = max(num_processes() // (cfg.data_parallel_replicate_dim or 1), 1)
        return (of_model + of_draft) // shards

    def cast_bytes(self, dtype: str, recompute: bool) -> int:
        """Bytes of weights in bf16 that are kept until the backward pass, where the weights themselves are in fp32."""
        cfg, model = self.cfg, self.cfg.meta_model
        if self.autocasts(dtype):
            layer_passes = self.draft_passes + (0 if cfg.freezes_model else cfg.num_layers)
            head = torch.bfloat16.itemsize * model.tok_embeddings.weight.numel()
            return (cast_bytes(model, layer_passes, recompute) + head) // (cfg.tensor_parallel_dim or 1)
        return cast_bytes(model, self.draft_passes, recompute) if dtype == "bf16" and cfg.draft is not None else 0

    @property
    def loss_bytes(self) -> int:
        """Bytes that each process takes while it computes losses: a chunk's logits, and the sum of the head's gradients
        in fp32."""
        cfg, model = self.cfg, self.cfg.meta_model
        num_tokens, logits = model.tok_embeddings.num_embeddings, 0
        if cfg.draft is not None:
            logits = logits_bytes(self.chunk, min(cfg.draft.vocabulary or num_tokens, num_tokens), teacher=True)
        if not cfg.freezes_model:
            logits = max(logits, logits_bytes(self.chunk, num_tokens))
        return logits + (4 * model.tok_embeddings.weight.numel() if self.all_weights else 0)

    def activation_bytes(self, dtype: str, recompute: bool) -> tuple[int, int]:
        """Bytes per token that are kept until the backward pass, and of the layer that it computes again."""
        cfg, model, itemsize, autocast = self.cfg, self.cfg.meta_model, ITEMSIZE[dtype], self.autocasts(dtype)
        options = {"autocast": autocast, "on_heap": self.device == "cpu"}
        kept = layer = 0
        if not cfg.freezes_model:
            kept += token_bytes(model, cfg.num_layers, itemsize, recompute, self.all_weights, **options)
            kept += exit_state_bytes(model, self.num_exits, itemsize)
            layer = layer_bytes(model, itemsize, self.all_weights, autocast)
            layer += 0 if self.all_weights else adapter_gradient_bytes(model, itemsize)
        if cfg.draft is not None:
            is_adapter = cfg.draft.kind == "adapter"
            kept += token_bytes(model, self.draft_passes, itemsize, recompute, **options)
            kept += draft_state_bytes(model, IN_A_ROW if is_adapter else 1, is_adapter, itemsize)
            layer = max(layer, layer_bytes(model, itemsize, True, autocast))
        return kept, layer if recompute else 0

    def needed(self, dtype: str, samples: int, length: int, recompute: bool) -> int:
        """Bytes that each process takes to train with a batch: the losses come before the backward pass."""
        kept, layer = (size * samples * length for size in self.activation_bytes(dtype, recompute))
        return self.state_bytes(dtype) + self.cast_bytes(dtype, recompute) + kept + max(layer, self.loss_bytes)

    def needed_at_save(self, dtype: str, tokens: int) -> int:
        """Bytes that each process takes to measure exits or a draft at a save, with batches of so many tokens."""
        cfg, chunk = self.cfg, min(self.chunk, MOST_CHUNK_TOKENS)
        exits = min(sum(map(any, zip(*self.enabled, strict=True))), MOST_EXITS + 1)
        sizes = (tokens, ITEMSIZE[dtype], exits)
        measuring = measuring_bytes(cfg.meta_model, chunk, *sizes, draft=cfg.draft is not None)
        return self.state_bytes(dtype, gradients=False) + measuring

    def fits(self, dtype: str, length: int, recompute: bool, samples: int = 1) -> bool:
        return self.needed(dtype, samples, length, recompute) <= self.available

    @property
    def wanted_length(self) -> int:
        """512 tokens on a CPU and 2048 elsewhere, or the model's limit if that is less."""
        return min(LONGEST.get(self.device, LONGEST_ELSEWHERE), self.cfg.meta_model.max_seq_len)

    def longest_sample(self, dtype: str) -> int:
        """`wanted_length`, halved until a sample fits."""
        length = self.wanted_length
        while length > SHORTEST and not self.fits(dtype, length, recompute=True):
            length //= 2
        return length

    def samples(self, dtype: str, length: int, recompute: bool) -> int:
        """The number of samples that fit: 1, 2, 4 or 8."""
        return max(size for size in (1, 2, 4, 8) if size == 1 or self.fits(dtype, length, recompute, size))

    def warn_of_saves(self, dtype: str, tokens: int) -> None:
        """Warn if a save cannot measure the exits or the draft, while there is room to train."""
        needed = self.needed_at_save(dtype, tokens)
        if self.state_bytes(dtype) <= self.available < needed:
            measuring = needed - self.state_bytes(dtype, gradients=False)
            log.warning(
                f"Measuring the exits or the draft at a save needs {measuring / 2**30:.1f} GiB, more than is left. "
                "Checkpoints will be saved without it, and generation cannot choose by it"
            )

    def warn_if_little(self, dtype: str, wanted: int, length: int) -> None:
        """Warn if a sample of `wanted` tokens does not fit, even with checkpointing; `length` tokens were chosen."""
        if self.fits(dtype, wanted, recompute=True):
            return
        needed = self.needed(dtype, 1, wanted, recompute=True)
        said = f"Training with a sample of {wanted} tokens needs about {needed / 2**30:.1f} GiB, "
        said += f"and {self.available / 2**30:.1f} GiB can be used here"
        if length < wanted:
            said += f", so samples are cut to {length} tokens (not with tokenizer.max_seq_len={wanted})"
        if not self.fits(dtype, length, recompute=True):
            said += ". The run will probably end without memory"
        log.warning(f"{said}. Less is needed by {'hf/lora or ' if self.all_weights else ''}a smaller model")
