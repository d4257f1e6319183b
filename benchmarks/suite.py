"""The parts that suites share: options, the kinds of work they measure, and the loop around a measurement.

Only PyTorch is needed.
"""

import argparse
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .measure import BenchmarkError, Problem, Role, Row, count_until, freeze_heap, measure
from .results import Record, describe_times

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_OUT = Path(__file__).parent / "out"
QUICK_NOTE = "This was a quick run: it shows that everything runs. Its times and ratios mean nothing."
LEAST_ROUNDS = 10
WARMUP = {"cpu": 1, "cuda": 5}


# ---- options -------------------------------------------------------------------------------------------------------


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options of every suite."""
    parser.add_argument("--quick", action="store_true", help="a small run that shows whether everything works")
    parser.add_argument("--device", type=torch.device, help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument("--threads", type=positive, metavar="N", help="on a CPU (default: chosen by PyTorch)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder for the results")


def add_kernel_options(parser: argparse.ArgumentParser, dtypes: Sequence[str]) -> None:
    """Add the options of a suite that measures kernels."""
    add_common(parser)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each direction of each case")
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
    # Advice of the libraries about sequence lengths and padding would break the progress bar.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    device: torch.device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type not in ("cpu", "cuda"):
        raise BenchmarkError(f"--device {device}: cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError(f"--device {device}: PyTorch {torch.__version__} sees no GPU")
    return device


# ---- work ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelWork:
    """Compute the output in one way. ``leaves`` get gradients; without leaves, the work is for inference only."""

    role: Role
    call: Callable[[], Tensor]
    leaves: Sequence[Tensor] = ()

    @torch.no_grad()
    def run_forward(self) -> Tensor:
        """Compute the output."""
        return self.call()

    def run_both(self, grad: Tensor) -> object:
        """Compute the output, then the gradients of the leaves from that of the output."""
        return torch.autograd.grad(self.call(), self.leaves, grad, allow_unused=True)


def build_kernel_problem(case: Row, works: Mapping[str, KernelWork], grad: Tensor) -> Problem:
    """Return the problem of a forward pass and of forward + backward."""
    forward = {name: work.run_forward for name, work in works.items()}
    both = {name: partial(work.run_both, grad) for name, work in works.items() if work.leaves}
    roles = {name: work.role for name, work in works.items()}
    return Problem(case, roles, {"forward": forward, "forward+backward": both})


class ModelWork:
    """Run one model, which returns its loss on the batch."""

    def __init__(self, model: Any, batch: dict[str, Tensor], role: Role) -> None:
        self.model, self.batch, self.role = model, batch, role

    def step(self) -> None:
        """Run forward and backward."""
        self.model.train()
        self.model(**self.batch).loss.backward()
        self.model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def inference(self) -> None:
        """Run forward without gradients."""
        self.model.eval()
        self.model(**self.batch)


def build_model_problem(case: Row, works: Mapping[str, ModelWork]) -> Problem:
    """Return the problem of a training step and of inference."""
    steps = {name: work.step for name, work in works.items()}
    inferences = {name: work.inference for name, work in works.items()}
    roles = {name: work.role for name, work in works.items()}
    return Problem(case, roles, {"step": steps, "inference": inferences})


# ---- suites --------------------------------------------------------------------------------------------------------


def run_kernels(record: Record, problems: Iterable[Problem], options: argparse.Namespace, device: torch.device) -> int:
    """Run the suite for as many rounds as fit into the seconds of the options."""
    seconds, least, warmup = (0.0, 2, 1) if options.quick else (options.seconds, LEAST_ROUNDS, WARMUP[device.type])
    record.settings["seconds"] = seconds
    return run_suite(
        record, problems, options.out, device, partial(count_until, seconds, least=least, warmup=warmup), warmup
    )


def run_suite(
    record: Record,
    problems: Iterable[Problem],
    out: Path,
    device: torch.device,
    rounds: Callable[[], Iterable[int]],
    warmup: int = 1,
) -> int:
    """Measure, write and print one problem after another. Return the exit status."""
    for problem in problems:
        measured = measure(problem, device, rounds, warmup)
        record.add(measured, out)
        print(describe_times(measured[0]), flush=True)
    return record.conclude(out)
