"""Options that suites share."""

import argparse
import logging
import os
import sys
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import torch

from .measure import BenchmarkError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_OUT = Path(__file__).parent / "out"
QUICK_NOTE = "This was a quick run: it shows that everything runs. Its times and ratios mean nothing."


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options of every suite."""
    parser.add_argument("--quick", action="store_true", help="a small run that shows whether everything works")
    parser.add_argument("--device", type=torch.device, help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument("--threads", type=positive, metavar="N", help="on a CPU (default: chosen by PyTorch)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder for the results")


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def set_up(options: argparse.Namespace) -> torch.device:
    """Set the number of threads, silence the libraries, and return the device."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    # Advice of the libraries about sequence lengths and padding would break the progress bar.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    device: torch.device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type not in ("cpu", "cuda"):
        raise BenchmarkError(f"--device {device}: cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError(f"--device {device}: PyTorch {torch.__version__} sees no GPU")
    return device


def is_from_hub(model: str | None) -> bool:
    """Return whether ``--model`` names a model of the Hugging Face hub and not a local folder.

    Raises:
        BenchmarkError: It can only be a folder, and the folder does not exist.
    """
    from fastprefix.info import could_be_of_hub

    if model is None or Path(model).is_dir():
        return False
    if not could_be_of_hub(model):
        raise BenchmarkError(f"--model {model}: no such folder")
    return True


def is_hub_reachable() -> bool:
    """Return whether the hub answers within five seconds, although with an error."""
    try:
        urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=5).close()
    except OSError as error:
        return isinstance(error, urllib.error.HTTPError)
    return True


def prepare_hub() -> None:
    """Use only the local caches if the hub does not answer. Otherwise its libraries would retry for a minute."""
    if not is_hub_reachable():
        import datasets
        import huggingface_hub

        print("the Hugging Face hub cannot be reached: only the local cache is used", file=sys.stderr)
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
