"""Choose cases of a test that run every time, and leave the others for the night."""

from collections.abc import Sequence
from typing import Any

import pytest


def mark_slow(cases: Sequence[Any], every: int) -> list[Any]:
    """Return all cases as parameters. Only each ``every``-th runs without ``--slow``."""
    return [
        pytest.param(case, id=str(case), marks=[pytest.mark.slow] if number % every else [])
        for number, case in enumerate(cases)
    ]
