"""Test that importing the package is cheap, and which parts of the repository import which."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "fastprefix": {"fastprefix"},
    "tools": {"fastprefix", "tools"},
    "benchmarks": {"fastprefix", "benchmarks"},
    "tests": {"fastprefix", "tools", "tests"},
}
"""For each part, the parts that its modules may import."""
TESTS_OF_BENCHMARKS = (
    "gpu_compile.py",
    "gpu_dry_run.py",
    "host_times.py",
    "test_benchmarks.py",
    "test_cartridge.py",
    "test_gpu_benchmark.py",
    "test_plan.py",
    "test_results.py",
    "test_study.py",
)


def test_import_pulls_in_nothing_heavy():
    code = (
        "import sys, torch, fastprefix;"
        "assert 'transformers' not in sys.modules, 'transformers';"
        "assert 'triton' not in sys.modules, 'triton';"
        "assert not torch.cuda.is_initialized(), 'cuda';"
        "assert fastprefix.testing.assert_parity.__name__ == 'assert_parity'"  # without an import of its own
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def imported_parts(path: Path) -> Iterator[str]:
    """Yield the parts that a file imports, wherever in the file the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        elif isinstance(node, ast.ImportFrom):
            folder = path.relative_to(ROOT).parts[:-1]
            assert node.level <= len(folder), f"{path}: line {node.lineno} leaves its part"
            names = [folder[0]]
        else:
            continue
        yield from {name.partition(".")[0] for name in names} & set(ALLOWED)


@pytest.mark.parametrize("part", ALLOWED)
def test_parts_import_only_what_they_may(part: str) -> None:
    wrong = []
    for path in sorted((ROOT / part).rglob("*.py")):
        allowed = ALLOWED[part] | ({"benchmarks"} if path.name in TESTS_OF_BENCHMARKS and part == "tests" else set())
        wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in imported_parts(path) if name not in allowed]
    assert not wrong, "\n".join(wrong)
