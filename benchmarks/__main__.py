"""Run a benchmark suite: ``python -m benchmarks [SUITE] [options]``. The default suite is the main job."""

import argparse
import difflib
import importlib
import shlex
import sys
from collections.abc import Sequence

from .measure import BenchmarkError
from .suite import QUICK_NOTE

SUITES = {"main": "main_job", "models": "whole_models"} | {
    name: name.replace("-", "_")
    for name in ("shared-prompt", "visual-prompts", "plain-attention", "long-prefixes", "many-adapters", "attention",
                 "stores", "embedding", "gpu", "choices", "study", "cartridge", "compare", "report")
}  # fmt: skip
"""The module of each suite, with a docstring, add_arguments and run. It is imported only if its suite runs."""


def main(arguments: Sequence[str]) -> int:
    """Run a suite and return the exit status: 0 for success, 1 if a part of it failed, 2 if it could not start."""
    name = arguments[0] if arguments and not arguments[0].startswith("-") else "main"
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    suites = parser.add_subparsers(metavar="SUITE", help=f"{', '.join(SUITES)} (default: main)")
    if name not in SUITES:
        close = "".join(f" Did you mean {each}?" for each in difflib.get_close_matches(name, SUITES, n=1))
        parser.error(f"unknown suite {name!r}.{close} The suites are {', '.join(SUITES)}.")
    if arguments[:1] == ["--quick"] and (later := next((a for a in arguments if a in SUITES), None)):
        rest = [a for a in arguments if a != later]
        parser.error(f"the suite must come before its options: python -m benchmarks {shlex.join([later, *rest])}")
    try:
        suite = importlib.import_module(f".{SUITES[name]}", __package__)
    except ModuleNotFoundError as error:
        parser.error(f"{name} requires the package {error.name}. Install the extras of pyproject.toml")
    suite.add_arguments(suites.add_parser(name, description=(suite.__doc__ or "").partition("\n\n")[0]))
    if name not in arguments[:1] and not {"-h", "--help"} & set(arguments):
        arguments = [name, *arguments]
    options = parser.parse_args(arguments)
    try:
        status: int = suite.run(options)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if getattr(options, "quick", False):
        print(f"\n{QUICK_NOTE}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
