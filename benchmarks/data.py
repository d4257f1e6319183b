"""Read text and build batches from Python's documentation, a local file, or a data set on the Hugging Face hub."""

import argparse
import csv
import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import tokenizers
import torch
from datasets import Dataset, DatasetDict, disable_progress_bars, load_dataset
from torch import Tensor
from torch.utils.data import RandomSampler
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .measure import BenchmarkError, explain
from .models import Size, TaskKind

disable_progress_bars()

Batch = dict[str, Tensor]
COLUMNS = {
    "text": ("text", "sentence", "passage", "content", "document", "sentence1", "question", "premise"),
    "label": ("label", "labels", "class", "topic", "category"),
}
"""Usual names of the columns, in order of preference."""
HELD_OUT = 0.1  # of the passages
HELD_OUT_BATCHES = 4
MOST_ROWS = 20_000  # of a data set: more than any of these short runs reads
MOST_CLASSES = 200  # more distinct values are not class labels
LONGEST_PASSAGE = 500  # characters
TOPICS = Path(__file__).parent / "python_topics.json"  # topics of Python's documentation, by part of the manuals


def read_python_documentation() -> Dataset:
    """Read the documentation that every Python interpreter contains. Repeated paragraphs are used once."""
    rows, seen = list[dict[str, str]](), set[str]()
    for label, names in json.loads(TOPICS.read_text(encoding="utf-8")).items():
        for name in names:
            passage = ""
            for paragraph in topics.get(name, "").split("\n\n"):  # Python versions differ in their topics
                key = " ".join(paragraph.split())
                if not key or key in seen:
                    continue
                seen.add(key)
                if passage and len(passage) + len(paragraph) > LONGEST_PASSAGE:
                    rows.append({"text": passage, "label": label})
                    passage = ""
                passage += ("\n\n" if passage else "") + paragraph.strip("\n")
            rows += [{"text": passage, "label": label}] if passage else []
    return Dataset.from_list(rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the text."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", type=Path, metavar="FILE", help="text from a .tsv file with header, or a .jsonl file")
    source.add_argument("--dataset", metavar="NAME[:CONFIG]", help="text from a data set on the Hugging Face hub")
    add_columns(parser)


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Add the options that name columns."""
    for kind in COLUMNS:
        parser.add_argument(f"--{kind}-column", metavar="NAME", help="default: guessed")


def read_corpus(options: argparse.Namespace) -> tuple[str, DatasetDict]:
    """Return the name of the text, and its two parts."""
    if source := options.data or options.dataset:
        option = "--data" if options.data else "--dataset"
        return str(source), split_rows(str(source), read_rows(option, source, options), options.seed)
    name = "Python documentation (pydoc_data.topics)"
    return name, split_rows(name, read_python_documentation(), options.seed)


def read_rows(option: str, source: Path | str, options: argparse.Namespace) -> Dataset:
    """Return rows with the column "text" and, if the source has labels, the column "label".

    ``source`` is a path or a string. A path is a tab-separated file with a header line or a JSON-lines file. A string
    is the name of a data set on the hub. Errors mention ``option``.
    """
    if isinstance(source, str):
        name, _, config = source.partition(":")
        arguments: dict[str, Any] = {"path": name, "name": config or None}
    elif source.suffix == ".tsv":  # in which quotes are ordinary characters
        arguments = {"path": "csv", "data_files": str(source), "delimiter": "\t", "quoting": csv.QUOTE_NONE}
    elif source.suffix in (".jsonl", ".json"):
        arguments = {"path": "json", "data_files": str(source)}
    else:
        raise BenchmarkError(f"{option} {source}: must be a .tsv file with a header line or a .jsonl file")
    with explain(f"{option} {source}"):
        rows = load_dataset(**arguments, split="train")
    columns = rows.column_names
    chosen: dict[str, str] = {}
    for kind, usual in COLUMNS.items():
        named = getattr(options, f"{kind}_column")
        found = [name for name in ((named,) if named else usual) if name in columns]
        if not found and (named or kind == "text"):
            raise BenchmarkError(
                f"{option} {source}: select one of the columns {', '.join(columns)} with --{kind}-column"
            )
        chosen |= {found[0]: kind} if found else {}
    frame = rows.to_pandas()[list(chosen)].rename(columns=chosen).dropna().astype(str)
    return Dataset.from_pandas(frame[frame.text.str.strip() != ""], preserve_index=False)


def split_rows(name: str, rows: Dataset, seed: int) -> DatasetDict:
    """Split rows into a part to train on and a held-out part, named "test", and number their labels."""
    if len(rows) < 2:
        raise BenchmarkError(f"{name}: the text must have at least two passages")
    if len(rows) > MOST_ROWS:  # which may be sorted by their labels
        rows = rows.shuffle(seed=seed).select(range(MOST_ROWS))
    if "label" in rows.column_names:
        rows = rows.class_encode_column("label")
        if rows.features["label"].num_classes > MOST_CLASSES:
            raise BenchmarkError(f"{name}: the label column has more than {MOST_CLASSES} distinct values")
        if rows.features["label"].num_classes < 2:
            raise BenchmarkError(f"{name}: the label column has the same value in every row")
    return rows.train_test_split(max(1, round(HELD_OUT * len(rows))), seed=seed)


def list_classes(corpus: DatasetDict) -> list[str]:
    """Return the names of the classes, or an empty list for text without labels."""
    features = corpus["train"].features
    return list(features["label"].names) if "label" in features else []


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which can encode any text. This takes about a second."""
    special, tokenizer = ["<pad>", "<end>"], tokenizers.ByteLevelBPETokenizer()
    options = {"vocab_size": vocabulary, "min_frequency": 0, "special_tokens": special, "show_progress": False}
    tokenizer.train_from_iterator(texts, **options)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, pad_token=special[0], eos_token=special[1])


