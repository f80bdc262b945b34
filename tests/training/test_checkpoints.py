"""Which checkpoints a run leaves, in which order, and with which files."""

import itertools
import os
import re
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.configs import finetune_config
from helpers.resuming import FILES, WEIGHTS, checkpoints
from helpers.training import VALIDATION, set_up, train
from torchtune.utils import get_logger

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.folders.model_folder import model_folder
from layerskip_recipes.training import checkpoints as run_checkpoints
from layerskip_recipes.training import resuming
from layerskip_recipes.training.checkpoints import Checkpoints
from layerskip_recipes.training.config import FinetuneConfig

pytestmark = pytest.mark.slow

SHARDS = {"save_every_n_steps": 1, "enable_async_checkpointing": True}


@pytest.mark.parametrize(
    ("keep", "asynchronous", "names"),
    [
        (None, False, ["step_2", "step_4", "epoch_0", "step_6", "step_8", "epoch_1"]),
        (3, True, ["step_6", "step_8", "epoch_1"]),
        (1, False, ["epoch_1"]),
    ],
)
def test_checkpoints_are_named_by_step_and_epoch_and_the_oldest_go(keep, names, asynchronous, tmp_path, finetune):
    """step_N after N steps of the whole run, epoch_N (from 0) at an epoch's end and not twice; the oldest go."""
    path = finetune(
        dataset=VALIDATION | {"seq_len": 16, "max_samples": 10}, epochs=2, max_steps_per_epoch=None,
        save_every_n_steps=2, keep_last_n_checkpoints=keep, enable_async_checkpointing=asynchronous,
    )  # fmt: skip
    train(path)
    out = tmp_path / "out"
    assert checkpoints(out) == names
    assert {path.name for path in out.iterdir()} == {*names, "logs", "torchtune_config.yaml"}
    for name in names:
        files = {path.name for path in (out / name).iterdir()}
        shards = asynchronous and name.startswith("step")
        assert {".metadata", "recipe_state.pt"} <= files if shards else files >= FILES
        step = torch.load(out / name / "recipe_state.pt", weights_only=True)["step"]
        assert step == {"epoch_0": 5, "epoch_1": 10}.get(name, int(name.split("_")[1]))


def test_a_checkpoint_is_on_the_disk_before_it_appears_and_before_older_ones_go(tmp_path, finetune, monkeypatch):
    events: list[tuple[str, Path]] = []

    def noted(owner, name, place):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: (events.append((name, place(a))), function(*a, **k))[1])

    noted(os, "fsync", lambda args: Path(os.readlink(f"/proc/self/fd/{args[0]}")))
    noted(os, "rename", lambda args: Path(args[1]))
    noted(shutil, "rmtree", lambda args: Path(args[0]))
    train(finetune(save_every_n_steps=1, keep_last_n_checkpoints=1))
    out = tmp_path / "out"
    appeared = events.index(("rename", out / "epoch_0"))
    staging = out / ".incomplete" / "epoch_0"
    synced = {place for kind, place in events[:appeared] if kind == "fsync"}
    assert synced >= {staging, *(staging / file.name for file in (out / "epoch_0").iterdir())}
    gone = next(i for i, (_, place) in enumerate(events) if place.name == "old_step_1")
    assert appeared < events.index(("fsync", out), appeared) < gone


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def garbage(file):
    file.write_bytes(b"?" * file.stat().st_size)


def empty(file):
    file.write_bytes(b"")


DAMAGES = [
    *((kind, name) for kind in (empty, cut, garbage) for name in ("recipe_state.pt", "written", WEIGHTS)),
    (empty, "config.json"), (Path.unlink, "recipe_state.pt"), (Path.unlink, WEIGHTS), (Path.unlink, "written"),
]  # fmt: skip


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory, tokenizer_folder):
    """The config of a run with the checkpoints epoch_0 and epoch_1."""
    path = finetune_config(tmp_path_factory.mktemp("two"), tokenizer_folder, epochs=2)
    train(path)
    return path


