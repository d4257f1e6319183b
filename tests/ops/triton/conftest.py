"""The Triton kernels run on a GPU where there is one, and else in Triton's interpreter: ``TRITON_INTERPRET=1 pytest``.

Whether Triton interprets is settled when it is imported, so the interpreter's run is one of its own.
"""

import importlib.util
import os
from typing import Any

import numpy
import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available() and not INTERPRETING
HAS_TRITON = importlib.util.find_spec("triton") is not None
collect_ignore_glob = [] if HAS_TRITON and (HAS_GPU or INTERPRETING) else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def _boolean_comparisons() -> None:
    """Give comparisons the dtype int1 in the interpreter.

    It gives them the dtype of their operands. If a comparison of scalars is then part of a mask, Triton 3.9 refuses it.
    """
    if not INTERPRETING:
        return
    from triton.runtime import interpreter

    compute = interpreter.InterpreterBuilder.binary_op

    def compute_boolean(self: Any, *operands: Any) -> Any:
        result = compute(self, *operands)
        is_boolean = result.data.dtype == numpy.bool_
        return interpreter.TensorHandle(result.data, interpreter.tl.int1) if is_boolean else result

    interpreter.InterpreterBuilder.binary_op = compute_boolean


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.cuda) if HAS_GPU else "cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """Return the device on which the kernels run."""
    return request.param


@pytest.fixture
def store_counts(monkeypatch: pytest.MonkeyPatch) -> list[numpy.ndarray]:
    """Return a list to which every launch adds how often it stored to each address."""
    if not INTERPRETING:
        pytest.skip("only the interpreter shows stores")
    from triton.runtime import interpreter

    stored: list[numpy.ndarray] = []
    counts: list[numpy.ndarray] = []
    store, call = interpreter._interpreter.store, interpreter.GridExecutor.__call__

    def record_store(addresses: numpy.ndarray, value: numpy.ndarray, mask: numpy.ndarray) -> None:
        stored.append(addresses[mask.astype(bool)])
        store(addresses, value, mask)

    def launch(self: Any, *arguments: Any, **named: Any) -> None:
        stored.clear()
        call(self, *arguments, **named)
        counts.append(numpy.unique(numpy.concatenate(stored), return_counts=True)[1])

    monkeypatch.setattr(interpreter._interpreter, "store", record_store)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    return counts


@pytest.fixture(autouse=True)
def _poison(poisoned: None) -> None:
    """Fill uninitialized memory with NaN in every test here."""
