"""Shared by the tests: a tiny model, a tiny tokenizer folder and checkpoint, configs, and `layerskip`.

The fixtures import torch and what needs it, since xdist's main process loads this file too before it starts workers.
"""

import atexit
import functools
import gc
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

os.environ["HF_HUB_OFFLINE"] = "1"

# A shell that starts a program in the background may have it ignore Ctrl-C, and so all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tiny models are faster on one thread: on a busy machine four times, where threads wait for each other. Results must
# not depend on the number, which OMP_NUM_THREADS sets.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Test files that are started as programs find tests/helpers too.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
# One folder for a test run and all of its processes: xdist's workers inherit its name. It holds what inductor compiles,
# half a minute before the first graph, and the tokenizer.
if "LAYERSKIP_TEST_RUN" not in os.environ:
    os.environ["LAYERSKIP_TEST_RUN"] = tempfile.mkdtemp(prefix="layerskip-test-run-")
    atexit.register(shutil.rmtree, os.environ["LAYERSKIP_TEST_RUN"], ignore_errors=True)
SHARED = Path(os.environ["LAYERSKIP_TEST_RUN"])
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(SHARED / "inductor"))
os.environ["XDG_CACHE_HOME"] = str(SHARED / "cache")  # no test writes to the user's home

# With --dist loadfile --no-loadscope-reorder these files start first: what takes minutes must not come last. The first
# one compiles the C++, for which others would wait; the second one needs none.
LONG = (
    "test_cpp_decoder",
    "test_distributed_finetune",
    "test_readme",
    "test_fake_decoding",
    "test_real",
    "test_gpu_report",
)


def pytest_xdist_auto_num_workers() -> int:
    """As many as there are processors: each one imports everything, for half a minute."""
    return min(8, os.cpu_count() or 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the sort is stable."""
    rank = {stem: number for number, stem in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))


@pytest.fixture
def tiny():
    """A tiny llama3_2 model in eval mode: 6 layers, vocabulary 97, 128 positions."""
    from helpers.tiny import make_tiny

    return make_tiny()


@pytest.fixture
def float64():
    """New models compute in float64 throughout, also where torchtune asks for fp32 (norms, rotations, logits).

    For tests that two computations are the same mathematics: their tolerance does not depend on a processor's kernels.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class KeepsFloat64(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.Tensor.float and args[0].dtype == torch.float64:
                return args[0]
            return func(*args, **(kwargs or {}))

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with KeepsFloat64():
        yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """What was imported and what other files left stays. Torchtune often collects garbage, and would look through a
    million objects for half a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def little_memory_is_read():
    """Each report names the memory's bandwidth, which takes as long as the generation of a tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layerskip_recipes.generation.stats.PROBE_MEGABYTES", 1)
        yield


@pytest.fixture(scope="module", autouse=True)
def no_settings_of_other_files():
    """Recipes set torch's switches for the whole process, of which torch's cache of compiled code takes notice."""
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.set_deterministic_debug_mode("default")


@pytest.fixture(scope="session")
def tokenizer_folder() -> Path:
    """A tokenizer of 300 tokens trained on the standard library; tests only read it."""
    from layerskip_recipes.data.standard_library import stdlib_tokenizer

    with FileLock(SHARED / "tokenizer.lock"):
        stdlib_tokenizer(str(SHARED / "tokenizer"), vocab_size=300)
    return SHARED / "tokenizer"


@pytest.fixture(scope="module", autouse=True)
def few_texts(tokenizer_folder):
    """Reading all of the standard library takes longer than most trainings here, and so does measuring 64 samples'
    drafts for each checkpoint; the tokenizer is there already."""
    from layerskip_recipes.acceptance import measuring
    from layerskip_recipes.data import standard_library

    texts = dict([*standard_library.stdlib_texts("heldout").items()][:3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "ENOUGH_SAMPLES", 1)
        patch.setattr(standard_library, "stdlib_texts", lambda split: texts)
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer_folder) -> Path:
    """The folder of `make_checkpoint`; tests only read it."""
    from helpers.configs import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint", tokenizer_folder)


@pytest.fixture
def finetune(tmp_path, tokenizer_folder):
    """`finetune_config` in the test's own folder: a function of the keys that differ."""
    from helpers.configs import finetune_config

    return functools.partial(finetune_config, tmp_path, tokenizer_folder)


@pytest.fixture
def path(tmp_path, checkpoint) -> Path:
    """A generation of 24 tokens from it."""
    from helpers.configs import generate_config

    return generate_config(tmp_path, checkpoint, max_new_tokens=24)


@pytest.fixture(autouse=True)
def patient(request, monkeypatch):
    """Drafts go on, however slow a busy machine finds them: the account of the rule is never spent. Tests of what the
    rule does by the clock have the mark `clock`."""
    if request.node.get_closest_marker("clock") is None:
        for name in ("START", "MOST_SAVED"):
            monkeypatch.setattr(f"layerskip_recipes.generation.drafting.rule.{name}", 1e9)


@pytest.fixture
def no_weights(monkeypatch):
    """Weights must not be read before a mistake is found."""
    from torchtune.training import FullModelHFCheckpointer

    def load(self, *args, **kwargs):
        raise AssertionError("the weights are loaded before the mistake is found")

    monkeypatch.setattr(FullModelHFCheckpointer, "load_checkpoint", load)


@pytest.fixture
def traced(monkeypatch):
    """Graphs of torch's own operations, made in a second each. test_compile.py has inductor's of greedy chains."""
    from layerskip_recipes.generation.kernels import compiling

    monkeypatch.setattr(compiling, "BACKEND", lambda graph, inputs, **options: graph)


@pytest.fixture
def layerskip(monkeypatch, capsys, tmp_path):
    """Runs `layerskip ARGS` in this process, in an empty folder: exit status, stdout, stderr."""
    from layerskip_recipes.cli import commands as cli

    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["layerskip", *args])
        status = 0
        try:
            cli.main()
        except SystemExit as e:
            status = e.code
        return status, *capsys.readouterr()

    return run