@pytest.mark.parametrize(("damage", "name"), DAMAGES, ids=lambda value: getattr(value, "__name__", value))
def test_a_damaged_checkpoint_is_passed_over(damage, name, two_epochs, tmp_path, caplog):
    out = tmp_path / "out"
    shutil.copytree(two_epochs.parent / "out", out)
    damage(out / "epoch_1" / name)
    with caplog.at_level("WARNING", logger=get_logger().name):
        assert resuming.find_checkpoint(out) == model_folder(str(out)) == out / "epoch_0"
    said = [message for message in caplog.messages if f"{out / 'epoch_1'} is damaged and not used: {name}" in message]
    assert damage is Path.unlink or (len(said) == 1 and "\n" not in said[0])
    damage(out / "epoch_0" / name)
    with pytest.raises(ConfigError, match=r"^resume_from_checkpoint: "):
        resuming.find_checkpoint(out)


def test_runs_go_on_beside_a_damaged_checkpoint(two_epochs, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(two_epochs.parent / "out", out)
    empty(out / "epoch_1" / "written")
    assert train(two_epochs, f"output_dir={out}").step == 4
    empty(out / "epoch_1" / "recipe_state.pt")
    resumed = train(two_epochs, f"output_dir={out}", "resume_from_checkpoint=true")
    assert resumed.checkpoints.resumed_from.name == "epoch_0" and resumed.step == 4
    assert resuming.find_checkpoint(out).name == "epoch_1"


def test_damaged_shards_are_passed_over(tmp_path, finetune):
    train(finetune(**SHARDS, max_steps_per_epoch=3))
    shutil.rmtree(tmp_path / "out" / "epoch_0")
    cut(tmp_path / "out" / "step_2" / "__0_0.distcp")
    assert resuming.find_checkpoint(tmp_path / "out").name == "step_1"


@pytest.mark.parametrize("settings", [{}, SHARDS], ids=["whole", "shards"])
def test_a_resumed_run_that_threw_its_start_away_still_writes_whole_checkpoints(settings, tmp_path, finetune):
    """The model's config is copied from the checkpoint that the run began with, which is older than all kept ones."""
    path, out = finetune(**settings, keep_last_n_checkpoints=1, max_steps_per_epoch=3), tmp_path / "out"
    train(path)
    train(path, "resume_from_checkpoint=true", "epochs=3")
    assert checkpoints(out) == ["epoch_2"] and not (out / ".incomplete").exists()
    assert {file.name for file in (out / "epoch_2").iterdir()} >= FILES
    assert train(path, "resume_from_checkpoint=true", "epochs=4").step == 12


def test_a_copied_run_goes_on_from_its_last_checkpoint(tmp_path, finetune):
    path = finetune(epochs=3, save_every_n_steps=1)
    train(path)
    copy = tmp_path / "copy"
    for name in sorted(checkpoints(tmp_path / "out")):  # epoch_2 before step_1
        shutil.copytree(tmp_path / "out" / name, copy / name, copy_function=shutil.copy)
    assert train(path, f"output_dir={copy}", "resume_from_checkpoint=true").checkpoints.resumed_from.name == "epoch_2"


def test_the_last_checkpoint_is_the_newest_though_the_clock_goes_back(tmp_path, finetune, monkeypatch):
    """As from one machine to another: the last checkpoint stays the newest, and is what is kept."""
    clock = itertools.count(1e9, -100.0)
    monkeypatch.setattr(run_checkpoints.time, "time", lambda: next(clock))
    train(finetune(epochs=2, save_every_n_steps=1, keep_last_n_checkpoints=2))
    left = [folder.name for folder in run_checkpoints.complete_checkpoints(tmp_path / "out")]
    assert left == ["step_3", "epoch_1"]


def test_shards_do_not_push_the_last_model_out(tmp_path, finetune):
    """Generation needs a whole checkpoint; shards only serve to resume."""
    path = finetune(**SHARDS, keep_last_n_checkpoints=2, max_steps_per_epoch=3)
    train(path)
    recipe = set_up(path, "resume_from_checkpoint=true", "epochs=2")
    place = recipe.checkpoints._place

    def place_until_epoch_1(name):
        if name == "epoch_1":
            raise KeyboardInterrupt
        place(name)

    recipe.checkpoints._place = place_until_epoch_1
    with pytest.raises(KeyboardInterrupt):
        recipe.train()
    recipe.cleanup()
    assert sorted(checkpoints(tmp_path / "out")) == ["epoch_0", "step_4", "step_5"]


def test_shards_are_copies_that_later_steps_do_not_change(finetune, monkeypatch):
    given, write = [], dcp.async_save
    monkeypatch.setattr(dcp, "async_save", lambda shards, **kwargs: (given.append(shards), write(shards, **kwargs))[1])
    recipe = set_up(finetune(**SHARDS))
    recipe.train()
    own = {parameter.data_ptr() for parameter in recipe.model.parameters()}
    assert given and not any(value.data_ptr() in own for shards in given for value in shards["model"].values())
    recipe.cleanup()


def test_shards_that_cannot_be_written_end_the_run(finetune, monkeypatch):
    def full(self, name, place=Checkpoints._place):
        if name == "step_1":
            raise OSError("No space left on device")
        place(self, name)

    monkeypatch.setattr(Checkpoints, "_place", full)
    with pytest.raises(ConfigError, match=r"step_1 .*No space left on device"):
        train(finetune(**SHARDS))


def test_a_run_needs_room_for_one_checkpoint_more_than_it_keeps(finetune, monkeypatch):
    """Also when resuming, before a model is loaded."""
    path = finetune(save_every_n_steps=1, keep_last_n_checkpoints=2, epochs=2)
    size = FinetuneConfig.load(load_config(str(path))).checkpoint_bytes
    usage = SimpleNamespace(free=3 * size - 1)
    monkeypatch.setattr(run_checkpoints.shutil, "disk_usage", lambda place: usage)
    words = run_checkpoints.in_words
    message = rf"^output_dir: .* {words(usage.free)} .* {words(3 * size)} .*keep_last_n_checkpoints=1$"
    with pytest.raises(ConfigError, match=message):
        set_up(path)
    usage.free = 3 * size
    train(path, "epochs=1")
    usage.free = size - 1
    monkeypatch.delattr(Checkpoints, "load_weights")
    with pytest.raises(ConfigError, match=r"^output_dir: .* 1 more "):
        set_up(path, "resume_from_checkpoint=true")


@pytest.mark.parametrize("file", [WEIGHTS, "recipe_state.pt"])
def test_a_full_disk_is_named_and_emptied(file, tmp_path, finetune, monkeypatch):
    """Here files have a largest size, for which the system and the libraries have the same kinds of errors."""
    out, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)

    def write(self, name, *contents, write=Checkpoints._write):
        if name == "epoch_1":
            sizes = {part: (out / "epoch_0" / part).stat().st_size for part in (WEIGHTS, "recipe_state.pt")}
            most = sizes[WEIGHTS] // 2 if file == WEIGHTS else (sizes[WEIGHTS] + sizes[file]) // 2
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        write(self, name, *contents)

    monkeypatch.setattr(Checkpoints, "_write", write)
    try:
        with pytest.raises(ConfigError) as caught:
            train(finetune(epochs=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = caught.value.args
    assert re.match(
        rf"output_dir: epoch_1 cannot be written to '{out}' \(.+\)\. The disk at /.* has .*iB left\. ", line
    )
    assert line.endswith(f"The last whole checkpoint is {out}/epoch_0; go on from it with resume_from_checkpoint=true")
    assert checkpoints(out) == ["epoch_0"] and not (out / ".incomplete").exists()


@pytest.mark.parametrize("mask", [0o022, 0o077], ids=oct)
def test_others_can_read_the_files_if_they_can_read_new_ones(mask, tmp_path, finetune, monkeypatch):
    before = os.umask(mask)
    try:
        train(finetune())
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out" / "epoch_0").iterdir()}
    assert set(modes.values()) == {0o666 & ~mask}, modes
