"""The checkpoints of a training run: written atomically, the oldest deleted, the newest found on resume.

A checkpoint is written to a staging folder and renamed, so `epoch_N` or `step_N` is complete or does not exist. For a
whole checkpoint, rank 0 gathers the model, and the config's checkpointer writes it. A sharded checkpoint only serves to
resume: every rank writes its shards in the background (torch.distributed.checkpoint).
"""

import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException
from torchtune import training
from torchtune.modules import TransformerDecoder
from torchtune.utils import get_logger

from layerskip_recipes.acceptance.trained_exits import write_description
from layerskip_recipes.checkpoint.answers import Answers, write_answers
from layerskip_recipes.checkpoint.checkpointer_checks import warn_of_contradictions
from layerskip_recipes.checkpoint.checkpointers import (
    build_checkpointer,
    is_scratch,
    reads_hf_folder,
    starts_from_scratch,
)
from layerskip_recipes.checkpoint.drafts import BESIDE, DRAFT, DRAFT_FILE, describe_base, earlier_draft, write_draft
from layerskip_recipes.checkpoint.hf_checkpointer import HFCheckpointer
from layerskip_recipes.checkpoint.side_files import SideFiles, files_of_torchtune
from layerskip_recipes.checkpoint.weights import read_weights
from layerskip_recipes.config.components import Component
from layerskip_recipes.config.paths import existing
from layerskip_recipes.errors import ConfigError, first_line
from layerskip_recipes.folders.run_folder import (
    RECIPE_STATE,
    complete_checkpoints,
    mark_complete,
    sync,
    written_at,
)
from layerskip_recipes.model.adapters import ADAPTER_FILE, BIASES, adapter_names, correct_peft_form, move_peft_files
from layerskip_recipes.processes import (
    file_group,
    from_every_rank,
    from_rank_zero,
    is_rank_zero,
    new_file_group,
    wait_for_all,
)
from layerskip_recipes.training.config import FinetuneConfig

log = get_logger("INFO")
STAGING = ".incomplete"
REPLACED = "replaced_"
KEEP = "keep_last_n_checkpoints"
FAILED_WRITE = ("PytorchStreamWriter", "inline_container", "iostream error")  # in errors of torch.save
SHARDED = ".metadata"  # only sharded checkpoints have this file

Weights = Mapping[str, torch.Tensor]


def _resumed_section(section: Component, checkpoint: Path) -> Component:
    """The checkpointer section that resumes from a whole checkpoint."""
    if reads_hf_folder(section):
        return section.replace(path=str(checkpoint))
    weights = sorted(path.name for path in checkpoint.glob("model-*") if path.suffix in (".safetensors", ".bin"))
    start = {"checkpoint_dir": str(checkpoint), "checkpoint_files": weights}
    if is_scratch(section):  # a run from scratch writes Hugging Face checkpoints
        component = "torchtune.training.FullModelHFCheckpointer"
        start |= {"_component_": component, "model_type": section.get("model_type")}
        return Component(start, section.key)
    return section.replace(**start)


