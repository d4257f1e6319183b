"""The frozen models: built from a configuration with random weights, or loaded by name.

Only PyTorch and transformers are needed.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .measure import BenchmarkError, explain

ATTENTION = "sdpa"  # of the floor and of other packages; fastprefix replaces it where a method needs that
TaskKind = Literal["causal_lm", "classification"]
AUTO: dict[TaskKind, Any] = {
    "causal_lm": transformers.AutoModelForCausalLM,
    "classification": transformers.AutoModelForSequenceClassification,
}
LONGEST_PROMPT = 128  # positions in addition to those of the text


class Size(NamedTuple):
    """Hold the size of a model and of its batches."""

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
    """Return a configuration in the shape of BERT (to classify) or of Llama with grouped heads (language model).

    It has positions for the text and for a ``prompt`` of so many tokens.
    """
    shared: dict[str, Any] = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "pad_token_id": pad,
        # 1 / sqrt(fan-in): the usual 0.02 is made for widths of 768 and more and leaves small models nearly silent.
        "initializer_range": size.width**-0.5,
        "attn_implementation": ATTENTION,
    }
    if kind == "classification":
        return transformers.BertConfig(
            **shared | {"num_labels": classes},
            intermediate_size=4 * size.width,
            max_position_embeddings=size.length + prompt,
            # Attention dropout would put the floor and other packages on PyTorch's slow path on a CPU.
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
    """Move a model to the device, in the type in which it is measured."""
    nn.Module.to(model, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    return model


def locate(name: str) -> dict[str, str]:
    """Return the arguments with which transformers finds a model: a folder, a GGUF file, or a model of the hub."""
    path = Path(name)
    if path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": name}


def find_kind(name: str) -> TaskKind:
    """Return whether a named model is a causal language model or classifies."""
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
    """Load a model. A classifier gets a new head."""
    torch.manual_seed(seed)
    head = {} if kind == "causal_lm" else {"num_labels": classes, "ignore_mismatched_sizes": True}
    with explain(f"--model {name}"):
        model: PreTrainedModel = AUTO[kind].from_pretrained(
            **locate(name), attn_implementation=ATTENTION, dtype=torch.float32, **head
        )
    model.config.pad_token_id = pad
    model.config.use_cache = False
    return model
