"""The checkpoints of a training run: whole or not there, kept or thrown away, found again by themselves.

A checkpoint is written beside its place and renamed into it, so `epoch_N` or `step_N` either is complete or does not
exist. Two forms: torchtune's checkpointer writes the whole model (rank 0 gathers it), readable anywhere; or every rank
writes its shards in the background (torch.distributed.checkpoint), only to resume from.
"""

import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from omegaconf import DictConfig, OmegaConf
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torchtune import training
from torchtune.modules import TransformerDecoder

from layerskip_recipes.checkpoint.checkpointers import (
    build_checkpointer,
    checkpoint_files,
    is_scratch,
    warn_of_contradictions,
)
from layerskip_recipes.checkpoint.weights import read_weights
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.adapters import ADAPTER_FILE, BIASES, correct_peft_form
from layerskip_recipes.processes import TIMEOUT, from_rank_zero, is_rank_zero

RECIPE_STATE = "recipe_state.pt"
STAGING = ".incomplete"
REPLACED = "replaced_"
WRITTEN = "written"  # when, in seconds: the files' own times do not survive a copy
SHARDED = ".metadata"  # the file by which a checkpoint of shards is known

Weights = Mapping[str, torch.Tensor]


class Checkpoints:
    """What a run starts from, and what it leaves under `output_dir`.

    Args:
        cfg: `checkpointer`, `output_dir`, `resume_from_checkpoint`, `keep_last_n_checkpoints` and
            `enable_async_checkpointing` are read.
        adapters: the model has adapters: a resumed run starts from the same base and the adapters of the checkpoint.

    Attributes:
        resumed_from: the folder of the checkpoint that the run goes on from, or None.
        sharded: that checkpoint is one of shards.

    Raises:
        ValueError: on resume, if there is nothing to resume.
    """

    def __init__(self, cfg: DictConfig, adapters: bool = False) -> None:
        self.output_dir = Path(cfg.output_dir)
        self.staging = self.output_dir / STAGING
        self.keep = cfg.get("keep_last_n_checkpoints")
        self.resumed_from = find_checkpoint(self.output_dir) if cfg.get("resume_from_checkpoint") else None
        self.sharded = from_rank_zero(self.resumed_from is not None and (self.resumed_from / SHARDED).exists())
        self.adapters = adapters
        whole = self.resumed_from if not (adapters or self.sharded) else None
        section = cfg.checkpointer
        self.from_scratch = not whole and (is_scratch(section) or not checkpoint_files(section))
        if whole:
            weights = sorted(p.name for p in whole.glob("model-*") if p.suffix in (".safetensors", ".bin"))
            start = {"checkpoint_dir": str(whole), "checkpoint_files": weights}
            if is_scratch(section):
                # What it writes are Hugging Face checkpoints, and those are there now.
                component = "torchtune.training.FullModelHFCheckpointer"
                section = OmegaConf.create({"_component_": component, "model_type": section.model_type})
            # Not merged: the names of checkpoint_files may be a mapping before, and are a list now.
            section = OmegaConf.create(OmegaConf.to_container(section, resolve=True) | start)
        self._pending: Future | None = None
        # Shards are written while the run goes on, so their writers talk in a group of their own.
        asynchronous = cfg.get("enable_async_checkpointing") and dist.is_initialized()
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if asynchronous else None
        if asynchronous:
            check_shared(self.output_dir)
        self._section = section
        # torch cannot copy the state of torchao's optimizers, of 8 bits and fewer, to write it in the background.
        self.waits = str(cfg.optimizer._component_).startswith("torchao.")

    def load_state(self) -> dict[str, Any] | None:
        """The recipe's state, None unless resuming; the optimizer's is empty on other ranks than 0.

        Raises:
            ValueError: if another recipe wrote it.
        """
        if self.resumed_from is None:
            return None
        state: dict[str, Any] = {}
        if is_rank_zero():
            state = torch.load(self.resumed_from / RECIPE_STATE, map_location="cpu", weights_only=True)
        optimizer = state.pop(training.OPT_KEY, None) or {}
        state = from_rank_zero(state)
        if "run" not in state:
            raise ConfigError(
                f"resume_from_checkpoint: {str(self.resumed_from)!r} was not written by this version of "
                "layerskip_finetune. To begin with its weights set resume_from_checkpoint=false, another output_dir, "
                f"and checkpointer.checkpoint_dir={self.resumed_from}"
            )
        return state | {training.OPT_KEY: optimizer}

    def load_weights(self, model: TransformerDecoder) -> tuple[Weights | None, Weights | None]:
        """What the run starts from; other ranks than 0 get empty mappings.

        Args:
            model: whose weights they are, on any device.

        Returns:
            The model's weights (None from scratch) and the adapters' (None if fresh).
        """
        weights: Weights | None = None if self.from_scratch else {}
        adapters = None
        if is_rank_zero():
            # Not before: it makes its folder.
            self._checkpointer = build_checkpointer(self._section, str(self.staging))
            if self.from_scratch:
                # A file that is written needs a place for each key: all go into the first shard.
                self._checkpointer._weight_map = defaultdict(lambda: "0001")
            else:
                warn_of_contradictions(self._checkpointer, model)
                weights = read_weights(self._checkpointer)
        if self.adapters and self.resumed_from is not None and not self.sharded:
            adapters = torch.load(self.resumed_from / ADAPTER_FILE, weights_only=True) if is_rank_zero() else {}
        return weights, adapters

    def save(self, name: str, contents: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Write a whole checkpoint, on rank 0; a run that is killed here leaves the previous ones as they were.

        Args:
            name: `epoch_N` or `step_N`, of the folder.
            contents: torchtune's keys: the model's weights, the adapters', their config; and BIASES for PEFT's form.
            state: what a resumed run needs beside.
        """
        self.finish()
        self._clear()
        only, contents = training.MODEL_KEY not in contents, dict(contents)
        biases = contents.pop(BIASES, {})
        self._checkpointer.save_checkpoint(contents, epoch=0, **({"adapter_only": True} if only else {}))
        folder = self.staging / "epoch_0"
        os.rename(folder, self.staging / name)
        folder = self.staging / name
        if training.ADAPTER_KEY not in contents:
            # torchtune copies it from where the run began, and transformers then looks for adapters here.
            (folder / "adapter_config.json").unlink(missing_ok=True)
        correct_peft_form(folder, self._checkpointer._model_type.name, biases)
        torch.save(dict(state), folder / RECIPE_STATE)
        # From there the next one takes config and tokenizer: where this run began may be thrown away.
        if self._checkpointer._checkpoint_dir.parent == self.output_dir:
            self._checkpointer._checkpoint_dir = self.output_dir / name
        self._place(name)

    def save_shards(self, name: str, shards: dict[str, Any], state: Mapping[str, Any]) -> None:
        """Begin to write every rank's shards; on all ranks. The checkpoint appears when the last one is written.

        In the background, but with torchao's optimizers.

        Args:
            name: `step_N`.
            shards: a state_dict of sharded tensors.
            state: what a resumed run needs beside, on rank 0.
        """
        self.finish()
        if is_rank_zero():
            self._clear()
        if dist.is_initialized():
            dist.barrier()  # or a rank writes into what is being cleared
        place = self.staging / name
        if self.waits:
            dcp.save(shards, checkpoint_id=str(place), process_group=self._group)
            future: Future = Future()
            future.set_result(None)
        else:
            future = dcp.async_save(_snapshot(shards), checkpoint_id=str(place), process_group=self._group)
        if is_rank_zero():
            self._pending = _after(future, lambda: (torch.save(dict(state), place / RECIPE_STATE), self._place(name)))
        else:
            self._pending = future

    def load_shards(self, shards: dict[str, Any]) -> list[str]:
        """Fill a state_dict of sharded tensors in place, whatever the number of ranks that wrote them.

        Returns:
            The parameters whose optimizer had no state yet: what is there of it stays as it is.
        """
        reader = dcp.FileSystemReader(str(self.resumed_from))
        written = reader.read_metadata().state_dict_metadata
        if any(f"model.{name}" not in written for name in shards["model"]):
            raise ConfigError(f"resume_from_checkpoint: {str(self.resumed_from)!r} lacks weights of this model")
        # The state's names are state.PARAMETER.WHAT.
        absent = [name for name in shards[training.OPT_KEY] if f"{training.OPT_KEY}.{name}" not in written]
        dcp.load(shards, storage_reader=reader, planner=DefaultLoadPlanner(allow_partial_load=bool(absent)))
        states = [name.removeprefix("state.") for name in absent if name.startswith("state.")]
        return sorted({name.rpartition(".")[0] for name in states})

    def finish(self) -> None:
        """Wait for the shards that are being written, and raise what went wrong with them."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None
        if is_rank_zero() and self.staging.is_dir() and not any(self.staging.iterdir()):
            self.staging.rmdir()  # the checkpointer made it

    def _clear(self) -> None:
        put_back(self.output_dir)
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True)

    def _place(self, name: str) -> None:
        """Move a checkpoint that is complete to its place, and throw away the oldest ones."""
        # In their order even where the clock goes back, as from one machine to another.
        before = [_written(old) + 1e-3 for old in complete_checkpoints(self.output_dir)]
        (self.staging / name / WRITTEN).write_text(repr(max([time.time(), *before])))
        place = self.output_dir / name
        if place.exists():
            os.rename(place, self.staging / f"{REPLACED}{name}")
        os.rename(self.staging / name, place)
        if self.keep:
            source = self._checkpointer._checkpoint_dir  # of the next whole checkpoint's config and tokenizer
            for old in complete_checkpoints(self.output_dir)[: -self.keep]:
                if old == source:
                    continue
                os.rename(old, self.staging / f"old_{old.name}")  # at once: half a checkpoint is never there
        shutil.rmtree(self.staging, ignore_errors=True)


