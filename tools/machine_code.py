"""Read the machine code of a compiled Triton kernel, with the tools in Triton's package."""

import re
import subprocess
import tempfile
from pathlib import Path

_SHORTEST_LOOP = 8
"""In instructions. Shorter loops are padding at the end of a kernel, or wait on barriers."""


def read_resources(cubin: bytes) -> tuple[int, int]:
    """Return the number of registers of a thread, and the bytes of its stack, which contains spills."""
    usage = _run_tool(cubin, "cuobjdump", "-res-usage")
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def count_matrix_instructions(ptx: str) -> str:
    """Return the number of matrix instructions of each kind, as text."""
    counts = {
        "tcgen05": len(re.findall(r"tcgen05\.mma\b", ptx)),
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
    }
    return " ".join(f"{count} {name}" for name, count in counts.items() if count) or "-"


def find_loops(cubin: bytes) -> tuple[int, ...]:
    """Return the number of instructions in each innermost loop, in order. A backward jump marks the end of a loop."""
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    position = 0
    for line in _run_tool(cubin, "nvdisasm", "-c").splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = position
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            if target := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction[1]):
                jumps.append((position, target[1]))
            position += 1
    spans = [(labels[target], at) for at, target in jumps if labels[target] + _SHORTEST_LOOP <= at]
    inner = [x for x in spans if not any(x != y and x[0] <= y[0] and y[1] <= x[1] for y in spans)]
    return tuple(end - start + 1 for start, end in sorted(inner))


def _run_tool(cubin: bytes, name: str, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
