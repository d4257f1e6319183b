"""Prefix attention on a CUDA device in one run of under nine minutes: parity, then speed.

    python -m benchmarks.gpu --out result.json

Correctness comes first, in worker processes, so that a case that fails, hangs or loses the device leaves the others.
Every stage has a deadline, and the file is written after each case. Worker processes compile the kernels beforehand.
Times are those of ``triton.testing.do_bench``, which clears the cache before each call.
"""

import argparse
import copy
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastprefix.parity import DTYPES, AttentionCase, Case, EmbeddingCase, attention_cases, embedding_cases
from fastprefix.parity import measure as measure_parity

from .attention import Inputs, Shape, build_dense_mask
from .measure import BenchmarkError, Role, Row, Work, fault, figure_row, first_line, freeze_heap, measure
from .report import tabulate_gpu
from .results import Record, describe_fault, describe_times
from .suite import DEFAULT_OUT, Problem, build_kernel_work

DESCRIPTION = "Prefix attention on a CUDA device in one run of under nine minutes: parity, then speed."
CUDA = torch.device("cuda")
SHAPES = ((32, 12, 12, 128, 128, 64), (16, 16, 16, 512, 512, 64), (8, 32, 8, 1024, 1024, 128),
          (4, 32, 8, 2048, 2048, 128), (2, 32, 8, 8192, 8192, 128))  # fmt: skip
DECODING = tuple((B, 32, 8, 1, M, 128) for B in (1, 16, 128) for M in (1024, 8192))
COMPOSED = "composed"
SDPA = ("flash", "cudnn", "efficient")
SMALL: tuple[Case, ...] = (
    AttentionCase(Hq=4, N=150, M=170, P=77, D=64, gate="BhP", options={"is_causal": True}),
    AttentionCase(Hq=4, N=3, M=400, P=77, D=40, options={"is_causal": True}),
    AttentionCase(Hq=4, N=113, M=203, P=19, D=80, gate="BHNP", output_gate="BH", sinks=True),
    EmbeddingCase(B=3, N=113, S=100, d=129, r=19, V=211, offset="ffn"),
    EmbeddingCase(B=3, N=113, S=7, d=129, r=19, V=211, offset="low_rank"),
)
"""The cases of the stage "small", which is meant for compute-sanitizer and is not run by default."""
LARGE = [
    *(AttentionCase(N=n, M=m, P=77, D=D, Hq=4) for n, m in ((113, 203), (239, 1)) for D in (64, 128)),
    *(AttentionCase(N=257, M=257, P=77, D=D, Hq=4, options={"is_causal": True}) for D in (64, 80, 128, 256)),
    AttentionCase(N=150, M=170, P=77, D=64, Hq=4, gate="BHNP", bias="HNP", mask="float"),
    AttentionCase(N=150, M=170, P=77, D=64, Hq=4, gate="P", output_gate="BH", sinks=True),
    AttentionCase(N=150, M=170, P=77, D=128, Hq=4, mask="padding", options={"dropout_p": 0.1}),
    AttentionCase(B=8, N=150, M=170, P=1000, D=64, Hq=4, gate="B1P"),
    AttentionCase(B=4, Hq=8, N=1, M=3000, P=600, D=128, options={"is_causal": True}),
    AttentionCase(Hq=4, N=4, M=1000, P=300, D=64, output_gate="BH", options={"is_causal": True, "window_size": 700}),
]
"""Shapes that only a GPU runs in good time, in addition to the grid of ``python -m fastprefix parity``."""
Job = tuple[Any, ...]  # a function and its arguments

# ---- processes -----------------------------------------------------------------------------------------------------


def is_device_usable() -> bool:
    """Return whether the device still works for this process. After an illegal access every later call fails."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def run_job(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Run a job in a worker process, and return its answer or its error."""
    if not is_device_usable():
        return {"error": "left out, because an earlier job of this process lost the device"}
    try:
        return function(*arguments)
    except Exception as error:  # the failure of one job must not lose the results of the others
        return {"error": first_line(error)}


