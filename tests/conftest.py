"""What the tests share: small inputs, and the backends that are usable here."""

import os
import tempfile

# Compiled graphs know an operator by its name: those of another version of this package must not be found again.
_CACHE = tempfile.TemporaryDirectory(prefix="fastprefix-inductor-", ignore_cleanup_errors=True)
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _CACHE.name

import pytest  # noqa: E402
import torch  # noqa: E402

from fastprefix.ops.backends import BACKENDS  # noqa: E402

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
