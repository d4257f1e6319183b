"""Parity with the reference, and the same bits from a second run."""

import itertools
import json
import os
from typing import Any

import torch
from torch import Tensor

from fastprefix.parity import DTYPES, AttentionCase, Case, attention_cases, embedding_cases, measure

from .log import Log
from .workers import in_workers


def parity_cases() -> list[Case]:
    """The grid of ``python -m fastprefix parity``, and shapes that only a GPU runs in good time."""
    large = [
        *(AttentionCase(N=n, M=m, P=77, D=D, Hq=4) for n, m in ((113, 203), (239, 1)) for D in (64, 128)),
        *(AttentionCase(N=257, M=257, P=77, D=D, Hq=4, options={"is_causal": True}) for D in (64, 80, 128, 256)),
        AttentionCase(N=150, M=170, P=77, D=64, Hq=4, gate="BHNP", bias="HNP", mask="float"),
        AttentionCase(N=150, M=170, P=77, D=64, Hq=4, gate="P", output_gate="BH", sinks=True),
        AttentionCase(N=150, M=170, P=77, D=128, Hq=4, mask="padding", options={"dropout_p": 0.1}),
        AttentionCase(B=8, N=150, M=170, P=1000, D=64, Hq=4, gate="B1P"),
        AttentionCase(B=4, Hq=8, N=1, M=3000, P=600, D=128, options={"is_causal": True}),
        AttentionCase(
            Hq=4, N=4, M=1000, P=300, D=64, output_gate="BH", options={"is_causal": True, "window_size": 700}
        ),
    ]
    return [*large, *attention_cases(66), *embedding_cases()]


def results(case: Case, dtype: torch.dtype, device: str = "cuda", backend: str = "triton") -> list[Tensor]:
    """Output and gradients."""
    inputs = case.build(dtype, device)
    values = (value if isinstance(value, tuple) else (value,) for value in inputs.tensors.values())
    leaves = [tensor.requires_grad_() for tensor in itertools.chain(*values) if tensor.is_floating_point()]
    torch.manual_seed(5)
    output = case.operation(**inputs.tensors, **inputs.options, backend=backend)
    return [output, *torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)]


def check_parity(case: Case, dtype_name: str) -> dict[str, Any]:
    """Parity by the package's own rule, and the same bits from a second run. Uninitialised memory is NaN."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses; it is read when CUDA starts
    dtype = DTYPES[dtype_name]
    torch.use_deterministic_algorithms(True)
    try:
        first, second = results(case, dtype), results(case, dtype)
    finally:
        torch.use_deterministic_algorithms(False)
    same = all(x is y or torch.equal(x, y) for x, y in zip(first, second, strict=True))
    report = measure(case, dtype, "triton", "cuda")
    row = {"case": str(case), "dtype": dtype_name, "passed": same and report.ok, "deterministic": same}
    return row | {"of bound": {result.name: result.ratio for result in report.rows}}


# Worker processes


def parity(log: Log, seconds: float) -> None:
    jobs = [(check_parity, case, dtype) for dtype in DTYPES for case in parity_cases()]
    passed = 0
    for row in in_workers(jobs, seconds):
        log.add("parity", row)
        passed += bool(row.get("passed"))
        if not row.get("passed"):
            print("PARITY", json.dumps(row, default=str)[:600], flush=True)
    print(f"parity: {passed} of {len(jobs)} passed", flush=True)
