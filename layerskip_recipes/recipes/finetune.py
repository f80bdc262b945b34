"""`tune run layerskip_finetune`: training with layer dropout and early-exit loss. Wiring only.

The ideas live in `layer_dropout.py` and `early_exit.py`, the walk in `decoder.py`.
"""

import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch.optim import Optimizer
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler
from torchtune import config, modules, training, utils
from torchtune.training import DummyProfiler
from torchtune.training.lr_schedulers import get_lr
from tqdm import tqdm

from layerskip_recipes import checkpoint as ckpt
from layerskip_recipes.config import build_recipe, main_of
from layerskip_recipes.decoder import LayerSkipDecoder, layerskip_decoder
from layerskip_recipes.layer_dropout import LayerDropout
from layerskip_recipes.recipes.data import load_data
from layerskip_recipes.recipes.finetune_config import check_config, layer_dropout_section, loss_section
from layerskip_recipes.settings import (
    build,
    build_on_meta,
    check_device,
    check_dtype,
    check_length,
    check_one_process,
    check_vocabulary,
)

log = utils.get_logger("INFO")


def check_machine(cfg: DictConfig) -> tuple[torch.device, torch.dtype]:
    """The device and dtype of a config, if they and the checkpoint's files are here.

    Raises:
        ValueError: if not.
    """
    device = check_device(cfg)
    dtype = check_dtype(cfg, device)
    if cfg.get("enable_activation_offloading") and device.type != "cuda":
        raise ValueError(f"enable_activation_offloading: needs device=cuda, got {device.type}")
    ckpt.check_output_dir(cfg)
    if cfg.get("resume_from_checkpoint"):
        ckpt.find_checkpoint(Path(cfg.output_dir))
    else:
        ckpt.check_checkpoint_files(cfg, writes=True)
    check_one_process()
    return device, dtype


