"""The study: how well the methods learn a classification, at equal budgets and over several seeds.

It trains full fine-tuning, the head of the classifier alone, and every method with ``transformers.Trainer``. Three
learning rates per method are scored on the dev split after a short training, and the best one is used for all seeds.
Training ends early if the dev split improves no more, and the best weights are tested once. A finished training is a
file in ``OUT/runs``, named by a digest of all that it depends on, so that an interrupted study continues.
"""

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import fastprefix
from fastprefix.methods import MethodConfig

from . import data, models
from .measure import BenchmarkError, added_peak, describe_environment, find_version
from .options import DEFAULT_OUT, add_common, is_from_hub, positive, prepare_hub, set_up
from .peers import Prepared, attach, freeze_body, group
from .report import Plot, Table, number
from .results import write_text

DESCRIPTION = "Train a pretrained encoder on labelled text with full fine-tuning and every method: test accuracy."
WARMUP = 0.06  # of the steps; then the rate falls to 0 linearly
SPLIT_OFF, SPLIT_SEED = 0.1, 0  # of the training file, for dev and for test, where no file is given
SHORT_PROMPT = 0.6  # of the tokens of the budget: DePT and ADePT with 60 of 100, as published
BOTTLENECK = 8  # of residual networks at the equal budget, where the default of 128 would leave nothing for the rest
NOTES = """\
Mean and standard deviation over the seeds. trainable: without the head of the classifier, which every method trains.
rates: of the prompt / of the rest, chosen on the dev split. best step: with the best dev accuracy, whose weights are
tested. ms a step: median of forward, backward and optimizer. peak MB: what forward and backward of the longest batch
add to the model, by PyTorch's allocators."""
DEFAULTS: dict[str, Any] = {
    "steps": 600, "length_steps": 600, "search_steps": 150, "evaluate_every": 50, "patience": 4, "rows": 16,
    "max_length": 64, "head_rate": 1e-2, "train_examples": 4000, "dev_examples": 500, "test_examples": None, "seeds": 3,
    "lengths": (10, 50, 100, 200), "length_seeds": None, "prompt_tokens": 100, "prefix_tokens": 20,
}  # fmt: skip
QUICK = DEFAULTS | {
    "steps": 4, "length_steps": 4, "search_steps": 2, "evaluate_every": 2, "patience": 2, "rows": 4, "max_length": 16,
    "train_examples": 32, "dev_examples": 16, "test_examples": 16, "seeds": 2, "lengths": (2, 4), "prompt_tokens": 20,
    "prefix_tokens": 16,
}  # fmt: skip
SHARED = ("evaluate_every", "patience", "rows", "max_length", "head_rate")  # change the outcome of every training


class Rates(NamedTuple):
    """Learning rates of the prompt, of the gates, and of everything else but the head. None: there is nothing of it."""

    main: float | None = None
    prompt: float | None = None
    gate: float | None = None


class Entry(NamedTuple):
    """A method before it is fitted to a model, a budget and the longest input. The published rates come first."""

    name: str
    group: str
    candidates: tuple[Rates, ...]
    make: Callable[[PreTrainedModel, int, int], MethodConfig] | None = None


class StudyPeer(NamedTuple):
    """A row of a table. ``config`` is None for the whole model ("full") and for its head alone ("head")."""

    key: str
    group: str = "reference"
    config: MethodConfig | None = None

    @property
    def entry(self) -> Entry:
        return ENTRIES[self.key]


def count_parameters(model: PreTrainedModel, config: MethodConfig) -> int:
    """Count the parameters of a method on a model, without the head of a classifier."""
    attached = fastprefix.attach(models.share_weights(model), config)
    return fastprefix.count_parameters(attached).groups["fastprefix"]


