"""Test the methods without a model: options, initialization, parameter counts, gates."""

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fastprefix
from fastprefix.methods import (
    APT,
    METHODS,
    ADePT,
    DePT,
    LlamaAdapter,
    MethodConfig,
    PrefixTuning,
    PromptTuning,
    ResidualPrefix,
)
from fastprefix.methods.shapes import AttentionShape, EmbeddingShape
from tests import models

TABLE = EmbeddingShape(vocabulary=500, width=96)
LAYER = AttentionShape(heads=6, kv_heads=6, key_size=16, value_size=16, width=96, causal=False)
DECODER_LAYER = dataclasses.replace(LAYER, causal=True)
SHAPES = (LAYER, LAYER, LAYER)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def table() -> torch.Tensor:
    return 0.3 * torch.randn(TABLE.vocabulary, TABLE.width)


def test_random_prompt_has_the_tables_deviation() -> None:
    torch.manual_seed(0)
    method, weight = PromptTuning(fastprefix.PromptTuningConfig(400), TABLE), table()
    method.reset_parameters(weight, None)
    n = method.prompt.numel()
    assert abs(method.prompt.std() - weight.std()) < 5 * weight.std() / (2 * n) ** 0.5
    assert abs(method.prompt.mean()) < 5 * weight.std() / n**0.5


def test_vocab_prompt_draws_different_rows_from_the_first() -> None:
    method = PromptTuning(fastprefix.PromptTuningConfig(40, init="vocab", init_vocab_size=50), TABLE)
    weight = torch.arange(TABLE.vocabulary).float()[:, None].expand(-1, TABLE.width)
    method.reset_parameters(weight, None)
    rows = method.prompt[:, 0].tolist()
    assert len(set(rows)) == 40
    assert max(rows) < 50


def test_vocab_prompt_longer_than_the_vocabulary_is_refused() -> None:
    method = PromptTuning(fastprefix.PromptTuningConfig(51, init="vocab", init_vocab_size=50), TABLE)
    with pytest.raises(ValueError, match="vocab"):
        method.reset_parameters(table(), None)


def test_text_prompt_is_the_rows_of_the_text() -> None:
    method = PromptTuning(fastprefix.PromptTuningConfig(5, init="text", init_text="a b"), TABLE)
    ids, weight = torch.tensor([3, 7, 3, 7, 3]), table()
    method.reset_parameters(weight, ids)
    assert torch.equal(method.prompt, weight[ids])


def test_dept_starts_with_no_offset() -> None:
    torch.manual_seed(0)
    method = DePT(fastprefix.DePTConfig(20, rank=4, max_length=64), TABLE)
    method.reset_parameters(table(), None)
    assert method.a.abs().max() <= 0.5  # 1/sqrt(4)
    assert method.a.abs().max() > 0.45
    assert not method.b.any()
    assert method.offset(10, 0, torch.float32)["offset_scale"] == 4.0  # 8/sqrt(4)


def test_dept_input_longer_than_its_positions_names_both() -> None:
    method = DePT(fastprefix.DePTConfig(20, rank=4, max_length=64), TABLE)
    with pytest.raises(ValueError, match=r"64.*65"):
        method.offset(60, 5, torch.float32)


def test_dept_offset_follows_the_position() -> None:
    method = DePT(fastprefix.DePTConfig(2, rank=4, max_length=64), TABLE)
    method.reset_parameters(table(), None)
    assert torch.equal(method.offset(3, 5, torch.float32)["low_rank"][0], method.a[5:8])


def test_adept_first_step() -> None:
    """The offset is exactly zero, and only w2, b2 and the prompt have a gradient."""
    torch.manual_seed(0)
    method = ADePT(fastprefix.ADePTConfig(6, bottleneck_dim=4), TABLE)
    weight, ids = table(), torch.randint(0, TABLE.vocabulary, (2, 9))
    method.reset_parameters(weight, None)
    output = method.embed(ids, weight, 0, with_prompt=True)
    assert torch.equal(output[:, 6:], weight[ids])
    (output * torch.randn_like(output)).sum().backward()
    moved = {name for name, p in method.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"prompt", "w2", "b2"}
    assert 0.45 < method.w1.abs().max() <= 0.5  # U(-1/sqrt(4), 1/sqrt(4))


