"""Test the composed backend: flash attention for the tokens, Triton for the prefix, against the float64 reference.

On the CPU, PyTorch's flash attention for CPUs has the place of that for GPUs.
"""

import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fastprefix
from fastprefix._once import once
from fastprefix.ops import backends
from fastprefix.ops.prefix_attention import composed_backend
from fastprefix.ops.prefix_attention.arguments import AttentionArguments
from fastprefix.ops.prefix_attention.composed_backend import cudnn, flash, kernels, packed, plans
from fastprefix.ops.prefix_attention.composed_backend.problem import Known, Packing, Problem
from fastprefix.ops.prefix_attention.validation import canonical_arguments
from fastprefix.parity import make_attention_case, measure

CASES: dict[str, dict[str, Any]] = {
    "causal, gate of keys": {"gate": "BhP", "P": 40, "Hq": 4, "N": 37, "M": 37, "D": 24, "is_causal": True},
    "grouped heads, [B, N, H, D]": {"Hq": 4, "Hkv": 1, "N": 20, "M": 31, "P": 19, "gate": "P", "layout": "BNHD"},
    "more queries than keys": {"N": 50, "M": 3, "P": 40, "scale": 0.3},
    "one query": {"prefix_a_row": True, "bias": "BHNP", "N": 1, "M": 33, "P": 5, "layout": "strided"},
    "spans, gate of queries": {
        **{"spans": "ragged", "B": 4, "P": 40, "gate": "B1NP", "key_bias": "hT", "frozen": 3},
        **{"N": 20, "M": 20, "is_causal": True},
    },
    "large biases": {"bias": "BHNP", "level": 100.0, "key_bias": "hP"},
    "a hidden prefix": {"N": 20, "M": 20, "P": 5, "prefix_bias": torch.full((5,), float("-inf"))},
    "no prefix keys": {"P": 0, "N": 20, "M": 20, "is_causal": True},
    "plain attention": {"P": None, "N": 20, "M": 20},
}
LONG: dict[str, dict[str, Any]] = {
    "one prefix, causal, grouped heads": {"Hq": 4, "P": 33, "N": 19, "M": 19, "is_causal": True, "frozen": 2},
    "gate of keys, [B, N, H, D]": {"Hq": 4, "gate": "hP", "P": 33, "N": 19, "M": 23, "layout": "BNHD", "frozen": 2},
    "gate of rows": {"gate": "B1P", "P": 17, "N": 21, "M": 5},
    "a prefix a row, one gate": {"prefix_a_row": True, "gate": "1", "P": 9, "N": 5, "M": 33, "layout": "strided"},
    "one row": {"B": 1, "gate": "h1", "P": 9, "N": 3, "M": 3},
    "one query": {"P": 9, "N": 1, "M": 3},
}
"""Prefixes that PyTorch's kernels can run too."""


