"""Test that every kernel compiles without a GPU, within the chip's registers and shared memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def aot(*options: str) -> subprocess.CompletedProcess[str]:
    """Run the tool in a new process, because importing Triton decides whether it interprets or compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.aot", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def run_program(program: str) -> list[str]:
    """Run a program that compiles kernels in a separate process, and return the lines that it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


ONE = ("--dtype", "bfloat16", "--width", "128", "--features", "causal, gate of keys", "--bottleneck", "19")
"""Options for one kernel of each kind. The embedding's kernels take most of the time of ``--quick``."""


@pytest.mark.parametrize(
    ("arch", "instruction", "options"),
    [
        pytest.param("sm_80", " mma ", ONE, marks=pytest.mark.slow),
        pytest.param("sm_90", " wgmma ", ("--quick",), marks=pytest.mark.slow),
        ("sm_90", " wgmma ", ONE),
        pytest.param("sm_100", " tcgen05 ", ONE, marks=pytest.mark.slow),
        pytest.param("sm_120", " mma ", ONE, marks=pytest.mark.slow),
    ],
)
def test_compiles_without_spills(arch: str, instruction: str, options: tuple[str, ...]) -> None:
    done = aot("--arch", arch, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].endswith(" 0 not acceptable")
    assert {line.split()[3] for line in lines[:-1]} >= {"embedding_fwd", "embedding_bwd_spans", "decode", "combine"}
    for kernel in ("fwd", "bwd_dq", "bwd_dkv", "bwd_dprefix"):
        assert instruction in next(line for line in lines if f" {kernel} " in line)


