"""Test ``python -m benchmarks.gpu`` as far as possible without a GPU."""

import functools
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("pandas")
pytest.importorskip("tabulate")

from benchmarks import attention, choices, embedding, gpu, models, report, results
from benchmarks.__main__ import main
from benchmarks.gpu import device, jobs, kernels, methods, parity, problems, speed, tiles
from benchmarks.measure import BenchmarkError, Work, figure_row, timed_row
from fastprefix.ops.prefix_attention.triton_backend.operands import build_operands
from fastprefix.ops.prefix_attention.validation import canonical_arguments
from fastprefix.parity import AttentionCase, Case, embedding_cases

CPU, META = torch.device("cpu"), torch.device("meta")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("case", [*embedding_cases(), AttentionCase(gate="BhP", output_gate="BH", sinks=True)], ids=str)
def test_every_kind_of_case_runs(case: Case) -> None:
    output, *gradients = parity.run_case(case, torch.float32, "cpu", "eager")
    floating = [t for t in case.build(torch.float32).tensors.values() if isinstance(t, tuple) or t.is_floating_point()]
    assert len(gradients) == sum(len(t) if isinstance(t, tuple) else 1 for t in floating)
    assert output.requires_grad


def test_parity_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert "error" not in parity.check_case(AttentionCase(), "float32", "cpu", "eager")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    draws = itertools.count()
    monkeypatch.setattr(parity, "run_case", lambda *_: [torch.full((2,), float(next(draws)))])
    assert "different bits" in parity.check_case(AttentionCase(), "float32", "cpu", "eager")["error"]
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
    kinds = list(problems.list_problems())
    compilations = problems.list_compilations(kinds)
    compiled = {find_specialization(*job[1:]) for job in compilations}
    assert {find_specialization(*kind) for kind in kinds} <= compiled
    assert len(compilations) < len(kinds)


