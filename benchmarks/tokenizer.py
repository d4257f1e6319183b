"""A byte-level BPE tokenizer trained on the corpus at hand, and kept in the user's cache."""

import hashlib
import os
import tempfile
from pathlib import Path

import tokenizers
from transformers import PreTrainedTokenizerFast

from .data import Corpus

PAD, END = "<pad>", "<end>"


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/fastprefix/tokenizers``, by default under ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fastprefix" / "tokenizers"


def train_or_load(corpus: Corpus, vocabulary: int) -> PreTrainedTokenizerFast:
    """The tokenizer of this text and vocabulary size: from the cache, or trained now (about a second)."""
    path = cache_folder() / f"bpe-{vocabulary}-{_fingerprint(corpus, vocabulary)}.json"
    if not path.exists():
        _write(_train(corpus, vocabulary), path)
    return PreTrainedTokenizerFast(tokenizer_file=str(path), pad_token=PAD, eos_token=END)


def _fingerprint(corpus: Corpus, vocabulary: int) -> str:
    digest = hashlib.sha256(f"{tokenizers.__version__} {vocabulary}".encode())
    for text in corpus.train:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]


def _train(corpus: Corpus, vocabulary: int) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, END],
        # All 256 bytes, so that any text can be written and read back, whatever it was trained on.
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.train, trainer)
    return tokenizer


def _write(tokenizer: tokenizers.Tokenizer, path: Path) -> None:
    # Through a name of its own and a rename: a run that is killed, or one beside it, leaves no half file.
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".unfinished")
    os.close(handle)
    tokenizer.save(unfinished)
    Path(unfinished).replace(path)
