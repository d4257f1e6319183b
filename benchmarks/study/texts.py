"""The labelled texts of a study: to train on, to choose by (dev), and to report (test)."""

import random
from dataclasses import dataclass
from pathlib import Path

from .. import data
from ..data import Passages
from ..errors import BenchmarkError

SPLIT_SEED = 0  # which texts are split off and sampled is the same in every study of a file
SPLIT_OFF = 0.1  # of the training file, for dev and for test each, where no file is given


@dataclass(frozen=True)
class Source:
    """The files, None: split off from the training file; and their columns, None: guessed."""

    train: Path
    dev: Path | None
    test: Path | None
    text_column: str | None
    label_column: str | None


@dataclass(frozen=True)
class Sizes:
    """How many examples to draw of each part; None: all."""

    train: int | None
    dev: int | None
    test: int | None


@dataclass(frozen=True)
class Examples:
    """Texts and the index of the class of each."""

    texts: list[str]
    labels: list[int]

    def shares(self, classes: int) -> list[float]:
        """How much of the examples each class is: the largest is what guessing reaches."""
        return [self.labels.count(c) / len(self.labels) for c in range(classes)]


@dataclass(frozen=True)
class Texts:
    """The three parts; ``origin`` says where dev and test come from."""

    name: str
    origin: str
    class_names: list[str]
    train: Examples
    dev: Examples
    test: Examples

    def describe(self) -> str:
        """One line for the report."""
        counts = ", ".join(f"{len(getattr(self, part).texts):,} {part}" for part in ("train", "dev", "test"))
        guess = max(self.test.shares(len(self.class_names)))
        return f"{self.name}: {counts} examples ({self.origin}), {len(self.class_names)} classes, guessing {guess:.1%}"


def load(source: Source, sizes: Sizes) -> Texts:
    """Read, split off what no file is given for, and draw the examples."""
    train = _read(source, source.train, "--data")
    parts, origins = {"train": train}, []
    for part, path in (("dev", source.dev), ("test", source.test)):
        if path is not None:
            parts[part] = _read(source, path, f"--{part}")
            origins.append(f"{part} from {path.name}")
        else:
            parts["train"], parts[part] = _split_off(parts["train"], part)
            origins.append(f"{part} split off, {SPLIT_OFF:.0%}")
    class_names = data.class_names_of(train.name, train.labels or [])
    if len(class_names) < 2:
        raise BenchmarkError(f"{train.name}: two or more classes are needed, got {class_names}")
    examples = {part: _draw(parts[part], class_names, getattr(sizes, part)) for part in parts}
    return Texts(train.name, ", ".join(origins), class_names, **examples)


def _read(source: Source, path: Path, option: str) -> Passages:
    passages = data.read_file(path, option, source.text_column, source.label_column)
    if passages.labels is None:
        raise BenchmarkError(f"{option} {path}: name the column of the labels with --label-column")
    kept = [i for i, text in enumerate(passages.texts) if text.strip()]
    if not kept:
        raise BenchmarkError(f"{option} {path}: no text in it")
    return _chosen(passages, kept)


def _chosen(passages: Passages, rows: list[int]) -> Passages:
    assert passages.labels is not None
    return Passages(passages.name, [passages.texts[i] for i in rows], [passages.labels[i] for i in rows])


def _split_off(passages: Passages, part: str) -> tuple[Passages, Passages]:
    rows = list(range(len(passages.texts)))
    random.Random(SPLIT_SEED).shuffle(rows)
    cut = round(SPLIT_OFF * len(rows))
    if cut < 1:
        raise BenchmarkError(f"{passages.name}: too few examples to split some off; give a file with --{part}")
    return _chosen(passages, rows[cut:]), _chosen(passages, rows[:cut])


def _draw(passages: Passages, class_names: list[str], count: int | None) -> Examples:
    assert passages.labels is not None
    if unknown := sorted(set(passages.labels) - set(class_names)):
        raise BenchmarkError(f"{passages.name}: labels that the training file does not have: {unknown}")
    rows = list(range(len(passages.texts)))
    if count is not None and count < len(rows):
        rows = random.Random(SPLIT_SEED).sample(rows, count)
    ids = {label: index for index, label in enumerate(class_names)}
    return Examples([passages.texts[i] for i in rows], [ids[passages.labels[i]] for i in rows])
