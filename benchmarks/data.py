"""Text and its batches: Python's documentation, a local file, or a data set of the Hugging Face hub."""

import argparse
import csv
from pathlib import Path
from typing import Any, NamedTuple

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
"""The usual names of columns."""
HELD_OUT = 0.1  # of the passages
HELD_OUT_BATCHES = 4
MOST_ROWS = 20_000  # of a data set: more than any of these short runs reads
MOST_CLASSES = 200  # more distinct values are not class labels
LONGEST_PASSAGE = 500  # characters
TOPICS = {
    "literals and formatting": "strings numbers integers floating imaginary identifiers id-classes formatstrings",
    "data model": "objects types specialnames customization attribute-access callable-types sequence-types "
    "numeric-types context-managers",
    "execution and debugging": "execmodel naming dynamic-features exceptions debugger",
    "expressions": "atom-identifiers atom-literals attribute-references await binary bitwise booleans calls "
    "comparisons conversions dict exprlists in lambda lists operator-summary power shifting slicings subscriptions "
    "unary",
    "statements": "assert assignment augassign break continue del global import nonlocal pass raise return yield "
    "compound async class else for function if try while with",
    "built-in types": "bltin-code-objects bltin-ellipsis-object bltin-null-object bltin-type-objects specialattrs "
    "string-methods truth typesfunctions typesmapping typesmethods typesmodules typesseq typesseq-mutable",
}
"""Topics of Python's documentation by the part of the manuals that they were taken from."""


def read_python_documentation() -> Dataset:
    """Read the documentation that every interpreter contains. A paragraph of several topics counts once."""
    from pydoc_data.topics import topics

    texts, labels, seen = list[str](), list[str](), set[str]()
    for label, names in TOPICS.items():
        for name in names.split():
            passage = ""
            for paragraph in topics.get(name, "").split("\n\n"):  # interpreters differ in their topics
                key = " ".join(paragraph.split())
                if not key or key in seen:
                    continue
                seen.add(key)
                if passage and len(passage) + len(paragraph) > LONGEST_PASSAGE:
                    texts.append(passage)
                    passage = ""
                passage += ("\n\n" if passage else "") + paragraph.strip("\n")
            texts += [passage] if passage else []
            labels += [label] * (len(texts) - len(labels))
    return Dataset.from_dict({"text": texts, "label": labels})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the text."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", type=Path, metavar="FILE", help="text from a .tsv (with header) or .jsonl file")
    source.add_argument("--dataset", metavar="NAME[:CONFIG]", help="text from a data set of the Hugging Face hub")
    add_columns(parser)


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Add the options that name columns."""
    for kind in COLUMNS:
        parser.add_argument(f"--{kind}-column", metavar="NAME", help="default: guessed")


def read_corpus(options: argparse.Namespace) -> tuple[str, DatasetDict]:
    """Return the name and the two parts of the text."""
    if source := options.data or options.dataset:
        option = "--data" if options.data else "--dataset"
        return str(source), split_rows(str(source), read_rows(option, source, options), options.seed)
    name = "Python documentation (pydoc_data.topics)"
    return name, split_rows(name, read_python_documentation(), options.seed)


def read_rows(option: str, source: Path | str, options: argparse.Namespace) -> Dataset:
    """Return texts and labels, if there are any, in the columns "text" and "label". ``option`` is named in errors.

    A path is a tab-separated file with a header line or a JSON-lines file, a name a data set of the hub.
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
    text, label = choose_column(rows, "text", options), choose_column(rows, "label", options)
    if text is None:
        raise BenchmarkError(f"{option} {source}: name the column of the text by --text-column: {rows.column_names}")
    frame = rows.to_pandas()[[text, *filter(None, [label])]].dropna().astype(str)
    frame.columns = ["text", "label"][: len(frame.columns)]
    return Dataset.from_pandas(frame[frame.text.str.strip() != ""], preserve_index=False)


