"""A corpus as batches of token ids: language modelling or classification."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .data import Corpus
from .errors import BenchmarkError

Batch = dict[str, Tensor]
TaskKind = Literal["causal_lm", "classification"]
HELD_OUT_BATCHES = 4


@dataclass(frozen=True)
class Shape:
    """What a batch looks like, how many there are, and where they live."""

    rows: int
    length: int
    steps: int
    device: torch.device


@dataclass(frozen=True)
class Task:
    """Batches for every training step, the same for all methods, and a few that no method trains on."""

    kind: TaskKind
    description: str
    train: list[Batch]
    held_out: list[Batch]

    def tokens_per_step(self) -> float:
        """Tokens of the text in a training batch, padding and prompts not counted, on average."""
        return sum(float(batch["attention_mask"].sum()) for batch in self.train) / len(self.train)


def language_modelling(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, shape: Shape, seed: int) -> Task:
    """Passages one after another, cut into rows of equal length: no padding."""
    train = _blocks(corpus.train, tokenizer, shape.length)
    held_out = _blocks(corpus.held_out, tokenizer, shape.length)
    if not (len(train) and len(held_out)):
        raise BenchmarkError(f"{corpus.name}: too little text for rows of {shape.length} tokens")
    return Task("causal_lm", "language modelling", *_batches(_lm_rows(train), _lm_rows(held_out), shape, seed))


def classification(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, shape: Shape, seed: int) -> Task:
    """A passage a row, cut or padded to one length."""
    if corpus.train_labels is None or corpus.held_out_labels is None:
        raise BenchmarkError(f"{corpus.name}: no column of labels, so nothing to classify")
    train = _passages(corpus.train, corpus.train_labels, tokenizer, shape.length)
    held_out = _passages(corpus.held_out, corpus.held_out_labels, tokenizer, shape.length)
    return Task("classification", "classification of passages", *_batches(train, held_out, shape, seed))


def _blocks(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor([token for text in encoded for token in [*text, *end]])
    return ids[: len(ids) // length * length].view(-1, length)


def _lm_rows(blocks: Tensor) -> Batch:
    return {"input_ids": blocks, "attention_mask": torch.ones_like(blocks), "labels": blocks}


def _passages(texts: list[str], labels: list[int], tokenizer: PreTrainedTokenizerBase, length: int) -> Batch:
    rows = tokenizer(texts, truncation=True, padding="max_length", max_length=length, return_tensors="pt")
    return {
        "input_ids": rows["input_ids"],
        "attention_mask": rows["attention_mask"],
        "labels": torch.tensor(labels),
    }


def _batches(train: Batch, held_out: Batch, shape: Shape, seed: int) -> tuple[list[Batch], list[Batch]]:
    order = _shuffled_forever(len(train["input_ids"]), seed)
    chosen = [torch.tensor([next(order) for _ in range(shape.rows)]) for _ in range(shape.steps)]
    parts = torch.arange(len(held_out["input_ids"])).split(shape.rows)[:HELD_OUT_BATCHES]
    # Batches of one size, for their passes are timed; where there is not even one, a smaller one.
    parts = [part for part in parts if len(part) == len(parts[0])]
    return [_take(train, rows, shape.device) for rows in chosen], [
        _take(held_out, rows, shape.device) for rows in parts
    ]


def _take(rows: Batch, chosen: Tensor, device: torch.device) -> Batch:
    return {name: tensor[chosen].to(device) for name, tensor in rows.items()}


def _shuffled_forever(count: int, seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
