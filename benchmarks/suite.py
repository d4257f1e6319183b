"""The common parts of all suites: options, the kinds of work, and the loop around the measurements.

This module only requires PyTorch, so that suites can run in the environment of another package.
"""

import argparse
import ctypes
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .measure import BenchmarkError, Role, Row, Work, count_until, freeze_heap, measure
from .results import Record, describe_times

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_OUT = Path(__file__).parent / "out"
QUICK_NOTE = "This was a quick run, which only shows that everything works. Its times and ratios are meaningless."
Problem = tuple[Row, Mapping[str, Work]]  # a case and the work of each peer
WARMUP = {"cpu": 1, "cuda": 5}


def add_common(
    parser: argparse.ArgumentParser, rounds: int = 0, seconds: float = 0, dtypes: Sequence[str] = ()
) -> None:
    """Add the options of every suite. ``rounds`` adds those of ``run_suite``, and ``dtypes`` adds ``--dtype``."""
    parser.add_argument("--quick", action="store_true", help="a small run that only shows that everything works")
    parser.add_argument("--device", type=torch.device, help="cpu, cuda or cuda:N (default: a GPU if available)")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: chosen by PyTorch)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder for the results")
    if rounds:
        parser.add_argument("--rounds", type=positive, default=rounds, help=f"minimum rounds (default: {rounds})")
        parser.add_argument("--seconds", type=float, default=seconds, help="minimum seconds, which can add rounds")
    if dtypes:
        parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(dtypes))


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def set_up(options: argparse.Namespace) -> torch.device:
    """Set the number of threads, silence the libraries, and return the device."""
    freeze_heap()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    # Messages of the libraries about sequence lengths and padding would break the progress bar.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    device: torch.device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type not in ("cpu", "cuda"):
        raise BenchmarkError(f"--device {device}: must be cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError(f"--device {device}: PyTorch {torch.__version__} finds no GPU")
    return device


def draw(*size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Draw a tensor that requires a gradient."""
    return torch.randn(size, device=device).to(dtype).requires_grad_()


def build_kernel_work(role: Role, call: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor) -> Work:
    """Return the work of a kernel. ``leaves`` get gradients. Without leaves, only the forward pass is measured."""

    def run_both() -> object:
        return torch.autograd.grad(call(), leaves, grad, allow_unused=True)

    forward = torch.no_grad()(call)
    return Work(role, {"forward": forward, "forward+backward": run_both} if leaves else {"forward": forward})


def build_model_work(role: Role, model: Any, batch: dict[str, Tensor]) -> Work:
    """Return the work of a model that computes its loss on a batch: a training step and inference."""

    def step() -> None:
        model.train()
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def inference() -> None:
        model.eval()
        model(**batch)

    return Work(role, {"step": step, "inference": inference})


def keep_freed_memory() -> bool:
    """Make glibc allocate without mmap and keep freed memory. Return False if the C library is not glibc.

    Otherwise, page faults of new tensors randomly cost more than some peers, and the time in which the memory of one
    peer is returned to the system can count as the time of another.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    mmap_max, trim_threshold = -4, -1
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


def run_suite(
    suite: str,
    list_problems: Callable[[argparse.Namespace, torch.device], Iterable[Problem]],
    options: argparse.Namespace,
    measure_peaks: Callable[[], dict[str, float]] | None = None,
    **settings: Any,
) -> int:
    """Measure all problems, writing and printing the results after each one. Return the exit status.

    ``measure_peaks`` returns the peak rates of a CPU, which are stored with the times.
    """
    device = set_up(options)
    rounds, seconds, warmup = options.rounds, options.seconds, WARMUP[device.type]
    if options.quick:
        rounds, seconds, warmup = 1, 0.0, 1
    settings["freed_memory_kept"] = device.type == "cpu" and keep_freed_memory()
    record = Record.start(suite, device, options.quick, rounds=rounds, seconds=seconds, **settings)
    if measure_peaks is not None and device.type == "cpu" and not options.quick:
        record.settings["peaks"] = measure_peaks()  # after the load of the machine was read
    for case, works in list_problems(options, device):
        numbers = partial(count_until, seconds, least=rounds, warmup=warmup)
        measured = measure(case, works, device, numbers, warmup=warmup)
        record.add(*measured, options.out)
        print(describe_times(measured[0]), flush=True)
    return record.conclude(options.out)
