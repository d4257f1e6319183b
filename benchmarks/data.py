"""Where the text comes from: Python's documentation, a local file, or the Hugging Face hub."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import pydoc_text
from .errors import BenchmarkError, first_line

TEXT_COLUMNS = ("text", "sentence", "passage", "content", "document", "sentence1", "question", "premise")
LABEL_COLUMNS = ("label", "labels", "class", "topic", "category")
HELD_OUT = 0.1  # of the passages, for the losses in the table
MOST_ROWS = 20_000  # of a data set: more than any of these short runs reads
MOST_CLASSES = 200  # more distinct values than that are no class labels


@dataclass(frozen=True)
class Passages:
    """What a file or a data set has: texts and, where there is a column of them, labels as they stand there."""

    name: str
    texts: list[str]
    labels: list[str] | None


@dataclass(frozen=True)
class Corpus:
    """Passages with, where there are any, their classes; split into a part to train on and a part held out."""

    name: str
    train: list[str]
    held_out: list[str]
    train_labels: list[int] | None
    held_out_labels: list[int] | None
    class_names: list[str]

    def describe(self) -> str:
        """One line for the report."""
        classes = f", {len(self.class_names)} classes" if self.class_names else ", no labels"
        return f"{self.name}: {len(self.train):,} passages to train on, {len(self.held_out):,} held out{classes}"


def python_documentation(seed: int) -> Corpus:
    """The documentation that comes with the interpreter; see ``pydoc_text`` for the classes."""
    texts, classes = pydoc_text.passages()
    return _corpus("Python documentation (pydoc_data.topics)", texts, classes, seed)


def from_file(path: Path, seed: int, text_column: str | None = None, label_column: str | None = None) -> Corpus:
    """A tab-separated file with a header line, or a JSON-lines file, split into two parts."""
    return _split(read_file(path, "--data", text_column, label_column, MOST_ROWS), seed)


def read_file(
    path: Path, option: str, text_column: str | None = None, label_column: str | None = None, most: int | None = None
) -> Passages:
    """The first ``most`` rows, or all, of a tab-separated file with a header line or of a JSON-lines file.

    ``option`` is what the user named the file with, for errors.
    """
    readers: dict[str, tuple[str, dict[str, Any]]] = {
        ".tsv": ("csv", {"delimiter": "\t", "quoting": 3}),  # 3 is csv.QUOTE_NONE: quotes are ordinary characters
        ".jsonl": ("json", {}),
        ".json": ("json", {}),
    }
    if not path.is_file():
        raise BenchmarkError(f"{option} {path}: no such file")
    if path.suffix not in readers:
        raise BenchmarkError(f"{option} {path}: takes a .tsv file with a header line or a .jsonl file")
    from datasets import load_dataset

    builder, options = readers[path.suffix]
    rows = _load(f"{option} {path}", lambda: load_dataset(builder, data_files=str(path), split="train", **options))
    return _columns(path.name, rows, text_column, label_column, most)


def from_hub(name: str, seed: int, text_column: str | None = None, label_column: str | None = None) -> Corpus:
    """The train split of a hub data set: ``NAME``, ``NAME/CONFIG``, ``OWNER/NAME`` or ``OWNER/NAME/CONFIG``."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    def load() -> Any:
        parts = name.split("/")
        if len(parts) == 3:
            return load_dataset("/".join(parts[:2]), parts[2], split="train")
        try:
            return load_dataset(name, split="train")
        except DatasetNotFoundError:
            if len(parts) != 2:
                raise
            return load_dataset(*parts, split="train")

    rows = _load(f"--dataset {name}", load)
    return _split(_columns(name, rows, text_column, label_column, MOST_ROWS), seed)


def _load(option: str, load: Callable[[], Any]) -> Any:
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        return load()
    except Exception as error:  # whatever a reader or the network raises, the user needs one line
        raise BenchmarkError(f"{option}: could not be read ({first_line(error)})") from error


def _columns(name: str, rows: Any, text_column: str | None, label_column: str | None, most: int | None) -> Passages:
    columns: list[str] = rows.column_names
    text_column = text_column or _first_of(TEXT_COLUMNS, columns)
    if text_column not in columns:
        raise BenchmarkError(f"{name}: name the column of the text with --text-column; there are {columns}")
    if label_column is not None and label_column not in columns:
        raise BenchmarkError(f"{name}: no column {label_column!r} for --label-column; there are {columns}")
    label_column = label_column or _first_of(LABEL_COLUMNS, columns)
    if most is not None:
        rows = rows.select(range(min(len(rows), most)))
    texts = [str(text) for text in rows[text_column]]
    return Passages(name, texts, [str(label) for label in rows[label_column]] if label_column else None)


def _split(passages: Passages, seed: int) -> Corpus:
    return _corpus(passages.name, passages.texts, passages.labels, seed)


def _first_of(candidates: tuple[str, ...], columns: list[str]) -> str | None:
    return next((name for name in candidates if name in columns), None)


def _corpus(name: str, texts: list[str], labels: list[str] | None, seed: int) -> Corpus:
    kept = [i for i, text in enumerate(texts) if text.strip()]
    if len(kept) < 2:
        raise BenchmarkError(f"{name}: at least two passages of text are needed")
    random.Random(seed).shuffle(kept)
    cut = max(1, round(HELD_OUT * len(kept)))
    held_out, train = kept[:cut], kept[cut:]

    class_names = class_names_of(name, [labels[i] for i in kept]) if labels else []
    ids = {label: index for index, label in enumerate(class_names)}
    return Corpus(
        name=name,
        train=[texts[i] for i in train],
        held_out=[texts[i] for i in held_out],
        train_labels=[ids[labels[i]] for i in train] if labels else None,
        held_out_labels=[ids[labels[i]] for i in held_out] if labels else None,
        class_names=class_names,
    )


def class_names_of(name: str, labels: list[str]) -> list[str]:
    """The distinct labels, in order."""
    names = sorted(set(labels))
    if len(names) > MOST_CLASSES:
        raise BenchmarkError(f"{name}: {len(names)} distinct labels, more than {MOST_CLASSES}: not a class label")
    return names
