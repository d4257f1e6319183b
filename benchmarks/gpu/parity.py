"""Check correctness on a device: parity cases, and the tests of the repository."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from fastprefix.parity import DTYPES, AttentionCase, Case, EmbeddingCase
from fastprefix.parity import measure as measure_parity

from ..measure import ROOT, Add, BenchmarkError, Row, fault, figure_row, find_version
from . import jobs

FIRST: tuple[Case, ...] = (
    AttentionCase(N=257, M=257, P=77, D=64, Hq=4, options={"is_causal": True}),
    AttentionCase(N=257, M=257, P=77, D=128, Hq=4, Hkv=1, gate="BhP", options={"is_causal": True}),
    AttentionCase(N=257, M=257, P=77, D=256, Hq=4, options={"is_causal": True}),
    AttentionCase(N=113, M=203, P=77, D=128, Hq=4, layout="BNHD"),
    AttentionCase(N=150, M=170, P=77, D=64, Hq=4, gate="BHNP", bias="HNP", mask="float"),
    AttentionCase(N=150, M=170, P=77, D=64, Hq=4, gate="P", output_gate="BH", sinks=True),
    AttentionCase(N=150, M=170, P=77, D=128, Hq=4, mask="padding", options={"dropout_p": 0.1}),
    AttentionCase(B=8, N=150, M=170, P=1000, D=64, Hq=4, gate="B1P"),
    AttentionCase(B=4, Hq=8, N=1, M=3000, P=600, D=128, options={"is_causal": True}),
    AttentionCase(B=4, N=70, M=75, P=40, D=64, spans="ragged", frozen=1, gate="BhP", key_bias="hT"),
    EmbeddingCase(B=3, N=113, S=100, d=129, r=19, V=211, offset="ffn"),
)
"""The first cases. The twelfth case is a long one that is compared with SDPA (``problems.LONGEST``)."""
SMALL: tuple[Case, ...] = (
    AttentionCase(Hq=4, N=150, M=170, P=77, D=64, gate="BhP", options={"is_causal": True}),
    AttentionCase(Hq=4, N=3, M=400, P=77, D=40, options={"is_causal": True}),
    AttentionCase(Hq=4, N=113, M=203, P=19, D=80, gate="BHNP", output_gate="BH", sinks=True),
    EmbeddingCase(B=3, N=113, S=100, d=129, r=19, V=211, offset="ffn"),
    EmbeddingCase(B=3, N=113, S=7, d=129, r=19, V=211, offset="low_rank"),
)
"""The cases of the stage "small", which is meant for compute-sanitizer and is not run by default."""
SINGLE_SHARE = 3  # one of every three tests in float32 is run


def run_case(case: Case, dtype: torch.dtype, on: str = "cuda", backend: str = "triton") -> list[Tensor]:
    """Return the output and the gradients of a case."""
    inputs = case.build(dtype, on)
    values = (value if isinstance(value, tuple) else (value,) for value in inputs.tensors.values())
    leaves = [tensor.requires_grad_() for tensor in itertools.chain(*values) if tensor.is_floating_point()]
    torch.manual_seed(5)
    output = case.operation(**inputs.tensors, **inputs.options, backend=backend)
    return [output, *torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)]


def check_case(case: Case, dtype: str, on: str = "cuda", backend: str = "triton") -> dict[str, Any]:
    """Check that errors are within the bounds of ``assert_parity``, and that a second run gives the same bits.

    Deterministic mode fills uninitialized memory with NaN.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it, and CUDA reads it at its start
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run_case(case, DTYPES[dtype], on, backend) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    same = all(x is y or torch.equal(x, y) for x, y in zip(first, second, strict=True))
    report = measure_parity(case, DTYPES[dtype], backend, on)
    worst = max((row.ratio for row in report.rows), default=0.0)
    problems = ([] if same else ["a second run has different bits"]) + (
        [] if report.ok else [f"{worst:.2f} of the bound"]
    )
    return {"of bound": worst, **({"error": " and ".join(problems)} if problems else {})}


