"""Runs a program as on a machine with a GPU that computes nothing: `python start.py PROGRAM ARGUMENTS`.

torch's FakeTensorMode knows shapes, devices and aliases of tensors on a GPU, but a CPU build of torch refuses the
device "cuda". The two C++ objects below make it valid. They must be loaded before torch is imported, so a process of
its own runs the program, and no other test sees them.
"""

import ctypes
import importlib.util
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

STAND_IN = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

// Says that torch was built with CUDA and that its device is in use, which autograd asks for.
struct CUDAHooks : at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

// The only device is 0, with one stream on which nothing ever runs.
struct NoWork final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return {c10::kCUDA, 0}; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, getDevice()); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, NoWork);
"""


def load_stand_in() -> None:
    torch = Path(importlib.util.find_spec("torch").origin).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "stand_in.cpp"), Path(folder, "stand_in.so")
        source.write_text(STAND_IN)
        command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{torch}/include", str(source), "-o", str(library)]
        subprocess.run([*command, f"-L{torch}/lib", "-lc10", "-ltorch_cpu"], check=True)
        for path in (torch / "lib/libc10.so", torch / "lib/libtorch_cpu.so", library):
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)


if __name__ == "__main__":
    assert "torch" not in sys.modules
    load_stand_in()
    sys.path[0], sys.argv = str(Path(sys.argv[1]).parent), sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    # torch's own end would look for the GPU.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
