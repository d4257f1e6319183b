"""Run ``python -m benchmarks.gpu``, which is the same as ``python -m benchmarks gpu``."""

import sys

from ..__main__ import main

if __name__ == "__main__":
    sys.exit(main(["gpu", *sys.argv[1:]]))
