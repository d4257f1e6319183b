"""Command line: ``python -m benchmarks [SUITE] [options]``; without a suite's name, the main job."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import adapterhub, attention, compare, embedding, main_job, publish, shared_prompt, whole_models
from .errors import BenchmarkError
from .options import QUICK_NOTE
from .study import suite as study


@dataclass(frozen=True)
class Suite:
    """A benchmark, or work on results: what it is, its options, a function that runs it and returns the exit status."""

    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


SUITES = {
    "main": Suite(main_job.DESCRIPTION, main_job.add_arguments, main_job.run),
    "attention": Suite(attention.DESCRIPTION, attention.add_arguments, attention.run),
    "embedding": Suite(embedding.DESCRIPTION, embedding.add_arguments, embedding.run),
    "shared-prompt": Suite(shared_prompt.DESCRIPTION, shared_prompt.add_arguments, shared_prompt.run),
    "models": Suite(whole_models.DESCRIPTION, whole_models.add_arguments, whole_models.run),
    "adapterhub": Suite(adapterhub.DESCRIPTION, adapterhub.add_arguments, adapterhub.run),
    "study": Suite(study.DESCRIPTION, study.add_arguments, study.run),
    "compare": Suite(compare.DESCRIPTION, compare.add_arguments, compare.run),
    "report": Suite(publish.DESCRIPTION, publish.add_arguments, publish.run),
}
DEFAULT_SUITE = "main"


def parse(arguments: Sequence[str]) -> tuple[Suite, argparse.Namespace]:
    """The suite that the arguments name, and its options."""
    named = bool(arguments) and arguments[0] in SUITES
    name = arguments[0] if named else DEFAULT_SUITE
    suite = SUITES[name]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks" + (f" {name}" if named else ""),
        description=suite.description,
        epilog=f"suites: {', '.join(SUITES)} (default: {DEFAULT_SUITE})",
    )
    suite.add_arguments(parser)
    return suite, parser.parse_args(arguments[1:] if named else arguments)


def main(arguments: Sequence[str]) -> int:
    """Run a suite. Exit status 0: done; 1: some of it failed, the rest was reported; 2: it could not start."""
    suite, options = parse(arguments)
    try:
        status = suite.run(options)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if getattr(options, "quick", False):
        print(f"\n{QUICK_NOTE}")
    return status