class Checkpoints:
    """Reads the weights and the state that a run starts from, and writes its checkpoints under `output_dir`.

    `resumed_from` is the checkpoint's folder or None. A resumed run of adapters, or of a draft for a frozen model,
    takes these from the checkpoint, and the base weights from where the first run took them.
    """

    def __init__(self, cfg: FinetuneConfig, resumed_from: Path | None) -> None:
        self.output_dir = Path(cfg.output_dir)
        self.staging = self.output_dir / STAGING
        self.keep, self.every = cfg.keep_last_n_checkpoints, cfg.save_every_n_steps
        self.shards_steps = cfg.enable_async_checkpointing
        self.resumed_from = resumed_from
        self.sharded = from_rank_zero(self.resumed_from is not None and (self.resumed_from / SHARDED).exists())
        # A checkpoint contains the model, unless only adapters or a draft are trained. Those have a file of their own.
        self.has_adapters = bool(adapter_names(cfg.meta_model))
        self.draft_file = DRAFT_FILE if cfg.freezes_model else f"{DRAFT}/{DRAFT_FILE}" if cfg.draft else None
        resumed_model = None if self.has_adapters or cfg.freezes_model or self.sharded else self.resumed_from
        section, self.draft = cfg.checkpointer, cfg.draft
        self.from_scratch = not resumed_model and starts_from_scratch(section)
        self._section = _resumed_section(section, resumed_model) if resumed_model else section
        # torch cannot copy the low-bit state of torchao's optimizers for a background write.
        self._in_background = not cfg.optimizer.path.startswith("torchao.")
        self._completing = ThreadPoolExecutor(max_workers=1)
        self._pending: Future | None = None
        self._group = None
        if cfg.enable_async_checkpointing and dist.is_initialized():
            # Training goes on meanwhile, so the writers need a process group of their own.
            self._group = new_file_group()
            check_shared(self.output_dir)

    def load_state(self) -> dict[str, Any] | None:
        """The recipe's state, or None unless resuming. Only rank 0 gets the optimizer's state."""
        if self.resumed_from is None:
            return None
        state: dict[str, Any] = {}
        if is_rank_zero():
            state = torch.load(self.resumed_from / RECIPE_STATE, map_location="cpu", weights_only=True)
        optimizer = state.pop(training.OPT_KEY, None) or {}
        return from_rank_zero(state) | {training.OPT_KEY: optimizer}

    def load_weights(self, model: TransformerDecoder) -> tuple[Weights | None, Weights | None, Weights | None]:
        """The model's weights (None: from scratch), and those of its adapters and its draft (None: fresh).

        A new run trains the draft in the model's folder further, if its kind and exit are those of the config. Ranks
        other than 0 get empty mappings.
        """
        weights: Weights | None = None if self.from_scratch else {}
        adapters, of_draft = None, None
        if is_rank_zero():
            # Built only now, because building a checkpointer creates its folder.
            self._checkpointer = build_checkpointer(self._section, str(self.staging))
            if self.from_scratch:
                # torchtune looks up the file of each key; a model from scratch has one file.
                self._checkpointer._weight_map = defaultdict(lambda: "0001")
            else:
                warn_of_contradictions(self._checkpointer, model)
                weights = read_weights(self._checkpointer)
            if self.draft_file != DRAFT_FILE:
                self._read_side_files()
            if self.draft is not None and self.resumed_from is None:
                of_draft = earlier_draft(self._section, self.draft.kind, self.draft.exit_layer, weights or {})
                if of_draft is not None:
                    log.info("The draft in the model's folder is trained further.")
        if self.resumed_from is not None and not self.sharded:
            if self.has_adapters:
                file = self.resumed_from / ADAPTER_FILE
                adapters = torch.load(file, weights_only=True) if is_rank_zero() else {}
            if self.draft_file is not None:
                of_draft = load_file(self.resumed_from / self.draft_file) if is_rank_zero() else {}
        return weights, adapters, of_draft

    def _read_side_files(self) -> None:
        """Read config and tokenizer for the checkpoints now: later their folder may be changed or gone."""
        checkpointer = self._checkpointer
        if isinstance(checkpointer, HFCheckpointer):
            self._side_files = checkpointer.side_files
            return
        folder = checkpointer._checkpoint_dir
        files = (file for file in files_of_torchtune(folder) if folder / DRAFT not in file.parents)
        self._side_files = SideFiles(folder, files)
        checkpointer._checkpoint_dir = self.staging / "nothing"  # what torchtune copies files from
        if (scratch := getattr(checkpointer, "scratch", None)) is not None:
            scratch.cleanup()

    def base(self, weights: Weights | None) -> dict[str, Any]:
        """The draft description's entry about its base model; empty on ranks other than 0."""
        return describe_base(self._section, weights) if weights else {}

    def check_room(self, size: int, step: int, total_steps: int, per_epoch: int) -> None:
        """Check that the disk has room for the checkpoints of `size` bytes that the run adds from `step` on."""
        if not is_rank_zero() or step >= total_steps:
            return
        present = {path.name for path in complete_checkpoints(self.output_dir)}
        ends = {f"epoch_{number}" for number in range(step // per_epoch, total_steps // per_epoch)}
        every = self.every or total_steps
        between = {f"step_{s}" for s in range(every, total_steps, every) if s > step and s % per_epoch}
        new = ends | between
        count = len(new - present) + bool(new & present)  # one that replaces another is complete before that goes
        if self.keep:  # so is a new one before the oldest goes; shards do not replace the last model
            count = max(min(count, self.keep + 1 + self.shards_steps - len(present)), 1)
        if (free := shutil.disk_usage(existing(self.output_dir)).free) < count * size:
            fewer = f", or fewer checkpoints; for example {KEEP}=1" if count > 2 and self.keep != 1 else ""
            raise ConfigError(
                f"output_dir: {str(self.output_dir)!r} has {in_words(free)} left, and this run needs "
                f"{in_words(count * size)} for {count} more of its checkpoints at once. Allowed: a folder on a disk "
                f"with more room{fewer}"
            )

    @contextmanager
    def _removed_after_errors(self, name: str) -> Iterator[None]:
        """Remove a checkpoint that cannot be written, and explain a full or broken disk."""
        try:
            yield
        except BaseException as e:  # torch's CheckpointException is no Exception
            if is_rank_zero():
                restore_set_aside(self.output_dir)
                shutil.rmtree(self.staging, ignore_errors=True)
            of_torch = isinstance(e, RuntimeError) and any(words in str(e) for words in FAILED_WRITE)
            if not (of_torch or isinstance(e, OSError | SafetensorError | CheckpointException)):
                raise
            folder = self.output_dir.absolute()
            disk = next(place for place in (folder, *folder.parents) if place.is_mount())
            why = "torch.save failed" if of_torch else first_line(e)
            raise ConfigError(
                f"output_dir: {name} cannot be written to {str(self.output_dir)!r} ({why}). The disk at "
                f"{disk} has {in_words(shutil.disk_usage(disk).free)} left. {self.where_to_resume()}"
            ) from e

    def where_to_resume(self) -> str:
        """A sentence for the end of a run that is not finished."""
        newest = complete_checkpoints(self.output_dir)[-1:]
        if not newest:
            return f"There is no checkpoint under {str(self.output_dir)!r} yet"
        return f"The last whole checkpoint is {newest[0]}; go on from it with resume_from_checkpoint=true"

    def not_finite(self, what: str, lr: float) -> ConfigError:
        """The error of a run that stops because of infinite or missing numbers; `lr` is the config's."""
        lower = f"Try a smaller learning rate, for example optimizer.lr={lr / 2:.2g}"
        return ConfigError(f"{what}. {lower}. {self.where_to_resume()}")

    def save(
        self,
        name: str,
        contents: Mapping[str, Any],
        state: Mapping[str, Any],
        description: Mapping[str, Any],
        answers: Answers | None = None,
    ) -> None:
        """Write the whole checkpoint `epoch_N` or `step_N`, on rank 0. If killed, earlier checkpoints stay intact.

        `contents` comes from `checkpoint_contents`, `state` is for a resumed run, `description` goes to layerskip.json.
        A draft that is trained beside the model comes as contents[DRAFT] and description[DRAFT].
        """
        self.finish()
        with self._removed_after_errors(name):
            self._clear()
            self._write(name, contents, state, description)
            if answers is not None:
                write_answers(self.staging / name, answers)
            self._place(name)

    def _write(
        self, name: str, contents: Mapping[str, Any], state: Mapping[str, Any], description: Mapping[str, Any]
    ) -> None:
        model, described = dict(contents), dict(description)
        draft, of_draft = model.pop(DRAFT, None), described.pop(DRAFT, None)
        if self.draft_file == DRAFT_FILE:
            write_draft(self.staging / name, model[training.MODEL_KEY], described)
        else:
            self._write_model(name, model, described)
        if draft is not None:
            base = describe_base(_resumed_section(self._section, self.staging / name), model[training.MODEL_KEY])
            write_draft(self.staging / name / DRAFT, draft, of_draft | {"base": base | {"folder": BESIDE}})
        torch.save(dict(state), self.staging / name / RECIPE_STATE)

    def _write_model(self, name: str, contents: Mapping[str, Any], description: Mapping[str, Any]) -> None:
        only, contents = training.MODEL_KEY not in contents, dict(contents)
        ours = isinstance(self._checkpointer, HFCheckpointer)
        biases = {} if ours else contents.pop(BIASES, {})
        self._checkpointer.save_checkpoint(contents, epoch=0, **({"adapter_only": True} if only else {}))
        folder = (self.staging / "epoch_0").rename(self.staging / name)
        self._side_files.write(folder)
        if training.ADAPTER_KEY in contents and not ours:
            correct_peft_form(folder, self._checkpointer._model_type.name, biases)
        if not only:
            move_peft_files(folder)
        write_description(folder, description)

    def save_shards(self, name: str, shards: dict[str, Any], state: Mapping[str, Any]) -> None:
        """Start writing every rank's shards. Collective. The checkpoint appears once all of them are written."""
        self.finish()
        if is_rank_zero():
            self._clear()
        wait_for_all()  # no rank may write into the folder while rank 0 clears it
        place = self.staging / name
        written: Any = None
        if self._in_background:
            written = dcp.async_save(_snapshot(shards), checkpoint_id=str(place), process_group=self._group)
        else:
            with self._removed_after_errors(name):
                dcp.save(shards, checkpoint_id=str(place), process_group=self._group)

        def complete() -> None:
            with self._removed_after_errors(name):
                if written is not None:
                    written.result()
                if is_rank_zero():
                    torch.save(dict(state), place / RECIPE_STATE)
                    self._place(name)

        self._pending = self._completing.submit(complete)

    def load_shards(self, weights: dict[str, Any], states: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Fill sharded weights and the optimizer's states in place. Another number of ranks may have written them.

        Returns the states without those of parameters that had not been trained yet.
        """
        reader = dcp.FileSystemReader(str(self.resumed_from))
        written = reader.read_metadata().state_dict_metadata
        found_states = {
            name: state
            for name, state in states.items()
            if state and all(f"{training.OPT_KEY}.state.{name}.{key}" in written for key in state)
        }
        shards = {"model": weights} | ({training.OPT_KEY: {"state": found_states}} if found_states else {})
        dcp.load(shards, storage_reader=reader, process_group=file_group())
        wait_for_all()  # a slow reader would exceed the timeout of the next collective
        return found_states

    def finish(self) -> None:
        """Wait for the shards being written, and raise any error of that write."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None
        if is_rank_zero() and self.staging.is_dir() and not any(self.staging.iterdir()):
            self.staging.rmdir()  # left empty by torchtune's checkpointer, which creates it when built

    @property
    def writing(self) -> bool:
        """Whether shards are still being written in the background."""
        return self._pending is not None and not self._pending.done()

    def _clear(self) -> None:
        restore_set_aside(self.output_dir)
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True)

    def _place(self, name: str) -> None:
        """Move a complete checkpoint into place, and delete the oldest ones."""
        # Keep timestamps monotonic: another machine's clock may be behind.
        before = [written_at(old) + 1e-3 for old in complete_checkpoints(self.output_dir)]
        mark_complete(self.staging / name, max([time.time(), *before]))
        place = self.output_dir / name
        if place.exists():
            os.rename(place, self.staging / f"{REPLACED}{name}")
        os.rename(self.staging / name, place)
        sync(self.output_dir)  # delete nothing before the new checkpoint is on disk
        if self.keep:
            complete = complete_checkpoints(self.output_dir)
            models = [folder for folder in complete if not (folder / SHARDED).exists()]  # others are shards
            for old in complete[: -self.keep]:
                if old not in models[-1:]:
                    os.rename(old, self.staging / f"old_{old.name}")  # atomic, unlike deleting a folder
        shutil.rmtree(self.staging, ignore_errors=True)


def _snapshot(value: Any) -> Any:
    """The state with copied CPU tensors: torch 2.6 would write them after the next step has changed them."""
    if isinstance(value, dict):
        return {key: _snapshot(part) for key, part in value.items()}
    return value.detach().clone() if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value


def in_words(size: int) -> str:
    """A number of bytes as "1.5 GiB" or "3 MiB"."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.0f} MiB"


def restore_set_aside(output_dir: Path) -> None:
    """Move back a checkpoint that a killed run had set aside but not yet replaced."""
    for aside in (output_dir / STAGING).glob(f"{REPLACED}*"):
        place = output_dir / aside.name.removeprefix(REPLACED)
        if not place.exists():
            os.rename(aside, place)


def check_shared(folder: Path) -> None:
    """Raises a ConfigError unless all ranks, on all machines, see the same folder."""
    marker = folder / f".{from_rank_zero(uuid4().hex)}"
    if is_rank_zero():
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
    wait_for_all()
    seen = from_every_rank(marker.exists())
    marker.unlink(missing_ok=True)
    if not all(seen):
        raise ConfigError(
            f"output_dir: {str(folder)!r} is not shared by all machines, and enable_async_checkpointing writes each "
            "rank's shards there. Allowed: a shared folder, or enable_async_checkpointing=false"
        )
