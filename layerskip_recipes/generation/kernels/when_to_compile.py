"""Whether compiling the decoding steps pays for a run."""

import os
import shutil
from importlib.util import find_spec

import torch

from layerskip_recipes.generation.kernels.cpp_decoder import is_library_compiled

COMPILE_S = 30.0  # compile time of a first run on a CPU
GPU_STEPS = 300  # a GPU compiles runs of more steps
LOAD_S = 5.0  # to load C++ that an earlier run compiled, and to move weights to huge pages


def has_compiler(device: torch.device) -> bool:
    """Whether steps can be compiled, which needs a C++ compiler on a CPU, and triton on a GPU."""
    if device.type == "cpu":
        return shutil.which(os.environ.get("CXX", "g++")) is not None
    return device.type == "cuda" and find_spec("triton") is not None


def compiling_pays(eager_s: float, compiled_s: float, steps: int, device: torch.device) -> tuple[bool, str]:
    """Whether compiling pays, and a log line. On a CPU it must save more time than it takes, given the seconds per
    token of both; on a GPU it pays for more than a few hundred steps."""
    if not has_compiler(device):
        why = {"cpu": "no C++ compiler was found", "cuda": "triton is not installed"}
        return False, f"Not compiled, and so slower: {why.get(device.type, f'not possible on {device.type}')}"
    if device.type == "cuda":
        # No estimate: launches decide how long an uncompiled step takes, and inductor's cache how long compiling does.
        if steps > GPU_STEPS:
            return True, f"Compiled, since up to {steps} tokens are more than {GPU_STEPS}. compile=false leaves it out"
        return False, f"Not compiled, for at most {steps} tokens. For longer runs set compile=true"
    first = not is_library_compiled()
    saved, needed = steps * (eager_s - compiled_s), COMPILE_S if first else LOAD_S
    faster = f"makes decoding about {eager_s / compiled_s:.1f}x faster"
    if saved > needed:
        return True, f"Compiled: it {faster} here, and saves about {saved:.0f} s. compile=false leaves it out"
    return False, (
        f"Not compiled: that would save about {saved:.0f} s of at most {steps} tokens, and take about {needed:.0f} s"
        f"{' the first time' if first else ''}. For longer runs set compile=true"
    )
