"""Run the model tests on the oldest, the pinned and the newest versions of PyTorch, transformers and PEFT.

Each set of versions has its own virtual environment, which is kept. The oldest versions are the oldest ones that
``pyproject.toml`` allows. The pinned versions are those in the Makefile and ``constraints.txt``. The newest versions
are those that pip finds. With pinned and newest versions, the tests of PEFT run a second time with the transformers of
``constraints-peft.txt``.

Usage: python tools/matrix.py [--folder FOLDER] [--only NAME] [-- arguments of pytest]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import venv
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "peft")
COLUMNS = ("environment", *PACKAGES, "passed", "failed", "skipped")
MODEL_TESTS = ("tests/methods", "tests/integrations")
CONSTRAINED = ("--constraint", str(ROOT / "constraints.txt"))


class Environment(NamedTuple):
    """A set of versions, as arguments of pip."""

    name: str
    requirements: tuple[str, ...]
    overlaid: bool  # run the tests of PEFT again, with the transformers that PEFT works with


class Result(NamedTuple):
    """The row of the table and the failed tests of one run."""

    row: tuple[str, ...]
    failed: tuple[str, ...]


def main() -> int:
    """Run the tests in every environment and print a table.

    Returns:
        1 if a test failed, else 0.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-matrix", help="folder of the environments")
    parser.add_argument("--only", choices=("oldest", "pinned", "newest"), action="append", help="can be repeated")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, after --")
    options = parser.parse_args()
    chosen = [each for each in environments() if options.only is None or each.name in options.only]
    results = [result for each in chosen for result in run(each, options.folder.resolve(), options.pytest)]
    print_table([COLUMNS, *(result.row for result in results)])
    failed = [f"{result.row[0]}: {test}" for result in results for test in result.failed]
    print("\n".join(failed))
    return 1 if failed else 0


def environments() -> list[Environment]:
    """Return the three sets of versions."""
    oldest = tuple(f"{package}=={oldest_version(package)}" for package in PACKAGES)
    pinned = re.search(r"^TORCH \?= (\S+)", (ROOT / "Makefile").read_text("utf-8"), re.M)
    assert pinned is not None
    return [
        Environment("oldest", oldest, overlaid=False),
        Environment("pinned", (pinned[1], *CONSTRAINED), overlaid=True),
        Environment("newest", ("--upgrade", *PACKAGES), overlaid=True),
    ]


def oldest_version(package: str) -> str:
    """Return the oldest version that pip finds and ``pyproject.toml`` allows."""
    least = re.search(rf'"{package}>=([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    assert least is not None
    pip = (sys.executable, "-m", "pip", "index", "versions", package)
    listing = subprocess.run(pip, check=True, capture_output=True, text=True).stdout
    versions = re.search(r"Available versions: (.*)", listing)
    assert versions is not None
    releases = [version for version in versions[1].split(", ") if re.fullmatch(r"[\d.]+", version)]
    return min((version for version in releases if numbers(version) >= numbers(least[1])), key=numbers)


def numbers(version: str) -> tuple[int, ...]:
    """Return the numbers in a version."""
    return tuple(int(number) for number in version.split("."))


def run(environment: Environment, folder: Path, arguments: list[str]) -> Iterator[Result]:
    """Create an environment, if it does not exist, and run the tests in it."""
    python = install(environment, folder)
    yield run_tests(python, environment.name, [*MODEL_TESTS, *arguments], {})
    if environment.overlaid:
        overlay = folder / f"{environment.name}-peft"
        source = ROOT / "constraints-peft.txt"
        pip(python, "--no-deps", "--upgrade", "--target", str(overlay), "--requirement", str(source))
        variables = {"PYTHONPATH": str(overlay), "REQUIRE_PEFT": "1"}
        yield run_tests(python, f"{environment.name}, PEFT", ["-m", "peft", *arguments], variables)


def install(environment: Environment, folder: Path) -> Path:
    """Create or update a virtual environment, and return the path of its Python."""
    place = folder / environment.name
    python, stamp = place / "bin" / "python", place / "requirements.txt"
    files = [Path(each).read_text("utf-8") for each in environment.requirements if Path(each).is_file()]
    wanted = "\n".join([*environment.requirements, *files])
    if not stamp.exists() or stamp.read_text("utf-8") != wanted or "--upgrade" in environment.requirements:
        print(f"installing {environment.name}: {' '.join(environment.requirements)}", flush=True)
        if not python.exists():
            venv.create(place, with_pip=True, symlinks=True)
        torch = [each for each in environment.requirements if each not in PACKAGES[1:]]
        pip(python, "setuptools>=77", "ninja", *torch)
        pip(python, "--no-build-isolation", f"{ROOT}[test]", *environment.requirements)
        stamp.write_text(wanted, "utf-8")
    return python


def pip(python: Path, *arguments: str) -> None:
    """Run ``pip install`` in an environment. The tests do not need compiled kernels, so none are built."""
    command = (str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", "install", *arguments)
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "FASTPREFIX_BUILD_EXT": "0"})


def run_tests(python: Path, name: str, arguments: list[str], variables: dict[str, str]) -> Result:
    """Run pytest in an environment."""
    report = python.parent.parent / "report.xml"
    report.unlink(missing_ok=True)
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    options = ("--quiet", "--tb=short", "--numprocesses=auto", f"--junitxml={report}")
    command = (str(python), "-m", "pytest", *options, *arguments)
    code = subprocess.run(command, cwd=ROOT, env=variables, check=False).returncode
    versions = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"
    query = (python, "-c", versions, *PACKAGES)
    found = subprocess.run(query, env=variables, check=True, capture_output=True, text=True).stdout.split()
    if not report.exists():
        return Result((name, *found, "-", "-", "-"), (f"pytest ended with {code}",))
    cases: list[Any] = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    counts = (len(cases) - len(failed) - skipped, len(failed), skipped)
    names = tuple(f"{case.get('classname')}::{case.get('name')}" for case in failed)
    return Result((name, *found, *map(str, counts)), names or (f"pytest ended with {code}",) * (code != 0))


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Print a table in Markdown. The first row is the header."""
    for index, row in enumerate(rows):
        print(f"| {' | '.join(row)} |")
        if index == 0:
            print("|---" * len(row) + "|")


if __name__ == "__main__":
    sys.exit(main())
