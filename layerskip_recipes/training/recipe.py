"""`tune run layerskip_finetune`: training with layer dropout and early-exit loss, on one device or many. Wiring only.

The ideas live in `layer_dropout.py` and `early_exit.py`, the walk in `decoder.py`, the ranks in `mesh.py`.
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torchtune import config, training, utils
from torchtune.modules import common_utils
from torchtune.training import DummyProfiler
from tqdm import tqdm

from layerskip_recipes.checkpoint.checkpointers import check_checkpoint_files, check_output_dir, check_tokenizer_dir
from layerskip_recipes.config.settings import build, build_on_meta, check_device, check_dtype
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.adapters import adapter_names
from layerskip_recipes.model.limits import check_batch, check_length, check_vocabulary
from layerskip_recipes.processes import from_rank_zero, init_processes, is_rank_zero, num_processes
from layerskip_recipes.training.batches import TrainingData, limit_samples
from layerskip_recipes.training.checkpoints import Checkpoints, complete_checkpoints, find_checkpoint
from layerskip_recipes.training.config import check_config, layer_dropout_section, loss_section, without_effect
from layerskip_recipes.training.optimizers import Optimizers, adapter_parameters, build_model, checkpoint_contents
from layerskip_recipes.training.parallel import clip_gradients, make_mesh, mesh_sizes, rank_zero_first, reshard
from layerskip_recipes.training.run_log import RunLog, described, same_run
from layerskip_recipes.training.validation import Validation

log = utils.get_logger("INFO")


class LayerSkipFinetune:
    """Trains the weights of a torchtune model, or its adapters, with layer dropout and early-exit loss.

    Args:
        cfg: the config, see the README; its settings are all checked here.

    Raises:
        ValueError: for a wrong setting, before anything is loaded or written.
    """

    def __init__(self, cfg: DictConfig) -> None:
        check_config(cfg)
        self.cfg = cfg
        self.device = check_device(cfg)
        self.dtype = check_dtype(cfg, self.device)
        if cfg.get("enable_activation_offloading") and self.device.type != "cuda":
            raise ConfigError(f"enable_activation_offloading: needs device=cuda, got {self.device.type}")
        mesh_sizes(cfg, build_on_meta(cfg))
        init_processes(self.device.type, with_cpu=bool(cfg.get("fsdp_cpu_offload")))
        if cfg.get("fsdp_cpu_offload"):
            training.set_torch_num_threads()  # the optimizer runs on the CPU, where torchrun leaves one thread
        if num_processes() > 1:
            self.device = check_device(cfg)  # each process has a GPU of its own now
        if is_rank_zero():
            check_output_dir(cfg)
            if not cfg.get("resume_from_checkpoint"):
                check_checkpoint_files(cfg, writes=True)
                self._check_other_runs()
        if cfg.get("resume_from_checkpoint"):
            find_checkpoint(Path(cfg.output_dir))
        common_utils._use_low_cpu_ram = bool(cfg.get("low_cpu_ram"))  # for QLoRA's checkpoints
        torch.set_float32_matmul_precision(cfg.get("float32_matmul_precision", "highest"))
        self.accumulation = cfg.get("gradient_accumulation_steps", 1)
        self.seed = self._seed()

    def _check_other_runs(self) -> None:
        """Raises a ValueError if a run that starts anew would throw away an earlier run's checkpoints."""
        there = [folder.name for folder in complete_checkpoints(Path(self.cfg.output_dir))]
        if there and self.cfg.get("keep_last_n_checkpoints"):
            raise ConfigError(
                f"keep_last_n_checkpoints: {self.cfg.keep_last_n_checkpoints} would throw away an earlier run's "
                f"checkpoints under output_dir {self.cfg.output_dir!r}, {', '.join(there)}. Allowed: another "
                "output_dir, or to go on with that run: resume_from_checkpoint=true"
            )
        if there:
            log.warning(
                f"{self.cfg.output_dir} has checkpoints of an earlier run, {', '.join(there)}: those of the same name "
                "will be replaced"
            )

    def _seed(self) -> int:
        """Seed all generators, each rank's differently; what ranks must do alike is seeded by what this returns."""
        seed = training.set_seed(seed=self.cfg.get("seed"), debug_mode=self.cfg.get("cudnn_deterministic_mode"))
        return from_rank_zero(seed)

    def setup(self) -> None:
        """Everything that training needs: data first, since a mistake there costs no loaded weights."""
        cfg = self.cfg
        if is_rank_zero():
            config.log_config(recipe_name=type(self).__name__, cfg=cfg)
        with training.set_default_dtype(self.dtype):
            self.meta = build_on_meta(cfg)
        self.mesh = make_mesh(cfg, self.meta, self.device)
        self.loss = loss_section(cfg, len(self.meta.layers))
        if is_rank_zero():
            for line in without_effect(cfg, self.loss):
                log.warning(line)
        with rank_zero_first():
            tokenizer = build(cfg.tokenizer, "tokenizer")
            check_tokenizer_dir(cfg)
            check_vocabulary(tokenizer, self.meta)
            limit_samples(cfg, tokenizer, self.meta)
            self.data = TrainingData(
                cfg, tokenizer, self.meta, self.device, self.loss.ignore_index, self.mesh, self.seed
            )
            check_length(self.data.first_length, self.meta)
            self.validation = Validation(cfg, tokenizer, self.meta, self.device, self.mesh)
        self.total_steps = self.data.steps_per_epoch * cfg.get("epochs", 1)
        self.said_nothing_counts = not is_rank_zero()

        adapted = bool(adapter_names(self.meta))
        self.checkpoints = Checkpoints(cfg, adapted)
        state, self.run = self.checkpoints.load_state(), described(cfg, self.data, tokenizer, adapted)
        if state is not None:
            same_run(state["run"], self.run)
            self.seed = self.data.seed = state[training.SEED_KEY]
            if cfg.get("seed") not in (None, self.seed) and is_rank_zero():
                log.warning(f"seed: {cfg.seed} changes nothing here: a resumed run goes on with its own, {self.seed}")
        self.step = state["step"] if state else 0
        self.log = RunLog(cfg, self.loss, len(self.meta.layers), self.total_steps)
        weights, adapters = self.checkpoints.load_weights(self.meta)
        if weights is None and is_rank_zero():
            log.info("No weights to begin with: training from scratch.")
        self.model = build_model(cfg, self.device, self.dtype, self.mesh, self.meta, weights, adapters, self.seed)
        del weights, adapters
        dropout = layer_dropout_section(cfg, self.model.num_layers, self.seed, cfg.get("batch_size", 1))
        self.model.layer_dropout = dropout or self.model.layer_dropout
        if self.model.layer_dropout is not None:
            # Each number of samples that a layer keeps is a shape of compiled attention, with a block mask and without.
            limit, dynamo = 2 * cfg.get("batch_size", 1) + 2, torch._dynamo.config
            name = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"  # torch 2.6
            setattr(dynamo, name, max(getattr(dynamo, name), limit))
        if cfg.get("compile"):
            self.loss.compile()
        self.offloading = training.get_act_offloading_ctx_manager(
            self.model, bool(cfg.get("enable_activation_offloading", False))
        )
        optimizer = state.pop(training.OPT_KEY) if state and not self.checkpoints.sharded else None
        self.optimizers = Optimizers(cfg, self.model, optimizer, self.total_steps, self.step)
        self.remembered = range(0)  # the steps whose allocations the profiler's picture of the memory shows
        self.profiler = self._setup_profiler()
        if state:
            self._restore(state)
            if is_rank_zero():
                log.info(f"Resumed from {self.checkpoints.resumed_from}: {self.step} of {self.total_steps} steps done.")

    def _setup_profiler(self) -> Any:
        section = self.cfg.get("profiler")
        if not (section and section.get("enabled")):
            return DummyProfiler()
        section = OmegaConf.merge({"_component_": "torchtune.training.setup_torch_profiler"}, section)
        profiler, schedule = config.instantiate(section)
        if section.get("profile_memory") and self.device.type == "cuda":
            first = self.step + schedule["wait_steps"] + schedule["warmup_steps"]
            self.remembered = range(first, first + schedule["active_steps"])
        return profiler

    def train(self) -> None:
        """The loop: epochs of optimizer steps of micro-batches, with validation and checkpoints in between."""
        cfg, per_epoch = self.cfg, self.data.steps_per_epoch
        if self.step >= self.total_steps and is_rank_zero():
            log.info(f"All {self.step} steps are done; for more, set epochs higher.")
        self.profiler.start()
        if self.step == 0:
            self._validate()
        while self.step < self.total_steps:
            epoch, done = divmod(self.step, per_epoch)
            batches = self.data.batches(epoch, done * self.accumulation)
            shown = {"desc": f"epoch {epoch + 1}", "dynamic_ncols": True, "disable": not is_rank_zero()}
            with tqdm(total=per_epoch, initial=done, **shown) as self.progress:
                for _ in range(done, per_epoch):
                    if self.remembered and self.step == self.remembered.start:
                        torch.cuda.memory._record_memory_history()
                    self._train_step(batches)
                    if self.remembered and self.step == self.remembered.stop:
                        torch.cuda.memory._record_memory_history(enabled=None)
                    self.progress.update(1)
                    ends = self.step % per_epoch == 0
                    if self.validation.due(self.step) or (self.step == self.total_steps):
                        self._validate()
                    if not ends and self.step % (cfg.get("save_every_n_steps") or self.total_steps + 1) == 0:
                        self._save(f"step_{self.step}", shards=bool(cfg.get("enable_async_checkpointing")))
            self._save(f"epoch_{epoch}")
        self.checkpoints.finish()
        self.profiler.stop()

    def _train_step(self, batches: Iterator[dict[str, Any]]) -> None:
        """One optimizer step. The exits are chosen once, the dropout is drawn for each micro-batch."""
        started = time.perf_counter()
        dropout, in_backward = self.model.layer_dropout, self.optimizers.in_backward
        if dropout is not None:
            dropout.set_step(self.step, self.total_steps)
        tokens, total, per_exit = 0, 0.0, {}
        for _ in range(self.accumulation):
            batch = next(batches)
            check_batch(batch["tokens"], self.model)
            self.data.warn_of_cuts(batch["tokens"])
            labels = F.pad(batch["labels"][:, 1:], (0, 1), value=self.loss.ignore_index)
            # Here, as the host would wait for a GPU that looks for them.
            counted = (labels != self.loss.ignore_index).flatten().nonzero()[:, 0]
            count = len(counted)
            batch |= {"labels": labels, "counted": counted}
            utils.batch_to_device(batch, self.device)
            with self.offloading:
                loss, exits = self.loss(
                    self.model,
                    batch.pop("tokens"),
                    batch.pop("labels"),
                    step=self.step,
                    total_steps=self.total_steps,
                    **batch,
                )
            # Micro-batches weigh by their tokens; a single one of an optimizer in backward is a mean already, and over
            # ranks (which FSDP averages) it weighs as its tokens do in the whole.
            weight = count
            if in_backward:
                everywhere = self.mesh.sum(torch.tensor(float(count), device=self.device)).clamp(min=1)
                weight = self.mesh.data_size * count / everywhere
            if loss.requires_grad:  # not so if all layers with adapters are dropped
                (loss * weight).backward()
            else:
                reshard(self.model)
            tokens += count
            total = total + loss.detach() * count
            per_exit = {e: per_exit.get(e, 0.0) + value * count for e, value in exits.items()}
        of_all = torch.tensor(float(tokens), device=self.device)
        sums = self.mesh.sum(torch.stack([of_all, total, *per_exit.values()]))
        everywhere = sums[0].clamp(min=1)  # a step without a single label that counts changes nothing
        metrics: dict[str, Any] = {}
        if not in_backward:
            training.scale_grads(self.model, self.mesh.data_size / everywhere)
            clip = self.cfg.get("clip_grad_norm")
            norm = clip_gradients(self.model, math.inf if clip is None else float(clip))
            metrics |= {} if clip is None else {"grad_norm": norm}
        else:
            norm = torch.zeros((), device=self.device)
        self._check_sums(*sums[:2], norm)
        self.optimizers.step()
        metrics["lr"] = self.optimizers.lr
        self.optimizers.step_schedule()
        self.step += 1
        self.profiler.step()
        if self.step % self.cfg.get("log_every_n_steps", 1) == 0:
            loss, *of_exits = (sums[1:] / everywhere).tolist()
            metrics |= {"loss": loss, "loss_final": of_exits[-1]}
            metrics |= {f"loss_exit_{e}": value for e, value in zip(per_exit, of_exits, strict=True)}
            metrics["layer_dropout_rate"] = dropout.max_rate if dropout else 0.0
            # A group that splits its matrices shares its samples.
            speed = tokens / self.mesh.tensor / (time.perf_counter() - started)
            metrics["tokens_per_second_per_gpu"] = speed
            self._log(metrics)

    def _log(self, metrics: dict[str, Any]) -> None:
        if "grad_norm" in metrics:
            metrics["grad_norm"] = metrics["grad_norm"].item()
        if self.cfg.get("log_peak_memory_stats") and self.device.type in ("cuda", "xpu"):
            metrics |= training.get_memory_stats(device=self.device)
        self.log.write(metrics, self.step)
        self.progress.set_postfix_str(
            f"loss {metrics['loss']:.3f}, final {metrics['loss_final']:.3f}, "
            f"{metrics['tokens_per_second_per_gpu']:.0f} tok/s"
        )

    def _check_sums(self, tokens: torch.Tensor, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Stop before weights become NaN (an optimizer in backward moved them already); a step's one wait. A step that
        learns nothing is said once.

        Raises:
            ValueError: with the step and the samples of its batch.
        """
        labels, change = torch.stack([tokens, loss + norm]).tolist()
        if not labels and not self.said_nothing_counts:
            self.said_nothing_counts = True
            log.warning(
                f"step {self.step + 1} learns nothing: no label counts in samples {self.data.samples(self.step)} of "
                f"the dataset. Of a prompt as long as tokenizer.max_seq_len={self.data.cut_at} the answer is cut off"
            )
        if not math.isfinite(change):
            what = "loss" if not loss.isfinite() else "gradient norm"
            there = bool(complete_checkpoints(Path(self.cfg.output_dir)))
            of = repr(self.cfg.output_dir)
            last = f"The last checkpoint under {of} is whole" if there else f"There is no checkpoint under {of} yet"
            raise ConfigError(
                f"{what}: not finite at step {self.step + 1}, with samples {self.data.samples(self.step)} of the "
                f"dataset. {last}; for example {'resume_from_checkpoint=true ' if there else ''}"
                f"optimizer.lr={self.optimizers.base_lr / 2:.2g}"
            )

    def _validate(self) -> None:
        if self.validation.on:
            self.log.write(self.validation.measure(self.model, self.device, self.step), self.step)

    def _save(self, name: str, shards: bool = False) -> None:
        """Write a checkpoint; on all ranks."""
        optimizer = self.optimizers.state_dict(whole=not shards)
        state = self._state()
        if shards:
            self.checkpoints.save_shards(name, {"model": self._trained(), training.OPT_KEY: optimizer}, state)
        else:
            contents = checkpoint_contents(self.cfg, self.model, self.meta, self.device)
            if is_rank_zero():
                self.checkpoints.save(name, contents, state | {training.OPT_KEY: optimizer})
            if dist.is_initialized():
                dist.barrier()
        if is_rank_zero():
            log.info(f"Checkpoint after step {self.step}: {Path(self.cfg.output_dir) / name}")

    def _trained(self) -> dict[str, torch.Tensor]:
        """This rank's part of the weights that change, to be written or filled in place."""
        return adapter_parameters(self.model, self.meta) or self.model.state_dict()

    def _state(self) -> dict[str, Any]:
        """What a resumed run needs beside weights and optimizer; data and curriculum follow from seed and step."""
        kind = self.device.type
        mine = {"cpu": torch.get_rng_state(), "device": self._device_rng().get_rng_state(), "device_type": kind}
        generators = [mine]
        if dist.is_initialized():
            generators = [None] * dist.get_world_size()
            dist.all_gather_object(generators, mine)
        return {
            "step": self.step,
            training.SEED_KEY: self.seed,
            "run": self.run,
            "layer_dropout": self.model.layer_dropout.state_dict() if self.model.layer_dropout else None,
            training.RNG_KEY: generators,
            "validation": self.validation.state_dict(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        """Take up the state of the stopped run."""
        if self.checkpoints.sharded:
            shards = {"model": self._trained(), training.OPT_KEY: self.optimizers.state_dict(whole=False)}
            never_stepped = self.checkpoints.load_shards(shards)
            self.optimizers.load_state_dict(shards[training.OPT_KEY], whole=False, never_stepped=never_stepped)
        if self.model.layer_dropout and state["layer_dropout"]:
            self.model.layer_dropout.load_state_dict(state["layer_dropout"])
        self.validation.load_state_dict(state["validation"])
        generators = state[training.RNG_KEY]
        rank = dist.get_rank() if dist.is_initialized() else 0
        if rank < len(generators):  # with more ranks than before, the new ones keep their own seed
            torch.set_rng_state(generators[rank]["cpu"])
            if generators[rank].get("device_type", self.device.type) == self.device.type:
                self._device_rng().set_rng_state(generators[rank]["device"])

    def _device_rng(self) -> Any:
        """The module with the random state of the device: torch.cuda, torch.mps, torch.xpu, or torch itself."""
        return torch if self.device.type == "cpu" else getattr(torch, self.device.type)

    def cleanup(self) -> None:
        """Close the metric logger."""
        self.log.close()