def find_largest(model: PreTrainedModel, make: Callable[[int], MethodConfig], budget: int) -> int:
    """Return the largest size within a budget. Parameters grow by the same number with each step of the size."""
    one, two = (count_parameters(model, make(size)) for size in (1, 2))
    if one > budget:
        raise ValueError(f"the smallest has {one:,} parameters, got {budget:,}")
    return 1 + (budget - one) // (two - one)


def fill(make: Callable[[int], MethodConfig]) -> Callable[[PreTrainedModel, int, int], MethodConfig]:
    """Use as many tokens as the budget allows."""
    return lambda model, budget, length: make(find_largest(model, make, budget))


def make_dept(model: PreTrainedModel, budget: int, length: int) -> MethodConfig:
    tokens = max(1, round(SHORT_PROMPT * find_largest(model, fastprefix.PromptTuningConfig, budget)))
    return fastprefix.DePTConfig.for_budget(model, trainable=budget, num_virtual_tokens=tokens, max_length=length)


def make_adept(model: PreTrainedModel, budget: int, length: int) -> MethodConfig:
    tokens = max(1, round(SHORT_PROMPT * find_largest(model, fastprefix.PromptTuningConfig, budget)))
    return fastprefix.ADePTConfig.for_budget(model, trainable=budget, num_virtual_tokens=tokens)


def widen(residual: bool, gate: bool) -> Callable[[PreTrainedModel, int, int], MethodConfig]:
    """Use as many tokens as prefix tuning, and the widest network within the budget, although export drops it."""

    def make(model: PreTrainedModel, budget: int, length: int) -> MethodConfig:
        options: dict[str, Any] = {"bottleneck_dim": BOTTLENECK, "residual": residual, "gate": gate}
        tokens = find_largest(model, fastprefix.PrefixTuningConfig, budget)
        width = find_largest(model, lambda h: fastprefix.ResidualPrefixConfig(tokens, hidden_dim=h, **options), budget)
        return fastprefix.ResidualPrefixConfig(tokens, hidden_dim=width, **options)

    return make


NETWORKS = {"mlp": (False, False), "mlp+gate": (False, True), "residual": (True, False), "residual+gate": (True, True)}
PREFIX_RATES = (Rates(1e-2), Rates(3e-2), Rates(1e-1))
GATED_RATES = (Rates(3e-2, gate=1e-3), Rates(1e-1, gate=1e-3), Rates(1e-1, gate=1e-4))
NETWORK_RATES = (Rates(1e-3), Rates(3e-3), Rates(1e-2))
PROMPT_RATES = (Rates(prompt=0.3), Rates(prompt=0.03), Rates(prompt=0.003))
DEPT_RATES = (Rates(1e-3, 0.3), Rates(1e-3, 0.03), Rates(5e-3, 0.003))
ADEPT_RATES = (Rates(1e-4, 0.3), Rates(1e-3, 0.03), Rates(1e-3, 0.003))
ENTRIES = {
    "full": Entry("full fine-tuning", "reference", (Rates(2e-5), Rates(5e-5), Rates(1e-4))),
    "head": Entry("head alone", "reference", (Rates(1e-3), Rates(1e-2), Rates(3e-2))),
    "pt": Entry("PT", "prompt", PROMPT_RATES, fill(fastprefix.PromptTuningConfig)),
    "dept": Entry("DePT", "prompt", DEPT_RATES, make_dept),
    "adept": Entry("ADePT", "prompt", ADEPT_RATES, make_adept),
    "prefix": Entry("prefix tuning", "prefix", PREFIX_RATES, fill(fastprefix.PrefixTuningConfig)),
    "apt": Entry("APT", "prefix", PREFIX_RATES, fill(fastprefix.APTConfig)),
    "apt-gates": Entry("APT, slow gates", "prefix", GATED_RATES, fill(fastprefix.APTConfig)),
    "mlp": Entry("MLP prefix", "prefix", NETWORK_RATES, widen(*NETWORKS["mlp"])),
    "mlp+gate": Entry("MLP prefix + gate", "prefix", NETWORK_RATES, widen(*NETWORKS["mlp+gate"])),
    "residual": Entry("residual prefix", "prefix", NETWORK_RATES, widen(*NETWORKS["residual"])),
    "residual+gate": Entry("residual prefix + gate", "prefix", NETWORK_RATES, widen(*NETWORKS["residual+gate"])),
}
LENGTH_METHODS = ("prefix", *NETWORKS)
COMPARED = (  # the findings of the papers: the first above the second
    ("DePT", "PT"), ("ADePT", "DePT"), ("ADePT", "PT"), ("APT", "prefix tuning"), ("APT, slow gates", "prefix tuning"),
    ("residual prefix + gate", "MLP prefix"), ("residual prefix + gate", "prefix tuning"),
)  # fmt: skip


