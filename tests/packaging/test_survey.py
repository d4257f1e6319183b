"""The survey's tool, on a family of each kind."""

from pathlib import Path

import pytest
import transformers

from tools import survey_prefixes
from tools.survey import Outcome, append, read

SINCE = {"t5gemma2": (5, 20)}  # before, its encoder did not follow a second switch of the attention, so it is refused


def surveyed(family: str) -> Outcome:
    version = tuple(int(number) for number in transformers.__version__.split(".")[:2])
    if family not in survey_prefixes.families() or version < SINCE.get(family, version):
        pytest.skip(f"this version of transformers has no {family} that works")
    return survey_prefixes.SURVEY.one(family)


@pytest.mark.parametrize("family", ["modernbert", "gemma2", "t5", "vit", "paligemma", "t5gemma2", "clip"])
def test_prefixes_work(family: str) -> None:
    outcome = surveyed(family)
    assert outcome.verdict == "works", outcome


@pytest.mark.parametrize("family", ["mamba", "big_bird", "inkling2_text"])
def test_families_that_are_not_served_are_refused(family: str) -> None:
    outcome = surveyed(family)
    assert outcome.verdict == "refused", outcome


def test_rows_are_read_back(tmp_path: Path) -> None:
    rows = [Outcome("a", "A", "works", "", 3, 1e-15, "x, y"), Outcome("b", "B", "refused", 'says "no"')]
    for row in rows:
        append(tmp_path / "rows.csv", row)
    assert read(tmp_path / "rows.csv") == rows
