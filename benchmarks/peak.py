"""Measure the peak rate of multiply-adds of this machine's CPU, to compare kernels with it.

A small C++ program (``peak.cpp``) runs only independent multiply-adds, with the package's instruction set and PyTorch's
number of threads. It multiplies numbers with random digits, as kernels do. A processor at its power limit multiplies
by 0 and 1 up to twice as fast.
"""

import ctypes
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fastprefix._native import find_instruction_set

_AVX512 = ["-mavx2", "-mfma", "-mavx512f"]
FLAGS = {
    "default": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": _AVX512,
    "avx512_bf16": [*_AVX512, "-mavx512bf16"],
    "amx": [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
SOURCE = Path(__file__).with_suffix(".cpp")


def measure_peaks(seconds: float = 0.3) -> dict[str, float]:
    """Return the operations per second of all threads for each dtype, the best of five runs.

    Return no rates without a program for the instruction set (ARM) or without a compiler.
    """
    name = find_instruction_set()
    if name not in FLAGS or shutil.which("c++") is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "peak.so")
        options = ["-O3", "-ffp-contract=fast", "-shared", "-fPIC", "-o", str(library)]
        subprocess.run(["c++", *FLAGS[name], str(SOURCE), *options], check=True)
        functions = ctypes.CDLL(str(library))
        return {dtype: max(_measure(functions[dtype], seconds) for _ in range(5)) for dtype in ("float32", "bfloat16")}


def _measure(function: "ctypes._NamedFuncPointer", seconds: float) -> float:
    function.restype, function.argtypes = ctypes.c_double, [ctypes.c_long]
    started = time.perf_counter()
    function(1_000_000)
    rounds = max(1, int(1_000_000 * seconds / (time.perf_counter() - started)))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        started = time.perf_counter()
        operations = sum(pool.map(function, [rounds] * torch.get_num_threads()))
        return float(operations) / (time.perf_counter() - started)
