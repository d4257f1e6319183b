"""Options that suites share, and what they mean."""

import argparse
from pathlib import Path

import torch

from .errors import BenchmarkError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_OUT = Path(__file__).parent / "out"


def add_common(parser: argparse.ArgumentParser) -> None:
    """Where to run, where to write, and whether only to try."""
    parser.add_argument("--quick", action="store_true", help="little and small: whether it runs, not how fast")
    parser.add_argument("--device", type=torch.device, help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder for the results")


def add_threads(parser: argparse.ArgumentParser) -> None:
    """How many CPU threads."""
    parser.add_argument("--threads", type=positive, help="on a CPU (default: PyTorch's choice)")


def positive(text: str) -> int:
    """A whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def device_of(options: argparse.Namespace) -> torch.device:
    """The one that was asked for, or the best there is; with the threads that were asked for."""
    if getattr(options, "threads", None):
        torch.set_num_threads(options.threads)
    chosen = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if chosen.type not in ("cpu", "cuda"):
        raise BenchmarkError(f"--device {chosen}: cpu or cuda")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError(f"--device {chosen}: PyTorch {torch.__version__} sees no GPU")
    assert isinstance(chosen, torch.device)
    return chosen
