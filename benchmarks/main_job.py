"""The main job: train an encoder and a decoder on real text with every method, the frozen floor, and PEFT."""

import argparse
import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from datasets import DatasetDict
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from . import data, models, report
from .data import Batch
from .measure import BenchmarkError, Row, Work, figure_row, find_busyness, keep_going, measure, time_call
from .models import TaskKind
from .peers import FLOOR, ModelPeer, Prepared, list_peers, share_weights
from .report import BOTH, FORWARD
from .results import Record
from .suite import add_common, positive, set_up

TOKENS = 100
SHORT = 0.6  # share of TOKENS with which DePT and ADePT have as many parameters as 100 prompt tokens at width 768
PEERS = (
    FLOOR, "PT", "DePT", "ADePT", "prefix tuning", "APT",
    "PEFT PT", "PEFT PT, accelerated", "PEFT prefix tuning", "PEFT prefix tuning, accelerated",
)  # fmt: skip
NOTES = f"""\
{FLOOR}: the model without a method. Its fwd + bwd computes the gradient of the embeddings, as every method must.
Prompts and prefixes have {TOKENS} tokens by default (--tokens), those of DePT and ADePT {SHORT} times as many.
accelerated: a PEFT model after fastprefix.accelerate.
times: medians of interleaved rounds. {report.NOISY}: p20 or p80 is more than {report.NOISE:.0%} off the median.
tokens/s: tokens of the text (without padding and prompts) per second of fwd + bwd.
peak MB: memory of PyTorch's allocators that fwd + bwd need in addition to the model.
loss: loss on held-out text before and after training, with the same labels for all methods. The losses only show that
training works. `python -m benchmarks study` measures how well the methods learn, on a pretrained encoder.
trainable: includes the head of a classifier, which every method trains."""
STEPS = {"quick": 24, "quick, pretrained": 4, "cpu": 32, "cuda": 120}
"""The number of forward passes over held-out batches, and of training steps. The first tenth of them is not timed."""


class Subject(NamedTuple):
    """A frozen model on its device, the batches of all training steps, and a few held-out batches."""

    title: str
    kind: TaskKind
    model: PreTrainedModel
    train: list[Batch]
    held_out: list[Batch]

    def describe(self) -> str:
        """Return the sizes of the model and of the task in one line."""
        config, size = self.model.config, " x ".join(map(str, self.train[0]["input_ids"].shape))
        weights = "pretrained" if config.name_or_path else "RANDOM"
        padding = 1 - torch.stack([batch["attention_mask"].float().mean() for batch in self.train]).mean()
        return (
            f"{self.model.num_parameters() / 1e6:.1f} M parameters, {config.num_hidden_layers} layers of "
            f"{config.hidden_size}, {self.model.dtype}, {weights} weights; {size} tokens, {padding:.0%} "
            f"of them padding, {len(self.train)} steps"
        )


def build_subjects(options: argparse.Namespace, corpus: DatasetDict, steps: int, device: torch.device) -> list[Subject]:
    """Build an encoder and a decoder with a tokenizer trained on the corpus, or load the model of ``--model``."""
    size, classes = models.SIZES["quick" if options.quick else device.type], len(data.list_classes(corpus))
    size = size._replace(length=options.length or size.length, rows=options.rows or size.rows)
    if name := options.model:
        kind, words = models.find_kind(name), models.load_tokenizer(name)
        if kind == "classification" and not classes:
            raise BenchmarkError(
                f"--model {name} is a classifier, but the text has no column of labels. Select one with --label-column"
            )
        model = models.place(models.load_model(name, kind, classes, words.pad_token_id, options.seed), device)
        return [Subject(name, kind, model, *data.build_task(kind, corpus, words, size, steps, device, options.seed))]
    words = data.train_tokenizer(list(corpus["train"]["text"]), size.vocabulary)
    kinds: dict[str, TaskKind] = {"encoder, BERT shape": "classification"} if classes else {}
    subjects = []
    for title, kind in {**kinds, "decoder, Llama shape": "causal_lm"}.items():
        prompt = max(options.tokens, models.LONGEST_PROMPT)
        config = models.configure(kind, size, words.pad_token_id, words.eos_token_id, classes, prompt)
        batches = data.build_task(kind, corpus, words, size, steps, device, options.seed)
        subjects.append(Subject(title, kind, models.build(kind, config, device, options.seed), *batches))
    return subjects


