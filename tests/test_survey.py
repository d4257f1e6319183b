"""The survey's tool, on a family of each kind."""

import pytest

from tests.float64 import Float64
from tools import survey_prefixes
from tools.survey import Outcome


def surveyed(family: str) -> Outcome:
    if family not in survey_prefixes.families():
        pytest.skip(f"this version of transformers has no {family}")
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
