"""The study: how well the methods learn a classification, at equal budgets and over several seeds.

It trains full fine-tuning, the head of the classifier alone, and every method with ``transformers.Trainer``. Three
learning rates per method are scored on the dev split after a short training, and the best one is used for all seeds.
Training ends early if the dev split improves no more, and the best weights are tested once. A finished training is a
row of ``OUT/study.json`` with all that it depends on, so that an interrupted study continues.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch import Tensor, nn
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import fastprefix
from fastprefix.methods import MethodConfig

from . import data, models
from .measure import BenchmarkError, Row, added_peak, explain, fault, find_version
from .peers import Prepared, attach, freeze_body, group
from .report import Table, draw_panels, number
from .results import Record, read, write_text
from .suite import DEFAULT_OUT, add_common, positive, set_up

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
Rates = dict[str, Any]
TABLE, LENGTHS = "table", "lengths"  # kinds of trainings, besides searches
COLUMNS = ("group", "rates", "trainable", "best_step", "seconds_a_step", "peak_bytes")
SHARED = ("evaluate_every", "patience", "rows", "max_length", "head_rate")  # change the outcome of every training


def set_rates(main: Any = None, prompt: Any = None, gate: Any = None) -> Rates:
    """Return learning rates of the prompt, of the gates, and of everything else but the head. None: nothing of it."""
    return {"main": main, "prompt": prompt, "gate": gate}


PREFIX_RATES = [set_rates(rate) for rate in (1e-2, 3e-2, 1e-1)]
NETWORK_RATES = [set_rates(rate) for rate in (1e-3, 3e-3, 1e-2)]
NETWORKS = {"mlp": (False, False), "mlp+gate": (False, True), "residual": (True, False), "residual+gate": (True, True)}
PEERS: dict[str, tuple[str, str, list[Rates]]] = {
    "full": ("full fine-tuning", "reference", [set_rates(rate) for rate in (2e-5, 5e-5, 1e-4)]),
    "head": ("head alone", "reference", [set_rates(rate) for rate in (1e-3, 1e-2, 3e-2)]),
    "pt": ("PT", "prompt", [set_rates(prompt=rate) for rate in (0.3, 0.03, 0.003)]),
    "dept": ("DePT", "prompt", [set_rates(1e-3, 0.3), set_rates(1e-3, 0.03), set_rates(5e-3, 0.003)]),
    "adept": ("ADePT", "prompt", [set_rates(1e-4, 0.3), set_rates(1e-3, 0.03), set_rates(1e-3, 0.003)]),
    "prefix": ("prefix tuning", "prefix", PREFIX_RATES),
    "apt": ("APT", "prefix", PREFIX_RATES),
    "apt-gates": (
        "APT, slow gates",
        "prefix",
        [set_rates(3e-2, None, 1e-3), *(set_rates(1e-1, None, g) for g in (1e-3, 1e-4))],
    ),
    "mlp": ("MLP prefix", "prefix", NETWORK_RATES),
    "mlp+gate": ("MLP prefix + gate", "prefix", NETWORK_RATES),
    "residual": ("residual prefix", "prefix", NETWORK_RATES),
    "residual+gate": ("residual prefix + gate", "prefix", NETWORK_RATES),
}
"""The name, the group and the candidates of the rates, of which the published come first."""
LENGTH_METHODS = ("prefix", *NETWORKS)
COMPARED = (  # the findings of the papers: the first above the second
    ("DePT", "PT"), ("ADePT", "DePT"), ("ADePT", "PT"), ("APT", "prefix tuning"), ("APT, slow gates", "prefix tuning"),
    ("residual prefix + gate", "MLP prefix"), ("residual prefix + gate", "prefix tuning"),
)  # fmt: skip


def count_parameters(model: PreTrainedModel, config: MethodConfig) -> int:
    """Count the parameters of a method on a model, without the head of a classifier."""
    attached = fastprefix.attach(models.share_weights(model), config)
    return fastprefix.count_parameters(attached).groups["fastprefix"]


def find_size(model: PreTrainedModel, budget: int, make: Callable[[int], MethodConfig]) -> int:
    """Return the largest size within a budget. Parameters grow by the same number with each step of the size."""
    one, two = (count_parameters(model, make(size)) for size in (1, 2))
    if one > budget:
        raise BenchmarkError(
            f"--prefix-tokens: {budget:,} parameters are too few for {type(make(1)).__name__}: {one:,}"
        )
    return 1 + (budget - one) // (two - one)


def fit_config(key: str, model: PreTrainedModel, options: argparse.Namespace) -> MethodConfig | None:
    """Return a method as large as the budget of its group allows: that of a plain prompt or of a plain prefix.

    A prompt as large as a usual prefix would have hundreds of tokens, hence two budgets. A network is counted, although
    export drops it.
    """
    group_name = PEERS[key][1]
    if group_name == "reference":
        return None
    if group_name == "prompt":
        plain = fastprefix.PromptTuningConfig(options.prompt_tokens)
        if key == "pt":
            return plain
        tokens = max(1, round(SHORT_PROMPT * options.prompt_tokens))
        fitted: dict[str, Any] = {"trainable": count_parameters(model, plain), "num_virtual_tokens": tokens}
        if key == "dept":
            return fastprefix.DePTConfig.for_budget(model, **fitted, max_length=options.max_length)
        return fastprefix.ADePTConfig.for_budget(model, **fitted)
    if key == "prefix":
        return fastprefix.PrefixTuningConfig(options.prefix_tokens)
    budget = count_parameters(model, fastprefix.PrefixTuningConfig(options.prefix_tokens))
    if key in NETWORKS:
        make = partial(make_network, key, options.prefix_tokens, bottleneck_dim=BOTTLENECK)
        return make(hidden_dim=find_size(model, budget, lambda width: make(hidden_dim=width)))
    return fastprefix.APTConfig(find_size(model, budget, fastprefix.APTConfig))


def make_network(key: str, tokens: int, **widths: Any) -> MethodConfig:
    """Return a prefix from a network."""
    residual, gate = NETWORKS[key]
    return fastprefix.ResidualPrefixConfig(tokens, residual=residual, gate=gate, **widths)


def size_config(key: str, tokens: int) -> MethodConfig:
    """Return a prefix method with so many tokens, whatever it costs. Networks have the default widths."""
    return make_network(key, tokens) if key in NETWORKS else fastprefix.PrefixTuningConfig(tokens)


def prepare(key: str, config: MethodConfig | None, rates: Rates, model: PreTrainedModel, head_rate: float) -> Prepared:
    """Return the model with what is trained, and its learning rates."""
    if config is not None:
        return attach(model, config, rates["main"] or 0.0, rates["prompt"] or 0.0, head_rate, rates["gate"])
    head = models.head_parameters(model)
    if key == "head":
        freeze_body(model)
        return Prepared(model, group(head, rates["main"]))
    body = [p for p in model.parameters() if p not in set(head)]
    return Prepared(model, group(body, rates["main"]) + group(head, head_rate))


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


class Study:
    """Hold what all trainings share: the options, the model, its tokenizer, and the texts as token ids."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device = options, device
        arguments = {name: value for name, value in vars(options).items() if name != "out"}
        parts, self.classes = load_texts(options)
        models.prepare_hub(options.model)
        self.tokenizer = models.load_tokenizer(options.model)
        self.texts = {part: self.encode(rows) for part, rows in parts.items()}
        self.model = self.load(0)
        weights = [self.model.config.to_diff_dict(), self.model.state_dict()]
        texts = [part.to_dict() for part in self.texts.values()]
        versions = [find_version(package) for package in ("fastprefix", "torch", "transformers")]
        shared = [getattr(options, name) for name in SHARED]
        self.subject = Hasher.hash([weights, texts, versions, shared, device.type])
        about = {"arguments": arguments, "introduction": self.describe()}
        self.record = Record.start("study", device, options.quick, **about)
        if (options.out / "study.json").exists():
            self.record.rows = [{**row, "in_tables": False} for row in read(options.out / "study.json").rows]

    def describe(self) -> str:
        """Return the texts, the model and the settings in three lines."""
        options = self.options
        counts = ", ".join(f"{len(rows):,} {part}" for part, rows in self.texts.items())
        settings = ", ".join(f"{name} {getattr(options, name)}" for name in ("steps", "search_steps", "seeds", *SHARED))
        return f"text    {options.data.name}: {counts} examples\nmodel   {options.model}\ntrain   {settings}"

    def encode(self, part: Dataset) -> Dataset:
        """Return texts as token ids."""
        rows = self.tokenizer(list(part["text"]), truncation=True, max_length=self.options.max_length)
        columns = {name: rows[name] for name in ("input_ids", "attention_mask")}
        return Dataset.from_dict({**columns, "labels": part["label"]})

    def load(self, seed: int) -> PreTrainedModel:
        """Load the model with a new head."""
        pad = self.tokenizer.pad_token_id
        model = models.load_model(self.options.model, "classification", len(self.classes), pad, seed)
        nn.Module.to(model, self.device)
        return model

    def train(
        self, kind: str, key: str, config: MethodConfig | None, rates: Rates, seed: int, steps: int
    ) -> Row | None:
        """Return the row of a training, which is in the record if it was finished before, or None if it fails."""
        name, group_name, _ = PEERS[key]
        about = {"kind": kind, "method": name, "group": group_name, "rates": rates, "seed": seed, "most_steps": steps}
        about |= {"config": config.to_dict() if config else None, "subject": self.subject}
        about = json.loads(json.dumps(about))  # as it is in the file
        if found := [row for row in self.record.rows if about.items() <= row.items()]:
            found[0]["in_tables"] = True
            return found[0]
        print(f"{name}, {kind}, seed {seed}, {steps} steps", flush=True)
        try:
            self.record.rows.append(about | self.run(key, config, rates, seed, steps) | {"in_tables": True})
        except Exception as error:  # the failure of one method must not lose the results of the others
            self.record.faults.append(fault({"kind": kind, "seed": seed}, name, "training", error))
            return None
        self.record.write(self.options.out)
        return self.record.rows[-1]

    def find_rates(self, kind: str, key: str, config: MethodConfig | None, steps: int) -> Rates | None:
        """Return the rates that are best on the dev split after a short training with the first seed."""
        steps = min(self.options.search_steps, steps)
        tried = [self.train(f"search, {kind}", key, config, rates, 0, steps) for rates in PEERS[key][2]]
        rows = sorted(filter(None, tried), key=lambda row: (-row["dev_accuracy"], row["dev_loss"]))
        return rows[0]["rates"] if rows else None

    def train_all(self, kind: str, configs: dict[str, list[Any]], steps: int, seeds: int) -> None:
        """Train the configurations of each method with the rates that are best for the middle one.

        The seeds are the outer loop, so an interrupted study has some seeds of all methods.
        """
        rates = {key: self.find_rates(kind, key, of[(len(of) - 1) // 2], steps) for key, of in configs.items()}
        for seed, key in itertools.product(range(seeds), configs):
            for config in configs[key]:
                if best := rates[key]:
                    self.train(kind, key, config, best, seed, steps)

    def run(self, key: str, config: MethodConfig | None, rates: Rates, seed: int, steps: int) -> dict[str, Any]:
        """Train, stop early, and test the best weights."""
        torch.manual_seed(seed)
        model, options, collate = self.load(seed), self.options, DataCollatorWithPadding(self.tokenizer)
        prepared = prepare(key, config, rates, model, options.head_rate)
        watcher = Watcher(model, options.patience)
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
            tested: Any = trainer.predict(self.texts["test"])
        assert watcher.best is not None
        (accuracy, negative_loss), step, _ = watcher.best
        head = sum(p.numel() for p in models.head_parameters(model))
        batch: Any = collate(sorted(self.texts["train"], key=lambda row: len(row["input_ids"]))[-options.rows :])
        peak = added_peak(lambda: model.train()(**batch.to(self.device)).loss.backward(), self.device)
        return {
            "dev_accuracy": accuracy, "dev_loss": -negative_loss, "best_step": step, "steps": len(watcher.seconds),
            "test_accuracy": tested.metrics["test_accuracy"], "trainable": prepared.count_trainable() - head,
            "head": head, "seconds_a_step": statistics.median(watcher.seconds), "peak_bytes": peak,
            "curve": watcher.curve,
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
        else:
            with explain(f"{options.data.name}, without {option}"):  # too few examples to split some off
                split = parts["train"].train_test_split(round(SPLIT_OFF * len(parts["train"])), seed=SPLIT_SEED)
            parts["train"], parts[part] = split["train"], split["test"]
    parts["train"], classes = data.number_labels(options.data.name, parts["train"])
    if len(classes) < 2:
        raise BenchmarkError(f"{options.data.name}: two or more classes are needed, got {classes}")
    for part, rows in parts.items():
        with explain(f"--{part}"):  # a label that the training file does not have
            numbered = rows.cast_column("label", parts["train"].features["label"])
        count = getattr(options, f"{part}_examples") or len(rows)
        parts[part] = numbered.shuffle(seed=SPLIT_SEED).select(range(min(len(rows), count)))
    return parts, classes


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
    parser.add_argument("--methods", nargs="+", choices=PEERS, default=list(PEERS), metavar="METHOD",
                        help=f"rows of the table: {', '.join(PEERS)}")  # fmt: skip
    parser.add_argument("--lengths", nargs="*", type=positive, metavar="N", help="prefix lengths; none: skip")
    parser.add_argument("--length-methods", nargs="+", choices=LENGTH_METHODS, default=list(LENGTH_METHODS),
                        metavar="METHOD", help=f"to compare over lengths: {', '.join(LENGTH_METHODS)}")  # fmt: skip
    parser.add_argument("--head-rate", type=float, help="learning rate of the head, with every method")
    for name in DEFAULTS.keys() - {"lengths", "head_rate"}:
        parser.add_argument(f"--{name.replace('_', '-')}", type=positive, help=f"default: {DEFAULTS[name]}")


def run(options: argparse.Namespace) -> int:
    """Train what is missing, print and write tables and plots. Return 1 if a training failed."""
    if options.report:
        record = read(options.out / "study.json")
    else:
        if options.data is None or options.model is None:
            raise BenchmarkError("--data (a file of labelled texts) and --model (an encoder) are needed")
        for name, value in (QUICK if options.quick else DEFAULTS).items():
            setattr(options, name, value if getattr(options, name) is None else getattr(options, name))
        study = Study(options, set_up(options))
        record, lengths = study.record, sorted(options.lengths)
        print(record.settings["introduction"], flush=True)
        fitted = {key: [fit_config(key, study.model, options)] for key in options.methods}
        study.train_all(TABLE, fitted, options.steps, options.seeds)
        sized = {key: [size_config(key, n) for n in lengths] for key in options.length_methods if lengths}
        study.train_all(LENGTHS, sized, options.length_steps, options.length_seeds or options.seeds)
    tables = "\n\n".join(table.markdown() for table in summarize(record))
    write_text(f"{record.settings['introduction']}\n\n{tables}\n\n{NOTES}\n", options.out / "study.md")
    print(f"\n{tables}\n\n{NOTES}")
    if accuracies := select_lengths(record):
        means = pd.DataFrame({name: of.mean() for name, of in accuracies.items()})
        draw_panels(
            {"test accuracy over lengths": means},
            options.out / "study_lengths.png",
            "prefix tokens",
            "% of the test texts",
        )
    return record.conclude(options.out)


def select_runs(record: Record, kind: str) -> pd.DataFrame:
    """Return the trainings of a kind that the last command asked for, with accuracies in percent."""
    chosen = [row for row in record.rows if row["kind"] == kind and row["in_tables"]]
    frame = pd.DataFrame(chosen, columns=["method", "seed", "config", "dev_accuracy", "test_accuracy", *COLUMNS])
    return frame.assign(test=100 * frame.test_accuracy, dev=100 * frame.dev_accuracy)


def select_lengths(record: Record) -> dict[str, pd.DataFrame]:
    """Return the test accuracy of each prefix method: a row for each seed, a column for each length."""
    frame = select_runs(record, LENGTHS)
    frame["length"] = [config["num_virtual_tokens"] for config in frame.config]
    return {
        name: of.pivot(index="seed", columns="length", values="test")
        for name, of in frame.groupby("method", sort=False)
    }


def summarize(record: Record) -> list[Table]:
    """Return the methods at their budgets, their differences, and the prefix methods over lengths."""
    header = ("method", "trainable", "rates", "seeds", "test %", "dev %", "best step", "ms a step", "peak MB")
    frame, rows = select_runs(record, TABLE), []
    for _, runs in frame.groupby("method", sort=False):
        first, rates = runs.iloc[0], runs.rates.iloc[0]
        shown = " / ".join(f"{rate:g}" for rate in (rates["prompt"], rates["main"]) if rate is not None)
        shown += f", gates {rates['gate']:g}" if rates["gate"] else ""
        rows.append([
            name_run(first), number(first.trainable, 0), shown, str(len(runs)),
            describe_spread(runs.test), describe_spread(runs.dev), number(runs.best_step.mean(), 0),
            number(1e3 * runs.seconds_a_step.median(), 0), number(runs.peak_bytes.max() / 1e6, 1),
        ])  # fmt: skip
    tables, compared = [Table(header, rows)], []
    scores = frame.pivot(index="seed", columns="method", values="test")
    for above, below in COMPARED:  # seed by seed: the same batches in the same order, and the same head at the start
        if above in scores and below in scores:
            differences = (scores[above] - scores[below]).dropna()
            each = ", ".join(f"{difference:+.1f}" for difference in differences)
            compared.append([f"{above} - {below}", f"{differences.mean():+.1f}", each])
    tables += [Table(("difference of test %", "mean", "of each seed"), compared)] * bool(compared)
    if lengths := select_lengths(record):
        columns, rows = sorted({length for of in lengths.values() for length in of}), []
        for name, of in lengths.items():
            cells = (describe_spread(of[length].dropna()) if length in of else "-" for length in columns)
            rows.append([name, *cells, number(of.mean().max() - of.mean().min(), 1)])
        tables.append(Table(("test % with a prefix of", *map(str, columns), "largest - least"), rows))
    return tables


def describe_spread(percentages: Any) -> str:
    """Return mean and standard deviation."""
    return f"{percentages.mean():.1f}" + (f" ± {percentages.std():.1f}" if len(percentages) > 1 else "")


def name_run(run: Any) -> str:
    """Return a method with its sizes."""
    if run.config is None:
        return str(run.method)
    sizes = [str(run.config["num_virtual_tokens"])]
    if run.group == "prompt":
        sizes += [f"r={run.config[name]}" for name in ("rank", "bottleneck_dim") if run.config.get(name) is not None]
    elif run.config.get("reparameterization") is not None:
        sizes.append(f"h={run.config['hidden_dim']}")
    return f"{run.method} ({', '.join(sizes)})"
