"""Test prompts that are computed from other parameters: formulas, initialization, parameter counts, budgets."""

import pytest
import torch
from torch import nn

import fastprefix
from fastprefix.methods import ACCEPT, ULPT, ComputedPrompt, DePT, MultitaskPrompt, PTuning
from fastprefix.methods.shapes import EmbeddingShape

from .test_methods import TABLE, WithEmbeddings, count, table


def test_ulpt_is_its_formula() -> None:
    torch.manual_seed(0)
    method = ULPT(fastprefix.ULPTConfig(7, rank=5, seed=3), TABLE)
    for parameter in method.parameters():
        nn.init.normal_(parameter)
    z, r, s, b = method.low_dimensional, method.projection, method.scale, method.shift
    rows = [torch.stack([s[k] * sum(z[i, j] * r[j, k] for j in range(5)) + b[k] for k in range(96)]) for i in range(7)]
    torch.testing.assert_close(method.prompt, torch.stack(rows))


def test_ulpt_initialization() -> None:
    torch.manual_seed(0)
    method = ULPT(fastprefix.ULPTConfig(400, rank=8), TABLE)
    method.reset_parameters(table(), None)
    z, n = method.low_dimensional, 400 * 8
    assert abs(z.std() - 1.0) < 5 / (2 * n) ** 0.5
    assert bool((method.scale == 1.0).all())
    assert not method.shift.any()
    bound = (6 / (8 + 96)) ** 0.5
    assert 0.98 * bound < method.projection.abs().max() <= bound
    assert abs(method.projection.mean()) < 5 * bound / (3 * 8 * 96) ** 0.5
    assert count(method) == 400 * 8 + 2 * 96


def test_ulpts_projection_follows_from_the_seed_and_is_frozen() -> None:
    first, again, other = (ULPT(fastprefix.ULPTConfig(3, rank=4, seed=seed), TABLE) for seed in (5, 5, 6))
    torch.manual_seed(1)
    first.reset_parameters(table(), None)
    assert torch.equal(first.projection, again.projection)
    assert not torch.equal(first.projection, other.projection)
    assert not first.projection.requires_grad
    assert "projection" not in first.state_dict()
    first.prompt.sum().backward()
    assert {name for name, p in first.named_parameters() if p.grad is not None} == {
        *("low_dimensional", "scale", "shift")
    }


def test_ulpts_projection_survives_conversions() -> None:
    method = ULPT(fastprefix.ULPTConfig(3, rank=4, seed=5), TABLE)
    expected = method.projection.clone()
    assert torch.equal(method.bfloat16().projection, expected.bfloat16())
    assert torch.equal(method.float().projection, expected)
    assert torch.equal(method.to("meta").to_empty(device="cpu").projection, expected)
    assert torch.equal(method.double().projection, expected.double())
    former = method.projection
    assert method.to("cpu").projection is former


@pytest.mark.parametrize(("length", "trainable", "rank"), [(100, 2 * 768 + 200, 2), (100, 7_936, 64), (20, 2_000, 23)])
def test_ulpt_budget(length: int, trainable: int, rank: int) -> None:
    config = fastprefix.ULPTConfig.for_budget(WithEmbeddings(768), trainable=trainable, num_virtual_tokens=length)
    assert config.rank == rank
    assert count(ULPT(config, EmbeddingShape(10, 768))) <= trainable


def codebook_of(rows: int, parts: int, codewords: int, block: int) -> int:
    return rows * parts * codewords + codewords * parts * block


