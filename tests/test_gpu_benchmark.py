"""``python -m benchmarks.gpu``, as far as it can be tested without a GPU."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import clock, inputs, log, parity, peers, speed, stages, workers
from fastprefix.ops.prefix_attention.triton.operands import problem
from fastprefix.ops.prefix_attention.validation import canonical_arguments
from fastprefix.parity import AttentionCase, Case, embedding_cases


@pytest.mark.parametrize("case", [*embedding_cases(), AttentionCase(gate="BhP", output_gate="BH", sinks=True)], ids=str)
def test_results_of_every_kind(case: Case) -> None:
    output, *gradients = parity.results(case, torch.float32, "cpu", "eager")
    floating = [t for t in case.build(torch.float32).tensors.values() if isinstance(t, tuple) or t.is_floating_point()]
    assert len(gradients) == sum(len(t) if isinstance(t, tuple) else 1 for t in floating)
    assert output.requires_grad


def test_nothing_to_time() -> None:
    assert clock.time_calls({}) == {}


def test_a_machine_without_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert log.driver() is None


def test_deterministic_algorithms_end_with_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)

    def results(*arguments: Any) -> list[Tensor]:
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        raise RuntimeError("out of memory")

    monkeypatch.setattr(parity, "results", results)
    with pytest.raises(RuntimeError, match="out of memory"):
        parity.check_parity(AttentionCase(), "float32")
    assert not torch.are_deterministic_algorithms_enabled()


def specialisation(shape: inputs.Shape, P: int, gate: str, causal: bool) -> tuple[Any, ...]:
    """All that Triton compiles anew for: what is there, which integers are 1 and which multiples of 16."""
    x = inputs.attention_inputs(shape, P, gate, causal)
    names = ("prefix_gate", "output_gate", "attn_mask", "prefix_bias", "window_size", "segment_ids", "softcap", "sinks")
    a = canonical_arguments(**dict.fromkeys(names) | {"scale": None, "dropout_p": 0.0} | x)

    def kind(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(kind, value))
        return (value == 1, value % 16 == 0) if type(value) is int else isinstance(value, Tensor) or value

    return kind(problem(a)), shape[4], gate, causal


def test_what_is_timed_is_compiled_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "randn", lambda *shape, dtype: torch.empty(shape, dtype=dtype, device="meta"))
    short = {specialisation((*shape[:3], 256, shape[4]), *rest) for _, shape, *rest in speed.compile_jobs()}
    assert {specialisation(*cell) for cell in speed.cells()} <= short
    assert len(speed.compile_jobs()) < len(list(speed.cells()))


def test_a_peer_with_a_dense_mask_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "randn", lambda *shape, dtype: torch.empty(shape, dtype=dtype, device="meta"))
    names = {
        causal: set(peers.peer_calls(inputs.attention_inputs((2, 4, 2, 8, 16), 3, "none", causal))) for causal in (0, 1)
    }
    assert names[1] - names[0] == {"concat + cudnn, dense mask"}


def answer(number: int) -> dict[str, Any]:
    if number == 1:
        raise ValueError("no such number")
    if number == 2:
        os._exit(7)
    if number == 4:
        time.sleep(60)
    return {"answer": number, "process": os.getpid()}


def lose_device(number: int) -> dict[str, Any]:
    """An illegal access is met when it happens, and by whatever the process asks of the device from then on."""

    def synchronize() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    torch.cuda.is_initialized = lambda: True
    torch.cuda.synchronize = synchronize
    synchronize()
    return {}


def test_workers_that_err_die_or_lose_the_device() -> None:
    jobs: list[workers.Job] = [(answer, 0), (answer, 1), (lose_device, 5), (answer, 6), (answer, 2), (answer, 7)]
    rows = list(workers.in_workers(jobs, 120, most=1))
    assert [row.get("answer") for row in rows] == [0, None, None, 6, None, 7]
    errors = [row["error"] for row in rows if "error" in row]
    assert "no such number" in errors[0]
    assert "illegal memory access" in errors[1]
    assert errors[2] == "its process died, exit code 7"
    assert rows[0]["process"] != rows[3]["process"] != rows[5]["process"]


def test_workers_end_in_time() -> None:
    start = time.monotonic()
    (row,) = workers.in_workers([(answer, 4), (answer, 0)], 1, most=1)
    assert row["left out"] == 2
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("job", "failure"),
    [((time.sleep, 0), None), ((time.sleep, 60), "ended after 2 s"), ((os._exit, 3), "its process died, exit code 3")],
)
def test_stages_are_supervised(job: tuple[Callable[..., object], int], failure: str | None) -> None:
    assert stages.supervised(job, 2 if failure == "ended after 2 s" else 60) == failure


def test_all_stages_fit_into_nine_minutes() -> None:
    assert set(stages.SECONDS) == set(stages.STAGES)
    assert sum(stages.SECONDS.values()) < stages.LIMIT < 540
