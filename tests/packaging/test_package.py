"""Test that the source distribution builds the wheel, and that the wheel contains exactly the package."""

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import setuptools
import torch_abi_audit

import fastprefix
from fastprefix import _native

ROOT = Path(__file__).parents[2]
DEVELOPER_TOOLS = {path.name for path in (ROOT / "tools").iterdir()} - {"__init__.py", "__pycache__"}
BUILD = """
import os, sys, tarfile
from setuptools import build_meta

out = sys.argv[1]
sdist = build_meta.build_sdist(out)
with tarfile.open(os.path.join(out, sdist)) as archive:
    archive.extractall(out, filter="data")
os.chdir(os.path.join(out, sdist.removesuffix(".tar.gz")))
build_meta.build_wheel(out)
"""
USE = """
import torch, fastprefix

x, prefix = torch.randn(1, 2, 3, 8), torch.randn(2, 4, 8)
print(fastprefix.__version__, fastprefix.__file__, *fastprefix.prefix_attention(x, x, x, prefix, prefix).shape)
"""


@dataclass
class Distributions:
    """The names in a source distribution, without its folder, and the wheel that was built from it."""

    sources: set[str]
    wheel: Path


def run(code: str, *arguments: str, folder: Path, **environment: str) -> str:
    """Return the output of Python code that runs outside the checkout."""
    command = [sys.executable, "-c", code, *arguments]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env={**kept, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """Return both distributions, built from a copy of the tracked files, because building writes files."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    run(BUILD, str(out), folder=copy, FASTPREFIX_BUILD_EXT="0")
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    return Distributions(sources, next(out.glob("*.whl")))


def test_source_distribution(built: Distributions) -> None:
    """It contains everything that is needed to build, but neither tests nor results."""
    for folder in ("fastprefix", "csrc"):
        files = subprocess.check_output(["git", "ls-files", folder], cwd=ROOT, text=True).splitlines()
        assert files
        assert set(files) <= built.sources
    assert {"LICENSE", "README.md", "CHANGELOG.md", "setup.py", "pyproject.toml"} <= built.sources
    folders = {name.partition("/")[0] for name in built.sources if "/" in name}
    assert folders == {"fastprefix", "csrc", "fastprefix.egg-info"}
    assert not any(name.endswith((".so", ".pyc")) for name in built.sources)


def test_wheel(built: Distributions) -> None:
    assert built.wheel.name == f"fastprefix-{fastprefix.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(built.wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {
        "fastprefix",
        f"fastprefix-{fastprefix.__version__}.dist-info",
    }
    assert "fastprefix/py.typed" in names
    assert not any(Path(name).name in DEVELOPER_TOOLS for name in names)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fastprefix").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules


def test_wheel_is_used_from_a_folder(built: Distributions, tmp_path: Path) -> None:
    zipfile.ZipFile(built.wheel).extractall(tmp_path / "site")
    printed = run(USE, folder=tmp_path, PYTHONPATH=str(tmp_path / "site")).split()
    assert printed == [fastprefix.__version__, str(tmp_path / "site" / "fastprefix" / "__init__.py"), *"1238"]


def test_commands_run_from_the_wheel(built: Distributions, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(built.wheel).extractall(site)
    (command,) = metadata.Distribution.at(next(site.glob("*.dist-info"))).entry_points
    assert (command.group, command.name) == ("console_scripts", "fastprefix")
    module, _, function = command.value.partition(":")
    program = f"import sys; from {module} import {function}; sys.exit({function}(sys.argv[1:]))"
    assert "eager" in run(program, "info", folder=tmp_path, PYTHONPATH=str(site))
    options = ("--shape", "1,2,1,3,5,4,8", "--dtype", "float32", "--backend", "eager", "--device", "cpu")
    assert "prefix_attention" in run(program, "parity", *options, folder=tmp_path, PYTHONPATH=str(site))


def test_a_library_runs_with_its_pytorch_and_newer_ones(tmp_path: Path) -> None:
    assert "was not built" in str(_native.find_library(tmp_path, "2.13.0+cpu"))
    library = tmp_path / f"{_native.find_instruction_set()}_abi2_11.so"
    library.touch()
    for version in ("2.11.0", "2.13.0+cpu", "2.100.0a0+git1", "3.0.0"):
        assert _native.find_library(tmp_path, version) == library
    reason = str(_native.find_library(tmp_path, "2.10.1+cpu"))
    assert reason == "its C++ extension requires PyTorch 2.11 or newer, but this is 2.10.1+cpu"


def test_a_machine_uses_the_best_library_that_was_built(tmp_path: Path) -> None:
    (tmp_path / "default_abi2_11.so").touch()
    assert _native.find_library(tmp_path, "2.13.0") == tmp_path / "default_abi2_11.so"


LIBRARIES = sorted(Path(_native.__file__).parent.glob("*.so"))


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)
def test_libraries_use_the_stable_interface_alone(library: Path) -> None:
    (report,) = torch_abi_audit.inspect_package(library).bundled_libs
    assert report.torch.stable
    assert report.torch.min_torch_version == f"{library.stem.rpartition('_abi')[2].replace('_', '.')}.0"


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)
def test_libraries_load_on_older_systems(library: Path) -> None:
    """They need no symbols newer than those of glibc 2.28 and of GCC 8's libstdc++."""
    needed = subprocess.check_output(["nm", "-D", "--undefined-only", library], text=True)
    for system, newest in (("GLIBC", (2, 28)), ("GLIBCXX", (3, 4, 25)), ("CXXABI", (1, 3, 11))):
        versions = {tuple(map(int, found.split("."))) for found in re.findall(rf"@{system}_([\d.]+)", needed)}
        assert max(versions) <= newest


def test_the_choice_of_an_instruction_set_can_be_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    choose, best = _native.find_instruction_set.__wrapped__, _native.INSTRUCTION_SETS[-1]
    monkeypatch.setenv("FASTPREFIX_CPU", "default")
    assert choose() == "default"
    monkeypatch.setenv("FASTPREFIX_CPU", best)
    highest = choose()
    monkeypatch.delenv("FASTPREFIX_CPU")
    assert choose() == highest
    monkeypatch.setenv("FASTPREFIX_CPU", "sse9")
    with pytest.raises(ValueError, match=r"`FASTPREFIX_CPU` must be one of default, .*, got sse9"):
        choose()


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    """Return ``setup.py`` as a module, without building anything."""
    specification = importlib.util.spec_from_file_location("fastprefix_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(specification)
    with mock.patch("setuptools.setup"):
        specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("system", "wanted", "compiler", "reason"),
    [
        ("Linux", "", "/usr/bin/c++", None),
        ("Linux", "1", "/usr/bin/c++", None),
        ("Linux", "0", "/usr/bin/c++", "FASTPREFIX_BUILD_EXT is 0"),
        ("Linux", "", None, "no C++ compiler was found"),
        ("Darwin", "", "/usr/bin/c++", "they require GCC on Linux, but this is Darwin"),
        ("Windows", "", "cl.exe", "they require GCC on Linux, but this is Windows"),
    ],
)
def test_when_the_kernels_are_built(
    setup: ModuleType, system: str, wanted: str, compiler: str | None, reason: str | None
) -> None:
    assert setup.why_not_built(system, wanted, compiler) == reason


def test_instruction_sets_of_architectures(setup: ModuleType) -> None:
    for machine, names in _native.ARCHITECTURES.items():
        assert tuple(setup.instruction_sets(machine)) == names
    assert list(setup.instruction_sets("AMD64")) == list(setup.instruction_sets("x86_64"))
    assert list(setup.instruction_sets("aarch64")) == ["default", "neon_bf16"]
    assert list(setup.instruction_sets("riscv64")) == ["default"]


@pytest.mark.parametrize(("wanted", "fails"), [("", False), ("1", True)])
def test_a_failing_compiler_fails_the_build_only_where_kernels_were_asked_for(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wanted: str, fails: bool
) -> None:
    def fail(self: object) -> None:
        raise RuntimeError("Error compiling objects")

    monkeypatch.setenv("FASTPREFIX_BUILD_EXT", wanted)
    monkeypatch.setattr(setup.BuildExtension, "run", fail)
    build = setup.Build(setuptools.Distribution())
    with pytest.raises(RuntimeError, match="compiling") if fails else contextlib.nullcontext():
        build.run()
    assert ("without its CPU kernels: Error compiling objects" in capsys.readouterr().err) is not fails
