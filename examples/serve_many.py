"""Answer requests that each use their own adapter, in batches and one request at a time.

    python examples/serve_many.py --model Qwen/Qwen3-0.6B --adapters adapters/*/ --requests 64

``--adapters`` are directories that ``save_adapter`` wrote. Without them the script creates a few random adapters, and
without ``--model`` it uses a tiny random decoder. It then runs in seconds.
"""

import argparse
import itertools
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from toy import SENTENCES, load_decoder
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import fastprefix


class Request(NamedTuple):
    """A text to continue, with the adapter of the user who sent it."""

    adapter: str
    text: str


def make_adapters(model: PreTrainedModel, folder: Path) -> list[Path]:
    """Save a few untrained adapters of different kinds and lengths."""
    configs = [
        fastprefix.PrefixTuningConfig(8, prefix_position="shift"),
        fastprefix.PrefixTuningConfig(32, prefix_position="shift"),
        fastprefix.PromptTuningConfig(16),
        fastprefix.ADePTConfig(12, bottleneck_dim=4),
    ]
    for index, config in enumerate(configs):
        fastprefix.attach(model, config)
        fastprefix.save_adapter(model, folder / f"user{index}")
        fastprefix.detach(model)
    return sorted(folder.iterdir())


def take_batches(queue: deque[Request], size: int) -> Iterator[list[Request]]:
    """Yield the requests of a queue in batches, in their order."""
    while queue:
        yield [queue.popleft() for _ in range(min(size, len(queue)))]


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: list[Request], tokens: int
) -> list[str]:
    """Return the continuation of each text, generated with the adapter of its request."""
    texts, names = [each.text for each in requests], [each.adapter for each in requests]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    options = {
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "do_sample": False,
        "pad_token_id": tokenizer.pad_token_id,
    }
    written = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], adapter_names=names, **options
    )
    return tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or path of a decoder")
    parser.add_argument("--adapters", type=Path, nargs="+", help="directories of adapters")
    parser.add_argument("--out", type=Path, default=Path("adapters"), help="directory in which to save random adapters")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16, help="tokens to generate per request")
    parser.add_argument("--room", type=int, default=1024, help="virtual tokens of all adapters in memory")
    options = parser.parse_args()

    torch.manual_seed(0)
    model, tokenizer = load_decoder(options.model)
    model.eval()
    folders = options.adapters or make_adapters(model, options.out)

    store = fastprefix.AdapterStore(model, tokens=options.room)
    library = {folder.name: folder for folder in folders}
    resident = fastprefix.ResidentAdapters(store, library, tokens=options.room)
    texts = [sentence.partition(" and ")[0] for sentence, _ in SENTENCES]
    pairs = zip(itertools.cycle([*library, "__base__"]), itertools.cycle(texts), strict=False)
    requests = [Request(*pair) for pair in itertools.islice(pairs, options.requests)]

    for folder in library:  # load each one once, so that the file cache holds them for both measurements below
        resident.fetch([folder])
    answers: dict[int, list[str]] = {}
    for size in (1, options.batch):
        answers[size], began = [], time.perf_counter()
        for batch in take_batches(deque(requests), size):
            resident.fetch(each.adapter for each in batch)
            answers[size] += answer(model, tokenizer, batch, options.tokens)
        seconds = time.perf_counter() - began
        speed = len(requests) * options.tokens / seconds
        how = "one request at a time" if size == 1 else f"batches of {size}, with different adapters"
        print(f"{how}: {speed:.0f} tokens per second")
    for request, text in list(zip(requests, answers[options.batch], strict=True))[:3]:
        print(f"{request.adapter}: {request.text} ... {text}")
    print(store)


if __name__ == "__main__":
    main()
