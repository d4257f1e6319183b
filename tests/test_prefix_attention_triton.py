"""The Triton kernels against the float64 reference, forward and every gradient, in Triton's interpreter on the CPU.

Whether Triton interprets is settled when it is imported. So this module, run as usual, runs itself in a fresh process
with ``TRITON_INTERPRET=1``, and only there are its cases defined.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix.ops.prefix_attention.layout import empty_heads
from fastprefix.ops.prefix_attention.validation import canonical_arguments
from fastprefix.testing import assert_parity

pytest.importorskip("triton")
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETING:

    def test_in_the_interpreter() -> None:
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", __file__]
        environment = os.environ | {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def test_refuses_cpu_tensors_without_the_interpreter() -> None:
        x = torch.zeros(1, 1, 1, 16)
        with pytest.raises(ValueError, match="it runs on cuda tensors"):
            fastprefix.prefix_attention(x, x, x, x[0], x[0], backend="triton")

    def test_import_does_not_import_triton() -> None:
        program = "import sys, fastprefix; sys.exit('triton' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


Inputs = dict[str, Any]
NAMES = ("query", "key", "value", "prefix_key", "prefix_value", "prefix_gate", "output_gate", "sinks")


def inputs(
    B: int = 2,
    Hq: int = 4,
    Hkv: int = 2,
    N: int = 37,
    M: int = 45,
    P: int = 19,
    D: int = 24,
    Dv: int = 40,
    *,
    shared: bool = True,
    gate: tuple[int, ...] | None = None,
    output_gate: tuple[int, ...] | None = None,
    sinks: bool = False,
    mask: tuple[int, ...] | None = None,
    hidden: tuple[int, ...] | None = None,
    bias: tuple[int, ...] | None = None,
    segments: int | None = None,
    **options: Any,
) -> Inputs:
    """Random arguments in float64 that float16 represents; ``mask`` float, ``hidden`` bool, others by shape."""
    generator = torch.Generator().manual_seed(N + 7 * M + 13 * P)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).half().double()

    def optional(shape: tuple[int, ...] | None) -> Tensor | None:
        return None if shape is None else draw(*shape)

    rows = () if shared else (B,)
    x: Inputs = {
        "query": draw(B, Hq, N, D),
        "key": draw(B, Hkv, M, D),
        "value": draw(B, Hkv, M, Dv),
        "prefix_key": draw(*rows, Hkv, P, D),
        "prefix_value": draw(*rows, Hkv, P, Dv),
        "prefix_gate": None if gate is None else (1 + 0.25 * draw(*gate)).half().double(),
        "output_gate": optional(output_gate),
        "sinks": draw(Hq) if sinks else None,
        "attn_mask": optional(mask),
        "prefix_bias": optional(bias),
        **options,
    }
    if hidden is not None:
        x["attn_mask"] = draw(*hidden) > -0.5
    if segments is not None:
        x["segment_ids"] = tuple(torch.randint(0, segments, (B, n), generator=generator) for n in (N, M))
    return x


Run = tuple[Tensor, dict[str, Tensor]]


def run(function: Callable[..., Tensor], x: Inputs, dtype: torch.dtype, wanted: tuple[str, ...] = NAMES) -> Run:
    """Output and gradients, in float64, of a call in ``dtype``."""
    cast = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in x.items()}
    leaves = {k: cast[k].requires_grad_() for k in wanted if cast[k] is not None}
    torch.manual_seed(5)  # the same dropout everywhere
    output = function(**cast)
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).half().to(dtype)
    gradients = torch.autograd.grad(output, list(leaves.values()), grad_output)
    return output.detach().double(), dict(zip(leaves, (g.double() for g in gradients), strict=True))


def triton_backend(**arguments: Any) -> Tensor:
    return fastprefix.prefix_attention(**arguments, backend="triton")


def assert_close(x: Inputs, dtype: torch.dtype, wanted: tuple[str, ...] = NAMES) -> None:
    """The parity of ``fastprefix.testing``."""
    cast = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in x.items()}
    tensors = {name: cast.pop(name) for name in NAMES if cast[name] is not None}
    options = {name: option for name, option in cast.items() if option is not None}
    grad = [name for name in wanted if name in tensors]
    assert_parity(fastprefix.prefix_attention, tensors, options={**options, "backend": "triton"}, grad=grad, draws=2)


CASES: dict[str, Inputs] = {
    "plain": {},
    "heads of the width of a tile": {"D": 32, "Dv": 32, "N": 64, "M": 64, "P": 32, "Hq": 2},
    "wide heads": {"D": 80, "Dv": 256, "Hq": 2, "Hkv": 1, "N": 33, "M": 31, "B": 1},
    "narrow heads": {"D": 8, "Dv": 8, "B": 1},
    "one query, one key": {"N": 1, "M": 1, "P": 1},
    "three": {"N": 3, "M": 3, "P": 3, "is_causal": True},
    "short prefix of many queries": {"P": 5, "N": 70, "M": 70, "B": 1, "gate": (2, 5)},
    "multi query": {"Hq": 3, "Hkv": 1, "is_causal": True},
    "causal": {"is_causal": True, "N": 70, "M": 70, "B": 1},
    "causal, more keys": {"is_causal": True, "N": 40, "M": 101, "B": 1},
    "causal, more queries": {"is_causal": True, "N": 70, "M": 33, "B": 1},
    "causal window": {"is_causal": True, "window_size": 9, "N": 70, "M": 75, "B": 1},
    "causal window of many tiles": {"is_causal": True, "window_size": 70, "N": 100, "M": 130, "B": 1, "Hq": 2},
    "window": {"window_size": 5, "N": 70, "M": 66, "B": 1},
    "narrow window": {"window_size": 2, "N": 40, "M": 40, "B": 1, "P": 0},
    "window of 32 bits": {"is_causal": True, "window_size": 2**31 - 1, "N": 40, "M": 45, "B": 1},
    "window of 63 bits": {"window_size": 2**63 - 1, "N": 45, "M": 40, "B": 1},
    "segments": {"segments": 3},
    "padding": {"hidden": (2, 45)},
    "bool mask": {"hidden": (2, 1, 37, 45)},
    "bool mask of heads, nothing seen": {"hidden": (4, 1, 1), "P": 0, "sinks": True},
    "float mask": {"mask": (1, 4, 37, 45)},
    "nothing but the least number": {"P": 0, "attn_mask": torch.full((37, 45), torch.finfo(torch.float32).min)},
    "float mask of keys": {"mask": (2, 1, 1, 45), "is_causal": True},
    "prefix bias": {"bias": (2, 1, 37, 19)},
    "prefix bias of keys": {"bias": (19,), "shared": False},
    "softcap": {"softcap": 1.5, "gate": (19,)},
    "sinks": {"sinks": True, "is_causal": True, "N": 50, "M": 40},
    "scale": {"scale": 0.3},
    "negative scale": {"scale": -0.3, "is_causal": True, "hidden": (2, 45)},
    "no scale": {"scale": 0.0, "is_causal": True},
    "prefix of each row": {"shared": False, "P": 40},
    "gate of keys": {"gate": (19,)},
    "gate of heads": {"gate": (2, 1)},
    "gate of rows": {"gate": (2, 2, 19)},
    "gate of rows, prefix of each": {"gate": (2, 1, 19), "shared": False},
    "one gate": {"gate": (1,)},
    "gate of queries": {"gate": (2, 4, 37, 19)},
    "gate of queries, shared by heads": {"gate": (2, 1, 37, 1), "P": 40},
    "gate of heads in four dimensions": {"gate": (1, 4, 1, 19)},
    "separate": {"output_gate": (2, 4)},
    "separate, gated": {"output_gate": (4,), "gate": (2, 2, 19), "is_causal": True},
    "separate, gate of queries": {"output_gate": (4,), "gate": (2, 4, 37, 19), "P": 19},
    "separate, sinks, softcap": {"output_gate": (2, 1), "sinks": True, "softcap": 2.0, "window_size": 9},
    "separate, dropout": {"output_gate": (2, 4), "dropout_p": 0.4, "gate": (19,)},
    "dropout": {"dropout_p": 0.3},
    "dropout of everything": {"dropout_p": 1.0, "B": 1},
    "everything": {
        "is_causal": True,
        "window_size": 30,
        "segments": 2,
        "mask": (2, 4, 37, 45),
        "bias": (2, 4, 37, 19),
        "gate": (2, 4, 37, 19),
        "softcap": 4.0,
        "sinks": True,
        "dropout_p": 0.2,
    },
    "no prefix": {"P": 0},
    "no prefix, separate": {"P": 0, "output_gate": (2, 4), "gate": (2, 2, 0)},
    "no tokens": {"M": 0},
    "no tokens, separate": {"M": 0, "output_gate": (2, 4)},
    "no keys": {"M": 0, "P": 0},
    "no keys but sinks": {"M": 0, "P": 0, "sinks": True},
    "no queries": {"N": 0, "gate": (2, 2, 19), "sinks": True},
    "no rows": {"B": 0, "gate": (19,), "output_gate": (4,)},
    "no rows, prefix of each": {"B": 0, "shared": False, "gate": (19,)},
    "decoding": {"N": 1, "M": 140, "P": 70, "is_causal": True},
    "decoding, a few": {"N": 5, "M": 100, "P": 40, "is_causal": True, "B": 3, "Hq": 8},
    "decoding, prefix of each row": {"N": 2, "M": 100, "P": 70, "shared": False, "gate": (2, 2, 70)},
    "decoding, separate": {"N": 2, "M": 100, "P": 70, "output_gate": (2, 4), "sinks": True, "softcap": 2.0},
    "decoding, window, masks": {
        "N": 3,
        "M": 100,
        "is_causal": True,
        "window_size": 40,
        "hidden": (2, 100),
        "sinks": True,
    },
    "decoding, gate of queries, dropout": {
        "N": 3,
        "M": 100,
        "gate": (2, 4, 3, 19),
        "dropout_p": 0.3,
        "bias": (4, 1, 19),
    },
    "decoding, segments": {"N": 4, "M": 100, "segments": 2, "mask": (2, 4, 4, 100)},
    "decoding, no prefix": {"N": 1, "M": 100, "P": 0},
    "decoding, no tokens": {"N": 1, "M": 0, "P": 100},
}
HALF_CASES = (
    "plain",
    "multi query",
    "causal window",
    "segments",
    "padding",
    "softcap",
    "negative scale",
    "no scale",
    "prefix bias",
    "gate of queries",
    "separate, gated",
    "separate, sinks, softcap",
    "decoding, a few",
)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Uninitialised memory is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


if INTERPRETING:

    @pytest.mark.parametrize("name", CASES)
    def test_parity_float32(name: str) -> None:
        assert_close(inputs(**CASES[name]), torch.float32)

    @pytest.mark.parametrize("name", HALF_CASES)
    def test_parity_float16(name: str) -> None:
        assert_close(inputs(**CASES[name]), torch.float16)

    @pytest.mark.parametrize("wanted", [*((name,) for name in NAMES), ("query", "value"), ("key", "prefix_gate")])
    def test_only_the_gradients_asked_for(wanted: tuple[str, ...]) -> None:
        x = inputs(N=20, M=33, gate=(2, 2, 19), output_gate=(2, 4), sinks=True)
        assert_close(x, torch.float32, wanted)

    def test_frozen_tokens_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
        from fastprefix.ops import targets

        launched: list[str] = []
        launch = targets.Device.launch

        def record(self: Any, kernel: Any, grid: Any, arguments: Any, constants: Any, tile: Any) -> None:
            launched.append(
                kernel.__name__
                + ("" if arguments[2] is not None and getattr(arguments[2], "p", 0) is not None else " without dq")
            )
            launch(self, kernel, grid, arguments, constants, tile)

        monkeypatch.setattr(targets.Device, "launch", record)
        run(triton_backend, inputs(gate=(19,)), torch.float32, ("prefix_key", "prefix_value", "prefix_gate"))
        assert not any("dkv" in name for name in launched)
        assert "prefix_attention_bwd_dq_kernel without dq" in launched

    def test_dropout_drops_what_the_eager_backend_drops() -> None:
        x = inputs(M=0, P=32, Dv=32, dropout_p=0.5, query=torch.zeros(2, 4, 37, 24, dtype=torch.float64))
        x["prefix_value"] = torch.eye(32, dtype=torch.float64).expand(2, 32, 32)  # the output is the probabilities
        kept = [
            run(lambda name=name, **a: fastprefix.prefix_attention(**a, backend=name), x, torch.float32)[0] != 0
            for name in ("eager", "triton")
        ]
        assert torch.equal(*kept)
        assert 0.4 < kept[0].double().mean() < 0.6

    def test_twice_the_same_bits() -> None:
        x = inputs(B=3, P=40, gate=(40,), sinks=True)
        first, second = (run(triton_backend, x, torch.float32) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])

    def test_strided_views_and_layouts() -> None:
        x = inputs(N=20, M=33)
        for name in ("query", "key", "value"):
            x[name] = x[name].transpose(1, 2).contiguous().transpose(1, 2)
        x["prefix_key"] = x["prefix_key"].transpose(0, 1).contiguous().transpose(0, 1)
        x["prefix_value"] = torch.stack([x["prefix_value"], x["prefix_value"]], -1)[..., 0]  # columns two apart
        assert_close(x, torch.float32)
        output = triton_backend(**{k: v.float() if isinstance(v, Tensor) else v for k, v in x.items()})
        assert output.stride() == empty_heads(x["query"], x["value"].shape[3]).stride()

    def test_columns_further_apart_than_32_bits_say() -> None:
        apart = 2**23 + 2**16
        memory = torch.from_numpy(numpy.empty(256 * apart, dtype=numpy.float16))  # few of its pages are ever touched
        x = {k: v.half() if isinstance(v, Tensor) else v for k, v in inputs(1, 1, 1, 20, 20, 3, 256, 16).items()}
        far = memory.as_strided(x["key"].shape, (1, 1, 1, apart)).copy_(x["key"])
        assert torch.equal(triton_backend(**{**x, "key": far}), triton_backend(**x))

    def test_operators_keep_pytorch_rules() -> None:
        names = ("window_size", "segment_ids", "softcap", "scale")
        x = {"is_causal": True, "dropout_p": 0.0} | dict.fromkeys(names) | inputs(N=5, M=6, P=3, gate=(3,), sinks=True)
        x = {k: v.float().requires_grad_() if isinstance(v, Tensor) else v for k, v in x.items()}
        torch.library.opcheck(torch.ops.fastprefix.prefix_attention.triton, tuple(canonical_arguments(**x)))

    @pytest.mark.parametrize(
        ("dtype", "precision", "used"),
        [(torch.float32, "tf32", "tf32"), (torch.float32, "ieee", "ieee"), (torch.bfloat16, "tf32", "ieee")],
    )
    def test_precision_of_products(
        dtype: torch.dtype, precision: str, used: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The user's, by PyTorch's newer switch: once it is set, the older one cannot be read."""
        from fastprefix.ops import targets

        seen: set[str] = set()
        launch = targets.Device.launch

        def record(self: Any, kernel: Any, grid: Any, arguments: Any, constants: Any, tile: Any) -> None:
            seen.add(constants["T"].PRECISION)
            launch(self, kernel, grid, arguments, constants, tile)

        monkeypatch.setattr(targets.Device, "launch", record)
        x = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in inputs(N=20, M=20, B=1).items()}
        matmul = torch.backends.cuda.matmul
        before, matmul.fp32_precision = matmul.fp32_precision, precision
        try:
            triton_backend(**x)
        finally:
            matmul.fp32_precision = before
        assert seen == {used}

    def test_compiles_whole() -> None:
        x = {k: v.float() if isinstance(v, Tensor) else v for k, v in inputs(N=5, M=6, P=3, gate=(3,)).items()}
        compiled = torch.compile(triton_backend, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(**x), triton_backend(**x))

    @pytest.mark.parametrize(
        ("change", "match"),
        [({"dtype": torch.float64}, "not torch.float64"), ({"D": 264}, "head sizes up to 256")],
    )
    def test_says_what_it_does_not_take(change: dict[str, Any], match: str) -> None:
        x = torch.zeros(1, 1, 1, change.get("D", 16), dtype=change.get("dtype", torch.float32))
        with pytest.raises(ValueError, match=match):
            triton_backend(query=x, key=x, value=x, prefix_key=x[0], prefix_value=x[0])
        assert fastprefix.prefix_attention(x, x, x, x[0], x[0]).shape == x.shape