@pytest.fixture
def force_plan(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return partial(monkeypatch.setattr, plans, "_forced")


def read_plan(a: AttentionArguments) -> tuple[plans.Plan, plans.Plan]:
    return plans.choose_plan(a, "forward"), plans.choose_plan(a, "backward")


def make(device: str, **named: Any) -> dict[str, Any]:
    inputs = make_attention_case(**{"N": 20, "M": 20, "D": 16} | named).build(find_dtype(device), device)
    return inputs.tensors | inputs.options


def find_dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


@pytest.mark.parametrize("name", CASES)
def test_parity(device: str, name: str) -> None:
    case = make_attention_case(**{"D": 16} | CASES[name])
    report = measure(case, find_dtype(device), "composed", device)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("prefix", ["prefix alike", "concatenated"])
@pytest.mark.parametrize("name", LONG)
def test_parity_of_prefixes_by_flash_attention(
    device: str, name: str, prefix: str, force_plan: Callable[[str], None]
) -> None:
    force_plan(f"flash, {prefix}")
    report = measure(make_attention_case(**{"D": 16} | LONG[name]), find_dtype(device), "composed", device)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("plan", ["flash, prefix alike", "flash, concatenated"])
@pytest.mark.parametrize("wanted", [("prefix_key",), ("prefix_gate",), ("query",), ("value",)])
def test_only_the_gradients_asked_for_by_each_plan(
    device: str, plan: str, wanted: tuple[str, ...], force_plan: Callable[[str], None]
) -> None:
    force_plan(plan)
    case = make_attention_case(N=20, M=20, D=16, P=9, gate="P")
    report = measure(case, find_dtype(device), "composed", device, grad=wanted)
    assert report.ok, f"\n{report}"


def test_passes_may_have_different_plans(device: str, force_plan: Callable[[str], None]) -> None:
    case = make_attention_case(N=20, M=20, D=16, P=9, gate="P").build(find_dtype(device), device)
    leaves = [x.requires_grad_() for x in case.tensors.values()]
    found = []
    for backward in ("flash", "flash, prefix alike", "flash, concatenated"):
        force_plan("flash, concatenated")
        output = fastprefix.prefix_attention(**case.tensors, backend="composed")
        force_plan(backward)
        found.append(torch.autograd.grad(output.square().sum(), leaves))
    for gradients in found[1:]:
        torch.testing.assert_close(gradients, found[0], rtol=1e-3, atol=1e-3)


SEGMENTS: dict[str, tuple[list[list[int]], list[list[int]] | None]] = {
    "packed": ([[0, 0, 0, 1, 1, 2, 2, 2, 2, 2], [7, 7, 7, 7, 7, 7, 7, 7, 3, -1]], None),
    "one row for all": ([[5, 5, 5, 4, 4, 4, 4, 4, 4, 6]], None),
    "cross": ([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]], [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]]),
}


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("packed", None),
        ("one row for all", "flash, prefix alike"),
        ("cross", "cudnn, concatenated"),
        *(
            pytest.param(name, plan, marks=pytest.mark.slow)
            for name, plan in [
                ("packed", "flash, prefix alike"),
                ("packed", "cudnn, concatenated"),
                ("one row for all", None),
                ("one row for all", "cudnn, concatenated"),
                ("cross", None),
                ("cross", "flash, prefix alike"),
            ]
        ),
    ],
)
def test_parity_of_segments(device: str, name: str, plan: str | None, force_plan: Callable[[str], None]) -> None:
    force_plan(plan)
    of_queries, of_keys = (None if x is None else torch.tensor(x, device=device) for x in SEGMENTS[name])
    of_keys, causal = (of_queries, True) if of_keys is None else (of_keys, False)
    lengths = {"N": of_queries.shape[1], "M": of_keys.shape[1], "Hq": 4, "P": 17, "D": 16, "gate": "hP"}
    options = {"segment_ids": (of_queries, of_keys), "is_causal": causal}
    report = measure(make_attention_case(**lengths, **options), find_dtype(device), "composed", device)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize(
    ("of_queries", "of_keys", "is_causal", "match"),
    [
        ([0, 0, 1, 1], [0, 1, 1, 2], False, "same order"),
        ([0, 1, 1, 0], [0, 1, 1, 0], False, "one piece"),
        ([0, 0, 1, 1], [0, 1, 1, 1], True, "as many queries as keys"),
    ],
)
def test_segments_that_are_not_sequences(
    device: str, of_queries: list[int], of_keys: list[int], is_causal: bool, match: str
) -> None:
    ids = tuple(torch.tensor([x, x], device=device) for x in (of_queries, of_keys))
    with pytest.raises(ValueError, match=match):
        fastprefix.prefix_attention(**make(device, N=4, M=4), segment_ids=ids, is_causal=is_causal, backend="composed")


