"""Test the survey's tool on a family of each kind."""

from pathlib import Path

import pytest

from tools.survey import SURVEYS, Outcome, append, choose_method, list_methods, main, make_config, read, write_table

from .. import models

SINCE = {"t5gemma2": (5, 20)}  # before, its encoder did not follow a second switch of the attention, so it is refused


def surveyed(family: str) -> Outcome:
    models.require("transformers", *SINCE.get(family, ()))
    if family not in SURVEYS["prefix"].families:
        pytest.skip(f"this version of transformers has no {family}")
    return SURVEYS["prefix"].run(family)


@pytest.mark.parametrize("family", ["modernbert", "gemma2", "t5", "vit", "paligemma", "t5gemma2", "clip", "patchtst"])
def test_prefixes_work(family: str) -> None:
    outcome = surveyed(family)
    assert outcome.verdict == "works", outcome


@pytest.mark.parametrize("family", ["mamba", "big_bird", "inkling2_text"])
def test_families_that_are_not_served_are_refused(family: str) -> None:
    outcome = surveyed(family)
    assert outcome.verdict == "refused", outcome


@pytest.mark.parametrize(
    ("kind", "method", "family", "verdict"),
    [
        ("prompt", "multitask_prompt", "llama", "works"),
        ("prompt", "accept", "gpt2", "works"),
        ("visual", "ship", "vit", "works"),
        ("visual", None, "dinov2", "works"),
        ("visual", "visual_prompt", "swin", "refused"),
    ],
)
def test_other_methods_and_models_of_images(kind: str, method: str | None, family: str, verdict: str) -> None:
    assert choose_method(kind, method).run(family).verdict == verdict


@pytest.mark.parametrize("kind", ["prefix", "prompt", "visual"])
def test_every_method_can_be_surveyed(kind: str) -> None:
    methods = list_methods(kind)
    assert len(methods) >= 2
    assert {make_config(method).num_virtual_tokens for method in methods} == {3}


def test_methods_have_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert make_config("prefix_tuning", softmax="own").softmax == "own"
    config = choose_method("prefix", "prefix_tuning", {"softmax": "own"}).survey.keywords["config"]
    assert config == make_config("prefix_tuning", softmax="own")
    monkeypatch.setattr("sys.argv", ["survey", "prefix", "--option", "softmax=own"])
    with pytest.raises(SystemExit):
        main()


def test_rows_are_read_back(tmp_path: Path) -> None:
    rows = [Outcome("a", "A", "works", "", 3, 1e-15, "x, y"), Outcome("b", "B", "refused", 'says "no"')]
    for row in rows:
        append(tmp_path / "rows.csv", row)
    assert read(tmp_path / "rows.csv") == rows


def test_the_page_has_a_column_for_every_survey(tmp_path: Path) -> None:
    for kind in SURVEYS:
        append(tmp_path / f"{kind}.csv", Outcome("llama", "LlamaModel", "works", "", 14, 1e-15))
        append(tmp_path / f"{kind}.csv", Outcome("mamba", "MambaModel", "not run", "no attention"))
    append(tmp_path / "prompt-accept.csv", Outcome("llama", "LlamaForCausalLM", "works", "", 19, 1e-15))
    write_table(tmp_path, tmp_path / "families.md")
    page = (tmp_path / "families.md").read_text("utf-8")
    (row,) = (line for line in page.splitlines() if line.startswith("| llama"))
    assert row.count("works (14)") == len(SURVEYS)
    assert "ACCEPT" in page
    assert page.count("not tried") > len(SURVEYS)
