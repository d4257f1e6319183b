"""``python -m benchmarks.gpu``, as far as it can be tested without a GPU."""

import functools
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("pandas")
pytest.importorskip("tabulate")

from benchmarks import attention, gpu, report, results
from benchmarks.__main__ import main
from benchmarks.measure import figure_row, timed_row
from fastprefix.ops.prefix_attention.triton_backend.operands import build_operands
from fastprefix.ops.prefix_attention.validation import canonical_arguments
from fastprefix.parity import AttentionCase, Case, embedding_cases

CPU, META = torch.device("cpu"), torch.device("meta")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("case", [*embedding_cases(), AttentionCase(gate="BhP", output_gate="BH", sinks=True)], ids=str)
def test_every_kind_of_case_runs(case: Case) -> None:
    output, *gradients = gpu.run_case(case, torch.float32, "cpu", "eager")
    floating = [t for t in case.build(torch.float32).tensors.values() if isinstance(t, tuple) or t.is_floating_point()]
    assert len(gradients) == sum(len(t) if isinstance(t, tuple) else 1 for t in floating)
    assert output.requires_grad


def test_parity_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert "error" not in gpu.check_case(AttentionCase(), "float32", "cpu", "eager")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    draws = itertools.count()
    monkeypatch.setattr(gpu, "run_case", lambda *_: [torch.full((2,), float(next(draws)))])
    assert "other bits" in gpu.check_case(AttentionCase(), "float32", "cpu", "eager")["error"]
    assert not torch.are_deterministic_algorithms_enabled()


def find_specialization(shape: attention.Shape, gate: str, causal: bool) -> tuple[Any, ...]:
    """Return all that Triton compiles anew for: what is there, which integers are 1 and which multiples of 16."""
    inputs = draw_meta(shape, gate, causal)
    tensors = ("query", "key", "value", "prefix_key", "prefix_value")
    names = ("prefix_gate", "output_gate", "attn_mask", "prefix_bias", "window_size", "segment_ids", "softcap", "sinks")
    arguments = dict.fromkeys(names) | {"scale": None, "dropout_p": 0.0, "is_causal": causal} | inputs.gates
    canonical = canonical_arguments(**arguments | dict(zip(tensors, inputs.leaves, strict=False)))

    def kind(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(kind, value))
        return (value == 1, value % 16 == 0) if type(value) is int else isinstance(value, Tensor) or value

    return kind(build_operands(canonical)), shape.D, gate, causal


def draw_meta(shape: attention.Shape, gate: str, causal: bool) -> attention.Inputs:
    """Return inputs without memory, whose shapes and strides are those of a GPU."""
    return attention.Inputs(shape, torch.bfloat16, causal, META, gate=gate)


@pytest.fixture
def _meta(monkeypatch: pytest.MonkeyPatch) -> None:
    randn = torch.randn
    monkeypatch.setattr(torch, "Generator", lambda device: type("Seed", (), {"manual_seed": lambda self, seed: None})())
    monkeypatch.setattr(torch, "randn", lambda size, generator, device: randn(size, device=device))


@pytest.mark.usefixtures("_meta")
def test_what_is_timed_is_compiled_before() -> None:
    compiled = {find_specialization(*job[1:]) for job in gpu.list_compilations()}
    assert {find_specialization(*kind) for kind in gpu.list_problems()} <= compiled
    assert len(gpu.list_compilations()) < len(list(gpu.list_problems()))


@pytest.mark.parametrize("gate", ["none", "row", "query", "separate"])
def test_peers_of_a_problem(gate: str) -> None:
    shape = attention.Shape(2, 4, 2, 8, 8, 16, 3)
    case, works = gpu.build_problem(shape, gate, True, CPU)
    roles = {work.role for work in works.values()}
    assert roles == ({"ours", "floor"} if gate == "query" else {"ours", "floor", "theirs"})
    assert case == {**shape._asdict(), "gate": gate, "causal": True}


def answer(number: int) -> dict[str, Any]:
    if number == 1:
        raise ValueError("no such number")
    if number == 2:
        os._exit(7)
    return {"answer": number, "process": os.getpid()}


def lose_device(number: int) -> dict[str, Any]:
    """Act like an illegal access, which every later call reports again."""

    def synchronize() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    torch.cuda.is_initialized = lambda: True
    torch.cuda.synchronize = synchronize
    synchronize()
    return {}


