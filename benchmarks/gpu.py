"""Prefix attention on a CUDA device in one run of under nine minutes: parity, memory accesses, tiles, speed.

    python -m benchmarks.gpu --out result.json

Correctness comes first. Every stage has a deadline and a process of its own, so a stage that fails, hangs or loses the
device leaves the results of the others. The file is written after each row. Worker processes compile the kernels
beforehand. Times are those of ``triton.testing.do_bench``, which clears the cache before each call.
"""

import argparse
import contextlib
import copy
import itertools
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
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
from .measure import ROOT, Row, added_peak, fault, figure_row, first_line, freeze_heap, group_calls, timed_row
from .report import tabulate_gpu
from .results import Record, describe_case, read
from .suite import DEFAULT_OUT, Problem, build_kernel_work

DESCRIPTION = "Prefix attention on a CUDA device in one run of under nine minutes: parity, memory, tiles, speed."
CUDA = torch.device("cuda")
SECONDS = {"parity": 110, "sanitizer": 60, "tiles": 100, "speed": 210}
LIMIT = 520  # of all stages and the starts of their processes; 20 more for what comes before ``run``
GRACE = 15  # in addition to its seconds, for the start and the last step of a stage
SHAPES = ((32, 12, 12, 128, 128, 64), (16, 16, 16, 512, 512, 64), (8, 32, 8, 1024, 1024, 128),
          (4, 32, 8, 2048, 2048, 128), (2, 32, 8, 8192, 8192, 128))  # fmt: skip
DECODING = tuple((B, 32, 8, 1, M, 128) for B in (1, 16, 128) for M in (1024, 8192))
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
SMALL: tuple[Case, ...] = (
    AttentionCase(Hq=4, N=150, M=170, P=77, D=64, gate="BhP", options={"is_causal": True}),
    AttentionCase(Hq=4, N=3, M=400, P=77, D=40, options={"is_causal": True}),
    AttentionCase(Hq=4, N=113, M=203, P=19, D=80, gate="BHNP", output_gate="BH", sinks=True),
    EmbeddingCase(B=3, N=113, S=100, d=129, r=19, V=211, offset="ffn"),
    EmbeddingCase(B=3, N=113, S=7, d=129, r=19, V=211, offset="low_rank"),
)
"""The cases that the memory checker watches."""
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
TILES = {
    "forward": ((128, 128, 64, 8, 2), (128, 64, 64, 8, 3), (128, 64, 64, 4, 3), (128, 128, 64, 4, 3),
                (64, 64, 64, 4, 3), (64, 128, 64, 4, 2)),
    "dq": ((128, 128, 64, 8, 2), (128, 64, 64, 8, 2), (128, 64, 64, 8, 3), (64, 64, 64, 4, 2), (64, 64, 64, 4, 3)),
    "dkv": ((32, 128, 64, 8, 2), (64, 128, 64, 8, 2), (64, 64, 64, 4, 2), (32, 64, 64, 4, 2), (64, 64, 64, 8, 2)),
    "dprefix": ((32, 64, 64, 4, 2), (64, 64, 64, 4, 2), (32, 64, 128, 8, 2), (64, 64, 128, 8, 2), (64, 64, 64, 8, 2)),
}  # fmt: skip
"""Candidates (BM, BN, BP, warps, stages) for heads of 64 and 128 in bfloat16."""


# ---- processes -----------------------------------------------------------------------------------------------------


