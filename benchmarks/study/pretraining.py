"""A small encoder pretrained on the study's own text, for where no pretrained model is at hand."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    get_linear_schedule_with_warmup,
)

from .. import models, tokenizer
from ..data import Corpus
from ..models import Size
from .batches import Encoded, for_training
from .texts import Texts

RATE = 1e-3
WARMUP = 0.06
MASKED = 0.15
SEED = 0
FIRST, MASK = "<first>", "<mask>"


def encoder(
    texts: Texts, size: Size, steps: int, folder: Path, device: torch.device, tick: Callable[[], object]
) -> Path:
    """The folder of an encoder pretrained with masked language modelling on the training texts; made once."""
    digest = hashlib.sha256(json.dumps([asdict(size), steps, RATE, MASKED, SEED, texts.train.texts]).encode())
    path = folder / f"encoder-{digest.hexdigest()[:16]}"
    if path.exists():
        return path
    words = _tokenizer(texts, size.vocabulary)
    model = _train(texts, words, size, steps, device, tick)
    unfinished = path.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    words.save_pretrained(unfinished)
    model.save_pretrained(unfinished)
    unfinished.replace(path)
    return path


def _tokenizer(texts: Texts, vocabulary: int) -> PreTrainedTokenizerFast:
    """Trained on the training texts; a first token of its own in every text, which a classifier reads."""
    words = tokenizer.train_or_load(Corpus(texts.name, texts.train.texts, [], None, None, []), vocabulary)
    words.add_special_tokens({"cls_token": FIRST, "mask_token": MASK})
    template = TemplateProcessing(single=f"{FIRST} $A", special_tokens=[(FIRST, words.cls_token_id)])
    words.backend_tokenizer.post_processor = template
    return words


def _train(
    texts: Texts,
    words: PreTrainedTokenizerFast,
    size: Size,
    steps: int,
    device: torch.device,
    tick: Callable[[], object],
) -> BertForMaskedLM:
    config = models.encoder_config(size, words.pad_token_id)
    config.vocab_size = len(words)
    torch.manual_seed(SEED)
    model = BertForMaskedLM(config)
    nn.Module.to(model, device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
    for batch in _masked(texts, words, size, steps, device):
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        tick()
    return model


def _masked(
    texts: Texts, words: PreTrainedTokenizerFast, size: Size, steps: int, device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    rows = words(texts.train.texts, truncation=True, max_length=size.length)["input_ids"]
    collator = DataCollatorForLanguageModeling(words, mlm_probability=MASKED, seed=SEED)
    for batch in for_training(Encoded(rows, texts.train.labels), words.pad_token_id, size.rows, steps, SEED, device):
        masked, labels = collator.torch_mask_tokens(batch["input_ids"])
        yield {"input_ids": masked, "attention_mask": batch["attention_mask"], "labels": labels}