def run_jobs(jobs: Sequence[Job], seconds: float, workers: int = 14) -> list[dict[str, Any]]:
    """Run jobs in worker processes, and return their answers. The pool replaces workers that die."""
    end, answers = time.monotonic() + seconds, list[dict[str, Any]]()
    with multiprocessing.get_context("spawn").Pool(min(workers, os.cpu_count() or 1, len(jobs))) as pool:
        for waiting in [pool.apply_async(run_job, job) for job in jobs]:
            try:
                answers.append(waiting.get(max(0.0, end - time.monotonic())))
            except multiprocessing.TimeoutError:
                answers.append({"error": "no answer in time, or the process died"})
    return answers


# ---- parity --------------------------------------------------------------------------------------------------------

Add = Callable[[list[Row], list[Row]], None]


def run_case(case: Case, dtype: torch.dtype, device: str = "cuda", backend: str = "triton") -> list[Tensor]:
    """Return the output and the gradients of a case."""
    inputs = case.build(dtype, device)
    values = (value if isinstance(value, tuple) else (value,) for value in inputs.tensors.values())
    leaves = [tensor.requires_grad_() for tensor in itertools.chain(*values) if tensor.is_floating_point()]
    torch.manual_seed(5)
    output = case.operation(**inputs.tensors, **inputs.options, backend=backend)
    return [output, *torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)]


