"""The main job: train every method on real text, on an encoder and on a decoder, beside the frozen floor and PEFT."""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

import fastprefix

from . import data, models, report
from .data import Corpus, Task
from .measure import Row, added_peak, fault, figure_row, find_busyness, interleave, time_call, timed_row
from .models import Size, TaskKind
from .peers import ADEPT_WIDTH, DEPT_RANK, FLOOR, PREFIX_RATE, ModelPeer, Prepared, attach, freeze, list_peft_peers
from .report import BOTH, FORWARD
from .results import Record, write_text
from .suite import QUICK_NOTE, add_common, positive, set_up

DESCRIPTION = "Train an encoder and a decoder on real text with every method: speed, memory and loss in one table each."
TOKENS, SHORT = 100, 60  # DePT and ADePT have the budget of 100 prompt tokens at a width of 768
NOTES = f"""\
{FLOOR}: the model itself without prompt or prefix; its fwd + bwd brings the gradient down to the embeddings, as
every method must. Medians of interleaved rounds; tokens/s of the text (no padding, no prompt) in fwd + bwd; peak MB:
what fwd + bwd add to the model, by PyTorch's allocators; loss: on held-out text, before and after training. The head of
a classifier is trained with every method, and counted. {report.NOISY}: p20 or p80 is more than {report.NOISE:.0%} off
the median."""


class Rounds(NamedTuple):
    """Hold the numbers of training steps, of evaluations after the first one, and of steps whose time is dropped."""

    steps: int
    evaluations: int
    warmup: int


ROUNDS = {"quick": Rounds(24, 4, 2), "cpu": Rounds(32, 4, 3), "cuda": Rounds(120, 10, 10)}


@dataclass(frozen=True)
class Subject:
    """Hold a frozen model on its device, and its task."""

    title: str
    model: PreTrainedModel
    task: Task
    weights: str = "RANDOM weights"

    def describe(self) -> str:
        config, dtype = self.model.config, str(self.model.dtype).removeprefix("torch.")
        shape = f"{config.num_hidden_layers} layers of {config.hidden_size}, {dtype}"
        parameters = f"{self.model.num_parameters() / 1e6:.1f} M parameters"
        return f"{parameters}, {shape}, {self.weights}; {self.task.describe()}"


def list_peers(kind: TaskKind, length: int) -> list[ModelPeer]:
    """Return the floor, the methods of this package, and PEFT's."""
    dept = fastprefix.DePTConfig(SHORT, rank=DEPT_RANK, max_length=length)
    adept = fastprefix.ADePTConfig(SHORT, bottleneck_dim=ADEPT_WIDTH)
    prefix = partial(attach, config=fastprefix.PrefixTuningConfig(TOKENS), rate=PREFIX_RATE)
    return [
        ModelPeer(FLOOR, "floor", freeze),
        ModelPeer(f"PT ({TOKENS})", "ours", partial(attach, config=fastprefix.PromptTuningConfig(TOKENS))),
        ModelPeer(f"DePT ({SHORT}, r={DEPT_RANK})", "ours", partial(attach, config=dept)),
        ModelPeer(f"ADePT ({SHORT}, r={ADEPT_WIDTH})", "ours", partial(attach, config=adept)),
        ModelPeer(f"prefix tuning ({TOKENS})", "ours", prefix),
        ModelPeer(f"APT ({TOKENS})", "ours", partial(attach, config=fastprefix.APTConfig(TOKENS), rate=PREFIX_RATE)),
        *list_peft_peers(kind, TOKENS, f"PEFT prompt tuning ({TOKENS})", f"PEFT prefix tuning ({TOKENS})"),
    ]


def build_subjects(
    options: argparse.Namespace, corpus: Corpus, size: Size, steps: int, device: torch.device
) -> list[Subject]:
    """Build an encoder and a decoder with a tokenizer trained on the corpus, or load the model of ``--model``."""
    if options.model:
        kind, words = models.find_kind(options.model), models.load_tokenizer(options.model)
        model = models.load_model(options.model, kind, len(corpus.classes), words.pad_token_id, options.seed)
        weights = "weights of the folder" if Path(options.model).is_dir() else "pretrained weights"
        task = data.build_task(kind, corpus, words, size, steps, device, options.seed)
        return [Subject(options.model, models.place(model, device), task, weights)]
    words = data.train_tokenizer(list(corpus.train["text"]), size.vocabulary)
    kinds: dict[str, TaskKind] = {"encoder, BERT shape": "classification"} if corpus.classes else {}
    subjects = []
    for title, kind in {**kinds, "decoder, Llama shape": "causal_lm"}.items():
        config = models.configure(kind, size, words.pad_token_id, words.eos_token_id, len(corpus.classes))
        task = data.build_task(kind, corpus, words, size, steps, device, options.seed)
        subjects.append(Subject(title, models.build(kind, config, device, options.seed), task))
    return subjects