def build_task(
    kind: TaskKind,
    corpus: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    size: Size,
    steps: int,
    device: torch.device,
    seed: int,
) -> tuple[list[Batch], list[Batch]]:
    """Return the batches of all training steps, which all peers share, and a few held-out batches."""
    encode = cut_blocks if kind == "causal_lm" else pad_passages
    train, held_out = (encode(corpus[part], tokenizer, size.length) for part in ("train", "test"))
    if not (len(train["labels"]) and len(held_out["labels"])):
        raise BenchmarkError(f"the text is too short for rows of {size.length} tokens")
    generator, count = torch.Generator().manual_seed(seed), steps * size.rows
    order = RandomSampler(train["labels"], num_samples=count, generator=generator)  # several epochs, if needed
    chosen = torch.tensor(list(order)).split(size.rows)
    parts = torch.arange(len(held_out["labels"])).split(size.rows)[:HELD_OUT_BATCHES]
    parts = tuple(part for part in parts if len(part) == len(parts[0]))  # all of one size, because they are timed

    def take(rows: Batch, of_batch: tuple[Tensor, ...]) -> list[Batch]:
        return [{name: tensor[part].to(device) for name, tensor in rows.items()} for part in of_batch]

    return take(train, chosen), take(held_out, parts)


def cut_blocks(part: Dataset, tokenizer: PreTrainedTokenizerBase, length: int) -> Batch:
    """Join passages and cut them into rows of equal length without padding."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    encoded = tokenizer(list(part["text"]), add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor([token for text in encoded for token in [*text, *end]])
    blocks = ids[: len(ids) // length * length].view(-1, length)
    labels = blocks.clone()
    labels[:, 0] = -100  # only some packages have the prompt predict the first token
    return {"input_ids": blocks, "attention_mask": torch.ones_like(blocks), "labels": labels}


def pad_passages(part: Dataset, tokenizer: PreTrainedTokenizerBase, length: int) -> Batch:
    """Truncate or pad every passage to one length."""
    rows = tokenizer(list(part["text"]), truncation=True, padding="max_length", max_length=length, return_tensors="pt")
    ids = {name: rows[name] for name in ("input_ids", "attention_mask")}
    return {**ids, "labels": torch.tensor(part["label"])}
