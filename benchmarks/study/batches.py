"""Examples as token ids, in batches of rows of much the same length, so that little of a batch is padding."""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from ..tasks import Batch
from .texts import Examples, Texts

POOL = 20  # batches whose rows are drawn together and sorted by length


@dataclass(frozen=True)
class Encoded:
    """Rows of token ids, and the class of each."""

    rows: list[list[int]]
    labels: list[int]


@dataclass(frozen=True)
class EncodedTexts:
    """The three parts as token ids."""

    train: Encoded
    dev: Encoded
    test: Encoded
    pad: int

    def fingerprint(self) -> str:
        """Changes with any example, with their order, and with the tokenizer."""
        parts = [[part.rows, part.labels] for part in (self.train, self.dev, self.test)]
        return hashlib.sha256(json.dumps([self.pad, parts]).encode()).hexdigest()


def encode(texts: Texts, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedTexts:
    """Every text cut to at most ``max_length`` tokens."""

    def encoded(examples: Examples) -> Encoded:
        return Encoded(tokenizer(examples.texts, truncation=True, max_length=max_length)["input_ids"], examples.labels)

    pad = tokenizer.pad_token_id
    return EncodedTexts(encoded(texts.train), encoded(texts.dev), encoded(texts.test), 0 if pad is None else pad)


def for_training(part: Encoded, pad: int, size: int, steps: int, seed: int, device: torch.device) -> Iterator[Batch]:
    """``steps`` full batches, epoch after epoch; the seed decides the order."""
    order = random.Random(seed)
    size = min(size, len(part.rows))
    chosen: list[list[int]] = []
    for _ in range(steps):
        if not chosen:
            chosen = _epoch(part, size, order)
        yield collate(part, chosen.pop(), pad, device)


def _epoch(part: Encoded, size: int, order: random.Random) -> list[list[int]]:
    """All rows once, but for those that fill no batch: sorted within pools, so that lengths go with lengths."""
    rows = list(range(len(part.rows)))
    order.shuffle(rows)
    pools = [
        sorted(rows[i : i + POOL * size], key=lambda r: len(part.rows[r])) for i in range(0, len(rows), POOL * size)
    ]
    batches = [pool[i : i + size] for pool in pools for i in range(0, len(pool), size)]
    full = [batch for batch in batches if len(batch) == size]
    order.shuffle(full)
    return full


def for_evaluation(part: Encoded, pad: int, size: int, device: torch.device) -> Iterator[Batch]:
    """Every row once, sorted by length; the last batch may be smaller."""
    rows = sorted(range(len(part.rows)), key=lambda r: len(part.rows[r]))
    for i in range(0, len(rows), size):
        yield collate(part, rows[i : i + size], pad, device)


def longest(part: Encoded, size: int) -> list[int]:
    """The numbers of the longest rows, whose batch needs most memory."""
    return sorted(range(len(part.rows)), key=lambda r: len(part.rows[r]))[-size:]


def collate(part: Encoded, chosen: Sequence[int], pad: int, device: torch.device) -> Batch:
    """The chosen rows as a batch, padded to the longest of them."""
    rows = [torch.tensor(part.rows[i]) for i in chosen]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    labels = torch.tensor([part.labels[i] for i in chosen])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}
