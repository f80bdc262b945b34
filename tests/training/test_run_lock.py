"""At most one training at a time in an output folder."""

import errno
import fcntl
import multiprocessing
import os
import re
import signal
import socket

import pytest
from helpers.training import set_up, train
from torchtune.utils import get_logger

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.folders.model_folder import model_folder
from layerskip_recipes.training.recipe import LayerSkipFinetune
from layerskip_recipes.training.run_lock import RUNNING, RunLock

forked = multiprocessing.get_context("fork")


@pytest.fixture
def other_run():
    """Starts another process that trains in a folder; returns the process."""
    started = []

    def hold(folder, connection):
        RunLock(folder)
        connection.send(True)
        signal.pause()

    def start(folder):
        ours, theirs = forked.Pipe()
        started.append(forked.Process(target=hold, args=(folder, theirs)))
        started[-1].start()
        assert ours.recv()
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.mark.slow
def test_a_second_run_is_refused(tmp_path, finetune, other_run):
    """In one line that names the first run; a killed run leaves no lock."""
    path, out = finetune(), tmp_path / "out"
    train(path)
    holder = other_run(out)
    before = sorted(out.rglob("*"))
    for overrides in ([], ["resume_from_checkpoint=true"], [f"output_dir={out}/logs/.."]):
        with pytest.raises(ConfigError) as caught:
            LayerSkipFinetune(load_config(str(path), overrides))
        (line,) = caught.value.args
        who = rf"process {holder.pid} on {re.escape(socket.gethostname())}, started \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
        assert re.match(rf"output_dir: '.*' is in use by another training, {who}\. Allowed: .*_2$", line)
    assert sorted(out.rglob("*")) == before
    assert model_folder(str(out)) == out / "epoch_0"  # other recipes read the folder meanwhile
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert (out / RUNNING).exists()
    assert train(path, "resume_from_checkpoint=true", "epochs=2").step == 4
    assert not (out / RUNNING).exists()


def test_one_process_may_start_again(tmp_path, finetune):
    """As in a notebook after an error; the lock that was taken over is not freed with the run before."""
    first, second = set_up(finetune()), set_up(finetune())
    first.cleanup()
    assert (tmp_path / "out" / RUNNING).exists()
    second.cleanup()
    assert not (tmp_path / "out" / RUNNING).exists()


def test_one_of_many_has_the_lock(tmp_path):
    """Also while others end, and the file goes with them."""

    def use(busy, wrong):
        for _ in range(200):
            try:
                lock = RunLock(tmp_path)
            except ConfigError:
                continue
            if not busy.acquire(block=False):
                wrong.set()
            busy.release()
            lock.release()

    busy, wrong = forked.Lock(), forked.Event()
    processes = [forked.Process(target=use, args=(busy, wrong)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert not wrong.is_set() and not any(tmp_path.iterdir())


def test_a_file_system_without_locks_is_warned_of(tmp_path, finetune, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level("WARNING", logger=get_logger().name):
        train(finetune())
    assert "cannot be locked ([Errno 37] No locks available)" in caplog.text
    assert (tmp_path / "out" / "epoch_0").exists() and not (tmp_path / "out" / RUNNING).exists()