def test_segments_are_read_once_until_they_change(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    make_packing = packed._make_packing

    def count(*arguments: Any) -> Any:
        counted.append(1)
        return make_packing(*arguments)

    monkeypatch.setattr(packed, "_make_packing", count)
    x, ids = make(device, N=4, M=4), torch.tensor([[0, 0, 1, 1]], device=device)
    call = partial(fastprefix.prefix_attention, **x, segment_ids=(ids, ids), backend="composed")
    first = call()
    assert torch.equal(first, call())
    assert len(counted) == 1
    ids[0, 1] = 1
    changed = call()
    assert len(counted) == 2
    assert not torch.equal(first, changed)
    with torch.inference_mode():
        ids = torch.tensor([[0, 0, 1, 1]], device=device)
        call = partial(call, segment_ids=(ids, ids))
        assert torch.equal(call(), first)
        ids[0, 1] = 1
        torch.testing.assert_close(call(), changed)


@pytest.mark.parametrize("wanted", [("prefix_key",), ("query",), ("value", "prefix_gate"), ("prefix_key_bias",)])
def test_only_the_gradients_asked_for(device: str, wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    differentiate = kernels.differentiate

    def record(*arguments: Any) -> tuple[Tensor, ...]:
        called.append("tokens")
        return differentiate(*arguments)

    monkeypatch.setattr(kernels, "differentiate", record)
    case = make_attention_case(N=20, M=20, D=16, gate="P", key_bias="P")
    report = measure(case, find_dtype(device), "composed", device, draws=1, grad=wanted)
    assert report.ok, f"\n{report}"
    assert bool(called) == bool({"query", "value"}.intersection(wanted))


@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
def test_operators_keep_pytorch_rules(device: str, layout: str) -> None:
    x = {name: value.requires_grad_() for name, value in make(device, N=5, M=5, gate="P", layout=layout).items()}
    arguments = tuple(canonical_arguments(**x, is_causal=True))
    torch.library.opcheck(torch.ops.fastprefix.prefix_attention.composed, arguments)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"output_gate": "BH"}, "not support `output_gate`"),
        ({"mask": "padding"}, "not support `attn_mask`"),
        ({"sinks": True}, "not support `sinks`"),
        ({"dropout_p": 0.1}, "not support `dropout_p`"),
        ({"window_size": 3}, "not support `window_size`"),
        ({"softcap": 3.0}, "not support `softcap`"),
        ({"D": 12}, "multiples of 8, not 12"),
        ({"Dv": 8}, "Dv = 8"),
        ({"M": 0}, "one row, one query and one key"),
        ({"M": 21, "is_causal": True}, "not 20 and 21"),
        ({"D": 264}, "head dimensions up to 256"),
        ({"scale": 0.0}, "scales above 0"),
        ({"scale": -0.3}, "scales above 0"),
    ],
)
def test_says_what_it_does_not_take(device: str, change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        fastprefix.prefix_attention(**make(device, **change), backend="composed")


def test_says_which_dtypes_it_takes(device: str) -> None:
    x = make(device)
    other = torch.float16 if device == "cpu" else torch.float32
    with pytest.raises(ValueError, match=f"not {other}"):
        fastprefix.prefix_attention(**{name: value.to(other) for name, value in x.items()}, backend="composed")


@pytest.mark.parametrize("kernel", [flash, cudnn])
@pytest.mark.parametrize("is_causal", [False, True])
def test_calls_of_kernels_on_cuda(is_causal: bool, kernel: Any) -> None:
    """Check the calls against PyTorch's own schemas and shapes, for tensors that a GPU would hold."""
    with FakeTensorMode():
        q, do = (torch.empty(2, 33, 8, 64, dtype=torch.bfloat16, device="cuda").transpose(1, 2) for _ in range(2))
        k, v = (torch.empty(2, 2, 33, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        problem = Problem(q, k, v, is_causal, 0.1)
        output, logsumexp = kernel.attend(problem)
        assert output.shape == q.shape
        assert (logsumexp.shape, logsumexp.dtype) == ((2, 8, 33), torch.float32)
        gradients = kernel.differentiate(problem, Known(do, output, logsumexp))
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]


def test_the_longest_sequences_are_found() -> None:
    a = canonical_arguments(**make("cpu", N=33, M=40))
    of_queries, of_keys = (torch.tensor([[0] * n + [1] * (m - n), [2] * m]) for n, m in ((10, 33), (20, 40)))
    packing = packed._make_packing(a, of_queries, of_keys)
    assert packing.starts == ((0, 0), (10, 20), (33, 40), (66, 80))
    assert packed.list_lengths(packing)[2:] == (33, 40)


def test_calls_with_segments_on_cuda() -> None:
    with FakeTensorMode():
        q, do = (torch.empty(2, 8, 33, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        k, v = (torch.empty(2, 2, 40, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        begins = (torch.empty(4, dtype=torch.int32, device="cuda") for _ in range(2))
        packing = Packing(*begins, ((0, 0), (10, 20), (33, 40), (66, 80)), (33, 40))
        problem = Problem(q, k, v, False, 0.1, packing)
        output, logsumexp = packed.attend(problem)
        assert (output.shape, logsumexp.shape) == (q.shape, (2, 8, 33))
        gradients = packed.differentiate(problem, Known(do, output, logsumexp))
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]


def test_rows_are_aligned() -> None:
    x = torch.randn(2, 3, 5, 16, dtype=torch.bfloat16)
    for fine in (x, x[:, 1:], x.transpose(1, 2), x[..., :8], x[:1, :, :1], x[:, :1].expand(-1, 3, -1, -1)):
        assert kernels._align_rows(fine) is fine
    for wrong in (x[..., 1:9], x.flatten()[1:-4].view(5, 1, 19, 5), x[..., :9].contiguous(), x.transpose(2, 3)):
        copy = kernels._align_rows(wrong)
        assert torch.equal(copy, wrong)
        assert copy.is_contiguous()
        assert copy.data_ptr() % 16 == 0


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)])
def test_cudnn_gets_its_own_layout(order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The output and its gradient have the layout of the queries, and no stride of the keys is 0."""
    sizes, inverse = (2, 8, 33, 64), [order.index(dim) for dim in range(4)]
    backward, given = torch.ops.aten._scaled_dot_product_cudnn_attention_backward, list[Tensor]()

    def record(*arguments: Any, **named: Any) -> Any:
        given.extend(arguments[:5])
        return backward(*arguments, **named)

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention_backward", record)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta"}
    q = torch.empty([sizes[dim] for dim in order], **options).permute(inverse)
    k, v = (torch.empty(2, 1, 33, 64, **options).expand(-1, 8, -1, -1) for _ in range(2))
    output, do = torch.empty(sizes, **options), torch.empty(2, 64, 8, 33, **options).permute(0, 2, 3, 1)
    known = Known(do, output, torch.empty(2, 8, 33, device="meta"))
    cudnn.differentiate(Problem(q, k, v, False, 0.1), known)
    assert given[0].stride() == given[4].stride() == q.stride()
    assert all(0 not in x.stride() for x in given)


def test_many_sequences_are_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    segments = torch.tensor([[0, 1, 2, 2]] * 2, device=device)
    x = make(device, N=4, M=4) | {"segment_ids": (segments, segments)}
    assert fastprefix.prefix_attention(**x, backend="composed").shape[2] == 4
    monkeypatch.setattr(packed, "MOST_SEQUENCES", 5)
    with pytest.raises(ValueError, match="up to 5 sequences in a call, not 6"):
        fastprefix.prefix_attention(**(x | {"segment_ids": (segments.clone(), segments)}), backend="composed")


def test_segments_are_refused_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = torch.zeros(1, 20, dtype=torch.int64)
    with FakeTensorMode():
        a = make_call(20)._replace(query_segments=segments, key_segments=segments)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert packed.can_read(a)
    with pytest.raises(ValueError, match="CUDA graph"):
        packed.find_packing(a)


def test_sequences_stay_alive_on_the_stream_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[str] = []
    tensor = SimpleNamespace(is_cuda=True, device="cuda:1", record_stream=recorded.append)
    monkeypatch.setattr(packed, "_read_packing", lambda a: Packing(tensor, tensor, ((0, 0), (1, 1)), (1, 1)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    with FakeTensorMode():
        packed.find_packing(make_call(20)._replace(query_segments=torch.zeros(1, 20, dtype=torch.int64)))
    assert recorded == ["stream of cuda:1"] * 2


def make_call(N: int, P: int = 3, D: int = 64, **options: Any) -> AttentionArguments:
    x, prefix = (torch.empty(1, 2, length, D, device="cuda", dtype=torch.bfloat16) for length in (N, P))
    return canonical_arguments(x, x, x, prefix, prefix, **options)


def test_plans_without_measurements(force_plan: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "find_cell", lambda a: None)
    with FakeTensorMode():
        short, long = make_call(20, 511), make_call(20, 512)
        biased = make_call(20, 512, prefix_bias=torch.empty(1, 1, 1, 512, device="cuda", dtype=torch.bfloat16))
        causal = make_call(20, is_causal=True)
        key = torch.empty(1, 2, 1, 64, device="cuda", dtype=torch.bfloat16)
    own, alike = plans.Plan("flash", "own"), plans.Plan("flash", "alike")
    assert [read_plan(a) for a in (short, long, biased)] == [(own, own), (alike, alike), (own, own)]
    force_plan("cudnn, concatenated")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    wanted = ["concatenated", "concatenated", "own", "own"]
    assert [plans.choose_plan(a, "forward") for a in (short, long, biased, causal)] == [
        plans.Plan("cudnn", prefix) for prefix in wanted
    ]
    one = [a._replace(key=key, value=key) for a in (short, causal)]
    assert [plans.choose_plan(a, "forward") for a in one] == [plans.Plan("cudnn", "concatenated"), own]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert plans.choose_plan(short, "backward") == plans.Plan("flash", "concatenated")
    with pytest.raises(ValueError, match="`name`"):
        plans.force("fastest")


def test_the_default_follows_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"architecture": "sm_90", "kind": "plain", "is_causal": True, "D": 64, "P": 16, "N": 100}
    row |= {"forward": "cudnn", "backward": "flash, prefix alike", "inference": False, "training": True}
    longer = row | {"N": 1000, "forward": "flash", "inference": True}
    monkeypatch.setattr(plans, "find_architecture", lambda device: "sm_90")
    monkeypatch.setattr(plans, "is_cudnn_usable", lambda: True)

    def set_choices(*rows: dict[str, Any]) -> None:
        plans._find_cell.cache_clear()
        monkeypatch.setattr(plans, "read_choices", lambda: plans.parse_choices([*rows]))

    with FakeTensorMode():
        causal, shorter, full = make_call(100, is_causal=True), make_call(99, is_causal=True), make_call(100)
        narrow, wide = make_call(100, D=40, is_causal=True), make_call(100, D=72, is_causal=True)
        far = make_call(2000, is_causal=True)
        training = causal._replace(query=torch.empty_like(causal.query, requires_grad=True))
        segments = torch.empty(1, 2000, dtype=torch.int64, device="cuda")
        of_segments = far._replace(query_segments=segments, key_segments=segments)
    assert [composed_backend.refusal(a) for a in (causal, shorter, full)] == [None] * 3
    is_preferred = composed_backend.is_preferred
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    set_choices()
    assert not is_preferred(training)
    set_choices(row, longer)
    calls = (causal, training, shorter, full, narrow, wide, far, of_segments)
    assert [is_preferred(a) for a in calls] == [False, True, False, False, False, False, True, False]
    with torch.no_grad():
        assert not is_preferred(training)
    monkeypatch.setattr(plans, "is_cudnn_usable", lambda: False)
    assert [is_preferred(a) for a in (training, far)] == [False, True]
    assert read_plan(causal)[0] == plans.Plan("flash", "own")
    monkeypatch.setattr(plans, "is_cudnn_usable", lambda: True)
    found = [read_plan(a) for a in (causal, narrow, far)]
    first, second = (plans.Plan("cudnn", "own"), plans.Plan("flash", "alike")), plans.Plan("flash", "own")
    assert found == [first, first, (second, first[1])]
    set_choices(row | {"kind": "segments"})
    assert not is_preferred(of_segments)  # a fake has no values
    monkeypatch.setattr(packed, "can_read", lambda a: True)
    assert not is_preferred(of_segments)
    assert is_preferred(of_segments._replace(query=torch.empty_like(far.query, requires_grad=True)))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not is_preferred(training)
    plans._find_cell.cache_clear()


class Attention(nn.Module):
    def forward(self, *tensors: Tensor) -> Tensor:
        return fastprefix.prefix_attention(*tensors, is_causal=True)


class Embedding(nn.Module):
    def forward(self, *tensors: Tensor) -> Tensor:
        return fastprefix.prompt_embedding(*tensors)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("N", "chosen"), [(64, "triton"), (8192, "composed")])
def test_the_default_is_chosen_in_one_graph_on_cuda(
    N: int, chosen: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trace calls with tensors that a GPU would hold, and let nothing but the operators be left."""
    for name in ("composed", "triton"):
        monkeypatch.setitem(backends.BACKENDS, name, backends.Backend(name, ("cuda",), lambda device: None))
    monkeypatch.setattr(plans, "find_architecture", once(lambda device: "sm_90"))
    monkeypatch.setattr(plans, "is_cudnn_usable", once(lambda: True))
    torch.use_deterministic_algorithms(False)  # under which "composed" is not the default
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    with FakeTensorMode(shape_env=ShapeEnv() if dynamic else None), warnings.catch_warnings():
        warnings.simplefilter("error")  # e.g. about caches that a trace ignores
        tokens = [torch.empty(2, heads, N, 128, **options) for heads in (8, 2, 2)]
        prefix = [torch.empty(2, 128, 128, **options) for _ in range(2)]
        lengths = [{2: torch.export.Dim.AUTO} for _ in tokens] + [{} for _ in prefix]
        table, prompt = torch.empty(1000, 64, **options), torch.empty(7, 64, **options)
        ids = torch.empty(2, N, dtype=torch.int64, device="cuda")
        for module, tensors, sizes in (
            (Attention(), (*tokens, *prefix), lengths),
            (Embedding(), (ids, table, prompt), [{1: torch.export.Dim.AUTO}, {}, {}]),
        ):
            graph = torch.export.export(
                module, tensors, dynamic_shapes=(tuple(sizes),) if dynamic else None, strict=True
            )
            used = [node.target for node in graph.graph.nodes if "fastprefix" in str(node.target)]
            expected = chosen if isinstance(module, Attention) else "triton"
            assert [str(each).rpartition(".")[2] for each in used] == [expected]


@pytest.mark.parametrize(("preferred", "chosen"), [(True, "first"), (False, "second")])
def test_a_backend_is_the_default_only_where_it_is_preferred(
    preferred: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usable = {name: backends.Backend(name, None, lambda device: None) for name in ("first", "second")}
    monkeypatch.setattr(backends, "BACKENDS", usable)
    refusals = dict.fromkeys(usable, lambda arguments: None)
    preferences = {"first": lambda arguments: preferred}
    assert backends.choose(None, torch.device("cpu"), refusals, preferences=preferences) == chosen
    assert backends.choose("first", torch.device("cpu"), refusals, preferences=preferences) == "first"
