"""Whether compiling the decoding steps pays for a run."""

import os
import shutil
from importlib.util import find_spec

import torch

from layerskip_recipes.generation.kernels.cpp_decoder import is_library_compiled

COMPILE_S = {"cpu": 30.0, "cuda": 180.0}  # compile time of a first run
LOAD_S = 5.0  # to load C++ that an earlier run compiled, and to move weights to huge pages


def has_compiler(device: torch.device) -> bool:
    """Whether steps can be compiled, which needs a C++ compiler on a CPU, and triton on a GPU."""
    if device.type == "cpu":
        return shutil.which(os.environ.get("CXX", "g++")) is not None
    return device.type == "cuda" and find_spec("triton") is not None


def compiling_pays(eager_s: float, compiled_s: float, steps: int, device: torch.device) -> tuple[bool, str]:
    """Whether compiling saves more time than it takes, given the seconds per token of both; and a log line."""
    if not has_compiler(device):
        why = {"cpu": "no C++ compiler was found", "cuda": "triton is not installed"}
        return False, f"Not compiled, and so slower: {why.get(device.type, f'not possible on {device.type}')}"
    first = device.type != "cpu" or not is_library_compiled()
    saved, needed = steps * (eager_s - compiled_s), COMPILE_S[device.type] if first else LOAD_S
    faster = f"makes decoding about {eager_s / compiled_s:.1f}x faster"
    if saved > needed:
        return True, f"Compiled: it {faster} here, and saves about {saved:.0f} s. compile=false leaves it out"
    return False, (
        f"Not compiled: that would save about {saved:.0f} s of at most {steps} tokens, and take about {needed:.0f} s"
        f"{' the first time' if first else ''}. For longer runs set compile=true"
    )