def test_adept_drops_only_while_training() -> None:
    method = ADePT(fastprefix.ADePTConfig(6, bottleneck_dim=4, dropout=0.1), TABLE)
    assert method.train().offset(3, 0, torch.float32)["dropout_p"] == 0.1
    assert method.eval().offset(3, 0, torch.float32)["dropout_p"] == 0.0


class WithEmbeddings(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, width)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding


@pytest.mark.parametrize("width", [768, 1024, 4096])
@pytest.mark.parametrize(("length", "r"), [(20, 39), (40, 29), (60, 19), (80, 9)])
def test_adept_budget_of_100_prompt_tokens(width: int, length: int, r: int) -> None:
    model = WithEmbeddings(width)
    config = fastprefix.ADePTConfig.for_budget(model, trainable=100 * width, num_virtual_tokens=length)
    assert config.bottleneck_dim == r
    assert count(ADePT(config, EmbeddingShape(10, width))) <= 100 * width


@pytest.mark.parametrize(("length", "rank"), [(20, 60), (40, 45), (60, 30), (80, 15)])
def test_dept_budget_of_100_prompt_tokens(length: int, rank: int) -> None:
    model = WithEmbeddings(768)
    config = fastprefix.DePTConfig.for_budget(model, trainable=76_800, num_virtual_tokens=length, max_length=256)
    assert config.rank == rank


def test_the_defaults_of_60_tokens_are_the_published_settings() -> None:
    shape = EmbeddingShape(10, 768)
    assert count(ADePT(fastprefix.ADePTConfig(60), shape)) == 76_051
    assert count(DePT(fastprefix.DePTConfig(60), shape)) == 60 * 768 + 30 * (256 + 768)


def test_budget_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="trainable"):
        fastprefix.ADePTConfig.for_budget(WithEmbeddings(768), trainable=768 * 20, num_virtual_tokens=20)


def test_prefix_initialization() -> None:
    torch.manual_seed(0)
    method = PrefixTuning(fastprefix.PrefixTuningConfig(50), SHAPES)
    method.reset_parameters(None)
    values = torch.cat([t.flatten() for pair in method.prefixes() for t in pair])
    assert abs(values.std() - 0.02) < 5 * 0.02 / (2 * values.numel()) ** 0.5
    method = PrefixTuning(fastprefix.PrefixTuningConfig(50, init="zero"), SHAPES)
    method.reset_parameters(None)
    assert not any(t.any() for pair in method.prefixes() for t in pair)


def test_prefix_shapes_are_of_the_key_value_heads() -> None:
    shape = AttentionShape(heads=8, kv_heads=2, key_size=12, value_size=20, width=96, causal=True)
    for reparameterization in (None, "mlp"):
        config = fastprefix.PrefixTuningConfig(7, reparameterization=reparameterization)
        method = PrefixTuning(config, [shape, shape])
        method.reset_parameters(None)
        prefixes = method.prefixes()
        assert [(k.shape, v.shape) for k, v in prefixes] == [((2, 7, 12), (2, 7, 20))] * 2


def test_mlp_reparameterization_is_its_formula() -> None:
    method = PrefixTuning(fastprefix.PrefixTuningConfig(7, reparameterization="mlp", hidden_dim=24), SHAPES)
    method.reset_parameters(None)
    p = method.prefix
    flat = p.project_out(torch.tanh(p.project_in(p.embedding)))  # [m, 2 L Hkv D]
    assert flat.shape == (7, 2 * 3 * 96)
    for layer, (pk, pv) in enumerate(method.prefixes()):
        k, v = flat[:, 2 * layer * 96 : (2 * layer + 2) * 96].split(96, dim=1)
        assert torch.equal(pk.transpose(0, 1).reshape(7, 96), k)
        assert torch.equal(pv.transpose(0, 1).reshape(7, 96), v)


def test_a_prefix_with_a_softmax_of_its_own_starts_with_closed_gates() -> None:
    shapes = [dataclasses.replace(LAYER, kv_heads=2)] * 3
    plain = PrefixTuning(fastprefix.PrefixTuningConfig(10), shapes)
    method = PrefixTuning(fastprefix.PrefixTuningConfig(10, softmax="own"), shapes)
    nn.init.ones_(method.output_gates[1])
    method.reset_parameters(None)
    assert count(method) == count(plain) + 3 * LAYER.heads
    assert all(not method.output_gate(layer).any() for layer in range(3))
    assert plain.output_gate(0) is None
    nn.init.normal_(method.output_gates[1])
    assert torch.equal(method.output_gate(1), torch.tanh(method.output_gates[1]))


