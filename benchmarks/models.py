"""Build frozen models with random weights from a configuration, or load them by name.

This module only requires PyTorch and transformers.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .measure import BenchmarkError, explain

ATTENTION = "sdpa"  # for the floor and other packages; methods of fastprefix replace it if necessary
TaskKind = Literal["causal_lm", "classification", "tagging"]
AUTO: dict[TaskKind, Any] = {
    "causal_lm": transformers.AutoModelForCausalLM,
    "classification": transformers.AutoModelForSequenceClassification,
    "tagging": transformers.AutoModelForTokenClassification,
}
LONGEST_PROMPT = 128  # positions in addition to those of the text


class Size(NamedTuple):
    """The size of a model and of its batches. ``length`` is in tokens."""

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


def configure(
    kind: TaskKind, size: Size, pad: int = 0, end: int = 1, classes: int = 2, prompt: int = LONGEST_PROMPT
) -> PretrainedConfig:
    """Return the configuration of a BERT classifier, or of a Llama language model with grouped heads.

    It has positions for the text and for ``prompt`` more tokens.
    """
    shared: dict[str, Any] = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "pad_token_id": pad,
        # 1 / sqrt(fan-in). The usual 0.02 is meant for widths of 768 and more, and makes outputs of small models tiny.
        "initializer_range": size.width**-0.5,
        "attn_implementation": ATTENTION,
    }
    if kind == "classification":
        return transformers.BertConfig(
            **shared | {"num_labels": classes},
            intermediate_size=4 * size.width,
            max_position_embeddings=size.length + prompt,
            # With attention dropout, the floor and other packages would use PyTorch's slow path on a CPU.
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    return transformers.LlamaConfig(
        **shared,
        num_key_value_heads=size.heads // 2,
        intermediate_size=8 * size.width // 3,
        max_position_embeddings=2 * (size.length + prompt),
        bos_token_id=end,
        eos_token_id=end,
        use_cache=False,
    )


def build(kind: TaskKind, config: PretrainedConfig, device: torch.device, seed: int = 0) -> PreTrainedModel:
    """Build a model with random weights."""
    torch.manual_seed(seed)
    return place(AUTO[kind].from_config(config), device)


def draw_batch(kind: TaskKind, size: Size, length: int, device: torch.device) -> dict[str, Tensor]:
    """Draw random tokens without padding, and labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, size.vocabulary, (size.rows, length), generator=generator)
    labels = ids if kind == "causal_lm" else torch.randint(0, 2, (size.rows,), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def place(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a model to the device and cast it to the dtype of the measurements."""
    nn.Module.to(model, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    return model


def locate(name: str) -> dict[str, str]:
    """Return the arguments of ``from_pretrained`` for a folder, a GGUF file, or a name on the hub."""
    path = Path(name)
    if path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": name}


def find_kind(name: str) -> TaskKind:
    """Return the kind of a named model: a causal language model or a classifier."""
    if "gguf_file" in locate(name):
        return "causal_lm"
    with explain(f"--model {name}"):
        architecture = (transformers.AutoConfig.from_pretrained(name).architectures or [""])[0]
    return "causal_lm" if architecture.endswith(("CausalLM", "LMHeadModel")) else "classification"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, with a padding token."""
    with explain(f"--model {name}, tokenizer"):
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(**locate(name))
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():  # invented, because there are no files
        raise BenchmarkError(f"--model {name}: no tokenizer; tokenizer.save_pretrained writes one into the folder")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_model(name: str, kind: TaskKind, classes: int, pad: int | None, seed: int) -> PreTrainedModel:
    """Load a model, with a new head for a classifier."""
    torch.manual_seed(seed)
    head = {} if kind == "causal_lm" else {"num_labels": classes, "ignore_mismatched_sizes": True}
    with explain(f"--model {name}"):
        model: PreTrainedModel = AUTO[kind].from_pretrained(
            **locate(name), attn_implementation=ATTENTION, dtype=torch.float32, **head
        )
    model.config.pad_token_id = pad
    model.config.use_cache = False
    return model