def is_device_usable() -> bool:
    """Return whether the device still works for this process. After an illegal access every later call fails."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def serve(connection: Any) -> None:
    """Run jobs in a worker process until one of them leaves the device unusable."""
    usable = True
    while usable:
        function, *arguments = connection.recv()
        try:
            answer = function(*arguments)
        except Exception as error:
            answer = {"error": first_line(error)}
        usable = is_device_usable()
        connection.send((answer, usable))


def run_jobs(
    jobs: Sequence[tuple[Any, ...]],
    seconds: float,
    workers: int = 14,
    done: Callable[[tuple[Any, ...], dict[str, Any]], None] = lambda job, answer: None,
) -> list[dict[str, Any]]:
    """Run ``(function, *arguments)`` in worker processes, and return the answers in the order of the jobs.

    A worker that dies or loses the device is replaced, so the failure of one job is no failure of another. ``done`` is
    called after each job.
    """
    context, end, lock = multiprocessing.get_context("spawn"), time.monotonic() + seconds, threading.Lock()
    answers: dict[int, dict[str, Any]] = {}
    waiting = deque(range(len(jobs)))

    def finish(number: int, answer: dict[str, Any]) -> None:
        with lock:
            answers[number] = answer
            done(jobs[number], answer)

    def lead_worker() -> None:
        process: Any = None
        here: Any = None
        while time.monotonic() < end:
            try:
                number = waiting.popleft()
            except IndexError:
                break
            if process is None:
                here, there = context.Pipe()
                process = context.Process(target=serve, args=(there,), daemon=True)
                process.start()
                there.close()  # so that the end of the process is the end of the pipe
            try:
                here.send(jobs[number])
                if not here.poll(max(0.0, end - time.monotonic())):
                    break
                answer, usable = here.recv()
            except (EOFError, OSError):
                process.join()
                answer, usable = {"error": f"the process died, exit code {process.exitcode}"}, False
            finish(number, answer)
            process = process if usable else None
        if process is not None:
            process.kill()

    threads = [threading.Thread(target=lead_worker) for _ in range(min(workers, os.cpu_count() or 1, len(jobs)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in sorted(set(range(len(jobs))) - answers.keys()):
        finish(number, {"error": "left out for lack of time"})
    return [answers[number] for number in range(len(jobs))]


def run_in_own_group(function: Callable[..., object], *arguments: Any) -> None:
    os.setsid()
    function(*arguments)


def supervise(job: tuple[Any, ...], seconds: float) -> str | None:
    """Run a job in a process, and end it with all that it started. Return why it did not end by itself."""
    process = multiprocessing.get_context("spawn").Process(target=run_in_own_group, args=job)
    process.start()
    assert process.pid is not None
    process.join(seconds)
    code = process.exitcode
    process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if code is None:
        return f"ended after {seconds:.0f} s"
    return None if code == 0 else f"the process died, exit code {code}"


# ---- stages --------------------------------------------------------------------------------------------------------

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


def check_parity(add: Add, seconds: float) -> None:
    cases = [(case, dtype) for dtype in DTYPES for case in (*LARGE, *attention_cases(66), *embedding_cases())]

    def add_answer(job: tuple[Any, ...], answer: dict[str, Any]) -> None:
        about = {"case": str(job[1]), "dtype": job[2]}
        if "error" in answer:
            add([], [fault(about, "triton", "parity", RuntimeError(answer["error"]))])
        else:
            add([figure_row(about, "triton", "ours", "parity", "share of the bound", answer["of bound"])], [])

    answers = run_jobs([(check_case, *case) for case in cases], seconds, done=add_answer)
    print(f"parity: {sum('error' not in answer for answer in answers)} of {len(cases)} passed", flush=True)


def run_small(*cases: Case) -> dict[str, Any]:
    for case in cases:
        run_case(case, torch.bfloat16)
    torch.cuda.synchronize()
    return {}


def check_memory(add: Add, seconds: float) -> None:
    """Run small cases under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        print("sanitizer: compute-sanitizer is not installed", flush=True)
        return
    start = time.monotonic()
    run_jobs([(run_small, case) for case in SMALL], seconds / 2)  # only to compile
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu", "--small"]
    environment, left = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, seconds - (time.monotonic() - start)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=left, check=False)
    if done.returncode:
        tail = f"exit status {done.returncode}: {(done.stdout + done.stderr)[-1500:]}"
        add([], [fault({}, "triton", "sanitizer", RuntimeError(tail))])
    print(f"sanitizer: exit status {done.returncode}", flush=True)


def find_tiles(kernel: str) -> tuple[dict[Any, Any], Any, str]:
    """Return the table of tiles of this device, the class of a tile, and the type of half precision."""
    from fastprefix.ops.prefix_attention.triton_backend import tiles
    from fastprefix.ops.targets import architecture

    return (
        tiles.ARCHITECTURES[architecture(torch.cuda.get_device_capability())][kernel],
        tiles.AttentionTile,
        tiles.HALF,
    )


def build_tile_call(kernel: str, width: int, N: int) -> Callable[[], object]:
    """Return a call whose time is that of one kernel, apart from small parts."""
    P, causal = (2048, False) if kernel == "dprefix" else (128, True)
    inputs = Inputs(Shape(4, 16, 8, N, N, width, P), torch.bfloat16, causal, CUDA, gate="none")
    if kernel == "forward":
        return torch.no_grad()(inputs.run_fused)
    leaves = {"dq": (inputs.q,), "dkv": (inputs.k, inputs.v), "dprefix": (inputs.pk, inputs.pv)}[kernel]
    for tensor in inputs.leaves:
        tensor.requires_grad_(any(tensor is leaf for leaf in leaves))
    output = inputs.run_fused()
    return partial(torch.autograd.grad, output, leaves, inputs.grad, retain_graph=True)


