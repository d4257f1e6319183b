"""Command line: ``python -m benchmarks.gpu``, the same as ``python -m benchmarks gpu``."""

import sys

from ..__main__ import main

if __name__ == "__main__":
    sys.exit(main(["gpu", *sys.argv[1:]]))
