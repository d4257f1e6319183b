"""Importing the package is cheap."""

import subprocess
import sys


def test_import_pulls_in_nothing_heavy():
    code = (
        "import sys, torch, fastprefix;"
        "assert 'transformers' not in sys.modules, 'transformers';"
        "assert 'triton' not in sys.modules, 'triton';"
        "assert not torch.cuda.is_initialized(), 'cuda'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_testing_needs_no_import_of_its_own():
    code = "import fastprefix; print(fastprefix.testing.assert_parity.__name__)"
    assert (
        "assert_parity"
        in subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    )


def test_command_line():
    run = subprocess.run([sys.executable, "-m", "fastprefix", "info"], capture_output=True, text=True, check=True)
    assert "eager" in run.stdout
    assert subprocess.run([sys.executable, "-m", "fastprefix", "nothing"], capture_output=True).returncode == 2