def run_tile(kernel: str, width: int, values: tuple[int, ...], N: int, measure: bool) -> list[float]:
    """Run a kernel with another tile, and return the samples if it is to be measured."""
    table, tile, half = find_tiles(kernel)
    own = table[width, half]
    table[width, half] = tile(*values)
    try:
        call = build_tile_call(kernel, width, N)
        call()
        torch.cuda.synchronize()
        return time_turns({"": call})[""] if measure else []
    finally:
        table[width, half] = own


def tune_tiles(add: Add, seconds: float) -> None:
    """Find the fastest tile of each kernel. Later stages use the tiles of the package."""
    end = time.monotonic() + seconds
    pairs = list(itertools.product((128, 64), TILES))
    jobs = [(run_tile, kernel, width, values, 256, False) for width, kernel in pairs for values in TILES[kernel]]
    run_jobs(jobs, seconds * 0.6)
    for width, kernel in pairs:
        table, _, half = find_tiles(kernel)
        own, found = tuple(table[width, half])[:5], dict[str, float]()
        for values in dict.fromkeys((own, *TILES[kernel])):
            if time.monotonic() < end:
                case: Row = {"D": width, "tile": str(values)}
                try:
                    samples = run_tile(kernel, width, values, 2048, True)
                except Exception as error:  # too much shared memory, for example
                    add([], [fault(case, kernel, "tiles", error)])
                    if not is_device_usable():
                        raise
                    continue
                found[str(values)] = statistics.median(samples)
                add([timed_row(case, kernel, "ours", "tile", samples)], [])
        if found:
            print(f"tiles {kernel} D {width}: best {min(found, key=lambda tile: found[tile])}, own {own}", flush=True)


def list_problems() -> Iterator[tuple[Shape, str, bool]]:
    """Return the most informative cases first, in case time runs out."""
    for P, gate in itertools.product((128, 16, 100, 2048), ("none", "row", "query", "separate")):
        for shape, causal in itertools.product(SHAPES, (True, False)):
            if gate in ("none", "row") or P in (16, 128):
                yield Shape(*shape, P), gate, causal
        if gate == "none" and P in (128, 2048):
            yield from ((Shape(*shape, P), gate, False) for shape in DECODING)


def build_problem(shape: Shape, gate: str, causal: bool, device: torch.device = CUDA) -> Problem:
    """Return the peers: concatenation and the tokens alone on each kernel of SDPA, and compiled FlexAttention."""
    inputs = Inputs(shape, torch.bfloat16, causal, device, gate=gate)
    build = partial(build_kernel_work, grad=inputs.grad)
    works = {"fused": build("ours", inputs.run_fused, inputs.leaves)}

    def choose(call: Callable[[], Tensor], backend: SDPBackend) -> Callable[[], Tensor]:
        def run_on_backend() -> Tensor:
            with sdpa_kernel(backend):
                return call()

        return run_on_backend

    for name, backend in SDPA.items():
        variant = copy.copy(inputs)
        variant.repeats_heads = name == "efficient" and shape.Hq != shape.Hkv
        if name == "cudnn" and causal:  # it aligns masks to the upper left alone
            variant.mask = build_dense_mask(shape.N, shape.M, shape.P, inputs.q.device)
        works[f"tokens, {name}"] = build("floor", choose(variant.run_tokens, backend), inputs.leaves[:3])
        if gate != "query":  # a gate for each query cannot be folded into the keys
            works[f"concat, {name}"] = build("theirs", choose(variant.run_concat, backend), inputs.leaves)
    if gate == "none" and causal and shape.P == 128:
        torch.compiler.reset()  # past its limit of recompilations it would refuse
        works["concat, flex"] = build("theirs", inputs.compile_flex(), inputs.leaves)
    case: Row = {**shape._asdict(), "gate": gate, "causal": causal}
    return case, works


def compile_problem(shape: Shape, gate: str, causal: bool) -> dict[str, Any]:
    """Run the kernels of a case on short inputs."""
    inputs = Inputs(shape, torch.bfloat16, causal, CUDA, gate=gate)
    for call in build_kernel_work("ours", inputs.run_fused, inputs.leaves, inputs.grad).calls.values():
        call()
    torch.cuda.synchronize()
    return {}


def shorten(shape: Shape) -> Shape:
    """Return a shape for which the kernels are compiled alike."""
    return shape if shape.N == 1 else shape._replace(N=256, M=256)