def test_a_baked_prefix_keeps_the_gates_of_its_own_softmax() -> None:
    config = fastprefix.PrefixTuningConfig(7, reparameterization="mlp", hidden_dim=8, softmax="own")
    method = PrefixTuning(config, SHAPES)
    method.reset_parameters(None)
    for gate in method.output_gates:
        nn.init.normal_(gate)
    baked = method.baked()
    assert (baked.config.softmax, baked.config.reparameterization) == ("own", None)
    assert torch.equal(baked.output_gate(2), method.output_gate(2))
    assert torch.equal(baked.prefixes()[2][1], method.prefixes()[2][1])


def test_apt_has_half_as_many_parameters_again() -> None:
    plain = PrefixTuning(fastprefix.PrefixTuningConfig(10), SHAPES)
    assert count(APT(fastprefix.APTConfig(10), SHAPES)) == 1.5 * count(plain) + len(SHAPES)


@pytest.mark.parametrize("pooling", ["cls", "mean", "query"])
def test_apt_gates_start_at_one_half(pooling: str) -> None:
    method = APT(fastprefix.APTConfig(10, pooling=pooling), SHAPES)
    method.reset_parameters(None)
    gate = method.prefix_gate(1, torch.randn(2, 5, 96), None)
    assert gate is not None
    assert gate.shape == ((2, 1, 5, 10) if pooling == "query" else (2, 1, 10))
    assert torch.equal(gate, torch.full_like(gate, 0.5))


def test_apt_gate_is_its_formula() -> None:
    torch.manual_seed(0)
    h = torch.randn(2, 5, 96)
    attended = torch.tensor([[False, True, True, True, False], [True, True, False, False, False]])
    pooled = {
        "cls": torch.stack([h[0, 1], h[1, 0]]),
        "mean": torch.stack([h[0, 1:4].mean(0), h[1, :2].mean(0)]),
        "query": h,
    }
    for pooling, hidden in pooled.items():
        method = APT(fastprefix.APTConfig(10, pooling=pooling), SHAPES)
        for parameter in method.parameters():
            nn.init.normal_(parameter)
        gate = method.prefix_gate(2, h, attended)
        expected = method.layer_gates[2] * torch.sigmoid(hidden @ method.gate_projections[2])
        torch.testing.assert_close(gate, expected.unsqueeze(1))


def test_apt_gates_can_be_switched_off() -> None:
    h = torch.randn(2, 5, 96)
    none = APT(fastprefix.APTConfig(10, token_gate=False, layer_gate=False), SHAPES)
    assert none.prefix_gate(0, None, None) is None
    assert not none.needs_hidden()
    layer = APT(fastprefix.APTConfig(10, token_gate=False), SHAPES)
    layer.reset_parameters(None)
    gate = layer.prefix_gate(0, None, None)
    assert gate is not None
    assert gate.shape == (1,)
    token = APT(fastprefix.APTConfig(10, layer_gate=False), SHAPES)
    token.reset_parameters(None)
    assert token.prefix_gate(0, h, None).shape == (2, 1, 10)


def test_apt_pooling_by_default_and_refused() -> None:
    assert APT(fastprefix.APTConfig(10), [LAYER]).poolings == ["cls"]
    assert APT(fastprefix.APTConfig(10), [DECODER_LAYER]).poolings == ["query"]
    with pytest.raises(ValueError, match="mean"):
        APT(fastprefix.APTConfig(10, pooling="mean"), [DECODER_LAYER])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mean_of_many_tokens_is_a_mean(dtype: torch.dtype) -> None:
    """The sum of the tokens exceeds the range of float16, and their number the precision of bfloat16."""
    method = APT(fastprefix.APTConfig(3, pooling="mean"), [LAYER])
    method.reset_parameters(None)
    method.to(dtype)
    hidden = torch.full((1, 513, LAYER.width), 200.0, dtype=dtype)
    attended = torch.ones(1, 513, dtype=torch.bool)
    assert torch.equal(method._pool("mean", hidden, attended, None), hidden[:, 0])


