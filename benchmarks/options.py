"""What the options of several suites mean."""

import argparse
import logging
import warnings
from pathlib import Path

import torch
import transformers

from .errors import BenchmarkError


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
    """Whether ``--model`` names a model of the hub, and not a local folder."""
    return model is not None and not Path(model).is_dir()


def silence_libraries() -> None:
    """Advice of the libraries about sequence lengths and padding would tear the progress bar apart."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
