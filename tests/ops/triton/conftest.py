"""The Triton kernels run on a GPU where there is one, and else in Triton's interpreter: ``TRITON_INTERPRET=1 pytest``.

Whether Triton interprets is settled when it is imported, so the interpreter's run is one of its own.
"""

import importlib.util
import os

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available() and not INTERPRETING
HAS_TRITON = importlib.util.find_spec("triton") is not None
collect_ignore_glob = [] if HAS_TRITON and (HAS_GPU or INTERPRETING) else ["test_*.py"]


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.cuda) if HAS_GPU else "cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """The device on which the kernels run."""
    return request.param


@pytest.fixture(autouse=True)
def _poison(poisoned: None) -> None:
    """Poison the memory of every test here."""
