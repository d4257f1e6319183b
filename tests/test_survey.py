"""The survey's tool, on a family of each kind."""

import pytest
import transformers

from tests.float64 import Float64
from tools import survey_prefixes
from tools.survey import Outcome

SINCE = {"t5gemma2": (5, 20)}  # before, its encoder did not follow a second switch of the attention, so it is refused


def surveyed(family: str) -> Outcome:
    version = tuple(int(number) for number in transformers.__version__.split(".")[:2])
    if family not in survey_prefixes.families() or version < SINCE.get(family, version):
        pytest.skip(f"this version of transformers has no {family} that works")
    with Float64():
        return survey_prefixes.survey(family, survey_prefixes.families()[family])


@pytest.mark.parametrize("family", ["modernbert", "gemma2", "t5", "vit", "paligemma", "t5gemma2", "clip"])
def test_prefixes_are_exact(family: str) -> None:
    outcome = surveyed(family)
    assert outcome.verdict() == "exact", outcome


@pytest.mark.parametrize("family", ["mamba", "big_bird", "inkling2_text"])
def test_families_that_are_not_served_are_refused(family: str) -> None:
    outcome = surveyed(family)
    assert outcome.verdict() == "refused", outcome
