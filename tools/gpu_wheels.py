"""Collect the wheels that a GPU machine without a network needs, including this package's wheel.

    python tools/gpu_wheels.py wheels                              # here, with a network
    python -m pip install --no-index --no-deps wheels/*.whl        # there

The default machine has x86_64 Linux, Python 3.12, torch 2.11, transformers 5.17, their dependencies, pandas, pyarrow
and matplotlib. For another machine, pass its output of `python -m pip freeze`:

    python tools/gpu_wheels.py wheels --installed freeze.txt --python 3.11

wandb (20 MiB) is left out: only its own logger needs it.
"""

import argparse
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The packages of an image with a GPU build of torch. It also has their dependencies.
INSTALLED = ("torch==2.11.0", "transformers==5.17.0", "pandas", "pyarrow", "matplotlib")
LEFT_OUT = ("wandb",)
# Images may lack these: only recent releases of typer, a dependency of transformers, need pydantic.
ALWAYS = ("pydantic", "pydantic-core", "annotated-types", "typing-inspection")
FOR_THE_REPORT = ("pytest", "pytest-xdist", "liger-kernel")


def pip(*arguments: str) -> str:
    """Run pip and return its output; exit if it fails."""
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"pip {arguments[0]} failed, see above")
    return done.stdout


def of_machine(python: str) -> list[str]:
    """pip options that select wheels for the other machine."""
    tags = [f"manylinux_2_{minor}_x86_64" for minor in range(35, 16, -1)] + ["manylinux2014_x86_64", "any"]
    return ["--only-binary=:all:", f"--python-version={python}", *(f"--platform={tag}" for tag in tags)]


def canonical(name: str) -> str:
    """A package name in pip's normalized form."""
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(requirements: Sequence[str], options: Sequence[str]) -> dict[str, str]:
    """{name: version} of the requirements and their dependencies."""
    report = pip(
        *("install", "--quiet", "--dry-run", "--ignore-installed", "--report=-", "--target=nowhere"),
        *(*options, *requirements),
    )
    found = (package["metadata"] for package in json.loads(report)["install"])
    return {canonical(package["name"]): package["version"] for package in found}


def collect(folder: Path, installed: dict[str, str], options: Sequence[str]) -> list[Path]:
    """Download missing packages and build our wheel. Returns the wheels, largest first."""
    ours = importlib.metadata.requires("layerskip-recipes") or []
    needed = [line for line in ours if "extra ==" not in line and not line.startswith(LEFT_OUT)]
    pins = [f"{name}=={version}" for name, version in installed.items() if name not in ALWAYS]
    everything = resolve([*needed, *FOR_THE_REPORT, *pins], options)
    missing = [f"{n}=={v}" for n, v in everything.items() if n not in installed or n in ALWAYS]
    pip("download", "--quiet", "--no-deps", f"--dest={folder}", *options, *missing)
    with tempfile.TemporaryDirectory() as copy:  # a build folder in the checkout may hold deleted files
        source = shutil.copytree(
            ROOT, Path(copy) / "source", ignore=shutil.ignore_patterns("build", ".*", "*.egg-info")
        )
        pip("wheel", "--quiet", "--no-deps", f"--wheel-dir={folder}", str(source))
    return sorted(folder.glob("*.whl"), key=lambda path: -path.stat().st_size)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the wheels go; it must be empty")
    parser.add_argument("--installed", type=Path, help="what `python -m pip freeze` prints on the machine")
    parser.add_argument("--python", default="3.12", help="the machine's version of Python (default 3.12)")
    parser.add_argument("--limit-mib", type=float, default=40.0, help="largest total size of the wheels (default 40)")
    args = parser.parse_args(arguments)
    if args.folder.exists() and any(args.folder.iterdir()):
        parser.error(f"{args.folder} is not empty: older wheels there would be installed too")
    options = of_machine(args.python)
    if args.installed is None:
        installed = resolve(INSTALLED, options)
    else:
        pinned = re.findall(r"^([\w.-]+)==([^\s+]+)", args.installed.read_text(), flags=re.M)
        installed = {canonical(name): version for name, version in pinned}
    wheels = collect(args.folder, installed, options)
    sizes = [wheel.stat().st_size / 2**20 for wheel in wheels]
    for wheel, size in zip(wheels, sizes, strict=True):
        print(f"{size:7.2f} MiB  {wheel.name}")
    if sum(sizes) > args.limit_mib:
        sys.exit(f"{sum(sizes):.1f} MiB are more than --limit-mib {args.limit_mib}")
    print(f"{sum(sizes):7.2f} MiB  in all. On the machine, without a network:")
    print(f"python -m pip install --no-index --no-deps {args.folder}/*.whl")


if __name__ == "__main__":
    main(sys.argv[1:])