@pytest.mark.parametrize(
    ("make", "error", "name"),
    [
        (lambda: fastprefix.ResidualPrefixConfig(3, gate="no"), ValueError, "gate"),
        (lambda: fastprefix.ResidualPrefixConfig(3, residual=1), ValueError, "residual"),
        (lambda: fastprefix.ResidualPrefixConfig(3, gate=False, per_layer_gate=True), ValueError, "per_layer_gate"),
        (lambda: fastprefix.APTConfig(3, token_gate="yes"), ValueError, "token_gate"),
        (lambda: fastprefix.PromptTuningConfig(3, shared_prompt=1), ValueError, "shared_prompt"),
        (lambda: fastprefix.ADePTConfig(3, dropout="0.1"), TypeError, "dropout"),
        (lambda: fastprefix.ADePTConfig(3, dropout=True), TypeError, "dropout"),
        (lambda: fastprefix.PromptTuningConfig(3, modules_to_save=[1]), TypeError, "modules_to_save"),
        (lambda: fastprefix.ADePTConfig.for_budget(models.encoder(), trainable=1e4, num_virtual_tokens=3), TypeError,
         "trainable"),
    ],
)  # fmt: skip
def test_options_of_another_type_are_refused(make: Any, error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"^`{name}` must be"):
        make()


def test_llama_adapter_starts_with_closed_gates() -> None:
    torch.manual_seed(0)
    method = LlamaAdapter(fastprefix.LlamaAdapterConfig(200, layers=2), SHAPES[1:])
    method.reset_parameters(None)
    assert count(method) == 2 * (200 * 96 + 6)
    for layer in range(2):
        states = method.projected_states(layer)
        assert abs(states.std() - 1.0) < 0.05
        assert not method.output_gate(layer).any()
    nn.init.normal_(method.gates[1])
    assert torch.equal(method.output_gate(1), torch.tanh(method.gates[1]))


def test_llama_adapter_chooses_the_last_layers() -> None:
    assert LlamaAdapter.chosen_layers(fastprefix.LlamaAdapterConfig(5, layers=2), 2 * SHAPES) == range(4, 6)
    assert LlamaAdapter.chosen_layers(fastprefix.LlamaAdapterConfig(5), 2 * SHAPES) == range(6)
    with pytest.raises(ValueError, match=r"`layers` must be at most 6, .* got 7"):
        LlamaAdapter.chosen_layers(fastprefix.LlamaAdapterConfig(5, layers=7), 2 * SHAPES)


def test_residual_prefix_is_its_formula() -> None:
    torch.manual_seed(0)
    method = ResidualPrefix(fastprefix.ResidualPrefixConfig(7, bottleneck_dim=8), SHAPES)
    method.reset_parameters(None)
    p = method.prefix
    assert p.residual is not None
    d_to_b, _, b_to_d, norm = p.residual
    embedding = p.embedding + norm(b_to_d(torch.relu(d_to_b(p.embedding))))
    flat = p.project_out(torch.tanh(p.project_in(embedding)))
    torch.testing.assert_close(method.prefixes()[0][0].transpose(0, 1).reshape(7, 96), flat[:, :96])
    gate = method.gate_weights()
    assert gate is not None
    assert torch.equal(gate, torch.full((7,), 0.5))
    assert torch.equal(method.prefix_gate(1, None, None), gate)


def test_residual_prefix_switches() -> None:
    plain = ResidualPrefix(fastprefix.ResidualPrefixConfig(7, residual=False, gate=False), SHAPES)
    assert plain.prefix.residual is None
    assert plain.gate_weights() is None
    assert plain.prefix_gate(0, None, None) is None
    per_layer = ResidualPrefix(fastprefix.ResidualPrefixConfig(7, per_layer_gate=True), SHAPES)
    per_layer.reset_parameters(None)
    with torch.no_grad():
        per_layer.gate_logits.copy_(torch.randn(3, 7))
    assert torch.equal(per_layer.prefix_gate(2, None, None), torch.sigmoid(per_layer.gate_logits[2]))


@pytest.mark.parametrize("name", list(METHODS))
def test_configurations_survive_saving(name: str) -> None:
    parts = [fastprefix.PrefixTuningConfig(2).to_dict(), fastprefix.APTConfig(3).to_dict()]
    required = {"multitask_prompt": {"num_tasks": 2}, "cartridge": {"init_text": "a"}}
    required |= {"composition": {"parts": parts, "trainable": [True, False]}}
    config = METHODS[name][0](5, modules_to_save=["head"], **required.get(name, {}))
    restored = dataclasses.replace(config, init_text="") if name == "cartridge" else config  # texts can be private
    assert MethodConfig.from_dict(config.to_dict()) == restored
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


