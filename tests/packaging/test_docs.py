"""Test the README and the documentation: examples run, commands exist with their options, links have targets."""

import argparse
import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, Qwen3Config, Qwen3ForCausalLM

import fastprefix
from fastprefix.methods import METHODS
from fastprefix.ops.backends import BACKENDS
from fastprefix.ops.prefix_attention.registration import OPERATION

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
SURVEY = "families.md"
NOT_OURS = ("accelerate", "pip", "torchrun")
"""Commands in examples whose options are others' to keep."""
OPTIONAL = ("sentence_transformers", "lm_eval")
"""Libraries in examples that need not be installed. Examples run up to the first one that is not."""


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def scripts() -> list[Any]:
    """Return the examples. Those of the README are independent, and those of a page follow one another."""
    found = [pytest.param(block, id=f"README-{n}") for n, block in enumerate(blocks(PAGES[0], "python"))]
    pages = {page.stem: "\n".join(blocks(page, "python")) for page in DOCS}
    return found + [pytest.param(script, id=name) for name, script in pages.items() if script]


@pytest.fixture
def registries() -> Iterator[None]:
    """Restore the registries of methods and backends, which examples may change."""
    tables: list[dict[str, Any]] = [METHODS, BACKENDS, OPERATION._operators]
    former = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, former, strict=True):
        table.clear()
        table.update(entries)


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the models and tokenizers that examples name by small ones without files."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 384}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}

    def load_model(name: str) -> Qwen3ForCausalLM:
        return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, name_or_path=name))

    def load_tokenizer(name: str, **_: Any) -> ByT5Tokenizer:
        return ByT5Tokenizer()

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load_model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load_tokenizer)


@pytest.mark.parametrize("script", scripts())
@pytest.mark.usefixtures("registries", "small_models")
def test_examples_run(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = ModuleType("example")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where its dataclasses look names up
    try:
        exec(compile(script, module.__name__, "exec"), vars(module))
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed, but all before it runs")


def test_there_are_examples() -> None:
    assert len(scripts()) >= 7


# ---- commands ------------------------------------------------------------------------------------------------------


def commands() -> list[str]:
    """Return the commands of all ``sh`` blocks, one per line, and those in the text."""
    found = []
    for page in PAGES:
        for block in blocks(page, "sh"):
            found += [line.partition(" #")[0].strip() for line in block.splitlines() if not line.startswith("#")]
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        spans = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
        found += [
            span for span in spans if re.match(r"(\w+=\S+ )*(make\b|fastprefix [a-z]|python -m|python \S+\.py)", span)
        ]
    return sorted({command for command in found if command})


class Understood(Exception):  # noqa: N818
    """A command line was parsed."""


@pytest.fixture
def parse_and_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make programs stop after their options have been parsed."""
    parse = argparse.ArgumentParser.parse_args

    def parse_args(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> NoReturn:
        parse(parser, *args, **kwargs)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)


@pytest.mark.parametrize("command", commands())
@pytest.mark.usefixtures("parse_and_stop")
def test_commands_exist(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command)
    while re.match(r"\w+=", words[0]):
        del words[0]
    if words[0] == "make":
        check_make(words[1:])
    elif words[0] == "fastprefix":
        run_until_parsed(runpy.run_module, words[0], words[1:], monkeypatch)
    elif words[:2] == ["python", "-m"]:
        run_until_parsed(runpy.run_module, words[2], words[3:], monkeypatch)
    elif words[0] == "python":
        monkeypatch.syspath_prepend(str((ROOT / words[1]).parent))  # as Python itself does
        run_until_parsed(runpy.run_path, str(ROOT / words[1]), words[2:], monkeypatch)
    else:
        assert words[0] in NOT_OURS


def check_make(words: list[str]) -> None:
    """Check that the Makefile has the targets and variables."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z]+):", makefile, re.MULTILINE)
    variables = re.findall(r"^([A-Z]+) \?=", makefile, re.MULTILINE)
    for word in words:
        name, assigned, _ = word.partition("=")
        assert name in (variables if assigned else targets)


def run_until_parsed(
    run: Callable[..., object], program: str, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run a program until its options have been parsed."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "argv", [program, *options])
    with pytest.raises(Understood):
        run(program, run_name="__main__")


# ---- links ---------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks" / "README.md"], ids=lambda page: str(page.stem))
def test_files_that_are_named_exist(page: Path) -> None:
    """Paths in backquotes begin at the root of the repository."""
    if page.match(SURVEY):
        return
    folders = "fastprefix|csrc|benchmarks|tests|tools|examples|docs"
    for name in re.findall(rf"`((?:{folders})/[\w./*-]+)`", page.read_text(encoding="utf-8")):
        assert list(ROOT.glob(name.rstrip("/"))) or "/out" in name, name


def test_every_page_is_in_the_navigation() -> None:
    configuration = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert all(f" {page.relative_to(ROOT / 'docs')}\n" in configuration for page in DOCS)


def test_the_api_page_names_everything_public() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^::: (\S+)$", page, re.MULTILINE))
    public = {
        f"fastprefix.{name}" for name in fastprefix.__all__ if name not in ("__version__", "reference", "testing")
    }
    assert public <= named
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__


# ---- features ------------------------------------------------------------------------------------------------------


def features() -> list[list[str]]:
    """Return the cells of each row of the page's tables, without the headers."""
    page = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    return [row for row in rows if row[1] != "fastprefix" and set(row[0]) != {"-"}]


def test_every_feature_names_a_test_or_a_reason() -> None:
    page = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
    tests: dict[str, str] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        tests[path.name] = tests.get(path.name, "") + path.read_text(encoding="utf-8")
    assert len(features()) > 70
    for name, own, *_, test in features():
        assert test or own.startswith("no (")
        for reason in re.findall(r"\(([a-z])\)", own):
            assert f"\n- ({reason}) " in page, name
        if test:
            file, _, function = test.strip("`").partition("::")
            assert f"\ndef {function}(" in tests[file], test
