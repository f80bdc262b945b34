"""`tune run layerskip_finetune`: training with layer dropout and early-exit loss, on one device or many.

The layer loop is in `model/decoder.py`, layer dropout in `model/layer_dropout.py`, the loss in `early_exit.py`, and
everything about several processes in `parallel.py`.
"""

import math
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import nn
from torchtune import config, training, utils
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from tqdm import tqdm

from layerskip_recipes.checkpoint.answers import ANSWERS_FILE, Answers, answers_of
from layerskip_recipes.checkpoint.checkpointer_checks import check_checkpoint_files, check_tokenizer_dir
from layerskip_recipes.config.paths import check_folder
from layerskip_recipes.data.datasets import limit_samples
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.decoder import move_batch
from layerskip_recipes.model.limits import check_batch, check_vocabulary
from layerskip_recipes.processes import (
    from_every_rank,
    from_rank_zero,
    init_processes,
    is_rank_zero,
    local_part,
    num_processes,
    wait_for_all,
)
from layerskip_recipes.training.batches import TrainingData
from layerskip_recipes.training.checkpoints import Checkpoints
from layerskip_recipes.training.config import FinetuneConfig
from layerskip_recipes.training.contents import learned_weights, optimizer_state, restore, run_state, whole_contents
from layerskip_recipes.training.description import describe_run
from layerskip_recipes.training.draft_loss import DraftLoss
from layerskip_recipes.training.early_exit import EarlyExitLoss
from layerskip_recipes.training.fingerprint import base_fingerprint, check_resumable, run_fingerprint, template_of
from layerskip_recipes.training.label_counts import LabelCounts
from layerskip_recipes.training.model_setup import build_model
from layerskip_recipes.training.optimizers import Optimizers
from layerskip_recipes.training.parallel import clip_gradients, make_mesh, mesh_sizes, parts_of, reshard
from layerskip_recipes.training.profiling import Profiling
from layerskip_recipes.training.resuming import (
    check_earlier_runs,
    find_checkpoint,
    stored_choices,
)
from layerskip_recipes.training.run_lock import RunLock
from layerskip_recipes.training.run_log import LossMeans, RunLog
from layerskip_recipes.training.validation import Validation

log = utils.get_logger("INFO")