def test_private_texts_are_in_no_description() -> None:
    config = fastprefix.CartridgeConfig(4, init_text="the secret")
    assert dict(config.list_choices()) == {"num_virtual_tokens": 4}
    assert config.to_dict()["init_text"] == ""
    assert "secret" not in f"{config} {config.to_dict()} {PrefixTuning(config, SHAPES)}"


@pytest.mark.parametrize(
    ("make", "error", "named"),
    [
        (lambda: fastprefix.PromptTuningConfig(0), ValueError, "num_virtual_tokens"),
        (lambda: fastprefix.PromptTuningConfig(2.5), TypeError, "num_virtual_tokens"),
        (lambda: fastprefix.PromptTuningConfig(5, init="zeros"), ValueError, "init"),
        (lambda: fastprefix.PromptTuningConfig(5, init="text"), ValueError, "init_text"),
        (lambda: fastprefix.PromptTuningConfig(5, init_text="a"), ValueError, "init_text"),
        (lambda: fastprefix.PromptTuningConfig(5, init_vocab_size=0), ValueError, "init_vocab_size"),
        (lambda: fastprefix.PromptTuningConfig(5, shared_prompt="yes"), ValueError, "shared_prompt"),
        (lambda: fastprefix.DePTConfig(5, rank=0), ValueError, "rank"),
        (lambda: fastprefix.DePTConfig(5, rank=2, max_length=-1), ValueError, "max_length"),
        (lambda: fastprefix.DePTConfig(5, alpha=float("nan")), ValueError, "alpha"),
        (lambda: fastprefix.DePTConfig(5, alpha="8"), TypeError, "alpha"),
        (
            lambda: fastprefix.APTConfig(5, poolng="cls"),
            TypeError,
            r"Did you mean pooling\? Its options are .*token_gate",
        ),
        (lambda: fastprefix.ADePTConfig(5, r=2), TypeError, r"Did you mean bottleneck_dim\?"),
        (lambda: fastprefix.DePTConfig(5, r=2), TypeError, r"Did you mean rank\?"),
        (lambda: fastprefix.PrefixTuningConfig(num_tokens=5), TypeError, r"Did you mean num_virtual_tokens\?"),
        (lambda: fastprefix.APTConfig(5, modules_to_save="norm"), TypeError, "modules_to_save` must be a list"),
        (
            lambda: fastprefix.PrefixTuningConfig(5, prefix_projection=True),
            TypeError,
            r'Did you mean reparameterization="mlp"\?',
        ),
        (lambda: fastprefix.ADePTConfig(5, bottleneck_dim=0), ValueError, "bottleneck_dim"),
        (lambda: fastprefix.ADePTConfig(5, bottleneck_dim=2, dropout=1.5), ValueError, "dropout"),
        (lambda: fastprefix.PrefixTuningConfig(5, reparameterization="lstm"), ValueError, "reparameterization"),
        (lambda: fastprefix.PrefixTuningConfig(5, reparameterization="mlp", init="zero"), ValueError, "init"),
        (lambda: fastprefix.PrefixTuningConfig(5, hidden_dim=0), ValueError, "hidden_dim"),
        (lambda: fastprefix.PrefixTuningConfig(5, prefix_position="up"), ValueError, "prefix_position"),
        (lambda: fastprefix.PrefixTuningConfig(5, softmax="two"), ValueError, "softmax"),
        (lambda: fastprefix.APTConfig(5, pooling="max"), ValueError, "pooling"),
        (lambda: fastprefix.ResidualPrefixConfig(5, reparameterization=None), ValueError, "reparameterization"),
        (lambda: fastprefix.LlamaAdapterConfig(5, layers=0), ValueError, "layers"),
        (lambda: MethodConfig.from_dict({"method": "lora"}), ValueError, "method"),
        (lambda: MethodConfig.from_dict({"method": "apt", "num_virtual_tokens": 5, "r": 1}), ValueError, "r"),
    ],
)
def test_bad_options_are_named(make: object, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=rf"\b{named}(?!\w)"):
        make()


def test_what_is_printed_of_a_method() -> None:
    model = fastprefix.attach(models.decoder(), fastprefix.ADePTConfig(6, bottleneck_dim=3))
    count = fastprefix.count_parameters(model).trainable
    assert f"ADePT(num_virtual_tokens=6, bottleneck_dim=3, {count:,} parameters)" in str(model)
