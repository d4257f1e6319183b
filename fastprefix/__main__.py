"""``python -m fastprefix``: the package's tools, one a row of the table below."""

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "aot": "compiles every Triton kernel without a GPU; exit status 1 on an undeclared spill or a failure",
    "info": "versions, devices, which backends are usable and why others are not; with --model, how prompts run on it",
    "parity": "parity of every usable backend with the float64 reference; exit status 1 on a miss",
}
"""A command is a module of this package with ``add_arguments(parser)`` and ``main(args) -> int``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    parser = argparse.ArgumentParser("python -m fastprefix", description="fastprefix's tools")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    chosen = next((word for word in (sys.argv[1:] if argv is None else argv) if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if name == chosen:  # the others' modules need not be imported
            module = importlib.import_module(f".{name}", __package__)
            module.add_arguments(subparser)
            subparser.set_defaults(main=module.main)
    args = parser.parse_args(argv)
    status: int = args.main(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