def fit_peer(key: str, model: PreTrainedModel, options: argparse.Namespace) -> StudyPeer:
    """Return a row of the table, as large as the budget of its group allows: that of a plain prompt or plain prefix.

    A prompt as large as a usual prefix would have hundreds of tokens, hence two budgets.
    """
    entry = ENTRIES[key]
    if entry.make is None:
        return StudyPeer(key)
    prompt, prefix = fastprefix.PromptTuningConfig, fastprefix.PrefixTuningConfig
    of_group = {"prompt": prompt(options.prompt_tokens), "prefix": prefix(options.prefix_tokens)}
    try:
        budget = count_parameters(model, of_group[entry.group])
        return StudyPeer(key, entry.group, entry.make(model, budget, options.max_length))
    except ValueError as error:
        raise BenchmarkError(f"{entry.name} does not fit --{entry.group}-tokens ({error}); give more") from error


def size_peer(key: str, tokens: int) -> StudyPeer:
    """Return a prefix method with so many tokens, whatever it costs. Networks have the default widths."""
    if key not in NETWORKS:
        return StudyPeer(key, "length", fastprefix.PrefixTuningConfig(tokens))
    residual, gate = NETWORKS[key]
    return StudyPeer(key, "length", fastprefix.ResidualPrefixConfig(tokens, residual=residual, gate=gate))


def prepare(peer: StudyPeer, rates: Rates, model: PreTrainedModel, head_rate: float) -> Prepared:
    """Return the model with what is trained, and its learning rates."""
    if peer.config is not None:
        return attach(model, peer.config, rates.main or 0.0, rates.prompt or 0.0, head_rate, rates.gate)
    assert rates.main is not None
    head = models.head_parameters(model)
    if peer.key == "head":
        freeze_body(model)
        return Prepared(model, group(head, rates.main))
    body = [p for p in model.parameters() if p not in set(head)]
    return Prepared(model, group(body, rates.main) + group(head, head_rate))


