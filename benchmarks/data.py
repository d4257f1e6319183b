"""Text and its batches: Python's documentation, a local file, or a data set of the Hugging Face hub."""

import csv
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from torch import Tensor
from torch.utils.data import RandomSampler
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .measure import BenchmarkError, explain
from .models import Size, TaskKind

disable_progress_bars()

Batch = dict[str, Tensor]
TEXT_COLUMNS = ("text", "sentence", "passage", "content", "document", "sentence1", "question", "premise")
LABEL_COLUMNS = ("label", "labels", "class", "topic", "category")
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


@dataclass(frozen=True)
class Corpus:
    """Hold passages in the column "text" and, if there are ``classes``, their numbers in the column "label"."""

    name: str
    train: Dataset
    held_out: Dataset
    classes: list[str]

    def describe(self) -> str:
        """Return the name and the counts."""
        classes = f"{len(self.classes)} classes" if self.classes else "no labels"
        return f"{self.name}: {len(self.train):,} passages to train on, {len(self.held_out):,} held out, {classes}"


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


def read_file(path: Path, option: str, text_column: str | None = None, label_column: str | None = None) -> Dataset:
    """Read a tab-separated file with a header line or a JSON-lines file. ``option`` names it in errors."""
    if path.suffix not in (".tsv", ".jsonl", ".json"):
        raise BenchmarkError(f"{option} {path}: must be a .tsv file with a header line or a .jsonl file")
    # Quotes are ordinary characters.
    options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    builder = "csv" if path.suffix == ".tsv" else "json"
    with explain(f"{option} {path}"):
        rows = load_dataset(builder, data_files=str(path), split="train", **options)
    return choose_columns(path.name, rows, text_column, label_column)


def read_hub(name: str, text_column: str | None = None, label_column: str | None = None) -> Dataset:
    """Read the train split of ``NAME``, ``NAME/CONFIG``, ``OWNER/NAME`` or ``OWNER/NAME/CONFIG``."""
    path, _, config = name.rpartition("/")
    with explain(f"--dataset {name}"):
        try:
            rows = load_dataset(name, split="train")
        except Exception:
            if not path:
                raise
            rows = load_dataset(path, config, split="train")
    return choose_columns(name, rows, text_column, label_column)


def choose_columns(name: str, rows: Dataset, text: str | None, label: str | None) -> Dataset:
    """Return the rows that have text, with the columns "text" and, if there are labels, "label"."""
    columns = rows.column_names
    text = text or next((column for column in TEXT_COLUMNS if column in columns), None)
    if text not in columns:
        raise BenchmarkError(f"{name}: name the column of the text with --text-column; there are {columns}")
    if label is not None and label not in columns:
        raise BenchmarkError(f"{name}: no column {label!r} for --label-column; there are {columns}")
    label = label or next((column for column in LABEL_COLUMNS if column in columns), None)
    chosen = [i for i, passage in enumerate(rows[text]) if str(passage).strip()]
    columns_of = {"text": text} | ({"label": label} if label else {})
    return Dataset.from_dict({name: [str(rows[column][i]) for i in chosen] for name, column in columns_of.items()})


def build_corpus(name: str, rows: Dataset, seed: int) -> Corpus:
    """Split rows into a part to train on and a part held out, and number their classes."""
    if len(rows) < 2:
        raise BenchmarkError(f"{name}: at least two passages of text are needed")
    rows, classes = number_labels(name, rows.select(range(min(len(rows), MOST_ROWS))))
    parts = rows.train_test_split(max(1, round(HELD_OUT * len(rows))), seed=seed)
    return Corpus(name, parts["train"], parts["test"], classes)


def number_labels(name: str, rows: Dataset) -> tuple[Dataset, list[str]]:
    """Replace the labels by their numbers, and return the classes. Rows without labels have none."""
    if "label" not in rows.column_names:
        return rows, []
    rows = rows.class_encode_column("label")
    classes = rows.features["label"].names
    if len(classes) > MOST_CLASSES:
        raise BenchmarkError(f"{name}: {len(classes)} distinct labels, more than {MOST_CLASSES}: not a class label")
    return rows, classes


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (about a second), which can write and read any text."""
    special, tokenizer = ["<pad>", "<end>"], tokenizers.ByteLevelBPETokenizer()
    options = {"vocab_size": vocabulary, "min_frequency": 0, "special_tokens": special, "show_progress": False}
    tokenizer.train_from_iterator(texts, **options)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, pad_token=special[0], eos_token=special[1])


@dataclass(frozen=True)
class Task:
    """Hold the batches of every training step, the same for all peers, and a few that no peer trains on."""

    kind: TaskKind
    train: list[Batch]
    held_out: list[Batch]

    def describe(self) -> str:
        """Return the kind and the sizes."""
        rows, length = self.train[0]["input_ids"].shape
        kind = {"causal_lm": "language modelling", "classification": "classification of passages"}[self.kind]
        return f"{kind}, {rows} x {length} tokens, {len(self.train)} steps"

    def tokens_per_step(self) -> float:
        """Return the mean number of tokens of text in a training batch, without padding and prompts."""
        return sum(float(batch["attention_mask"].sum()) for batch in self.train) / len(self.train)


def build_task(
    kind: TaskKind,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    size: Size,
    steps: int,
    device: torch.device,
    seed: int,
) -> Task:
    """Encode a corpus and draw the batches."""
    if kind == "classification" and not corpus.classes:
        raise BenchmarkError(f"{corpus.name}: no column of labels, so nothing to classify")
    make = cut_blocks if kind == "causal_lm" else pad_passages
    train, held_out = (make(part, tokenizer, size.length) for part in (corpus.train, corpus.held_out))
    if not (len(train["labels"]) and len(held_out["labels"])):
        raise BenchmarkError(f"{corpus.name}: too little text for rows of {size.length} tokens")
    generator, count = torch.Generator().manual_seed(seed), steps * size.rows
    order = RandomSampler(train["labels"], num_samples=count, generator=generator)  # an epoch after another
    chosen = torch.tensor(list(order)).split(size.rows)
    parts = torch.arange(len(held_out["labels"])).split(size.rows)[:HELD_OUT_BATCHES]
    parts = tuple(part for part in parts if len(part) == len(parts[0]))  # their passes are timed: one size for all

    def take(rows: Batch, of_batch: tuple[Tensor, ...]) -> list[Batch]:
        return [{name: tensor[part].to(device) for name, tensor in rows.items()} for part in of_batch]

    return Task(kind, take(train, chosen), take(held_out, parts))


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
