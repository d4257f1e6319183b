"""What the tests share: small inputs, and the backends that are usable here."""

import pytest
import torch

from fastprefix.ops.backends import BACKENDS

USABLE = [name for name, backend in BACKENDS.items() if backend.refusal(torch.device("cpu")) is None]


@pytest.fixture(params=USABLE)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that is usable on this machine's CPU."""
    return request.param


@pytest.fixture
def poisoned():
    """Uninitialised memory is NaN, so a result that was never written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