@pytest.mark.slow
def test_the_widest_heads_fit_into_the_least_shared_memory() -> None:
    options = ("--arch", "sm_86", "--dtype", "bfloat16", "--width", "256", "--features", "full", "--bottleneck", "19")
    done = aot(*options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " bwd_dkv " in done.stdout


@pytest.mark.slow
def test_narrow_and_padded_heads_and_rounded_products() -> None:
    widths, features = ("--width", "64", "80"), ("--features", "full")
    done = aot("--arch", "sm_80", "--dtype", "bfloat16", "tf32", *widths, *features, "--bottleneck", "9")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {(line.split()[1], line.split()[2]) for line in done.stdout.splitlines()[:-1] if " fwd " in line}
    assert found == {("bfloat16", "D64"), ("bfloat16", "D80"), ("tf32", "D64")}


@pytest.mark.parametrize(
    ("row", "capabilities"),
    [
        ("sm_80", [(8, 0), (8, 7)]),
        ("sm_86", [(8, 6), (8, 9)]),
        ("sm_90", [(9, 0)]),
        ("sm_100", [(10, 0), (10, 3), (11, 0)]),
        ("sm_120", [(12, 0), (12, 1)]),
    ],
)
def test_rows_of_devices(row: str, capabilities: list[tuple[int, int]]) -> None:
    from fastprefix.ops.prefix_attention.triton_backend import tiles
    from fastprefix.ops.targets import name_architecture
    from tools.aot import SHARED_MEMORY

    assert [name_architecture(capability) for capability in capabilities] == [row] * len(capabilities)
    assert row in tiles.ARCHITECTURES
    assert row in tiles.VARIANTS
    assert row in SHARED_MEMORY


COUNT = """
import torch, triton
from fastprefix.ops.prefix_attention.arguments import DIFFERENTIABLE
from fastprefix.ops.prefix_attention.triton_backend import launch as attention
from fastprefix.ops.prompt_embedding import arguments
from fastprefix.ops.prompt_embedding.triton_backend import launch as embedding
from tools import aot

class Target:
    architecture, processors, split_from = "sm_80", 132, 256
    def launch(self, kernel, grid, arguments, constants, tile):
        aot.compile_kernel(kernel, grid, arguments, constants, tile)

def count(*, compile, fn, **_):
    kinds.setdefault((fn.name, compile["key"]), (B, N, S))
    return True  # do not compile

def tensor(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

kinds = {}
aot.pretend_device(80)
triton.knobs.runtime.jit_cache_hook = count
for B, N, S in (2, 512, 60), (3, 77, 64), (4, 130, 16), (16, 1, 1):
    for a in aot.embedding_calls(torch.bfloat16, 19, B, N, S, 768).values():
        needs = [getattr(a, name) is not None for name in arguments.DIFFERENTIABLE]
        embedding.backward(embedding.forward(*a, target=Target()), needs, *a, target=Target())
    if N > 16:
        q, k, p = tensor(B, 4, N, 64), tensor(B, 2, N + S, 64), tensor(2, 50, 64)
        a = aot.attention_arguments(q, k, k, p, p, is_causal=True)
        output, normalizers = attention.forward(*a, target=Target())
        needs = [getattr(a, name) is not None for name in DIFFERENTIABLE]
        attention.backward(output, output, normalizers, needs, *a, target=Target())
print(*sorted(name for (name, _), size in kinds.items() if size != (2, 512, 60)))
print(len({name for name, _ in kinds}))
"""


def test_another_batch_or_length_compiles_nothing_anew() -> None:
    assert run_program(COUNT) == ["", "12"]


LENGTHS = """
import torch, triton
from fastprefix.ops.prefix_attention.arguments import DIFFERENTIABLE, EAGER_ALONE
from fastprefix.ops.prefix_attention.triton_backend import launch
from fastprefix.parity import make_attention_case
from tools import aot

class Target:
    architecture, processors, split_from = "sm_80", 132, 256
    def launch(self, kernel, grid, arguments, constants, tile):
        aot.compile_kernel(kernel, grid, arguments, constants, tile)

def count(*, compile, fn, **_):
    kinds.add((fn.name, compile["key"]))
    return True  # do not compile

aot.pretend_device(80)
triton.knobs.runtime.jit_cache_hook = count
for features in (
    {"mask": "padding"},
    {"segments": True, "is_causal": True},
    {"mask": "bool BHNM"},
    {"mask": "float B1NM", "bias": "BHNP"},
    {"gate": "B1NP", "D": 40},
    {"gate": "BHNP", "layout": "BNHD", "spans": "own"},
    {"mask": "padding", "B": 1, "gate": "BhP"},
):
    kinds, after_two = set(), None
    for length in (100, 101, *range(102, 300, 7), 112, 128, 256, 299):
        for N, M in ((length, length), (1, length + 256)):
            case = make_attention_case(**{"B": 2, "Hq": 4, "N": N, "M": M, "P": 100, "D": 64} | features)
            inputs = case.build(torch.bfloat16, "meta")
            a = aot.attention_arguments(**inputs.tensors, **inputs.options)
            output, normalizers = launch.forward(*a, target=Target())
            if N > 1:
                asked = [getattr(a, x) is not None and x not in EAGER_ALONE for x in DIFFERENTIABLE]
                launch.backward(output, output, normalizers, asked, *a, target=Target())
        if length == 101:
            after_two = len(kinds)
    print(after_two, len(kinds))
"""


def test_another_length_compiles_nothing_anew_whatever_masks_and_gates_there_are() -> None:
    counts = [tuple(map(int, line.split())) for line in run_program(LENGTHS)]
    assert len(counts) == 7
    assert all(first == last >= 7 for first, last in counts), counts


KINDS = """
import torch, triton
from fastprefix.ops.prefix_attention.triton_backend import launch
from fastprefix.parity import make_attention_case
from tools import aot

class Target:
    architecture, processors, split_from = "sm_90", 132, 256
    def launch(self, kernel, grid, arguments, constants, tile):
        aot.compile_kernel(kernel, grid, arguments, constants, tile)

kinds = {}
aot.pretend_device(90)
triton.knobs.runtime.jit_cache_hook = lambda *, compile, fn, **_: kinds.setdefault(fn.name, set()).add(compile["key"])
for features in ({}, {"mask": "padding"}, {"is_causal": True, "gate": "BhP"}, {"softcap": 3.0}, {"dropout_p": 0.1}):
    inputs = make_attention_case(Hq=4, N=1, M=300, P=100, D=64, **features).build(torch.bfloat16, "meta")
    launch.forward(*aot.attention_arguments(**inputs.tensors, **inputs.options), target=Target())
print(*sorted(f"{name.rpartition('.')[2]} {len(keys)}" for name, keys in kinds.items()), sep="\\n")
"""


def test_parts_are_joined_by_one_kernel_for_all_kinds_of_calls() -> None:
    assert run_program(KINDS) == ["prefix_attention_combine_kernel 1", "prefix_attention_decode_kernel 5"]


CHAINS = """
import re
import torch
from fastprefix.ops.prefix_attention.triton_backend import launch as attention
from fastprefix.ops.prompt_embedding import arguments
from fastprefix.ops.prompt_embedding.triton_backend import launch as embedding
from tools import aot

class Target:
    architecture, processors, split_from = "sm_80", 132, 256
    def launch(self, kernel, grid, arguments, constants, tile):
        ttgir = aot.compile_kernel(kernel, grid, arguments, constants, tile).asm["ttgir"]
        zeros = set(re.findall(r"(%\\S+) = arith.constant dense<0.000000e\\+00>", ttgir))
        sums = re.findall(r"tt.dot %\\S+, %\\S+, (%[^\\s,]+)", ttgir)
        print(kernel.__name__, len(sums), sum(x not in zeros for x in sums))

aot.pretend_device(80)
a = aot._attention(torch.float32, 16, 512, gate="B1NP")
output, normalizers = attention.forward(*a, target=Target())
wanted = ("query", "key", "value", "prefix_key", "prefix_value", "prefix_gate")
needs = [name in wanted for name in aot.attention.DIFFERENTIABLE]
attention.backward(output, output, normalizers, needs, *a, target=Target())
calls = aot.embedding_calls(torch.float32, 9)
for a in (calls["ADePT"], calls["DePT, bank"]):
    needs = [getattr(a, name) is not None for name in arguments.DIFFERENTIABLE]
    embedding.backward(embedding.forward(*a, target=Target()), needs, *a, target=Target())
"""


ROWS = """
import torch
from fastprefix.ops.prefix_attention.triton_backend import launch
from tools import aot

class Target:
    architecture, processors, split_from = "sm_80", 132, 256
    def launch(self, kernel, grid, arguments, constants, tile):
        if kernel.__name__ in ("prefix_attention_bwd_dkv_kernel", "prefix_attention_bwd_dprefix_kernel"):
            compiled = aot.compile_kernel(kernel, grid, arguments, constants, tile)
            loads = [line for line in compiled.asm["ttir"].splitlines() if " tt.load " in line]
            rows = [line for line in loads if "!tt.ptr<f32>" in line]
            print(kernel.__name__, len(rows), sum("," in line.partition(" : ")[0] for line in rows))

aot.pretend_device(80)
a = aot._attention(torch.bfloat16, 64, 512)
output, normalizers = launch.forward(*a, target=Target())
needs = [name in ("key", "value", "prefix_key", "prefix_value") for name in aot.attention.DIFFERENTIABLE]
launch.backward(output, output, normalizers, needs, *a, target=Target())
"""


def test_numbers_of_rows_are_loaded_without_masks() -> None:
    """A mask at each load costs a quarter of the instructions of these loops with Triton 3.6."""
    lines = [line.split() for line in run_program(ROWS)]
    assert len(lines) == 2
    assert all(int(loads) >= 2 and masked == "0" for _, loads, masked in lines), lines


@pytest.mark.slow
def test_no_chain_of_additions_in_float32_runs_through_all_blocks() -> None:
    """In compiled code, Triton starts a product at the sum that it is added to."""
    counts = [line.split() for line in run_program(CHAINS)]
    assert sum(int(products) for _, products, _ in counts) > 20
    chained = {name: number for name, _, number in counts if number != "0"}
    assert chained == {"prompt_embedding_fwd_kernel": "1"}  # w2's only product, which begins with b2


PRODUCTS = """
import torch
from fastprefix.ops.prefix_attention.arguments import DIFFERENTIABLE
from fastprefix.ops.prefix_attention.triton_backend import launch
from fastprefix.parity import make_attention_case
from tools import aot

class Target:
    architecture, processors, split_from = "sm_80", 132, 256
    def launch(self, kernel, grid, arguments, constants, tile):
        if kernel.__name__ in ("prefix_attention_bwd_dprefix_kernel", "prefix_attention_bwd_delta_kernel"):
            compiled = aot.compile_kernel(kernel, grid, arguments, constants, tile)
            print(compiled.asm["ttir"].count(" tt.dot "), end=" ")

aot.pretend_device(80)
case = make_attention_case(N=70, M=75, P=20, D=16, key_bias="hP", output_gate="BH")
a = aot.attention_arguments(**case.build(torch.bfloat16, "meta").tensors)
output, normalizers = torch.empty_like(a.query), torch.empty(a.normalizers_shape, device="meta")
for wanted in ("prefix_value", "prefix_key", "prefix_key_bias", "prefix_key prefix_value", "value", "query"):
    needs = [name in wanted.split() for name in DIFFERENTIABLE]
    launch.backward(output, output, normalizers, needs, *a, target=Target())
    print(wanted)
"""


def test_only_the_products_that_the_wanted_gradients_need() -> None:
    """Count products of the kernels of delta and of the prefix, of two softmaxes; <do, pv> is not for values."""
    assert run_program(PRODUCTS) == [
        "0 2 prefix_value",
        "2 3 prefix_key",
        "2 2 prefix_key_bias",
        "2 4 prefix_key prefix_value",
        "0 value",
        "4 query",
    ]


def test_a_spill_is_not_acceptable() -> None:
    from fastprefix.ops.prefix_attention.triton_backend.tiles import AttentionTile
    from tools.aot import Report

    tile = AttentionTile(64, 64, 64, 4, 2)
    known = ("fwd", "sm_90", "bfloat16", "D64", "full")
    assert Report(*known, tile, 255, spill=8).fault is not None
    assert Report(*known, tile._replace(spills="measured faster"), 255, spill=8).fault is None
    assert Report(*known, tile, 100, shared=228 * 1024).fault is not None
    assert Report(*known, tile, failure="error").fault is not None
