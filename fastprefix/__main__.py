"""Run one of the package's commands: ``fastprefix COMMAND`` or ``python -m fastprefix COMMAND``."""

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "info": "print versions, devices, usable backends and, with --model, how methods would run on a model",
    "parity": "compare usable backends with the float64 reference (exit status 1 if a bound is missed)",
}
"""Commands and descriptions. Each command is a module with ``add_arguments(parser)`` and ``main(args) -> int``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    parser = argparse.ArgumentParser("fastprefix", description="The tools of fastprefix.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    chosen = next((word for word in (sys.argv[1:] if argv is None else argv) if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if name == chosen:  # the modules of other commands are not imported
            module = importlib.import_module(f".{name}", __package__)
            module.add_arguments(subparser)
            subparser.set_defaults(main=module.main)
    args = parser.parse_args(argv)
    status: int = args.main(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