def check_case(case: Case, dtype: str, device: str = "cuda", backend: str = "triton") -> dict[str, Any]:
    """Check parity by the rule of the package, and that a second run has the same bits. Uninitialized memory is NaN."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses; it is read when CUDA starts
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run_case(case, DTYPES[dtype], device, backend) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    same = all(x is y or torch.equal(x, y) for x, y in zip(first, second, strict=True))
    report = measure_parity(case, DTYPES[dtype], backend, device)
    worst = max((row.ratio for row in report.rows), default=0.0)
    problems = ([] if same else ["another run has other bits"]) + ([] if report.ok else [f"{worst:.2f} of the bound"])
    return {"of bound": worst, **({"error": " and ".join(problems)} if problems else {})}


def check_parity(add: Add, seconds: float, cases: Sequence[Case]) -> None:
    """Check cases in all types."""
    jobs = [(check_case, *cell) for cell in itertools.product(cases, DTYPES)]
    for (_, case, dtype), answer in zip(jobs, run_jobs(jobs, seconds), strict=True):
        about = {"case": str(case), "dtype": dtype}
        if "error" in answer:
            add([], [fault(about, "triton", "parity", RuntimeError(answer["error"]))])
        else:
            add([figure_row(about, "triton", "ours", "parity", "share of the bound", answer["of bound"])], [])


# ---- speed ---------------------------------------------------------------------------------------------------------


def time_with_triton(call: Callable[[], object], device: torch.device) -> list[float]:
    """Return the seconds of many calls, as a timer of ``measure``."""
    from triton.testing import do_bench

    return [ms / 1e3 for ms in do_bench(call, warmup=10, rep=20, return_mode="all")]


def list_problems() -> Iterator[tuple[Shape, str, bool]]:
    """Return the most informative cases first, in case time runs out."""
    for P, gate in itertools.product((128, 16, 100, 2048), ("none", "row", "query", "separate")):
        for shape, causal in itertools.product(SHAPES, (True, False)):
            if gate in ("none", "row") or P in (16, 128):
                yield Shape(*shape, P), gate, causal
        if gate == "none" and P in (128, 2048):
            yield from ((Shape(*shape, P), gate, False) for shape in DECODING)


def is_composed(shape: Shape, gate: str) -> bool:
    """Return whether the composed backend is measured: it has one softmax, and is not made for decoding."""
    return gate != "separate" and shape.N > 1


def build_problem(shape: Shape, gate: str, causal: bool, device: torch.device = CUDA) -> Problem:
    """Return the peers: concatenation and the tokens alone on each kernel of SDPA, and compiled FlexAttention."""
    inputs = Inputs(shape, torch.bfloat16, causal, device, gate=gate)

    def build(role: Role, call: Callable[[], Tensor], leaves: Sequence[Tensor] = inputs.leaves) -> Work:
        return build_kernel_work(role, call, () if shape.N == 1 else leaves, inputs.grad)  # decoding has no backward

    def choose(call: Callable[[], Tensor], name: str) -> Callable[[], Tensor]:
        return sdpa_kernel(getattr(SDPBackend, f"{name.upper()}_ATTENTION"))(call)

    works = {"fused": build("ours", inputs.run_fused)}
    if is_composed(shape, gate):
        works["composed"] = build("ours", partial(inputs.run_backend, COMPOSED))
    for name in SDPA:
        variant = copy.copy(inputs)
        variant.repeats_heads = name == "efficient" and shape.Hq != shape.Hkv
        if name == "cudnn" and causal:  # it aligns masks to the upper left alone
            variant.mask = build_dense_mask(shape.N, shape.M, shape.P, inputs.q.device)
        works[f"tokens, {name}"] = build("floor", choose(variant.run_tokens, name), inputs.leaves[:3])
        if gate != "query":  # a gate for each query cannot be folded into the keys
            works[f"concat, {name}"] = build("theirs", choose(variant.run_concat, name))
    if gate == "none" and causal and shape.P == 128:
        torch.compiler.reset()  # past its limit of recompilations it would refuse
        works["concat, flex"] = build("theirs", inputs.compile_flex())
    return {**shape._asdict(), "gate": gate, "causal": causal}, works


def compile_problem(shape: Shape, gate: str, causal: bool) -> dict[str, Any]:
    """Run the kernels of a case on short inputs."""
    inputs = Inputs(shape, torch.bfloat16, causal, CUDA, gate=gate)
    runs = [inputs.run_fused]
    if is_composed(shape, gate):
        runs.append(partial(inputs.run_backend, COMPOSED))
    for run in runs:
        for call in build_kernel_work("ours", run, inputs.leaves, inputs.grad).calls.values():
            call()
    torch.cuda.synchronize()
    return {}


def list_compilations() -> list[Job]:
    """Return one job per specialization of the kernels, on small shapes for which they are compiled alike."""
    jobs: dict[Job, None] = {}
    for shape, gate, causal in list_problems():
        small = shape._replace(B=min(shape.B, 2))
        jobs[compile_problem, small if shape.N == 1 else small._replace(N=256, M=256), gate, causal] = None
    return list(jobs)


def measure_speed(add: Add, seconds: float) -> None:
    """Measure as many cases as there is time for."""
    end = time.monotonic() + seconds
    run_jobs(list_compilations(), seconds / 3)
    for number, kind in enumerate(list_problems()):
        if time.monotonic() > end:
            print(f"speed: {number} cases measured, the others left out for lack of time", flush=True)
            return
        problem, rounds = build_problem(*kind), partial(range, 2)
        rows, faults = measure(*problem, CUDA, rounds, warmup=0, timer=time_with_triton)
        add(rows, faults)
        print(describe_times(rows), flush=True)
        if not is_device_usable():
            raise RuntimeError("the device is lost")


# ---- the run -------------------------------------------------------------------------------------------------------

STAGES: dict[str, tuple[Callable[[Add, float], None], int]] = {
    "parity": (partial(check_parity, cases=(*SMALL, *LARGE, *attention_cases(66), *embedding_cases())), 120),
    "speed": (measure_speed, 380),
    "small": (partial(check_parity, cases=SMALL), 120),
}
"""The stages and their seconds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT / "gpu.json", help="the file of results")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=["parity", "speed"])


def run(options: argparse.Namespace) -> int:
    """Run the stages. Return 0: success; 1: a stage or a kernel of this package failed; 2: there is no device."""
    if not torch.cuda.is_available():
        raise BenchmarkError("benchmarks.gpu needs a CUDA device, and PyTorch finds none")
    freeze_heap()
    record = Record.start("gpu", CUDA, False, seconds=dict[str, float]())

    add = partial(record.add, path=options.out)
    for name in options.stages:
        (stage, seconds), start = STAGES[name], time.monotonic()
        try:
            stage(add, seconds)
        except Exception as error:  # the stages that follow are useful in any case
            add([], [fault({}, "stage", name, error)])
        record.settings["seconds"][name] = round(time.monotonic() - start, 1)
        add([], [])
    failed = [of for of in record.faults if of["peer"] in ("stage", "triton", "fused", "composed")]
    print("\n".join([tabulate_gpu(record).markdown(), *map(describe_fault, failed), f"results in {options.out}"]))
    return int(bool(failed))  # that a peer does not support a case is no failure of the run


if __name__ == "__main__":
    # Worker processes find functions in the module of this name, and not in ``__main__``.
    from benchmarks.__main__ import main

    sys.exit(main(["gpu", *sys.argv[1:]]))