def choose_column(rows: Dataset, kind: str, options: argparse.Namespace) -> str | None:
    """Return the column of the texts or of the labels: the one that an option names, or the first usual name."""
    named = getattr(options, f"{kind}_column")
    if named is not None and named not in rows.column_names:
        raise BenchmarkError(f"--{kind}-column {named}: the columns are {', '.join(rows.column_names)}")
    return named or next((name for name in COLUMNS[kind] if name in rows.column_names), None)


def split_rows(name: str, rows: Dataset, seed: int) -> DatasetDict:
    """Split rows into a part to train on and a held-out part, named "test", and number their labels."""
    if len(rows) < 2:
        raise BenchmarkError(f"{name}: at least two passages of text are needed")
    rows = rows.select(range(min(len(rows), MOST_ROWS)))
    if "label" in rows.column_names:
        rows = rows.class_encode_column("label")
        if rows.features["label"].num_classes > MOST_CLASSES:
            raise BenchmarkError(f"{name}: more than {MOST_CLASSES} distinct labels: not a class label")
    return rows.train_test_split(max(1, round(HELD_OUT * len(rows))), seed=seed)


def list_classes(corpus: DatasetDict) -> list[str]:
    """Return the classes of the labels. Text without labels has none."""
    features = corpus["train"].features
    return list(features["label"].names) if "label" in features else []


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (about a second), which can write and read any text."""
    special, tokenizer = ["<pad>", "<end>"], tokenizers.ByteLevelBPETokenizer()
    options = {"vocab_size": vocabulary, "min_frequency": 0, "special_tokens": special, "show_progress": False}
    tokenizer.train_from_iterator(texts, **options)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, pad_token=special[0], eos_token=special[1])


class Task(NamedTuple):
    """Hold the batches of every training step, the same for all peers, and a few that no peer trains on."""

    train: list[Batch]
    held_out: list[Batch]


def build_task(
    kind: TaskKind,
    corpus: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    size: Size,
    steps: int,
    device: torch.device,
    seed: int,
) -> Task:
    """Encode a corpus and draw the batches."""
    encode = cut_blocks if kind == "causal_lm" else pad_passages
    train, held_out = (encode(corpus[part], tokenizer, size.length) for part in ("train", "test"))
    if not (len(train["labels"]) and len(held_out["labels"])):
        raise BenchmarkError(f"too little text for rows of {size.length} tokens")
    generator, count = torch.Generator().manual_seed(seed), steps * size.rows
    order = RandomSampler(train["labels"], num_samples=count, generator=generator)  # an epoch after another
    chosen = torch.tensor(list(order)).split(size.rows)
    parts = torch.arange(len(held_out["labels"])).split(size.rows)[:HELD_OUT_BATCHES]
    parts = tuple(part for part in parts if len(part) == len(parts[0]))  # their passes are timed: one size for all

    def take(rows: Batch, of_batch: tuple[Tensor, ...]) -> list[Batch]:
        return [{name: tensor[part].to(device) for name, tensor in rows.items()} for part in of_batch]

    return Task(take(train, chosen), take(held_out, parts))


def cut_blocks(part: Dataset, tokenizer: PreTrainedTokenizerBase, length: int) -> Batch:
    """Join passages and cut them into rows of equal length without padding."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    encoded = tokenizer(list(part["text"]), add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor([token for text in encoded for token in [*text, *end]])
    blocks = ids[: len(ids) // length * length].view(-1, length)
    return {"input_ids": blocks, "attention_mask": torch.ones_like(blocks), "labels": blocks}


def pad_passages(part: Dataset, tokenizer: PreTrainedTokenizerBase, length: int) -> Batch:
    """Cut or pad every passage to one length."""
    rows = tokenizer(list(part["text"]), truncation=True, padding="max_length", max_length=length, return_tensors="pt")
    ids = {name: rows[name] for name in ("input_ids", "attention_mask")}
    return {**ids, "labels": torch.tensor(part["label"])}