def check_parity(add: Add, seconds: float, cases: Sequence[Case], dtypes: Sequence[str]) -> None:
    """Check all cases in each dtype."""
    cells = [(check_case, case, dtype) for dtype in dtypes for case in cases]
    for (_, case, dtype), answer in zip(cells, jobs.run_jobs(cells, seconds), strict=True):
        about = {"case": str(case), "dtype": dtype}
        if "error" in answer:
            add([], [fault(about, "triton", "parity", RuntimeError(answer["error"]))])
        else:
            add([figure_row(about, "triton", "ours", "parity", "share of the bound", answer["of bound"])], [])


# ---- the repository's tests ----------------------------------------------------------------------------------------


ON_DEVICE = ("tests/ops", "-m", "cuda")
_PYTEST = (sys.executable, "-m", "pytest", "--slow")  # slow tests are slow in the interpreter only


def collect_tests(selection: Sequence[str] = ON_DEVICE) -> list[str]:
    """Return the tests on a device, the most important ones first: bfloat16, float16, then a third of the others."""
    command = [*_PYTEST, *selection, "--collect-only", "-q"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = [line for line in done.stdout.splitlines() if "::" in line]
    if done.returncode != 0 or not names:
        raise BenchmarkError(f"pytest collects no tests:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    brain_float = [name for name in names if "bfloat16" in name]
    half = [name for name in names if "float16" in name and "bfloat16" not in name]
    return brain_float + half + [name for name in names if "float16" not in name][::SINGLE_SHARE]


def run_tests(add: Add, seconds: float, selection: Sequence[str] = ON_DEVICE) -> None:
    """Run as many tests on a device as the time allows, and add a fault for each one that fails."""
    end = time.monotonic() + seconds
    names = collect_tests(selection)
    with tempfile.TemporaryDirectory() as folder:
        wanted, log = Path(folder, "tests"), Path(folder, "log")
        wanted.write_text("\n".join(names), encoding="utf-8")
        command = [*_PYTEST, f"@{wanted}", "-v", "--tb=short", "-p", "no:cacheprovider"]
        with log.open("w", encoding="utf-8") as output:
            _run_until(end, [*command, *_divide()], output)
        text = log.read_text(encoding="utf-8")
    outcomes = dict(read_outcomes(text))
    counts = {word: sum(outcome == word for outcome in outcomes.values()) for word in ("PASSED", "SKIPPED")}
    about: Row = {"case": "pytest", "dtype": "all"}
    rows = [figure_row(about, "tests", "ours", "tests", word.lower(), count) for word, count in counts.items()]
    rows.append(figure_row(about, "tests", "ours", "tests", "selected", len(names)))
    failed = [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    add(rows, [fault({"case": name}, "tests", "tests", RuntimeError(find_message(text, name))) for name in failed])
    if not outcomes:
        raise BenchmarkError(f"no test ran:\n{text[-2000:]}")


def _run_until(end: float, command: Sequence[str], output: IO[str]) -> None:
    """Run a command, and end it and the processes that it started at a time."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
    try:
        process.wait(max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        print("tests: the remaining ones are skipped for lack of time", flush=True)
    finally:
        with contextlib.suppress(ProcessLookupError):  # the processes have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _divide() -> list[str]:
    """Return the options that run tests in several processes, if pytest-xdist is installed."""
    if find_version("pytest-xdist") is None:
        return []
    return ["-n", str(min(jobs.WORKERS, os.cpu_count() or 1))]


def read_outcomes(text: str) -> Iterator[tuple[str, str]]:
    """Yield each test in the output of pytest with its outcome."""
    for line in text.splitlines():
        words = [word for word in line.split() if word in ("PASSED", "FAILED", "ERROR", "SKIPPED")]
        at = line.find("tests/")
        if words and at >= 0 and "::" in line and " - " not in line:
            yield line[at:].partition(f" {words[0]}")[0].strip(), words[0]


def find_message(text: str, name: str) -> str:
    """Return the message about a failed test in pytest's summary."""
    lines = [line for line in text.splitlines() if name in line and " - " in line]
    return lines[-1].partition(" - ")[2] if lines else "it failed, and the run ended before pytest's summary"