class LayerSkipFinetune:
    """Trains all weights of a torchtune model with layer dropout and early-exit loss, on one device.

    Args:
        cfg: the config, see the README; its settings are all checked here.

    Raises:
        ValueError: for a wrong setting, before anything is loaded or written.
    """

    def __init__(self, cfg: DictConfig) -> None:
        check_config(cfg)
        self.device, self.dtype = check_machine(cfg)
        self.cfg = cfg
        torch.set_float32_matmul_precision(cfg.get("float32_matmul_precision", "highest"))
        self.accumulation = cfg.get("gradient_accumulation_steps", 1)
        self.optimizer_in_bwd = bool(cfg.get("optimizer_in_bwd", False))
        self.seed = training.set_seed(seed=cfg.get("seed"), debug_mode=cfg.get("cudnn_deterministic_mode"))

    def setup(self) -> None:
        """Everything that training needs: data first, since a mistake there costs no loaded weights."""
        cfg = self.cfg
        config.log_config(recipe_name=type(self).__name__, cfg=cfg)
        self.tokenizer = build(cfg.tokenizer, "tokenizer")
        ckpt.check_tokenizer_dir(cfg)
        base = build_on_meta(cfg)
        check_vocabulary(self.tokenizer, base)
        self.loss = loss_section(cfg, len(base.layers))
        self.dataloader = self._setup_data()
        check_length(len(self.dataloader.dataset[0]["tokens"]) if len(self.dataloader.dataset) else 0, base)
        self.steps_per_epoch = len(self.dataloader) // self.accumulation
        if self.steps_per_epoch < 1:
            raise ValueError(
                f"dataset: {len(self.dataloader.dataset)} samples make no step of batch_size "
                f"{cfg.get('batch_size', 1)} x gradient_accumulation_steps {self.accumulation}; lower one of them"
            )
        self.steps_per_epoch = min(self.steps_per_epoch, cfg.get("max_steps_per_epoch") or self.steps_per_epoch)
        self.total_steps = self.steps_per_epoch * cfg.get("epochs", 1)

        self.metric_logger = build(cfg.metric_logger, "metric_logger")
        self.checkpoints = ckpt.Checkpoints(cfg)
        model_state, state = self.checkpoints.load()
        self.model = self._setup_model(model_state)
        self.optimizer, self.lr_scheduler = self._setup_optimizer(state)
        self.epochs_run = state[training.EPOCHS_KEY] if state else 0
        self.step = self.epochs_run * self.steps_per_epoch
        self.profiler = self._setup_profiler()
        self.metric_logger.log_config(cfg)
        if state:
            self._restore(state)
            log.info(f"Resumed from {self.checkpoints.resumed_from}: {self.epochs_run} epochs, {self.step} steps done.")

    def _setup_data(self) -> StatefulDataLoader:
        cfg = self.cfg
        dataset, collate = load_data(cfg, self.tokenizer, self.loss.ignore_index)
        self.sampler = StatefulDistributedSampler(
            dataset, num_replicas=1, rank=0, shuffle=bool(cfg.get("shuffle", True)), seed=self.seed
        )
        return StatefulDataLoader(
            dataset,
            batch_size=cfg.get("batch_size", 1),
            sampler=self.sampler,
            collate_fn=collate,
            drop_last=True,
        )

    def _setup_model(self, state: dict[str, torch.Tensor] | None) -> LayerSkipDecoder:
        cfg = self.cfg
        with training.set_default_dtype(self.dtype), self.device:
            model = layerskip_decoder(config.instantiate(cfg.model))
        dropout = layer_dropout_section(cfg, model.num_layers, self.seed)
        model.layer_dropout = dropout or model.layer_dropout
        if cfg.get("compile"):
            training.compile_model(model, verbose=False)
            self.loss.sum_of_chunk = torch.compile(self.loss.sum_of_chunk, dynamic=True)
        if cfg.get("enable_activation_checkpointing"):
            training.set_activation_checkpointing(model, auto_wrap_policy={modules.TransformerSelfAttentionLayer})
        if state is None:
            ckpt.initialise(model, 0.02 if cfg.get("init_std") is None else cfg.init_std)
        else:
            ckpt.check_state_dict(model, state)
            model.load_state_dict(state)
        training.validate_expected_param_dtype(model.named_parameters(), dtype=self.dtype)
        self.offloading = training.get_act_offloading_ctx_manager(
            model, bool(cfg.get("enable_activation_offloading", False))
        )
        return model.train()

    def _setup_optimizer(self, state: dict[str, Any] | None) -> tuple[Any, Any]:
        """The optimizer (with optimizer_in_bwd: torchtune's wrapper of one per parameter) and the lr schedule."""
        cfg = self.cfg
        if self.optimizer_in_bwd:
            each = {p: config.instantiate(cfg.optimizer, [p]) for p in self.model.parameters()}
            training.register_optim_in_bwd_hooks(model=self.model, optim_dict=each)
            optimizer: Any = training.create_optim_in_bwd_wrapper(model=self.model, optim_dict=each)
        else:
            optimizer = config.instantiate(cfg.optimizer, self.model.parameters())
        if state:
            optimizer.load_state_dict(state[training.OPT_KEY])
        if cfg.get("lr_scheduler") is None:
            return optimizer, None
        one: Optimizer = next(iter(optimizer.optim_map.values())) if self.optimizer_in_bwd else optimizer
        done = state[training.EPOCHS_KEY] * self.steps_per_epoch if state else 0
        scheduler = config.instantiate(cfg.lr_scheduler, one, num_training_steps=self.total_steps, last_epoch=done - 1)
        if self.optimizer_in_bwd:
            optimizer.set_lr_scheduler(scheduler)
            # A schedule sets its first rate when it is made, and torchtune passes on the later ones only.
            for other in optimizer.optim_map.values():
                for group in other.param_groups:
                    group["lr"] = one.param_groups[0]["lr"]
            scheduler = optimizer
        return optimizer, scheduler

    def _setup_profiler(self) -> Any:
        section = self.cfg.get("profiler")
        if not (section and section.get("enabled")):
            return DummyProfiler()
        section = OmegaConf.merge({"_component_": "torchtune.training.setup_torch_profiler"}, section)
        profiler, _ = config.instantiate(section)
        return profiler

    def train(self) -> None:
        """The loop: epochs of optimizer steps of micro-batches. A checkpoint after each epoch."""
        if self.epochs_run >= self.cfg.get("epochs", 1):
            log.info(f"All {self.epochs_run} epochs are done; for more, set epochs higher.")
        self.profiler.start()
        for epoch in range(self.epochs_run, self.cfg.get("epochs", 1)):
            self.sampler.set_epoch(epoch)
            batches = iter(self.dataloader)
            with tqdm(total=self.steps_per_epoch, desc=f"epoch {epoch + 1}", dynamic_ncols=True) as self.progress:
                for _ in range(self.steps_per_epoch):
                    self._train_step(batches)
                    self.progress.update(1)
            self.epochs_run = epoch + 1
            place = self.checkpoints.save(self.model.state_dict(), self._state(), epoch)
            log.info(f"Checkpoint of epoch {epoch + 1}: {place}")
        self.profiler.stop()

    def _train_step(self, batches: Any) -> None:
        """One optimizer step. The exits are chosen once, the dropout is drawn for each micro-batch."""
        started = time.perf_counter()
        dropout = self.model.layer_dropout
        if dropout is not None:
            dropout.set_step(self.step, self.total_steps)
        tokens, total, per_exit = 0, 0.0, {}
        for _ in range(self.accumulation):
            batch = next(batches)
            check_length(batch["tokens"].shape[1], self.model)
            utils.batch_to_device(batch, self.device)
            labels = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=self.loss.ignore_index)
            count = (labels != self.loss.ignore_index).sum()
            with self.offloading:
                loss, exits = self.loss(
                    self.model, batch.pop("tokens"), labels, step=self.step, total_steps=self.total_steps, **batch
                )
            # Micro-batches weigh by their tokens; a single one of an optimizer in backward is a mean already.
            (loss if self.optimizer_in_bwd else loss * count).backward()
            tokens = tokens + count
            total = total + loss.detach() * count
            per_exit = {e: per_exit.get(e, 0.0) + value * count for e, value in exits.items()}
        metrics: dict[str, Any] = {}
        if not self.optimizer_in_bwd:
            # A step without a single label that counts changes nothing, instead of dividing by 0.
            training.scale_grads(self.model, 1 / tokens.clamp(min=1))
            if self.cfg.get("clip_grad_norm") is not None:
                metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(
                    self.model.parameters(), max_norm=float(self.cfg.clip_grad_norm)
                )
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        metrics["lr"] = get_lr(self.optimizer)
        if self.lr_scheduler is not None:
            (self.optimizer.step_lr_scheduler if self.optimizer_in_bwd else self.lr_scheduler.step)()
        self.step += 1
        self.profiler.step()
        if self.step % self.cfg.get("log_every_n_steps", 1) == 0:
            self._log(metrics, tokens, total, per_exit, dropout, started)

    def _log(
        self,
        metrics: dict[str, Any],
        tokens: torch.Tensor,
        total: torch.Tensor,
        per_exit: dict[int, torch.Tensor],
        dropout: LayerDropout | None,
        started: float,
    ) -> None:
        last, tokens = self.model.num_layers, tokens.clamp(min=1)
        metrics |= {"loss": (total / tokens).item(), "loss_final": (per_exit[last] / tokens).item()}
        metrics |= {f"loss_exit_{e}": (value / tokens).item() for e, value in per_exit.items()}
        metrics["layer_dropout_rate"] = dropout.max_rate if dropout else 0.0
        metrics["tokens_per_second_per_gpu"] = tokens.item() / (time.perf_counter() - started)
        if "grad_norm" in metrics:
            metrics["grad_norm"] = metrics["grad_norm"].item()
        if self.cfg.get("log_peak_memory_stats") and self.device.type in ("cuda", "xpu"):
            metrics |= training.get_memory_stats(device=self.device)
        self.metric_logger.log_dict(metrics, step=self.step)
        self.progress.set_postfix_str(
            f"loss {metrics['loss']:.3f}, final {metrics['loss_final']:.3f}, "
            f"{metrics['tokens_per_second_per_gpu']:.0f} tok/s"
        )

    def _state(self) -> dict[str, Any]:
        """What a resumed run needs beside the weights. Data order and curriculum follow from seed, epoch and step."""
        return {
            training.EPOCHS_KEY: self.epochs_run,
            training.SEED_KEY: self.seed,
            training.TOTAL_EPOCHS_KEY: self.cfg.get("epochs", 1),
            "steps_per_epoch": self.steps_per_epoch,
            training.OPT_KEY: self.optimizer.state_dict(),
            "layer_dropout": self.model.layer_dropout.state_dict() if self.model.layer_dropout else None,
            training.RNG_KEY: {"cpu": torch.get_rng_state(), "device": self._device_rng().get_rng_state()},
        }

    def _restore(self, state: dict[str, Any]) -> None:
        """Take up the state of the stopped run.

        Raises:
            ValueError: if the run would not be the same one.
        """
        if state["steps_per_epoch"] != self.steps_per_epoch:
            raise ValueError(
                f"resume_from_checkpoint: an epoch had {state['steps_per_epoch']} steps and now has "
                f"{self.steps_per_epoch}; keep dataset, batch_size, gradient_accumulation_steps and max_steps_per_epoch"
            )
        if self.seed != state[training.SEED_KEY]:
            self.seed = state[training.SEED_KEY]
            self.sampler.seed = self.seed
        if self.model.layer_dropout and state["layer_dropout"]:
            self.model.layer_dropout.load_state_dict(state["layer_dropout"])
        torch.set_rng_state(state[training.RNG_KEY]["cpu"])
        self._device_rng().set_rng_state(state[training.RNG_KEY]["device"])

    def _device_rng(self) -> Any:
        """The module with the random state of the device: torch.cuda, torch.mps, torch.xpu, or torch itself."""
        return torch if self.device.type == "cpu" else getattr(torch, self.device.type)

    def cleanup(self) -> None:
        """Close the metric logger."""
        self.metric_logger.close()


def main() -> None:
    """Finetune a torchtune model for early exit and self-speculative decoding (LayerSkip, arXiv 2404.16710).

    tune run layerskip_finetune --config quickstart/finetune
    tune run layerskip_finetune --config my.yaml layer_dropout.prob=0.2 early_exit_loss.interval=4
    """

    def steps() -> None:
        recipe = build_recipe(LayerSkipFinetune, main.__doc__)
        recipe.setup()
        try:
            recipe.train()
        finally:
            recipe.cleanup()

    main_of(steps)