def list_compilations() -> list[tuple[Any, ...]]:
    """Return one job per specialization of the kernels, which hardly depends on the batch and on the length."""
    kinds = {}
    for shape, *rest in list_problems():
        kinds[(shape.B == 1, shape[1:3], shape.N == 1, shape[5:], *rest)] = (shorten(shape), *rest)
    return [(compile_problem, *kind) for kind in kinds.values()]


def time_turns(calls: dict[str, Callable[[], object]], turns: int = 2) -> dict[str, list[float]]:
    """Return the seconds of each call, measured in turns that begin with another call."""
    from triton.testing import do_bench

    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns):
        names = list(calls)[turn % len(calls) :] + list(calls)[: turn % len(calls)]
        for name in names:
            samples[name] += [ms / 1e3 for ms in do_bench(calls[name], warmup=10, rep=20, return_mode="all")]
    return samples


def measure_speed(add: Add, seconds: float) -> None:
    end, left = time.monotonic() + seconds, 0
    run_jobs(list_compilations(), seconds / 3)
    for kind in list_problems():
        if time.monotonic() > end:
            left += 1
            continue
        case, works = build_problem(*kind)
        rows, faults = list[Row](), list[Row]()
        for direction, calls in group_calls(works).items():
            if direction == "forward+backward" and case["N"] == 1:
                continue
            working = {}
            for name, call in calls.items():
                try:
                    call()
                    torch.cuda.synchronize()
                    working[name] = call
                except Exception as error:  # that a peer cannot do this is a result too
                    faults.append(fault(case, name, direction, error))
                    if not is_device_usable():
                        add(rows, faults)
                        raise
            for name, samples in time_turns(working).items():
                about = (case, name, works[name].role, direction)
                rows.append(timed_row(*about, samples))
                rows.append(figure_row(*about, "bytes", added_peak(working[name], CUDA)))
        add(rows, faults)
        print(describe_case(case), flush=True)
    print(f"speed: {left} cases left out for lack of time", flush=True)


STAGES: dict[str, Callable[[Add, float], None]] = {
    "parity": check_parity, "sanitizer": check_memory, "tiles": tune_tiles, "speed": measure_speed,
}  # fmt: skip


def run_stage(name: str, path: Path, seconds: float) -> None:
    """Run a stage, and append its results to the file."""
    freeze_heap()
    record, start = read(path), time.monotonic()

    def add(rows: list[Row], faults: list[Row]) -> None:
        record.rows += rows
        record.faults += faults
        record.write_to(path)

    try:
        STAGES[name](add, seconds)
    except Exception as error:  # the stages that follow are useful in any case
        add([], [fault({}, "stage", name, error)])
        print(f"stage {name} failed:\n{traceback.format_exc()}", flush=True)
    record.settings["seconds"][name] = round(time.monotonic() - start, 1)
    record.write_to(path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT / "gpu.json", help="the file of results")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--small", action="store_true", help="only what the memory checker watches")


def run(options: argparse.Namespace) -> int:
    """Run the stages as far as there is time. Return 0: success; 1: a part failed; 2: there is no device."""
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and PyTorch finds none", file=sys.stderr)
        return 2
    if options.small:
        run_small(*SMALL)
        return 0
    return run_stages(options.stages, options.out, CUDA)


def run_stages(names: Sequence[str], path: Path, device: torch.device) -> int:
    end = time.monotonic() + LIMIT
    Record.start("gpu", device, False, seconds=dict[str, float]()).write_to(path)
    for name in names:
        left = end - time.monotonic()
        failure: str | None = f"left out, with {left:.0f} s left"
        if left > GRACE:
            seconds = min(SECONDS[name], left - GRACE)
            failure = supervise((run_stage, name, path, seconds), seconds + GRACE)
        if failure is not None:
            record = read(path)
            record.faults.append(fault({}, "stage", name, RuntimeError(failure)))
            record.write_to(path)
            print(f"stage {name}: {failure}", flush=True)
    record = read(path)
    print(f"{tabulate_gpu(record).markdown()}\n\nresults in {path}", flush=True)
    # That a peer does not support a case, or a tile does not fit, is no failure of the run.
    return int(any(of["peer"] in ("stage", "triton", "fused") for of in record.faults))


if __name__ == "__main__":
    # Worker processes find functions in the module of this name, and not in ``__main__``.
    from benchmarks.__main__ import main

    sys.exit(main(["gpu", *sys.argv[1:]]))
