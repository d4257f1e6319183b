"""Give tests the devices of this machine and the backends that are usable on them."""

import ctypes
import gc
import os
import platform
import tempfile
from collections import Counter
from collections.abc import Iterator

# Compiled graphs know an operator by its name: those of another version of this package must not be found again.
_CACHE = tempfile.TemporaryDirectory(prefix="fastprefix-inductor-", ignore_cleanup_errors=True)
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _CACHE.name

import pytest  # noqa: E402
import torch  # noqa: E402

from fastprefix.ops.backends import BACKENDS  # noqa: E402

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


TARGETS = [
    pytest.param(
        (device, name),
        id=name if device == "cpu" else f"{name}-{device}",
        marks=[pytest.mark.cuda] if device == "cuda" else [],
    )
    for device in DEVICES
    for name, backend in BACKENDS.items()
    if backend.refusal(torch.device(device)) is None and not backend.partial
]
"""Every device of this machine with each backend that is usable on it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that runs slow tests."""
    parser.addoption("--slow", action="store_true", help="run the tests that are marked slow, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without ``--slow``, leave out tests that are marked slow, and most cases of those marked sampled."""
    if config.getoption("--slow"):
        return
    counts = Counter[str]()
    chosen: dict[bool, list[pytest.Item]] = {False: [], True: []}
    for item in items:
        test = item.nodeid.partition("[")[0]
        sampled = item.get_closest_marker("sampled")
        is_left_out = item.get_closest_marker("slow") or (sampled and counts[test] % sampled.kwargs["every"])
        chosen[not is_left_out].append(item)
        counts[test] += 1
    config.hook.pytest_deselected(items=chosen[False])
    items[:] = chosen[True]


def pytest_collection_finish() -> None:
    """Exclude imported objects from garbage collections, because ``Trainer`` runs a full one per training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Return a device and a backend."""
    return request.param


@pytest.fixture
def device(target: tuple[str, str]) -> str:
    """Return the device on which a test's backend runs."""
    return target[0]


@pytest.fixture
def backend(target: tuple[str, str]) -> str:
    """Return the name of a backend that is usable on a device of this machine."""
    return target[1]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill uninitialized memory of PyTorch and C++ with NaN, so that results that are never written show."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    _fill_allocations(0x100)  # every byte is 255
    yield
    _fill_allocations(0)
    torch.use_deterministic_algorithms(False)


def _fill_allocations(value: int) -> None:
    """Make glibc fill new memory with the complement of the lowest byte of ``value``. 0 turns this off."""
    if platform.libc_ver()[0] == "glibc":
        m_perturb = -6
        assert ctypes.CDLL(None).mallopt(m_perturb, value) == 1