class Watcher(TrainerCallback):
    """Time the steps, keep the best weights in memory, and stop if the dev split improves no more."""

    def __init__(self, model: PreTrainedModel, patience: int) -> None:
        self.parameters, self.patience = [p for p in model.parameters() if p.requires_grad], patience
        self.seconds: list[float] = []
        self.curve: list[dict[str, float]] = []
        self.best: tuple[tuple[float, float], int, list[Tensor]] | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        control.should_evaluate |= state.global_step == state.max_steps

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        score = (metrics["eval_accuracy"], -metrics["eval_loss"])
        self.curve.append({"step": state.global_step, "accuracy": score[0], "loss": -score[1]})
        if self.best is None or score > self.best[0]:
            self.best, self.waited = (score, state.global_step, [p.detach().clone() for p in self.parameters]), 0
        else:
            self.waited += 1
            control.should_training_stop |= self.waited >= self.patience

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best weights back."""
        assert self.best is not None
        for parameter, value in zip(self.parameters, self.best[2], strict=True):
            parameter.copy_(value)


def measure_accuracy(predicted: Any) -> dict[str, float]:
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


class Study(NamedTuple):
    """Hold what all trainings share: the model by seed, its tokenizer, the texts as token ids, options, device, digests."""

    load: Callable[[int], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    texts: dict[str, Dataset]
    options: argparse.Namespace
    device: torch.device
    subject: dict[str, Any]

    def train(self, peer: StudyPeer, rates: Rates, seed: int, search: bool = False) -> dict[str, Any]:
        """Return the outcome of a training, which is read from its file if it was finished before."""
        options = vars(self.options)
        steps = options["length_steps" if peer.group == "length" else "steps"]
        steps, kind = (min(options["search_steps"], steps), "search") if search else (steps, "run")
        config = peer.config.to_dict() if peer.config else peer.key
        about = {"config": config, "rates": rates._asdict(), "seed": seed, "kind": kind, "steps": steps, **self.subject}
        about |= {name: options[name] for name in SHARED}
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        path: Path = self.options.out / "runs" / f"{peer.key}-{kind}-seed{seed}-{key}.json"
        if not path.exists():
            print(f"{peer.entry.name}, {kind}, seed {seed}, {steps} steps", flush=True)
            write_text(json.dumps(about | {"outcome": self.run(peer, rates, seed, search, steps)}), path)
        outcome: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["outcome"]
        return outcome

    def run(self, peer: StudyPeer, rates: Rates, seed: int, search: bool, steps: int) -> dict[str, Any]:
        """Train, stop early, and test the best weights."""
        torch.manual_seed(seed)
        model, options, collate = self.load(seed), self.options, DataCollatorWithPadding(self.tokenizer)
        prepared, watcher = prepare(peer, rates, model, options.head_rate), Watcher(model, options.patience)
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder, max_steps=steps, per_device_train_batch_size=options.rows, per_device_eval_batch_size=64,
                lr_scheduler_type="linear", warmup_steps=round(WARMUP * steps), max_grad_norm=1.0, seed=seed,
                eval_strategy="steps", eval_steps=options.evaluate_every, save_strategy="no", logging_strategy="no",
                report_to=[], disable_tqdm=True, remove_unused_columns=False, use_cpu=self.device.type == "cpu",
            )  # fmt: skip
            trainer = Trainer(
                model, arguments, collate, self.texts["train"], self.texts["dev"], callbacks=[watcher],
                compute_metrics=measure_accuracy,
                optimizers=(torch.optim.AdamW(prepared.groups, weight_decay=0.0), None),
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            watcher.restore()
            predicted: Any = None if search else trainer.predict(self.texts["test"])
        assert watcher.best is not None
        (accuracy, negative_loss), step, _ = watcher.best
        head = sum(p.numel() for p in models.head_parameters(model))
        batch: Any = collate(sorted(self.texts["train"], key=lambda row: len(row["input_ids"]))[-options.rows :])
        work = lambda: model.train()(**batch.to(self.device)).loss.backward()  # noqa: E731
        return {
            "dev_accuracy": accuracy, "dev_loss": -negative_loss, "best_step": step, "steps": len(watcher.seconds),
            "test_accuracy": None if search else predicted.metrics["test_accuracy"], "trainable": prepared.count_trainable() - head, "head": head,
            "seconds_a_step": statistics.median(watcher.seconds), "curve": watcher.curve,
            "peak_bytes": None if search else added_peak(work, self.device),
        }  # fmt: skip


def load_texts(options: argparse.Namespace) -> tuple[dict[str, Dataset], list[str]]:
    """Return the three parts and the classes. Parts without a file are split off from the training file."""
    parts: dict[str, Dataset] = {}
    for part, path in (("train", options.data), ("dev", options.dev), ("test", options.test)):
        option = "--data" if part == "train" else f"--{part}"
        if path is not None:
            parts[part] = data.read_file(path, option, options.text_column, options.label_column)
            if "label" not in parts[part].column_names:
                raise BenchmarkError(f"{option} {path}: name the column of the labels with --label-column")
            continue
        count = round(SPLIT_OFF * len(parts["train"]))
        if count < 1:
            raise BenchmarkError(f"{options.data.name}: too few examples to split some off; give a file with --{part}")
        split = parts["train"].train_test_split(count, seed=SPLIT_SEED)
        parts["train"], parts[part] = split["train"], split["test"]
    classes = data.list_classes(options.data.name, parts["train"])
    if len(classes) < 2:
        raise BenchmarkError(f"{options.data.name}: two or more classes are needed, got {classes}")
    for part, rows in parts.items():
        if unknown := sorted(set(rows["label"]) - set(classes)):
            raise BenchmarkError(f"--{part}: labels that the training file does not have: {unknown}")
        drawn = rows.shuffle(seed=SPLIT_SEED).select(
            range(min(len(rows), getattr(options, f"{part}_examples") or len(rows)))
        )
        parts[part] = data.number_labels(drawn, classes)
    return parts, classes


def set_up_study(options: argparse.Namespace, device: torch.device) -> tuple[Study, dict[str, Any]]:
    """Read the texts, load the model, and begin the document of results."""
    texts, classes = load_texts(options)
    if is_from_hub(options.model):
        prepare_hub()
    words = models.load_tokenizer(options.model)

    def load(seed: int) -> PreTrainedModel:
        model = models.load_model(options.model, "classification", len(classes), words.pad_token_id, seed)
        nn.Module.to(model, device)
        return model

    def encode(part: Dataset) -> Dataset:
        rows = words(list(part["text"]), truncation=True, max_length=options.max_length)
        columns = {name: rows[name] for name in ("input_ids", "attention_mask")}
        return Dataset.from_dict({**columns, "labels": part["label"]})

    model, encoded = load(0), {part: encode(rows) for part, rows in texts.items()}
    weights = hashlib.sha256(json.dumps(model.config.to_diff_dict(), sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        weights.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    digest = hashlib.sha256(json.dumps([part.to_dict() for part in encoded.values()]).encode()).hexdigest()
    software = {package: find_version(package) for package in ("fastprefix", "torch", "transformers")}
    subject = {"model": weights.hexdigest(), "texts": digest, "software": software, "device": device.type}
    counts = ", ".join(f"{len(rows):,} {part}" for part, rows in texts.items())
    settings = ", ".join(f"{name} {getattr(options, name)}" for name in ("steps", "search_steps", "seeds", *SHARED))
    introduction = f"text    {options.data.name}: {counts} examples\nmodel   {options.model}\ntrain   {settings}"
    arguments = {name: value for name, value in vars(options).items() if name != "out"}
    head = {"suite": "study", "arguments": arguments, "environment": describe_environment(device)}
    document = {**head, "introduction": introduction, "table": [], "lengths": {}}
    return Study(load, words, encoded, options, device, subject), document


def carry_out(study: Study, document: dict[str, Any], failures: list[str]) -> None:
    """Search rates with the first seed, then train every seed. An interrupted study has some seeds of all methods."""
    options, model = study.options, study.load(0)
    jobs: list[tuple[StudyPeer, Rates | None, dict[str, Any]]] = []

    def attempt(peer: StudyPeer, rates: Rates, seed: int, search: bool = False) -> dict[str, Any] | None:
        try:
            return study.train(peer, rates, seed, search)
        except Exception:  # the failure of one method must not lose the results of the others
            failures.append(f"{peer.entry.name}, seed {seed}, failed:\n{traceback.format_exc()}")
            return None

    def add_rows(searched: StudyPeer, peers: list[StudyPeer]) -> list[dict[str, Any]]:
        """Search rates for one peer, and add rows that are trained with the best of them."""
        found = [(attempt(searched, rates, 0, search=True), rates) for rates in searched.entry.candidates]
        scored = [(outcome["dev_accuracy"], -outcome["dev_loss"], rates) for outcome, rates in found if outcome]
        best = max(scored, key=lambda score: score[:2])[2] if scored else None
        about = {
            "method": searched.entry.name, "group": searched.group, "rates": best._asdict() if best else None,
            "search": [{"rates": rates._asdict(), "dev_accuracy": accuracy} for accuracy, _, rates in scored],
        }  # fmt: skip
        rows = [{**about, "config": peer.config.to_dict() if peer.config else None, "runs": {}} for peer in peers]
        jobs.extend((peer, best, row) for peer, row in zip(peers, rows, strict=True))
        return rows

    def run_seeds(seeds: int) -> None:
        for seed in range(seeds):
            for peer, rates, row in jobs:
                if rates is not None and (outcome := attempt(peer, rates, seed)) is not None:
                    row["runs"][str(seed)] = outcome
        jobs.clear()

    for key in dict.fromkeys(options.methods):
        peer = fit_peer(key, model, options)
        document["table"] += add_rows(peer, [peer])
    run_seeds(options.seeds)
    for key in options.length_methods if options.lengths else ():
        middle = sorted(options.lengths)[(len(options.lengths) - 1) // 2]  # one rate for all lengths
        rows = add_rows(size_peer(key, middle), [size_peer(key, length) for length in options.lengths])
        document["lengths"][ENTRIES[key].name] = dict(zip(map(str, options.lengths), rows, strict=True))
    run_seeds(options.length_seeds or options.seeds)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.set_defaults(out=DEFAULT_OUT / "study")
    parser.add_argument("--report", action="store_true", help="train nothing: tables and plots of OUT/study.json")
    for name in ("data", "dev", "test"):
        meaning = "training texts: .tsv or .jsonl" if name == "data" else "default: a tenth of the training texts"
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=meaning)
    parser.add_argument("--text-column", metavar="NAME", help="default: guessed")
    parser.add_argument("--label-column", metavar="NAME", help="default: guessed")
    parser.add_argument("--model", metavar="NAME", help="a pretrained encoder: a folder, or a model of the hub")
    parser.add_argument("--methods", nargs="+", choices=ENTRIES, default=list(ENTRIES), metavar="METHOD",
                        help=f"rows of the table: {', '.join(ENTRIES)}")  # fmt: skip
    parser.add_argument("--lengths", nargs="*", type=positive, metavar="N", help="prefix lengths; none: skip")
    parser.add_argument("--length-methods", nargs="+", choices=LENGTH_METHODS, default=list(LENGTH_METHODS),
                        metavar="METHOD", help=f"to compare over lengths: {', '.join(LENGTH_METHODS)}")  # fmt: skip
    parser.add_argument("--head-rate", type=float, help="learning rate of the head, with every method")
    for name in DEFAULTS.keys() - {"lengths", "head_rate"}:
        parser.add_argument(f"--{name.replace('_', '-')}", type=positive, help=f"default: {DEFAULTS[name]}")


def run(options: argparse.Namespace) -> int:
    """Train what is missing, print and write tables and plots. Return 1 if a training failed or was interrupted."""
    failures = list[str]()
    if options.report:
        path: Path = options.out / "study.json"
        if not path.exists():
            raise BenchmarkError(f"--report: {path} does not exist")
        document = json.loads(path.read_text(encoding="utf-8"))
    else:
        if options.data is None or options.model is None:
            raise BenchmarkError("--data (a file of labelled texts) and --model (an encoder) are needed")
        for name, value in (QUICK if options.quick else DEFAULTS).items():
            setattr(options, name, value if getattr(options, name) is None else getattr(options, name))
        study, document = set_up_study(options, set_up(options))
        print(document["introduction"], flush=True)
        try:
            carry_out(study, document, failures)
        except KeyboardInterrupt:
            failures.append("interrupted: finished trainings are kept, the same command continues")
        write_text(json.dumps(document, default=str), options.out / "study.json")
    tables = "\n\n".join(table.markdown() for table in summarize(document))
    write_text(f"{document['introduction']}\n\n{tables}\n\n{NOTES}\n", options.out / "study.md")
    print(f"\n{tables}\n\n{NOTES}\n\nJSON, tables and plots in {options.out}")
    print("\n".join(failures), file=sys.stderr)
    if lengths := read_lengths(document):
        curves = {name: pd.Series({int(n): 100 * s.mean() for n, s in of.items()}) for name, of in lengths.items()}
        panels = {"test accuracy over lengths": pd.DataFrame(curves)}
        Plot(panels, "prefix tokens", "% of the test texts", "line").draw(options.out / "study_lengths.png")
    return 1 if failures else 0


def summarize(document: dict[str, Any]) -> list[Table]:
    """Return the methods at their budgets, their differences, and the prefix methods over lengths."""
    header = ("method", "trainable", "rates", "seeds", "test %", "dev %", "best step", "ms a step", "peak MB")
    finished, rows = [row for row in document["table"] if row["runs"]], []
    for row in finished:
        runs, rates = pd.DataFrame(row["runs"].values()), row["rates"]
        shown = " / ".join(f"{rate:g}" for rate in (rates["prompt"], rates["main"]) if rate is not None)
        rows.append([
            name_row(row), number(runs.trainable.iloc[0], 0), shown + (f", gates {rates['gate']:g}" if rates["gate"] else ""),
            str(len(runs)), describe_spread(runs.test_accuracy), describe_spread(runs.dev_accuracy),
            number(runs.best_step.mean(), 0), number(1e3 * runs.seconds_a_step.median(), 0),
            number(runs.peak_bytes.max() / 1e6, 1),
        ])  # fmt: skip
    tables, compared = [Table(header, rows)], []
    tested = {row["method"]: read_accuracies(row) for row in finished}
    for above, below in COMPARED:  # seed by seed: the same batches in the same order, and the same head at the start
        if above in tested and below in tested:
            differences = (100 * (tested[above] - tested[below])).dropna()
            each = ", ".join(f"{difference:+.1f}" for difference in differences)
            compared.append([f"{above} - {below}", f"{differences.mean():+.1f}", each])
    tables += [Table(("difference of test %", "mean", "of each seed"), compared)] * bool(compared)
    if lengths := read_lengths(document):
        columns, rows = list(dict.fromkeys(length for of in lengths.values() for length in of)), []
        for name, of in lengths.items():
            means = [100 * scores.mean() for scores in of.values()]
            cells = (describe_spread(of[length]) if length in of else "-" for length in columns)
            rows.append([name, *cells, number(max(means) - min(means), 1)])
        tables.append(Table(("test % with a prefix of", *columns, "largest - least"), rows))
    return tables


def read_accuracies(row: dict[str, Any]) -> Any:
    """Return the test accuracies by seed."""
    return pd.Series({seed: outcome["test_accuracy"] for seed, outcome in row["runs"].items()}, dtype=float)


def read_lengths(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the test accuracies by method and length."""
    of_method = document["lengths"].items()
    found = {name: {n: read_accuracies(row) for n, row in rows.items() if row["runs"]} for name, rows in of_method}
    return {name: of for name, of in found.items() if of}


def describe_spread(shares: Any) -> str:
    """Return the mean and the standard deviation in percent."""
    return f"{100 * shares.mean():.1f}" + (f" ± {100 * shares.std():.1f}" if len(shares) > 1 else "")


def name_row(row: dict[str, Any]) -> str:
    """Return the name of a method and its sizes."""
    config = row["config"]
    if config is None:
        return str(row["method"])
    sizes = [str(config["num_virtual_tokens"])]
    if row["group"] == "prompt":
        sizes += [f"r={config[name]}" for name in ("rank", "bottleneck_dim") if config.get(name) is not None]
    elif config.get("reparameterization") is not None:
        sizes.append(f"h={config['hidden_dim']}")
    return f"{row['method']} ({', '.join(sizes)})"
