"""Shared by the tests: tiny models of every family, a tiny tokenizer folder, and the real `tune run`."""

import atexit
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune.models.gemma._component_builders import gemma
from torchtune.models.gemma2._component_builders import Gemma2FinalNorm, gemma2
from torchtune.models.llama2._component_builders import llama2
from torchtune.models.llama3._component_builders import llama3
from torchtune.models.llama3_1._component_builders import llama3_1
from torchtune.models.llama3_2._component_builders import llama3_2
from torchtune.models.mistral._component_builders import mistral
from torchtune.models.phi3._component_builders import phi3
from torchtune.models.qwen2._component_builders import qwen2

# A shell that starts a program in the background may have it ignore Ctrl-C, and so all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tiny models are faster on one thread: on a busy machine four times, where threads wait for each other.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What inductor compiles is kept for one test run and found by all of its processes: xdist's workers inherit the
# folder. An empty one costs half a minute before the first graph, for probes and headers.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="layerskip-inductor-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

# With --dist loadfile --no-loadscope-reorder the files start in this order: what takes longest must not come last, and
# two files of several processes each shall not run beside each other.
LONGEST_FIRST = (
    *("test_readme", "test_distributed_finetune", "test_real", "test_resume", "test_compile", "test_speculation"),
    *("test_finetune", "test_distributed_generate", "test_generate", "test_errors", "test_adapters", "test_harness"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, each as it is."""
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


VOCAB = 97
SIZE = {
    "vocab_size": VOCAB,
    "num_layers": 6,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "intermediate_dim": 64,
    "max_seq_len": 128,
}
# code_llama2, 3.3, qwen2_5 and phi4 are the same builders with other numbers.
FAMILIES = {
    "llama2": lambda: llama2(**SIZE),
    "llama3": lambda: llama3(**SIZE),
    "llama3_1": lambda: llama3_1(**SIZE),
    "llama3_2": lambda: llama3_2(**SIZE),
    "mistral": lambda: mistral(**SIZE),
    "qwen2": lambda: qwen2(**SIZE),
    "qwen2_tied": lambda: qwen2(**SIZE, tie_word_embeddings=True),
    "gemma": lambda: gemma(**SIZE, head_dim=8),
    "gemma2": lambda: gemma2(**SIZE, head_dim=8, sliding_window_size=64),
    "phi3": lambda: phi3(**SIZE),
}


def make_tiny(family: str = "llama3_2", seed: int = 0):
    """A small model of a family whose greedy outputs vary: its weights are wide, not near zero as a fresh model's."""
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def unembedded(model: Any, h: torch.Tensor) -> torch.Tensor:
    """Norm and head of a decoder, written without them being called as one; Gemma 2's cap of 30 is on the logits."""
    if not isinstance(model.norm, Gemma2FinalNorm):
        return model.output(model.norm(h)).float()
    return 30.0 * torch.tanh(model.output(model.norm.rms_norm(h)).float() / 30.0)


def logits_of(base: Any, tokens: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """What a torchtune decoder gives, of Gemma 2 with the cap of 30 on the logits; torchtune has it on the state."""
    if not isinstance(base.norm, Gemma2FinalNorm):
        return base(tokens, **inputs)
    capping, base.norm.logit_capping = base.norm.logit_capping, torch.nn.Identity()
    logits, base.norm.logit_capping = base(tokens, **inputs), capping
    return 30.0 * torch.tanh(logits / 30.0)


class CountedCollectives(TorchDispatchMode):
    """Counts this rank's collectives in a `with` block: `counts` by kind, {"all_gather": 8}. Slow: not for timed runs.

    torch's own CommDebugMode fails on a decoder whose parts are called one by one.
    """

    KINDS = ("all_gather", "all_reduce", "reduce_scatter", "broadcast")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor makes plain operations of it, and those come here
        if getattr(func, "namespace", None) in ("c10d", "_c10d_functional"):
            # A kind has many names: _allgather_base_, all_gather_into_tensor, ...
            name = func.__name__.replace("allgather", "all_gather").replace("allreduce", "all_reduce")
            self.counts.update(kind for kind in self.KINDS if kind in name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def tiny():
    """A tiny llama3_2 model in eval mode: 6 layers, vocabulary 97, 128 positions."""
    return make_tiny()


@pytest.fixture(params=FAMILIES)
def any_family(request):
    """A tiny model of each family."""
    return make_tiny(request.param)


def run_command(
    name: str, *args: str, cwd: Path, env: dict | None = None, timeout: int = 600, cold: bool = False
) -> subprocess.CompletedProcess:
    """`tune ARGS` or `layerskip ARGS` as a user types it, in the environment that runs the tests, without the hub.

    Args:
        env: variables beside those of this process; then it starts cold, as some are read at import.
        timeout: in seconds.
        cold: in a process of its own. Else in a fork of one that has imported all of it, which saves 5 seconds. Not
            where CUDA may be, which knows no forks.
    """
    command = [str(Path(sys.executable).with_name(name)), *args]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | (env or {})
    if cold or env or sys.platform != "linux" or torch.cuda.is_available():
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    (done,) = forks.run(command, cwd, [environment], timeout)
    return done


def last_line(stderr: str) -> str:
    """What a process said last, but for what nanobind, of which torch is made, says of its own at the end of some."""
    return stderr.partition("\nnanobind: ")[0].strip().splitlines()[-1]


run_tune = functools.partial(run_command, "tune")


@pytest.fixture(scope="module", autouse=True)
def no_settings_of_other_files():
    """Recipes set torch's switches for the whole process, of which torch's cache of compiled code takes notice."""
    torch.set_float32_matmul_precision("highest")
    torch.set_deterministic_debug_mode("default")


@pytest.fixture(scope="session", autouse=True)
def few_megabytes():
    """Measuring the memory's speed takes a second for each report, but for those of `tune run`."""
    from layerskip_recipes.recipes import benchmark, report

    with pytest.MonkeyPatch.context() as patch:
        for module in (benchmark, report):
            measure = functools.partial(module.memory_bandwidth, megabytes=8)
            patch.setattr(module, "memory_bandwidth", measure)
        yield


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A tokenizer of 300 tokens trained on a little of the standard library."""
    from layerskip_recipes.quickstart import stdlib_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    stdlib_tokenizer(str(folder / "tokenizer"), vocab_size=300)
    return folder / "tokenizer"


@pytest.fixture
def layerskip(monkeypatch, capsys, tmp_path):
    """Runs `layerskip ARGS` in this process, in an empty folder: exit status, stdout, stderr."""
    from layerskip_recipes import cli

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
