"""Options of several suites, and what they mean."""

import argparse
import logging
import warnings
from pathlib import Path

import torch
import transformers

from fastprefix.info import could_be_of_hub

from .errors import BenchmarkError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_OUT = Path(__file__).parent / "out"
QUICK_NOTE = "This was a quick run: it shows that everything runs. Its times and ratios mean nothing."


def add_common(parser: argparse.ArgumentParser) -> None:
    """Whether only to try, where to run, where to write."""
    parser.add_argument("--quick", action="store_true", help="little and small: whether it runs, not how fast")
    parser.add_argument("--device", type=torch.device, help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder for the results")


def add_threads(parser: argparse.ArgumentParser) -> None:
    """How many CPU threads: for ``set_threads``."""
    parser.add_argument("--threads", type=positive, metavar="N", help="on a CPU (default: PyTorch's choice)")


def set_threads(asked: int | None) -> None:
    """As many as were asked for; else as many as there are."""
    if asked is not None:
        torch.set_num_threads(asked)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def device_for(asked: torch.device | None) -> torch.device:
    """The device that was asked for, or a GPU if there is one."""
    device = asked or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type not in ("cpu", "cuda"):
        raise BenchmarkError(f"--device {device}: cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError(f"--device {device}: PyTorch {torch.__version__} sees no GPU")
    return device


def is_of_hub(model: str | None) -> bool:
    """Whether ``--model`` names a model of the hub, and not a local folder.

    Raises:
        BenchmarkError: it can only be a folder, and there is none.
    """
    if model is None or Path(model).is_dir():
        return False
    if not could_be_of_hub(model):
        raise BenchmarkError(f"--model {model}: no such folder")
    return True


def silence_libraries() -> None:
    """Advice of the libraries about sequence lengths and padding would tear the progress bar apart."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