def test_accept_is_its_formula() -> None:
    torch.manual_seed(0)
    config = fastprefix.ACCEPTConfig(
        5, max_length=9, prompt_block=32, prompt_codewords=4, offset_block=48, offset_codewords=3
    )
    method = ACCEPT(config, TABLE)
    for parameter in method.parameters():
        nn.init.normal_(parameter)
    for rows, codebook in ((method.prompt, method.prompt_codebook), (offset_rows(method, 9), method.offset_codebook)):
        w, c, t = codebook.weights, codebook.codewords, codebook.codewords.shape[2]
        for i, k in ((0, 0), (3, 1), (4, 96 // t - 1)):
            expected = sum(w[i, k, j] * c[k, j] for j in range(w.shape[2]))
            torch.testing.assert_close(rows[i, k * t : (k + 1) * t], expected)
    assert count(method) == codebook_of(5, 3, 4, 32) + codebook_of(9, 2, 3, 48)
    torch.testing.assert_close(method.offset(3, 5, torch.float32)["position_offset"], offset_rows(method, 9)[5:8])
    assert "offset_scale" not in method.offset(3, 5, torch.float32)
    with pytest.raises(ValueError, match=r"`input_ids` must have at most max_length = 9 tokens for ACCEPT, got 10"):
        method.offset(5, 5, torch.float32)


def offset_rows(method: ACCEPT, length: int) -> torch.Tensor:
    rows: torch.Tensor = method.offset(length, 0, torch.float32)["position_offset"]
    return rows


def test_accept_initialization() -> None:
    torch.manual_seed(0)
    options = {"max_length": 200, "prompt_block": 32, "prompt_codewords": 20, "offset_block": 48, "offset_codewords": 6}
    method = ACCEPT(fastprefix.ACCEPTConfig(60, **options), TABLE)
    method.reset_parameters(table(), None)
    bounds = {
        "prompt_codebook.weights": (3 * 20) ** -0.5,
        "prompt_codebook.codewords": (20 * 32) ** -0.5,
        "offset_codebook.weights": (2 * 6) ** -0.5,
        "offset_codebook.codewords": (6 / (6 * 48)) ** 0.5,
    }
    parameters = dict(method.named_parameters())
    assert parameters.keys() == bounds.keys()
    for name, bound in bounds.items():
        assert 0.95 * bound < parameters[name].abs().max() <= bound
        assert abs(parameters[name].mean()) < 5 * bound / (3 * parameters[name].numel()) ** 0.5
    assert offset_rows(method, 200).any()
    zero = ACCEPT(fastprefix.ACCEPTConfig(60, offset_init="zero", **options), TABLE)
    zero.reset_parameters(table(), None)
    assert not offset_rows(zero, 200).any()
    assert zero.offset_codebook.weights.any()


def test_accept_without_codebooks_is_dept() -> None:
    options = {"rank": 4, "max_length": 64, "init": "vocab"}
    method = ACCEPT(fastprefix.ACCEPTConfig(20, codebook_prompt=False, codebook_offset=False, **options), TABLE)
    dept = DePT(fastprefix.DePTConfig(20, **options), TABLE)
    weight, ids = table(), torch.randint(0, TABLE.vocabulary, (2, 9))
    for each in (method, dept):
        torch.manual_seed(0)
        each.reset_parameters(weight, None)
        nn.init.normal_(each.b, generator=torch.Generator().manual_seed(1))
    assert [p.shape for p in method.parameters()] == [p.shape for p in dept.parameters()]
    assert torch.equal(method.embed(ids, weight, 3, with_prompt=True), dept.embed(ids, weight, 3, with_prompt=True))


@pytest.mark.parametrize(
    ("width", "length", "options", "name", "found"),
    [
        (768, 60, {}, "offset_codewords", 4),
        (512, 40, {"prompt_codewords": 17, "offset_block": 256}, "offset_codewords", 30),
        (768, 60, {"codebook_prompt": False, "codebook_offset": False}, "rank", 30),
    ],
)
def test_accept_budget_of_100_prompt_tokens(width: int, length: int, options: dict, name: str, found: int) -> None:
    """The published settings of ACCEPT, and DePT's."""
    config = fastprefix.ACCEPTConfig.for_budget(
        WithEmbeddings(width), trainable=100 * width, num_virtual_tokens=length, **options
    )
    assert getattr(config, name) == found
    assert count(ACCEPT(config, EmbeddingShape(10, width))) <= 100 * width


def test_blocks_that_do_not_divide_the_width_are_refused() -> None:
    for name in ("prompt_block", "offset_block"):
        with pytest.raises(ValueError, match=rf"`{name}` must be a divisor of the model's width, 96, got 36"):
            ACCEPT(fastprefix.ACCEPTConfig(5, **{name: 36}), TABLE)
    with pytest.raises(ValueError, match="offset"):
        ACCEPT(fastprefix.ACCEPTConfig(5), TABLE).baked()


def multitask(tasks: int = 3, **options: object) -> MultitaskPrompt:
    torch.manual_seed(0)
    method = MultitaskPrompt(fastprefix.MultitaskPromptConfig(40, num_tasks=tasks, rank=2, **options), TABLE)
    method.reset_parameters(table(), None)
    return method


def test_multitask_prompts_are_their_formula() -> None:
    method = multitask()
    weight, ids = table(), torch.randint(0, TABLE.vocabulary, (4, 9))
    for parameter in method.parameters():
        nn.init.normal_(parameter)
    method.task_ids = torch.tensor([2, 0, 2, 1])
    expected = [method.shared * (method.columns[k] @ method.rows[k]) for k in (2, 0, 2, 1)]
    output = method.embed(ids, weight, 0, with_prompt=True)
    torch.testing.assert_close(output[:, :40], torch.stack(expected))
    assert torch.equal(output[:, 40:], weight[ids])
    assert torch.equal(method.embed(ids, weight, 3, with_prompt=False), weight[ids])
    assert count(method) == 40 * 96 + 3 * 2 * (40 + 96)


def test_multitask_initialization() -> None:
    method, weight = multitask(), table()
    assert abs(method.shared.std() - weight.std()) < 0.02
    for factor in (method.columns, method.rows):
        assert abs(factor.std() - 0.02) < 5 * 0.02 / (2 * factor.numel()) ** 0.5


def test_a_multitask_prompt_starts_from_other_tasks() -> None:
    source = [torch.randn(40, 96), torch.randn(5, 40, 2), torch.randn(5, 2, 96)]
    for how, picked in (("average", lambda t: t.mean(0)), ("task", lambda t: t[4])):
        method = multitask(source="x", source_init=how, source_task=4)
        method.start_from(*source)
        assert torch.equal(method.shared, source[0])
        for own, given in ((method.columns, source[1]), (method.rows, source[2])):
            assert torch.equal(own, picked(given).expand_as(own))
    method, untouched = (multitask(source="x", source_init="shared") for _ in range(2))
    method.start_from(*source)
    assert torch.equal(method.shared, source[0])
    assert torch.equal(method.columns, untouched.columns)
    with pytest.raises(ValueError, match="`source` must have"):
        method.start_from(source[0], source[1][:, :, :1], source[2])
    with pytest.raises(ValueError, match="`source_task` must be below the 5 tasks"):
        multitask(source="x", source_init="task", source_task=5).start_from(*source)


@pytest.mark.parametrize(
    ("ids", "error", "says"),
    [
        (None, ValueError, "`task_ids` must be given"),
        ([0, 1], TypeError, "`task_ids` must be an int64"),
        (torch.tensor([0.0, 1.0]), TypeError, "`task_ids` must be an int64"),
        (torch.tensor([0]), ValueError, r"`task_ids` must be \[2\]"),
        (torch.tensor([0, 3]), ValueError, "`task_ids` must be from 0 to 2, but has 3"),
        (torch.tensor([-1, 0]), ValueError, "but has -1"),
    ],
)
def test_bad_tasks_are_refused(ids: object, error: type[Exception], says: str) -> None:
    method = multitask()
    method.task_ids = ids  # type: ignore[assignment]
    with pytest.raises(error, match=says):
        method.find_tasks(2)
    with pytest.raises(ValueError, match="`num_tasks` must be 1"):
        method.baked()


def test_multitask_budget() -> None:
    config = fastprefix.MultitaskPromptConfig.for_budget(
        WithEmbeddings(768), trainable=100 * 768 + 5 * 2 * 868 + 100, num_virtual_tokens=100, num_tasks=5
    )
    assert config.rank == 2


@pytest.mark.parametrize("h", [None, 12])
def test_p_tuning_initialization_and_parameters(h: int | None) -> None:
    torch.manual_seed(0)
    d, n = 96, h or 96
    for encoder in ("mlp", "lstm"):
        method = PTuning(fastprefix.PTuningConfig(400, encoder=encoder, encoder_hidden_dim=h), TABLE)
        method.reset_parameters(table(), None)
        assert abs(method.embedding.std() - 1.0) < 5 / (2 * 400 * d) ** 0.5
        expected = 400 * d + 2 * d * n + n**2 + 2 * n + d
        if encoder == "lstm":
            layers = 8 * n * (d + n + 2) + 8 * n * (3 * n + 2)
            expected = 400 * d + layers + 4 * n**2 + 2 * n + 2 * n * d + d
        assert count(method) == expected
        assert method.prompt.shape == (400, d)
        for layer in method.mlp[::2]:
            bound = layer.in_features**-0.5
            assert 0.9 * bound < layer.weight.abs().max() <= bound


def test_p_tunings_hidden_width_is_the_models_by_default() -> None:
    method = PTuning(fastprefix.PTuningConfig(3, encoder="lstm", encoder_num_layers=1), TABLE)
    assert (method.lstm.hidden_size, method.lstm.num_layers) == (96, 1)
    assert [layer.out_features for layer in method.mlp[::2]] == [192, 96]


BAKED: dict[str, ComputedPrompt] = {
    "multitask": multitask(1),
    "p-tuning": PTuning(fastprefix.PTuningConfig(7, encoder_hidden_dim=5), TABLE),
    "ulpt": ULPT(fastprefix.ULPTConfig(7, rank=5), TABLE),
}


@pytest.mark.parametrize("method", BAKED.values(), ids=BAKED)
def test_a_baked_prompt_is_a_plain_one(method: ComputedPrompt) -> None:
    method.reset_parameters(table(), None)
    baked = method.baked()
    assert type(baked.config) is fastprefix.PromptTuningConfig
    assert [name for name, _ in baked.named_parameters()] == ["prompt"]
    assert torch.equal(baked.prompt, method.prompt)
    assert set(method.list_prompt_parameters()) == set(method.parameters())


@pytest.mark.parametrize(
    ("make", "error", "named"),
    [
        (lambda: fastprefix.ACCEPTConfig(5, prompt_block=0), ValueError, "prompt_block"),
        (lambda: fastprefix.ACCEPTConfig(5, prompt_codewords=0), ValueError, "prompt_codewords"),
        (lambda: fastprefix.ACCEPTConfig(5, offset_block=1.5), TypeError, "offset_block"),
        (lambda: fastprefix.ACCEPTConfig(5, offset_codewords=0), ValueError, "offset_codewords"),
        (lambda: fastprefix.ACCEPTConfig(5, offset_init="ones"), ValueError, "offset_init"),
        (lambda: fastprefix.ACCEPTConfig(5, codebook_prompt=3), ValueError, "codebook_prompt"),
        (lambda: fastprefix.ACCEPTConfig(5, init="vocab"), ValueError, "init"),
        (lambda: fastprefix.MultitaskPromptConfig(5, num_tasks=0), ValueError, "num_tasks"),
        (lambda: fastprefix.MultitaskPromptConfig(5, num_tasks=2, rank=0), ValueError, "rank"),
        (lambda: fastprefix.MultitaskPromptConfig(5, num_tasks=2, source_init="best"), ValueError, "source_init"),
        (lambda: fastprefix.MultitaskPromptConfig(5, num_tasks=2, source_task=-1), ValueError, "source_task"),
        (lambda: fastprefix.MultitaskPromptConfig(5, num_tasks=2, source_task=1), ValueError, "without"),
        (lambda: fastprefix.MultitaskPromptConfig(5, num_tasks=2, source="x", init="vocab"), ValueError, "init"),
        (lambda: fastprefix.PTuningConfig(5, encoder="gru"), ValueError, "encoder"),
        (lambda: fastprefix.PTuningConfig(5, encoder_hidden_dim=0), ValueError, "encoder_hidden_dim"),
        (lambda: fastprefix.PTuningConfig(5, encoder_num_layers=0), ValueError, "encoder_num_layers"),
        (lambda: fastprefix.ULPTConfig(5, rank=0), ValueError, "rank"),
        (lambda: fastprefix.ULPTConfig(5, seed=-1), ValueError, "seed"),
        (lambda: fastprefix.ULPTConfig(5, shared_prompt="yes"), ValueError, "shared_prompt"),
        (lambda: fastprefix.ULPTConfig(5, init="text"), TypeError, "init"),
    ],
)
def test_bad_options_are_named(make: object, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=rf"\b{named}\b"):
        make()
