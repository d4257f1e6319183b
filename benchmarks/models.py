"""The frozen models: built from a configuration with random weights, or loaded by name."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastprefix.integrations.transformers.adapter import MODULE, trainable_modules

from .errors import BenchmarkError, first_line
from .tasks import TaskKind

ATTENTION = "sdpa"  # of the floor and the peers; fastprefix puts its own in where a method needs it


@dataclass(frozen=True)
class Size:
    """How large a model and its batches are."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    rows: int
    length: int


SIZES = {
    "quick": Size(layers=2, width=128, heads=2, vocabulary=2048, rows=8, length=64),
    "cpu": Size(layers=4, width=256, heads=4, vocabulary=4096, rows=8, length=128),
    "cuda": Size(layers=12, width=1024, heads=16, vocabulary=4096, rows=32, length=256),
}
_WHENCE = "; tokenizer.save_pretrained writes one into the model's folder"
LONGEST_PROMPT = 128  # positions that BERT's table must have beside the text's


def build_encoder(size: Size, classes: int, pad: int, seed: int) -> PreTrainedModel:
    """A BERT-shaped classifier with random weights."""
    config = encoder_config(size, pad)
    config.num_labels = classes
    torch.manual_seed(seed)
    return BertForSequenceClassification(config)


def encoder_config(size: Size, pad: int) -> BertConfig:
    """BERT's shape in so small."""
    return BertConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        max_position_embeddings=size.length + LONGEST_PROMPT,
        pad_token_id=pad,
        **_common(size),
        # Attention dropout would put the floor and the peers on PyTorch's slow path on a CPU.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def build_decoder(size: Size, pad: int, end: int, seed: int) -> PreTrainedModel:
    """A Llama-shaped language model with random weights."""
    config = decoder_config(size, pad, end)
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def decoder_config(size: Size, pad: int, end: int) -> LlamaConfig:
    """Llama's shape in so small, with grouped-query attention."""
    return LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads // 2,
        intermediate_size=8 * size.width // 3,
        max_position_embeddings=2 * (size.length + LONGEST_PROMPT),
        pad_token_id=pad,
        bos_token_id=end,
        eos_token_id=end,
        use_cache=False,
        **_common(size),
    )


def _common(size: Size) -> dict[str, Any]:
    # 1 / sqrt(fan-in): the usual 0.02 is made for widths of 768 and more and leaves small models nearly silent.
    return {"initializer_range": size.width**-0.5, "attn_implementation": ATTENTION}


def task_of(name: str) -> TaskKind:
    """Whether the named model is a decoder to be measured on language modelling, or to be given a classifier's head."""
    config = _load(name, "configuration", AutoConfig.from_pretrained)
    architecture = (config.architectures or [""])[0]
    if architecture.endswith(("CausalLM", "LMHeadModel")):
        return "causal_lm"
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return "classification"
    raise BenchmarkError(f"--model {name}: neither a causal language model nor one that classifies ({architecture})")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The named model's tokenizer, with a padding token."""
    tokenizer: PreTrainedTokenizerBase = _load(name, "tokenizer", AutoTokenizer.from_pretrained, hint=_WHENCE)
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():  # made up, for want of files
        raise BenchmarkError(f"--model {name}: no tokenizer{_WHENCE}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str, kind: TaskKind, classes: int, pad: int | None, seed: int) -> PreTrainedModel:
    """The named model; a classifier gets a fresh head."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"attn_implementation": ATTENTION, "dtype": torch.float32}
    if kind == "causal_lm":
        model = _load(name, "model", AutoModelForCausalLM.from_pretrained, **options)
    else:
        options |= {"num_labels": classes, "ignore_mismatched_sizes": True}
        model = _load(name, "model", AutoModelForSequenceClassification.from_pretrained, **options)
    model.config.pad_token_id = pad
    model.config.use_cache = False
    assert isinstance(model, PreTrainedModel)
    return model


def _load(name: str, what: str, from_pretrained: Callable[..., Any], hint: str = "", **options: Any) -> Any:
    try:
        return from_pretrained(name, **options)
    except OSError as error:
        place = "the folder has none" if Path(name).is_dir() else "neither a local folder nor what the hub could give"
        raise BenchmarkError(f"--model {name}: no {what}, {place} ({first_line(error)})") from error
    except (ValueError, KeyError) as error:
        raise BenchmarkError(f"--model {name}: its {what} cannot be used here ({first_line(error)}){hint}") from error


def with_shared_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that a method may change at will; its frozen weights are the original's own memory, its head is not."""
    head = set(head_parameters(model))
    frozen = {id(p): p for p in model.parameters() if p not in head}
    return copy.deepcopy(model, memo=frozen)


def head_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """The parameters of a classifier's head, all that fastprefix trains of it; a language model's stays frozen."""
    modules = {name: module for name, module in trainable_modules(model, None).items() if name != MODULE}
    return [parameter for module in modules.values() for parameter in module.parameters()]
