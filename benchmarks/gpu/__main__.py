"""Entry point of ``python -m benchmarks.gpu``."""

import argparse
import sys
from pathlib import Path

import torch

from . import __doc__ as description
from .memory_check import SMALL, small_case
from .stages import STAGES, run_stages


def main() -> int:
    """Exit status 0: all stages came to their end; 1: some failed, the rest was done; 2: there is no device."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="where the raw figures go")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--small", action="store_true", help="only what the memory checker is to watch")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and PyTorch finds none", file=sys.stderr)
        return 2
    if options.small:
        for case in SMALL:
            small_case(case)
        return 0
    return run_stages(options.stages, options.out)


if __name__ == "__main__":
    sys.exit(main())
