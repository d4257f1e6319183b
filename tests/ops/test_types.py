"""Test a typed project that uses the package. ``make lint`` checks its types, and this module runs it."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from typing_extensions import assert_type

import fastprefix
from fastprefix.testing import Report, assert_parity


def test_methods_keep_the_model_type(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    model = LlamaForCausalLM(config)
    assert_type(fastprefix.attach(model, fastprefix.APTConfig(4, pooling="query"), name="apt"), LlamaForCausalLM)
    assert_type(fastprefix.count_parameters(model).trainable, int)
    torch.optim.AdamW(fastprefix.parameter_groups(model, lr=1e-3))
    fastprefix.save_adapter(model, tmp_path, name="apt")
    with fastprefix.disable_adapter(model):
        model(input_ids=torch.zeros(1, 3, dtype=torch.long))
    assert_type(fastprefix.detach(model), LlamaForCausalLM)
    assert_type(fastprefix.load_adapter(model, str(tmp_path)), LlamaForCausalLM)
    assert_type(fastprefix.merge(model), LlamaForCausalLM)


def test_configurations_have_typed_options() -> None:
    assert_type(fastprefix.ADePTConfig(60, bottleneck_dim=19).dropout, float)
    assert_type(fastprefix.PrefixTuningConfig(8).num_virtual_tokens, int)


def test_operations_return_tensors() -> None:
    x, prefix = torch.randn(1, 2, 3, 8), torch.randn(2, 4, 8)
    assert_type(fastprefix.prefix_attention(x, x, x, prefix, prefix, is_causal=True, backend="eager"), Tensor)
    ids, table, prompt = torch.zeros(2, 3, dtype=torch.long), torch.randn(5, 8), torch.randn(4, 8)
    assert_type(fastprefix.prompt_embedding(ids, table, prompt), Tensor)
    assert_type(fastprefix.reference.prompt_embedding(ids, table, prompt), Tensor)
    assert_type(assert_parity(fastprefix.prefix_attention, (x, x, x, prefix, prefix)), Report)