def test_workers_that_fail_die_or_lose_the_device() -> None:
    jobs = [(answer, 0), (answer, 2), (answer, 1), (answer, 3), (lose_device, 5), (answer, 6)]
    start = time.monotonic()
    rows = gpu.run_jobs(jobs, 30, workers=1)
    assert [row.get("answer") for row in rows] == [0, None, None, 3, None, None]
    assert "the process died" in rows[1]["error"]
    assert "no such number" in rows[2]["error"]
    assert "illegal memory access" in rows[4]["error"]
    assert "lost the device" in rows[5]["error"]
    assert rows[0]["process"] != rows[3]["process"]
    assert time.monotonic() - start < 60


def test_a_failing_stage_loses_no_other_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(add: gpu.Add, seconds: float) -> None:
        add([figure_row({"case": "a"}, "triton", "ours", "parity", "share of the bound", 0.5)], [])
        raise RuntimeError("no such luck")

    def work(add: gpu.Add, seconds: float) -> None:
        case = {**attention.Shape(2, 4, 2, 8, 8, 16, 3)._asdict(), "gate": "none", "causal": True}
        add([timed_row(case, "fused", "ours", "forward", [1e-3, 2e-3])], [])
        add([timed_row(case, "concat, flash", "theirs", "forward", [2e-3])], [])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "CUDA", CPU)
    monkeypatch.setattr(gpu, "STAGES", {"parity": (fail, 1), "speed": (work, 1)})
    assert main(["gpu", "--out", str(tmp_path / "gpu.json")]) == 1
    record = results.read(tmp_path / "gpu.json")
    assert [(fault["stage"], fault["message"]) for fault in record.faults] == [("parity", "RuntimeError: no such luck")]
    assert [row["direction"] for row in record.rows] == ["parity", "forward", "forward"]
    assert set(record.settings["seconds"]) == {"parity", "speed"}


def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every stage on the CPU, with a few small cases and in one process."""

    def time_call(call: Callable[[], object], device: torch.device) -> list[float]:
        return [1e-3] * (call() is not None)

    shapes = [attention.Shape(2, 4, 2, 8, 8, 16, 3), attention.Shape(2, 4, 2, 1, 8, 16, 3)]
    problems = [(shape, gate, shape.N > 1) for shape in shapes for gate in ("none", "row", "query", "separate")]
    check_case = functools.partial(gpu.check_case, device="cpu", backend="eager")
    monkeypatch.setitem(attention.BACKENDS, "cpu", "eager")
    monkeypatch.setattr(gpu, "COMPOSED", "eager")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "CUDA", CPU)
    monkeypatch.setattr(gpu, "build_problem", functools.partial(gpu.build_problem, device=CPU))
    monkeypatch.setattr(gpu, "check_case", check_case)
    monkeypatch.setattr(gpu, "run_jobs", lambda jobs, seconds: [gpu.run_job(*job) for job in jobs])
    monkeypatch.setattr(gpu, "time_with_triton", time_call)
    monkeypatch.setattr(gpu, "list_problems", lambda: iter(problems))
    cases = [AttentionCase(P=2), embedding_cases()[0]]
    monkeypatch.setitem(gpu.STAGES, "parity", (functools.partial(gpu.check_parity, cases=cases), 60))
    assert main(["gpu", "--out", str(tmp_path / "gpu.json")]) == 0
    record = results.read(tmp_path / "gpu.json")
    of = {(row["direction"], row["peer"]) for row in record.rows}
    assert {("parity", "triton"), ("forward", "fused"), ("forward+backward", "tokens, flash")} <= of
    assert {("forward", "composed"), ("forward+backward", "composed")} <= of
    assert {row["N"] for row in record.rows if row["direction"] == "forward+backward"} == {8}
    # Not every kernel of SDPA runs on a CPU. That is recorded and is no failure.
    assert {fault["peer"].split(", ")[1] for fault in record.faults} <= {"cudnn", "efficient"}
    assert len(report.tabulate_gpu(record).rows) == 12


def test_the_stages_fit_into_nine_minutes() -> None:
    assert sum(gpu.STAGES[name][1] for name in ("parity", "speed")) < 520


def test_it_needs_few_packages_and_says_that_there_is_no_device() -> None:
    code = """
import sys
for name in ("datasets", "tokenizers.models", "matplotlib", "cogapp", "tqdm"): sys.modules[name] = None
from benchmarks import __main__
sys.exit(__main__.main(["gpu"]))
"""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "CUDA device" in done.stderr