def _snapshot(value: Any) -> Any:
    """A copy of what lies on the CPU: torch 2.6 writes it as it is by then, and the training goes on."""
    if isinstance(value, dict):
        return {key: _snapshot(part) for key, part in value.items()}
    return value.detach().clone() if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value


def _after(future: Future, then: Callable[[], Any]) -> Future:
    """A future that is done when `then` ran after the first one, in its thread; with the error of either."""
    both: Future = Future()

    def done(first: Future) -> None:
        try:
            first.result()
            both.set_result(then())
        except BaseException as e:
            both.set_exception(e)

    future.add_done_callback(done)
    return both


def put_back(output_dir: Path) -> None:
    """Undo what a run killed between two renames left: a checkpoint set aside, and none in its place."""
    for aside in (output_dir / STAGING).glob(f"{REPLACED}*"):
        place = output_dir / aside.name.removeprefix(REPLACED)
        if not place.exists():
            os.rename(aside, place)


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints under output_dir, the oldest first."""
    states = [*output_dir.glob(f"epoch_*/{RECIPE_STATE}"), *output_dir.glob(f"step_*/{RECIPE_STATE}")]
    return sorted((path.parent for path in states), key=_written)


def _written(checkpoint: Path) -> float:
    """When a checkpoint was written, in seconds."""
    noted = checkpoint / WRITTEN
    return float(noted.read_text()) if noted.exists() else (checkpoint / RECIPE_STATE).stat().st_mtime


def find_checkpoint(output_dir: Path) -> Path:
    """The newest complete checkpoint under output_dir, by the time at which it was written; rank 0 looks for all.

    Raises:
        ValueError: if there is none.
    """
    found = None
    if is_rank_zero():
        put_back(output_dir)
        complete = complete_checkpoints(output_dir)
        if not complete:
            raise ConfigError(
                f"resume_from_checkpoint: no complete checkpoint (epoch_*/{RECIPE_STATE} or step_*/{RECIPE_STATE}) "
                f"under output_dir {str(output_dir)!r}. Set resume_from_checkpoint=false to start anew"
            )
        found = complete[-1]
    return from_rank_zero(found)


def check_shared(folder: Path) -> None:
    """Raises a ValueError unless all ranks, on all machines, have the same folder: their shards go there together."""
    marker = folder / f".{from_rank_zero(uuid4().hex)}"
    if is_rank_zero():
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
    dist.barrier()
    seen: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(seen, marker.exists())
    marker.unlink(missing_ok=True)
    if not all(seen):
        raise ConfigError(
            f"output_dir: {str(folder)!r} is not one folder for all machines, and enable_async_checkpointing writes "
            "each rank's shards there. Give one that they share, or enable_async_checkpointing=false"
        )