SHAPE = attention.Shape(2, 4, 2, 8, 8, 16, 3)
GATES = ("none", "row", "query", "separate", "segments")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the CPU represent the device, and the eager backend those that are measured."""
    monkeypatch.setattr(device, "CUDA", CPU)
    monkeypatch.setitem(attention.BACKENDS, "cpu", "eager")
    monkeypatch.setattr(problems, "BACKEND", "eager")
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 7)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)  # optimizers ask for it


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("gate", GATES)
def test_peers_of_a_problem(gate: str) -> None:
    problem = problems.build_problem(SHAPE, gate, True)
    roles = {work.role for work in problem.works.values()}
    assert roles == ({"ours", "floor"} if gate == "query" else {"ours", "floor", "theirs"})
    assert problem.case == {**SHAPE._asdict(), "gate": gate, "causal": True}
    assert problem.references


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("gate", GATES)
def test_a_peer_that_is_wrong_is_not_timed(gate: str) -> None:
    problem = problems.build_problem(SHAPE, gate, True, flex=False)
    right = problem.works["fused"].calls

    def spoil(call: Callable[[], Any]) -> Any:
        results = call()
        return results * 1.1 if isinstance(results, Tensor) else [*results[:2], results[2] * float("nan"), *results[3:]]

    backward = {"forward": right["forward"], "forward+backward": functools.partial(spoil, right["forward+backward"])}
    forward = right | {"forward": functools.partial(spoil, right["forward"])}
    spoiled = {"fused": Work("ours", forward), "composed, flash": Work("ours", backward)}
    rows, faults = [], []

    def add(found: list[Any], failed: list[Any]) -> None:
        rows.extend(found)
        faults.extend(failed)

    kept = speed.check_problem(add, problem._replace(works=problem.works | {"right": problem.works["fused"]} | spoiled))
    assert "right" in kept
    assert not kept.keys() & spoiled
    assert {row["quantity"] for row in rows} == {"relative difference"}
    assert {fault["peer"] for fault in faults if "differ from those" in fault["message"]} == spoiled.keys()
    assert next(row["p50"] for row in rows if row["peer"] == "right") < speed.LIMIT


@pytest.mark.parametrize("name", ["flash", "math"])
def test_one_kernel_of_sdpa_is_chosen(name: str) -> None:
    cuda = torch.backends.cuda
    before = cuda.flash_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()

    def call() -> Tensor:
        assert (cuda.flash_sdp_enabled(), cuda.math_sdp_enabled()) == (name == "flash", name == "math")
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        problems.choose(call, name)()
    assert (cuda.flash_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()) == before


@pytest.mark.usefixtures("on_cpu")
def test_nothing_to_compare_with() -> None:
    problem = problems.build_problem(SHAPE, "none", True, flex=False)
    with pytest.raises(BenchmarkError, match="nothing to compare"):
        speed.check_problem(lambda rows, faults: None, problem._replace(references={}))


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


@pytest.mark.slow
def test_workers_that_fail_die_or_lose_the_device() -> None:
    wanted = [(answer, 0), (answer, 2), (answer, 1), (answer, 3), (lose_device, 5), (answer, 6)]
    start = time.monotonic()
    rows = jobs.run_jobs(wanted, 100, workers=1)
    assert [row.get("answer") for row in rows] == [0, None, None, 3, None, None]
    assert "the process died" in rows[1]["error"]
    assert "no such number" in rows[2]["error"]
    assert "illegal memory access" in rows[4]["error"]
    assert "lost the device" in rows[5]["error"]
    assert rows[0]["process"] != rows[3]["process"]
    assert time.monotonic() - start < 90  # nothing waits for the one that died


@pytest.mark.usefixtures("on_cpu")
def test_a_failing_stage_loses_no_other_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(add: parity.Add, seconds: float) -> None:
        add([figure_row({"case": "a"}, "triton", "ours", "parity", "share of the bound", 0.5)], [])
        raise RuntimeError("no such luck")

    def work(add: parity.Add, seconds: float) -> None:
        case = {**attention.Shape(2, 4, 2, 8, 8, 16, 3)._asdict(), "gate": "none", "causal": True}
        add([timed_row(case, "fused", "ours", "forward", [1e-3, 2e-3])], [])
        add([timed_row(case, "concat, flash", "theirs", "forward", [2e-3])], [])

    monkeypatch.setattr(gpu, "STAGES", {"tests": (fail, 1), "kernels": (work, 1)})
    assert main(["gpu", "--out", str(tmp_path / "gpu.json"), "--stages", "tests", "kernels"]) == 1
    record = results.read(tmp_path / "gpu.json")
    assert [(fault["stage"], fault["message"]) for fault in record.faults] == [("tests", "RuntimeError: no such luck")]
    assert "no such luck" in record.faults[0]["traceback"]
    assert [row["direction"] for row in record.rows] == ["parity", "forward", "forward"]
    assert set(record.settings["seconds"]) == {"tests", "kernels"}


@pytest.mark.usefixtures("on_cpu")
def test_it_ends_where_the_first_stage_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    wrong = {"of bound": 2.0, "error": "2.00 of the bound"}
    monkeypatch.setattr(jobs, "run_jobs", lambda wanted, seconds: [wrong] * len(wanted))
    monkeypatch.setattr(gpu, "LONGEST", (SHAPE, "row", True))
    monkeypatch.setitem(gpu.STAGES, "tests", (lambda add, seconds: called.append("tests"), 1))
    assert main(["gpu", "--out", str(tmp_path / "gpu.json")]) == 1
    record = results.read(tmp_path / "gpu.json")
    assert not called
    assert sum(fault["peer"] == "triton" for fault in record.faults) == 2 * len(parity.FIRST)
    assert [fault["stage"] for fault in record.faults if fault["peer"] == "stage"] == ["first"]
    assert len(parity.FIRST) + 1 == 12
    assert any(row["quantity"] == "relative difference" for row in record.rows)


def test_outcomes_of_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
[gw1] [ 50%] PASSED tests/ops/test_a.py::test_one[a b]
tests/ops/test_a.py::test_two SKIPPED (no) [ 60%]
[gw0] [ 70%] FAILED tests/ops/test_a.py::test_three
FAILED tests/ops/test_a.py::test_three - AssertionError: no
"""
    outcomes = dict(parity.read_outcomes(text))
    assert outcomes["tests/ops/test_a.py::test_one[a b]"] == "PASSED"
    assert outcomes["tests/ops/test_a.py::test_two"] == "SKIPPED"
    assert outcomes["tests/ops/test_a.py::test_three"] == "FAILED"
    assert parity.find_message(text, "tests/ops/test_a.py::test_three") == "AssertionError: no"
    names = ["t::a[float32-1]", "t::b[float16]", "t::c[bfloat16]", "t::d", "t::e", "t::f"]
    done = subprocess.CompletedProcess([], 0, "\n".join(["", *names, "6 tests collected"]), "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert parity.collect_tests() == ["t::c[bfloat16]", "t::b[float16]", "t::a[float32-1]", "t::f"]


@pytest.mark.usefixtures("on_cpu")
def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every stage on the CPU, with a few small cases and in one process."""

    def time_call(call: Callable[[], object], on: torch.device) -> list[float]:
        return [1e-3] * (call() is not None)

    shapes = [SHAPE, SHAPE._replace(N=1)]
    kinds = [(shape, gate, shape.N > 1) for shape in shapes for gate in GATES if shape.N > 1 or gate != "segments"]
    monkeypatch.setattr(parity, "check_case", functools.partial(parity.check_case, on="cpu", backend="eager"))
    monkeypatch.setattr(jobs, "run_jobs", lambda wanted, seconds: [jobs.run_job(*job) for job in wanted])
    monkeypatch.setattr(device, "time_with_triton", time_call)
    monkeypatch.setattr(device, "COPIED", 64)
    monkeypatch.setattr(device, "WIDTH", 8)
    monkeypatch.setattr(speed, "WALL_SECONDS", 0.0)
    monkeypatch.setattr(speed, "ROUNDS", 2)
    monkeypatch.setattr(speed, "list_problems", lambda: iter(kinds))
    monkeypatch.setattr(problems, "EMBEDDINGS", (embedding.QUICK,))
    monkeypatch.setattr(gpu, "FIRST_CASES", [AttentionCase(P=2), embedding_cases()[0]])
    monkeypatch.setattr(gpu, "FIRST", kinds[:1])
    monkeypatch.setattr(gpu, "LONGEST", kinds[1])
    events = [SimpleNamespace(key="prefix_attention_fwd_kernel", self_device_time_total=3.0, count=1)]
    monkeypatch.setattr(tiles, "profile_call", lambda call: events if call() is not None else [])
    monkeypatch.setattr(tiles, "CANDIDATES", {"forward": (tiles.AttentionTile(16, 16, 16, 4, 1),)})
    monkeypatch.setattr(methods, "SIZE", models.Size(layers=2, width=96, heads=3, vocabulary=64, rows=2, length=8))
    monkeypatch.setattr(methods, "SETTINGS", (("PromptTuningConfig", 4), ("PrefixTuningConfig", 3)))
    selected = functools.partial(parity.run_tests, selection=("tests/ops/test_random.py",))
    monkeypatch.setitem(gpu.STAGES, "tests", (selected, 100))
    monkeypatch.setitem(gpu.STAGES, "kernels", (functools.partial(kernels.measure_kernels, kinds=kinds[:1]), 60))
    monkeypatch.setitem(gpu.STAGES, "tiles", (functools.partial(tiles.measure_tiles, kinds=kinds[:1]), 60))
    status = main(["gpu", "--out", str(tmp_path / "gpu.json"), "--commit", "abc"])
    record = results.read(tmp_path / "gpu.json")
    assert not [fault for fault in record.faults if gpu.is_own(fault["peer"])]
    assert status == 0
    of = {(row["direction"], row["peer"]) for row in record.rows}
    assert {("parity", "triton"), ("forward", "fused"), ("forward+backward", "tokens, flash")} <= of
    assert {("forward", "composed, flash"), ("forward+backward", "composed, cudnn, prefix alike")} <= of
    assert {("prefix_attention_fwd_kernel", "forward 16x16x16 w4 s1"), ("tests", "tests"), ("forward", "adept")} <= of
    assert {("step", "PEFT, prefix 3"), ("step", "accelerated, prompt 4"), ("step", "fastprefix, prefix 3")} <= of
    checked = {(row["peer"], row.get("gate")) for row in record.rows if row["quantity"] == "relative difference"}
    assert {("fused", gate) for gate in GATES} <= checked
    timed = [row for row in record.rows if row["quantity"] == "seconds"]
    assert all(row["samples"] for row in timed)
    assert {"wall seconds", "bytes", "copied bytes in a second"} <= {row["quantity"] for row in record.rows}
    assert {row["N"] for row in record.rows if row["direction"] == "forward+backward" and "gate" in row} == {8}
    assert set(record.settings["clocks"]) == {"start", *gpu.DEFAULT}
    # Not every kernel of SDPA runs on a CPU. That is recorded and is no failure.
    assert {fault["peer"].split(", ")[1] for fault in record.faults} <= {"cudnn", "efficient", "flex"}
    assert report.tabulate_gpu(record).rows


def test_the_stages_fit_into_nine_minutes() -> None:
    assert sum(gpu.STAGES[name][1] for name in gpu.DEFAULT) <= gpu.SECONDS < 530


def make_record(times: dict[str, tuple[float, float]], **case: Any) -> results.Record:
    about = {**SHAPE._asdict(), "gate": "none", "causal": True, "D": 64, "P": 128, "N": 1024} | case
    rows = [
        timed_row(about, peer, "ours", direction, [seconds])
        for peer, pair in times.items()
        for direction, seconds in zip(("forward", "forward+backward"), pair, strict=True)
    ]
    return results.Record("gpu", {}, {"capability": [9, 0]}, rows)


def test_a_table_of_measurements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = {"fused": (2.0, 6.0), "composed, flash": (3.0, 5.5), "composed, cudnn, prefix alike": (2.5, 5.9)}
    record = make_record(times | {"concat, flash": (1.0, 2.0)})
    of_rows = make_record({"fused": (2.0, 9.0), "composed, flash": (1.0, 3.0)}, gate="separate")
    record.rows += of_rows.rows  # another kind, which is not composed
    source, out = tmp_path / "gpu.json", tmp_path / "choices.json"
    record.write(source)
    old = {"architecture": "sm_80", "kind": "plain", "is_causal": True, "D": 64, "P": 1, "N": 1}
    old |= {"forward": "flash", "backward": "flash", "inference": True, "training": True}
    results.write_text(json.dumps([old, old | {"architecture": "sm_90"}]), out)
    assert main(["choices", str(source), "--out", str(out)]) == 0
    assert "0 for inference, 1 for training" in capsys.readouterr().out
    wanted = old | {"architecture": "sm_90", "P": 128, "N": 1024, "inference": False}
    wanted |= {"forward": "cudnn, prefix alike", "backward": "flash"}
    assert json.loads(out.read_text()) == [old, wanted]


def test_a_table_needs_measurements(tmp_path: Path) -> None:
    record = make_record({"fused": (1.0, 2.0)})
    record.write(tmp_path / "gpu.json")
    assert main(["choices", str(tmp_path / "gpu.json"), "--out", str(tmp_path / "choices.json")]) == 2
    assert not (tmp_path / "choices.json").exists()
    del record.settings["capability"]
    with pytest.raises(BenchmarkError, match="capability"):
        choices.build_table(record)


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