class Trainee:
    """A prepared model with its optimizer and batches."""

    def __init__(self, prepared: Prepared, subject: Subject) -> None:
        self.prepared, self.model, self.subject = prepared, prepared.model, subject
        self.batches, self.held_out = itertools.cycle(subject.train), itertools.cycle(subject.held_out)
        self.losses: list[Tensor] = []  # on held-out text
        # The floor of a language model trains nothing.
        self.optimizer = torch.optim.AdamW(prepared.groups, weight_decay=0.0) if prepared.groups else None

    def run_both(self, batch: Batch) -> None:
        """Run forward and backward."""
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        self.model(**batch).loss.backward()

    def train(self) -> float:
        """Run a training step. Return the seconds without the optimizer, which is the same for all peers."""
        (seconds,) = time_call(partial(self.run_both, next(self.batches)), self.subject.model.device)
        if self.optimizer is not None:
            self.optimizer.step()
        return seconds

    @torch.no_grad()
    def evaluate(self) -> None:
        """Run a forward pass on one held-out batch."""
        self.model.eval()
        self.losses.append(self.model(**next(self.held_out)).loss)

    def list_rows(self, row: Callable[..., Row]) -> list[Row]:
        """Return the losses on held-out text and the number of trained parameters."""
        passes, steps = len(self.subject.held_out), len(self.subject.train)
        for _ in range(passes):
            self.evaluate()
        first, last = (torch.stack(part).mean().item() for part in (self.losses[:passes], self.losses[-passes:]))
        return [
            row("training", "parameters", self.prepared.count_trainable()),
            row("held out", "loss", last, samples=[first, last], steps=[0, steps]),
        ]


def compare_peers(subject: Subject, peers: list[ModelPeer], seed: int) -> tuple[list[Row], list[Row]]:
    """Train all peers alternately, each on a copy of one model, and evaluate them before and after.

    Both training and evaluation are timed. In each round, every peer runs the same batch.
    """
    case, steps = {"model": subject.title}, len(subject.train)
    trainees, works, faults = dict[str, Trainee](), dict[str, Work](), list[Row]()
    for peer in peers:
        torch.manual_seed(seed)
        with keep_going(lambda _, found: faults.extend(found), case, peer.name, "set-up"):
            trainee = trainees[peer.name] = Trainee(peer.prepare(share_weights(subject.model)), subject)
            works[peer.name] = Work(peer.role, {FORWARD: trainee.evaluate, BOTH: trainee.train})
    rounds = partial(tqdm, range(steps), desc=subject.title, unit="round", leave=False, disable=None)
    rows, more = measure(case, works, subject.model.device, rounds, warmup=steps // 10)
    for name in works.keys() - {of["peer"] for of in more}:
        rows += trainees[name].list_rows(partial(figure_row, case, name, works[name].role))
    return rows, faults + more


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    data.add_arguments(parser)
    parser.add_argument("--model", metavar="NAME", help="a name on the hub or a folder, instead of the two models")
    parser.add_argument("--steps", type=positive, help="training steps")
    parser.add_argument("--length", type=positive, metavar="N", help="tokens per row. Longer texts are truncated")
    parser.add_argument("--rows", type=positive, metavar="B", help="rows per batch")
    parser.add_argument(
        "--tokens", type=positive, default=TOKENS, metavar="P", help=f"prompt and prefix tokens (default: {TOKENS})"
    )
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> int:
    """Run the main job. Return 0 if every peer succeeded, 1 otherwise."""
    start, device = time.perf_counter(), set_up(options)
    quick = "quick, pretrained" if options.model else "quick"
    steps = options.steps or STEPS[quick if options.quick else device.type]
    name, corpus = data.read_corpus(options)
    counts = ", ".join(f"{part} {len(rows):,} passages" for part, rows in corpus.items())
    text = f"{name}: {counts}, {len(data.list_classes(corpus))} classes"
    arguments = {name: value for name, value in vars(options).items() if name != "out"}
    record = Record.start("main-job", device, options.quick, arguments=arguments, corpus=text, models=dict[str, Any]())
    subjects, facts = build_subjects(options, corpus, steps, device), record.environment
    versions = ", ".join(f"{name} {facts[name]}" for name in ("fastprefix", "torch", "transformers", "peft"))
    print(f"text    {text}\ndevice  {facts['device_name']}, {facts['threads']} threads\nwith    {versions}")
    if busy := find_busyness(facts):
        print(f"warning {busy}. Measure again before you rely on this", flush=True)
    for subject in subjects:
        N, P = subject.train[0]["input_ids"].shape[1], options.tokens
        peers = list_peers(PEERS, subject.kind, P, N, max(1, round(SHORT * P)))
        tokens = sum(float(batch["attention_mask"].sum()) for batch in subject.train) / steps  # no padding, no prompts
        record.settings["models"][subject.title] = {"description": subject.describe(), "tokens_per_step": tokens}
        measured = compare_peers(subject, peers, options.seed)
        record.settings["seconds"] = time.perf_counter() - start
        record.add(*measured, options.out)
        table = report.tabulate_methods(record, subject.title, report.FULL).markdown()
        print(f"\n**{subject.title}**: {subject.describe()}\n\n{table}", flush=True)
    report.draw(record, options.out / "main_job.png")
    print(f"\n{NOTES}\n\n{record.settings['seconds']:.0f} s; JSON and plot in {options.out}")
    return record.conclude(options.out)
