"""Build the wheel, and check that it can be installed and gives correct results without a compiler.

``build`` builds one wheel for every supported Python and PyTorch. The same commit and compiler give the same bytes.
auditwheel then checks that the wheel runs with glibc 2.28 and uses no library of PyTorch except ``libtorch_cpu``.
``check`` installs a wheel in a fresh environment for each given Python and PyTorch, without a compiler on the path. It
compares every backend with the float64 reference there.

Usage: python tools/wheel.py build [--out dist]
       python tools/wheel.py check dist/*.whl --python python3.10 python3.13 --torch 2.11.0 2.13.0
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLATFORM = f"manylinux_2_28_{platform.machine()}"
PROGRAM = """
import fastprefix.info
from fastprefix.ops.backends import BACKENDS
import torch
print(*fastprefix.info.list_lines(), sep="\\n")
assert BACKENDS["cpu"].refusal(torch.device("cpu")) is None
"""


def main() -> None:
    """Run the subcommand."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    of_build = commands.add_parser("build", help="build the wheel and audit it")
    of_build.add_argument("--out", type=Path, default=ROOT / "dist")
    of_check = commands.add_parser("check", help="install a wheel without a compiler and test it")
    of_check.add_argument("wheel", type=Path)
    of_check.add_argument("--python", nargs="+", default=[sys.executable], help="Python interpreters")
    of_check.add_argument("--torch", nargs="+", default=["2.13.0"], help="PyTorch versions")
    options = parser.parse_args()
    if options.command == "build":
        build(options.out)
    else:
        for python in options.python:
            for torch in options.torch:
                check(options.wheel.resolve(), python, torch)


def build(out: Path) -> Path:
    """Build the wheel in ``out`` and return its path."""
    if importlib.util.find_spec("auditwheel") is None:
        raise SystemExit("auditwheel is not installed. Run: pip install auditwheel")
    commit_time = subprocess.check_output(["git", "log", "-1", "--format=%ct"], cwd=ROOT, text=True).strip()
    environment = {**os.environ, "FASTPREFIX_BUILD_EXT": "1", "SOURCE_DATE_EPOCH": commit_time}
    with tempfile.TemporaryDirectory() as folder:
        # A clone keeps other files of the checkout out of the wheel.
        subprocess.run(["git", "clone", "--quiet", ROOT, f"{folder}/fastprefix"], check=True)
        options = ("--no-deps", "--no-build-isolation", f"--config-settings=--build-option=--plat-name={PLATFORM}")
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", *options, "--wheel-dir", f"{folder}/out", "."]
        subprocess.run(command, cwd=f"{folder}/fastprefix", env=environment, check=True)
        (built,) = Path(folder, "out").glob("*.whl")
        audit(built)
        out.mkdir(parents=True, exist_ok=True)
        wheel = Path(shutil.copy(built, out))
    print(wheel)
    return wheel


def audit(wheel: Path) -> None:
    """Raise SystemExit if auditwheel finds symbols in the wheel that are newer than the platform in its name.

    auditwheel cannot confirm the platform itself, because the wheel does not contain PyTorch's library.
    """
    shown = " ".join(subprocess.check_output([sys.executable, "-m", "auditwheel", "show", wheel], text=True).split())
    print(shown)
    least = re.search(r'constrains the platform tag to "manylinux_(\d+)_(\d+)_', shown)
    promised = re.search(r"manylinux_(\d+)_(\d+)_", PLATFORM)
    assert promised is not None
    if least is None or tuple(map(int, least.groups())) > tuple(map(int, promised.groups())):
        raise SystemExit(f"the wheel requires a newer platform than the one in its name, {PLATFORM}")


def check(wheel: Path, python: str, torch: str) -> None:
    """Install the wheel in a fresh environment and test it there, without a compiler."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        environment = {"PATH": f"{folder}/bin", "HOME": folder, "CC": "false", "CXX": "false"}
        pip = [f"{folder}/bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        subprocess.run([*pip, f"torch=={torch}", "numpy", wheel], env={**environment, **kept}, check=True)
        run = [f"{folder}/bin/python", "-c", PROGRAM]
        subprocess.run(run, cwd=folder, env=environment, check=True)
        subprocess.run([f"{folder}/bin/fastprefix", "parity", "--quick"], cwd=folder, env=environment, check=True)
    print(f"{python}, PyTorch {torch}: passed", flush=True)


if __name__ == "__main__":
    main()