class Trainee:
    """Train and evaluate one prepared model. Steps and passes are jobs for ``interleave``."""

    def __init__(self, prepared: Prepared, task: Task) -> None:
        self.prepared, self.task, self.device = prepared, task, task.train[0]["input_ids"].device
        self.loss: Tensor
        self.losses: list[float] = []
        self.held_out_losses: list[float] = []
        # The floor of a language model trains nothing.
        self.optimizer = torch.optim.AdamW(prepared.groups, weight_decay=0.0) if prepared.groups else None

    def run_forward(self, batch: data.Batch) -> Tensor:
        """Return the loss."""
        self.loss = self.prepared.model(**batch).loss
        return self.loss

    def run_both(self, batch: data.Batch) -> None:
        """Run forward and backward."""
        self.run_forward(batch).backward()

    def train(self, i: int) -> float:
        """Do training step i. The seconds are those of forward + backward, for all peers use the same optimizer."""
        self.prepared.model.train()
        seconds = time_call(partial(self.run_both, self.task.train[i]), self.device)
        self.losses.append(self.loss.item())
        if self.optimizer is not None:
            self.optimizer.step()
        self.prepared.model.zero_grad(set_to_none=True)
        return seconds

    @torch.no_grad()
    def evaluate(self, i: int) -> float:
        """Do a forward pass over one held-out batch."""
        self.prepared.model.eval()
        batch = self.task.held_out[i % len(self.task.held_out)]
        seconds = time_call(partial(self.run_forward, batch), self.device)
        self.held_out_losses.append(self.loss.item())
        return seconds

    def measure_peak(self) -> int:
        """Return the bytes that forward + backward add at their peak, after training."""
        self.prepared.model.train()
        peak = added_peak(partial(self.run_both, self.task.train[0]), self.device)
        self.prepared.model.zero_grad(set_to_none=True)
        return peak


