"""What the methods are tried on: a frozen model with a task, built here or loaded by name."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import models, tasks, tokenizer
from .data import Corpus
from .models import Size
from .tasks import Shape, Task


@dataclass(frozen=True)
class Subject:
    """A frozen model on its device, and its task."""

    title: str
    model: PreTrainedModel
    task: Task
    weights: str = "RANDOM weights"

    def describe(self) -> str:
        """Model, weights and batches in one line."""
        config = self.model.config
        rows, length = self.task.train[0]["input_ids"].shape
        return (
            f"{self.model.num_parameters() / 1e6:.1f} M parameters, {config.num_hidden_layers} layers of "
            f"{config.hidden_size}, {str(self.model.dtype).removeprefix('torch.')}, {self.weights}; "
            f"{self.task.description}, {rows} x {length} tokens, {len(self.task.train)} steps"
        )


def built(corpus: Corpus, size: Size, steps: int, device: torch.device, seed: int) -> list[Subject]:
    """The encoder (where the corpus has labels) and the decoder, with a tokenizer trained on the corpus."""
    words = tokenizer.train_or_load(corpus, size.vocabulary)
    pad, end = words.pad_token_id, words.eos_token_id
    shape = Shape(size.rows, size.length, steps, device)
    subjects = []
    if corpus.train_labels is not None:
        encoder = models.build_encoder(size, len(corpus.class_names), pad, seed)
        task = tasks.classification(corpus, words, shape, seed)
        subjects.append(Subject("encoder, BERT shape", placed(encoder, device), task))
    decoder = models.build_decoder(size, pad, end, seed)
    task = tasks.language_modelling(corpus, words, shape, seed)
    return [*subjects, Subject("decoder, Llama shape", placed(decoder, device), task)]


def named(name: str, corpus: Corpus, size: Size, steps: int, device: torch.device, seed: int) -> list[Subject]:
    """One model by name, with its own tokenizer, on the task that its architecture is for."""
    kind = models.task_of(name)
    words: PreTrainedTokenizerBase = models.load_tokenizer(name)
    model = models.load_model(name, kind, len(corpus.class_names), words.pad_token_id, seed)
    shape = Shape(size.rows, size.length, steps, device)
    make = tasks.language_modelling if kind == "causal_lm" else tasks.classification
    weights = "weights of the folder" if Path(name).is_dir() else "pretrained weights"
    return [Subject(name, placed(model, device), make(corpus, words, shape, seed), weights)]


def placed(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """On the device, in the type to measure it in."""
    # Half the memory and several times the speed on a GPU; on a CPU float32 is what kernels are fast in.
    nn.Module.to(model, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    return model
