"""Build tiny random models of two families, in float64 and without dropout."""

import importlib.metadata
import re
from typing import Any, TypeVar

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as kinds
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

ModelT = TypeVar("ModelT", bound=PreTrainedModel)

VERSIONS = {
    name: tuple(map(int, re.findall(r"\d+", importlib.metadata.version(name))[:2])) for name in ("peft", "transformers")
}
VOCABULARY, WIDTH, LAYERS, HEADS, KV_HEADS = 100, 32, 2, 4, 2
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.2,
}
"""The sizes of a decoder with grouped heads, as a configuration takes them."""


def require(name: str, *least: int) -> None:
    """Skip a test that fails with a version of ``transformers`` or PEFT for reasons outside this package."""
    if VERSIONS[name] < least:
        pytest.skip(f"{name} before {'.'.join(map(str, least))} cannot do this by itself")


def encoder(layers: int = LAYERS, **options: object) -> BertForSequenceClassification:
    """Return a BERT-shaped classifier."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        intermediate_size=64,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
        **options,
    )
    return BertForSequenceClassification(config).double().eval()


def replace_norms(model: ModelT) -> ModelT:
    """Replace Llama's norms, which always compute in float32, by PyTorch's with weights of 1."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LlamaRMSNorm | MistralRMSNorm):
            norm = nn.RMSNorm(WIDTH, module.variance_epsilon)
            model.set_submodule(name, norm.to(module.weight))
    return model


def decoder(layers: int = LAYERS, **options: object) -> LlamaForCausalLM:
    """Return a Llama-shaped language model with grouped heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{**SIZES, "num_hidden_layers": layers, **options},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = replace_norms(LlamaForCausalLM(config)).double().eval()
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    return model


def tokenizer(**options: object) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words "w0" to "w99", whose ids are their numbers."""
    words = Tokenizer(kinds.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w2", model_input_names=names, **options
    )


def batch(padding: str = "none") -> dict[str, Tensor]:
    """Return three rows of seven tokens. The second has two and the third four tokens of padding on the given side."""
    torch.manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (3, 7))
    mask = torch.ones_like(ids)
    if padding == "right":
        mask[1, 5:] = mask[2, 3:] = 0
    elif padding == "left":
        mask[1, :2] = mask[2, :4] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def randomize(model: PreTrainedModel, std: float = 0.3) -> None:
    """Set random values for all trainable parameters, because an initial zero would hide errors."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


class InjectedError(BaseException):
    """An error that no code expects, such as an interruption."""


def fail_once(patch: pytest.MonkeyPatch, owner: object, name: str, number: int = 1) -> None:
    """Make the call of a function with this number raise an error. All other calls run the function."""
    function, calls = getattr(owner, name), []

    def run(*args: object, **kwargs: object) -> object:
        calls.append(name)
        if len(calls) == number:
            raise InjectedError(name)
        return function(*args, **kwargs)

    patch.setattr(owner, name, run)