def compare_peers(
    subject: Subject, peers: list[ModelPeer], rounds: Rounds, seed: int, tick: Callable[[str], object]
) -> tuple[list[Row], list[Row]]:
    """Train all peers side by side, each on a copy of one model, and evaluate them before, between and after.

    Training and evaluation are what is timed: in each round every peer does the same batch.
    """
    task, case, passes = subject.task, {"model": subject.title}, len(subject.task.held_out)
    trainees: dict[str, Trainee] = {}
    rows, faults = list[Row](), list[Row]()
    seconds: dict[str, dict[str, list[float]]] = {peer.name: {FORWARD: [], BOTH: []} for peer in peers}

    def run(direction: str, numbers: range, warmup: int) -> None:
        jobs = {name: of.train if direction == BOTH else of.evaluate for name, of in trainees.items()}
        samples, errors = interleave(jobs, numbers, warmup=warmup, tick=tick)
        for name, of_peer in samples.items():
            seconds[name][direction] += of_peer
        for name, error in errors.items():
            del trainees[name]
            faults.append(fault(case, name, direction, error))

    for peer in peers:
        torch.manual_seed(seed)
        try:
            trainees[peer.name] = Trainee(peer.prepare(models.share_weights(subject.model)), task)
        except Exception as error:  # the failure of one peer must not lose the results of the others
            faults.append(fault(case, peer.name, "set-up", error))
    parts = min(rounds.evaluations, rounds.steps)
    cuts = [rounds.steps * k // parts for k in range(parts + 1)]
    for k, stop in enumerate(cuts):
        run(BOTH, range(cuts[k - 1] if k else 0, stop), min(rounds.warmup, rounds.steps - 1))
        run(FORWARD, range(k * passes, (k + 1) * passes), passes)
    for peer in peers:
        if of := trainees.get(peer.name):
            row = partial(figure_row, case, peer.name, peer.role)
            held_out = torch.tensor(of.held_out_losses).view(-1, passes).mean(1).tolist()
            rows += [timed_row(case, peer.name, peer.role, *timed) for timed in seconds[peer.name].items()]
            rows += [
                row(BOTH, "bytes", of.measure_peak()),
                row("training", "parameters", of.prepared.count_trainable()),
                row("training", "loss", of.losses[-1], samples=of.losses),
                row("held out", "loss", held_out[-1], samples=held_out, steps=cuts),
            ]
    return rows, faults


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", type=Path, metavar="FILE", help="text from a .tsv (with header) or .jsonl file")
    source.add_argument("--dataset", metavar="NAME[/CONFIG]", help="text from a data set of the Hugging Face hub")
    parser.add_argument("--text-column", metavar="NAME", help="column of the text (default: guessed)")
    parser.add_argument("--label-column", metavar="NAME", help="column of the labels (default: guessed)")
    parser.add_argument("--model", metavar="NAME", help="a model of the hub or a local folder, in place of the two")
    parser.add_argument("--steps", type=positive, help="training steps")
    parser.add_argument("--seed", type=int, default=0)


def read_corpus(options: argparse.Namespace) -> Corpus:
    columns = (options.text_column, options.label_column)
    if options.data:
        return data.build_corpus(options.data.name, data.read_file(options.data, "--data", *columns), options.seed)
    if options.dataset:
        return data.build_corpus(options.dataset, data.read_hub(options.dataset, *columns), options.seed)
    name = "Python documentation (pydoc_data.topics)"
    return data.build_corpus(name, data.read_python_documentation(), options.seed)


def run(options: argparse.Namespace) -> int:
    """Run the main job. Return 0 if every peer succeeded, 1 otherwise."""
    start, device = time.perf_counter(), set_up(options)
    size_name = "quick" if options.quick else device.type
    size, rounds = models.SIZES[size_name], ROUNDS[size_name]
    rounds = rounds._replace(steps=options.steps or rounds.steps)
    models.prepare_hub(options.dataset or options.model)
    corpus = read_corpus(options)
    arguments: dict[str, Any] = {name: value for name, value in vars(options).items() if name != "out"}
    record = Record.start(
        "main-job", device, options.quick, arguments=arguments, corpus=corpus.describe(), models=dict[str, Any]()
    )
    subjects, facts = build_subjects(options, corpus, size, rounds.steps, device), record.environment
    versions = ", ".join(f"{name} {facts[name]}" for name in ("fastprefix", "torch", "transformers", "peft"))
    print(
        f"text    {corpus.describe()}\ndevice  {facts['device_name']}, {facts['threads']} threads\nwith    {versions}"
    )
    if busy := find_busyness(facts):
        print(f"warning {busy}: measure again before you believe this", flush=True)
    sections: list[str] = []
    for subject in subjects:
        task = subject.task
        peers = list_peers(task.kind, task.train[0]["input_ids"].shape[1])
        about = {"description": subject.describe(), "tokens_per_step": task.tokens_per_step()}
        record.settings["models"][subject.title] = about
        ticks = len(peers) * (rounds.steps + (min(rounds.evaluations, rounds.steps) + 1) * len(task.held_out))
        with tqdm(total=ticks, desc=subject.title, unit="step", leave=False, file=sys.stderr) as bar:
            measured = compare_peers(subject, peers, rounds, options.seed, lambda _, bar=bar: bar.update())  # type: ignore[misc]
        record.settings["seconds"] = time.perf_counter() - start
        record.add(measured, options.out)
        sections.append(f"**{subject.title}**: {subject.describe()}\n\n{report.list_tables(record)[-1]}")
        print(f"\n{sections[-1]}", flush=True)
    remarks = [NOTES, *filter(None, [busy]), *([QUICK_NOTE] if options.quick else [])]
    write_text("\n\n".join([*sections, *remarks]) + "\n", options.out / "main_job.md")
    draw(record, options.out)
    print(f"\n{NOTES}\n\n{record.settings['seconds']:.0f} s; JSON, tables and plots in {options.out}")
    return record.conclude(options.out)


def draw(record: Record, out: Path) -> None:
    """Write the plots of times and of losses."""
    report.PLOTS["main-job"][""].draw(record, out / "main_job_time.png")
    curves = [row for row in record.rows if row["direction"] == "held out"]
    panels: dict[str, pd.DataFrame] = {}
    for title in record.settings["models"]:
        of_model = [row for row in curves if row["model"] == title]
        panels[title] = pd.DataFrame({row["peer"]: pd.Series(row["samples"], row["steps"]) for row in of_model})
    report.draw_panels(panels, out / "main_job_loss.png", "step", "loss on held-out text")