class LayerSkipFinetune:
    """Trains a torchtune model, its adapters or a draft model. Checks the config before it loads or writes anything."""

    def __init__(self, source: DictConfig) -> None:
        self.cfg = cfg = FinetuneConfig.load(source)
        self.device = cfg.find_device()
        mesh_sizes(cfg)
        init_processes(self.device.type, with_cpu=cfg.fsdp_cpu_offload)
        if cfg.fsdp_cpu_offload:
            training.set_torch_num_threads()  # the optimizer runs on the CPU, and torchrun leaves one thread
        self.output_dir = Path(cfg.output_dir)
        if is_rank_zero():
            check_folder("output_dir", self.output_dir)
        self.lock = RunLock(self.output_dir)
        with self.lock.released_after_errors():
            if is_rank_zero() and not cfg.resume_from_checkpoint:
                check_checkpoint_files(cfg, writes=True)
                check_earlier_runs(self.output_dir, cfg.keep_last_n_checkpoints)
            self.resumed_from = find_checkpoint(self.output_dir) if cfg.resume_from_checkpoint else None
            # A resumed run takes the stopped run's choices. All ranks take those of rank 0: each may have found another
            # amount of free memory, and chosen by it.
            if self.resumed_from and is_rank_zero():
                self.cfg = FinetuneConfig.load(source, stored_choices(self.resumed_from))
            chosen = from_rank_zero(self.cfg.values)
            self.cfg = cfg = self.cfg if is_rank_zero() else FinetuneConfig.load(source, chosen)
        torch.set_float32_matmul_precision(cfg.float32_matmul_precision)
        # torchtune gives each rank its own seed. For random choices that all ranks share, use rank 0's.
        self.seed = from_rank_zero(training.set_seed(seed=cfg.seed, debug_mode=cfg.cudnn_deterministic_mode))

    def setup(self) -> None:
        """Load data, then weights: a mistake in the data costs no loading time."""
        with self.lock.released_after_errors():
            self._setup()

    def _setup(self) -> None:
        cfg = self.cfg
        config.log_config(recipe_name=type(self).__name__, cfg=cfg.source)
        self.loss: EarlyExitLoss | DraftLoss = cfg.exit_loss
        self.mesh = make_mesh(cfg, self.device)
        # Data. Rank 0 goes first, and the others find the files that it downloads or writes. Then it waits for them.
        if not is_rank_zero():
            wait_for_all()
        self.tokenizer = tokenizer = self._setup_data()
        cfg = self.cfg
        if is_rank_zero():
            wait_for_all()
        wait_for_all()
        self._warned_of_empty_step = self._has_learned = False

        # The state of a stopped run, which must have had the same settings.
        self.checkpoints = Checkpoints(cfg, self.resumed_from)
        state = self.checkpoints.load_state()
        num_frequent = cfg.draft.vocabulary or 0 if cfg.draft is not None else 0
        has_dates = "strftime_now" in template_of(cfg, tokenizer)
        samples_hash, self.frequent_tokens = self.data.summary(has_dates, num_frequent)
        self.fingerprint = run_fingerprint(cfg, self.data, tokenizer, samples_hash)
        if state is not None:
            check_resumable(state["run"], self.fingerprint)
            self.seed = self.data.seed = state[training.SEED_KEY]
            if cfg.seed not in (None, self.seed):
                log.warning(f"seed: {cfg.seed} changes nothing here: a resumed run keeps its seed, {self.seed}")
        self.step = state["step"] if state else 0
        self.checkpoints.check_room(cfg.checkpoint_bytes, self.step, self.total_steps, self.data.steps_per_epoch)

        # Model, optimizer and profiler.
        self.log = RunLog(cfg)
        self.losses = LossMeans()
        self._setup_model(state)
        states = state.pop(training.OPT_KEY).get("state", {}) if state and not self.checkpoints.sharded else None
        self.optimizers = Optimizers(cfg, self.learner, states, self.total_steps, self.step)
        self.profiling = Profiling(cfg.profiler, self.device, self.step)
        if state:
            restore(self, state)
            log.info(f"Resumed from {self.checkpoints.resumed_from}: {self.step} of {self.total_steps} steps done.")

    def _setup_data(self) -> Any:
        """Training and validation data. Returns the tokenizer."""
        cfg = self.cfg
        tokenizer = cfg.tokenizer.build()
        check_tokenizer_dir(cfg.checkpointer)
        check_vocabulary(tokenizer, cfg.meta_model)
        limit_samples([*cfg.dataset, *(cfg.dataset_val or [])], tokenizer, cfg.meta_model)
        self.data = TrainingData(cfg, tokenizer, self.device, self.mesh, self.seed)
        self.cfg = cfg = self.data.cfg
        if cfg.answer_tokens and not (hasattr(tokenizer, "decode") and "labels" in self.data.dataset[0]):
            raise ConfigError(
                f"answer_tokens: {cfg.answer_tokens} needs a tokenizer with `decode` and samples with labels. "
                "Without them set answer_tokens=0"
            )
        self.validation = Validation(cfg, tokenizer, self.device, self.mesh)
        num_tokens = cfg.meta_model.tok_embeddings.num_embeddings
        self.labels = LabelCounts(self.mesh, self.device, num_tokens)
        self.total_steps = self.data.total_steps
        return tokenizer

    def _setup_model(self, state: dict[str, Any] | None) -> None:
        cfg = self.cfg
        weights, adapters, of_draft = self.checkpoints.load_weights(cfg.meta_model)
        base = base_fingerprint(cfg, weights)
        self.fingerprint |= base
        if state is not None:
            check_resumable(state["run"], base)
        if weights is None:
            log.info("No weights given: training from scratch.")
        self.model, self.draft = build_model(cfg, self.device, self.mesh, weights, adapters, of_draft, self.seed)
        self.base: dict[str, Any] = {}  # "base" of the draft's layerskip.json; empty unless the model is frozen
        self.learner: nn.Module = self.model if self.draft is None else self.draft
        if cfg.draft is not None and self.draft is not None:
            model_loss = None
            if cfg.freezes_model:
                self.base = self.checkpoints.base(weights)
            else:
                model_loss = cfg.exit_loss
                self.learner = nn.ModuleDict({"model": self.model, "draft": self.draft})
            if cfg.draft.vocabulary is not None:
                self.draft.vocabulary = self.frequent_tokens
            self.loss = DraftLoss(cfg.draft, self.draft, model_loss)
        self.model.layer_dropout = dropout = cfg.build_layer_dropout() or self.model.layer_dropout
        if dropout is not None:
            if "seed" not in (cfg.model.get("layer_dropout") or ()):  # an argument of `layerskip_decoder`
                dropout.generator.manual_seed(self.seed)
            # Compiled attention has one shape for each number of kept samples, with and without a block mask.
            limit, dynamo = 2 * cfg.batch_size + 2, torch._dynamo.config
            name = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"  # torch 2.6
            setattr(dynamo, name, max(getattr(dynamo, name), limit))
        # Always compile on a GPU: the eager loss reads and writes the logits several times more.
        if cfg.compile or self.device.type == "cuda":
            self.loss.compile()
        self.offloading = training.get_act_offloading_ctx_manager(self.model, cfg.enable_activation_offloading)

    def train(self) -> None:
        try:
            self._train()
        except (KeyboardInterrupt, SystemExit):  # Ctrl-C and SIGTERM
            if is_rank_zero():
                log.info(f"Stopped after step {self.step} of {self.total_steps}. {self.checkpoints.where_to_resume()}")
            raise

    def _train(self) -> None:
        cfg, per_epoch = self.cfg, self.data.steps_per_epoch
        if self.step >= self.total_steps:
            log.info(f"All {self.step} steps are done; for more, set epochs higher.")
        self.profiling.profiler.start()
        if self.step == 0:
            self._validate()
        while self.step < self.total_steps:
            epoch, done = divmod(self.step, per_epoch)
            batches = self.data.batches(epoch, done * cfg.gradient_accumulation_steps)
            shown = {"desc": f"epoch {epoch + 1}", "dynamic_ncols": True, "disable": not is_rank_zero()}
            with tqdm(total=per_epoch, initial=done, **shown) as self.progress:
                for _ in range(done, per_epoch):
                    self.profiling.begin_step(self.step)
                    self._train_step(batches)
                    self.profiling.end_step(self.step)
                    self.progress.update(1)
                    if self.validation.due(self.step) or self.step == self.total_steps:
                        self._validate()
                    due = cfg.save_every_n_steps and self.step % cfg.save_every_n_steps == 0
                    if due and self.step % per_epoch != 0:
                        self._save(f"step_{self.step}", shards=cfg.enable_async_checkpointing)
            self._save(f"epoch_{epoch}")
        self.checkpoints.finish()
        self.profiling.profiler.stop()

    def _train_step(self, batches: Iterator[dict[str, Any]]) -> None:
        """One optimizer step. The exits are chosen once per step, layer dropout is drawn per micro-batch."""
        started = time.perf_counter()
        dropout = self.model.layer_dropout
        if dropout is not None:
            dropout.set_step(self.step, self.total_steps)
        tokens, losses = self._backward(batches)
        sums = self.mesh.sum(torch.stack([self._scalar(tokens), *losses.values()]))
        count = sums[0].clamp(min=1)

        # Scale to the mean over all micro-batches and ranks, then clip. An optimizer in backward has already stepped.
        metrics: dict[str, Any] = {}
        norm = torch.zeros((), device=self.device)
        if not self.optimizers.in_backward:
            training.scale_grads(self.learner, self.mesh.data_size / count)
            clip = self.cfg.clip_grad_norm
            norms = [clip_gradients(part, math.inf if clip is None else float(clip)) for part in parts_of(self.learner)]
            norm = torch.stack(norms).norm()
            metrics |= {} if clip is None else {"grad_norm": norm}
        learns = self._check_sums(sums[0], sums[1], norm)
        metrics["lr"] = self.optimizers.lr
        self.optimizers.step(learns)
        self.step += 1

        # Log the means since the last log line.
        if learns:
            self._has_learned = True
            self.losses.add(list(losses), sums[1:] / count)
        if self.step % self.cfg.log_every_n_steps == 0 and self.losses.values:
            means = self.losses.take()
            if len(means) > 1:
                metrics["loss_final"] = means[f"loss_exit_{self.cfg.num_layers}"]
                metrics["layer_dropout_rate"] = dropout.max_rate if dropout else 0.0
            # Tensor-parallel ranks see the same samples: count them once.
            speed = tokens / self.mesh.tensor / (time.perf_counter() - started)
            self._log(metrics | means | {"tokens_per_second_per_gpu": speed})

    def _backward(self, batches: Iterator[dict[str, Any]]) -> tuple[int, dict[str, torch.Tensor]]:
        """Run all micro-batches. Returns how many of this rank's labels count, and its summed losses, "loss" first."""
        tokens, losses = 0, {"loss": torch.zeros((), device=self.device)}
        settings: dict[str, Any] = {"step": self.step, "total_steps": self.total_steps}
        if self.cfg.early_exit_loss is not None and self.cfg.early_exit_loss.label_rows_only:
            settings["head_rows"] = self.labels.head_rows()
        for _ in range(self.cfg.gradient_accumulation_steps):
            batch = next(batches)
            count, loss, exits = self._forward(batch, settings)
            # An optimizer in backward steps at once, so weight its only micro-batch by this rank's share of the labels
            # times the number of ranks: FSDP averages gradients over ranks.
            weight: Any = count
            if self.optimizers.in_backward:
                of_all = self.mesh.sum(self._scalar(count)).clamp(min=1)
                weight = self.mesh.data_size * count / of_all
            if loss.requires_grad:
                (loss * weight).backward()
            else:  # layer dropout skipped every layer with adapters
                reshard(self.model)
            tokens += count
            for name, value in {"loss": loss.detach(), **{f"loss_exit_{e}": x for e, x in exits.items()}}.items():
                losses[name] = losses.get(name, 0.0) + value * count
        return tokens, losses

    def _forward(
        self, batch: dict[str, Any], settings: dict[str, Any]
    ) -> tuple[int, torch.Tensor, dict[int, torch.Tensor]]:
        """The number of labels that count in a micro-batch, its loss J at this step, and the loss of each exit.

        `settings`: the step, and the head's rows that early exits may change.
        """
        check_batch(batch["tokens"], self.model)
        rows, samples = len(batch["tokens"]), self.cfg.batch_size
        if rows != samples and self.model.layer_dropout is not None and num_processes() > 1:
            raise ConfigError(  # ranks would run different layers and wait for each other
                f"collate_fn: makes {rows} rows of {samples} samples, and layer_dropout on several processes needs one "
                "for each. Allowed: another collate_fn, or layer_dropout=null"
            )
        self.data.warn_of_cuts(batch["tokens"])
        labels = F.pad(batch["labels"][:, 1:], (0, 1), value=CROSS_ENTROPY_IGNORE_IDX)
        # On the CPU, to avoid a device synchronisation.
        counted = (labels != CROSS_ENTROPY_IGNORE_IDX).flatten().nonzero()[:, 0]
        batch |= {"labels": labels, "counted": counted}
        move_batch(batch, self.device)
        tokens, labels = batch.pop("tokens"), batch.pop("labels")
        self.labels.see(labels.flatten()[batch["counted"]])
        with self.offloading, self._computing():
            loss, exits = self.loss(self.model, tokens, labels, **settings, **batch)
        return len(counted), loss, exits

    def _scalar(self, number: float) -> torch.Tensor:
        """The number [] on the device; filled there, as a copy would wait for it."""
        return torch.full((), float(number), device=self.device)

    def _computing(self) -> torch.autocast:
        """Matrix products in `compute_dtype`. No weight is used twice, so autocast need not cache its casts."""
        enabled = self.cfg.multiplies_in_bf16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)

    def _log(self, metrics: dict[str, Any]) -> None:
        if "grad_norm" in metrics:
            metrics["grad_norm"] = metrics["grad_norm"].item()
        if self.cfg.log_peak_memory_stats and self.device.type in ("cuda", "xpu"):
            metrics |= training.get_memory_stats(device=self.device)
        self.log.write(metrics, self.step)
        final = f"final {metrics['loss_final']:.3f}, " if "loss_final" in metrics else ""
        speed = metrics["tokens_per_second_per_gpu"]
        self.progress.set_postfix_str(f"loss {metrics['loss']:.3f}, {final}{speed:.0f} tok/s")

    def _check_sums(self, tokens: torch.Tensor, loss: torch.Tensor, norm: torch.Tensor) -> bool:
        """Whether any label counts; if not, warn once. Stops at a loss or gradient that is not finite. Synchronises."""
        labels, change = torch.stack([tokens, loss + norm]).tolist()
        if not labels and not self._warned_of_empty_step:
            self._warned_of_empty_step = True
            log.warning(
                f"step {self.step + 1} learns nothing: no label counts in {self._samples()}. "
                f"tokenizer.max_seq_len={self.data.cut_at} may cut the answer off a long prompt"
            )
        if not math.isfinite(change):
            name = "loss" if not loss.isfinite() else "gradient norm"
            what = f"{name}: not finite at step {self.step + 1}, with {self._samples()}"
            raise self.checkpoints.not_finite(what, self.optimizers.base_lr)
        return labels > 0

    def _samples(self) -> str:
        return f"samples {self.data.samples(self.step)} of the dataset"

    def _validate(self) -> None:
        if self.validation.on:
            with self._computing():
                measured = self.validation.measure(self.model, self.step, self.draft)
            self.log.write(measured, self.step)
            last_layers = f"agreement_exit_{self.cfg.num_layers}"  # of the last layer with itself
            shown = [name for name in measured if "final" in name or ("agreement" in name and last_layers not in name)]
            log.info(f"Validation after step {self.step}: {', '.join(f'{n} {measured[n]:.3f}' for n in shown)}")

    def _save(self, name: str, shards: bool = False) -> None:
        """Write a checkpoint. A collective call."""
        if not (self._has_learned or self.checkpoints.resumed_from):
            raise ConfigError(
                f"dataset: nothing was learned in {self.step} steps, because no label counts. Are all answers empty or "
                f"masked, or does tokenizer.max_seq_len={self.data.cut_at} cut them off?"
            )
        if self.optimizers.in_backward:  # `_check_sums` has seen the losses only
            finite = all(bool(local_part(p).isfinite().all()) for p in self.learner.parameters() if p.requires_grad)
            if not all(from_every_rank(finite)):
                what = f"weights: not finite at step {self.step}"
                raise self.checkpoints.not_finite(what, self.optimizers.base_lr)
        optimizer = optimizer_state(self, shards)
        if shards:
            self.checkpoints.save_shards(name, {"model": learned_weights(self)} | optimizer, run_state(self))
        else:
            state = run_state(self) | optimizer
            with self._computing():
                description = describe_run(self)
            contents = whole_contents(self)
            if is_rank_zero():
                self.checkpoints.save(name, contents, state, description, self._answers)
            wait_for_all()
        log.info(f"Checkpoint after step {self.step}: {self.output_dir / name}")

    @cached_property
    def _answers(self) -> Answers | None:
        """What the checkpoints have of the answers; made at the first one."""
        most = self.cfg.answer_tokens
        return answers_of(self.data.dataset, self.tokenizer, ANSWERS_FILE, most) if most else None

    def cleanup(self) -> None:
        self.log.close()
        if not self.checkpoints.writing:  # else the lock goes with the process
            self.lock.release()
