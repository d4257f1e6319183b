"""The study: measure how well the methods learn a classification task, over several seeds.

A plan, ``benchmarks/study_plan.json``, contains the settings, the cells and the comparisons of cells. A cell is a
method with its options and the bounds of its learning rates: those of the prompt, of the gates, and of everything else
except the head ("main").

Optuna searches the rates of a cell by accuracy on the dev split. Successive halving stops bad trials early. The best
rates are used for all seeds, with ``transformers.Trainer`` and early stopping. The best weights are tested once. Trials
are stored in ``OUT/search.log`` and finished trainings in ``OUT/study.json``, with everything that they depend on, so
that an interrupted study can continue.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import optuna
import pandas as pd
import torch
import transformers
from datasets import Dataset
from datasets.fingerprint import Hasher
from optuna.storages.journal import JournalFileBackend
from transformers import PreTrainedModel, Trainer, TrainerCallback

from fastprefix.methods import MethodConfig

from . import data, models
from .measure import BenchmarkError, Row, added_peak, explain, fault, find_version
from .peers import Prepared, attach, freeze_body, group, head_parameters
from .report import Table, number
from .results import Record, read, write_text
from .suite import DEFAULT_OUT, add_common, set_up

DESCRIPTION = "Measure the test accuracy of a pretrained encoder with full fine-tuning and with every method."
PLAN = Path(__file__).parent / "study_plan.json"
WARMUP = 0.06  # of the steps; then the rate falls to 0 linearly
SPLIT_OFF = 0.1  # share of the training file that is used for dev and for test if no files are given
FEW_SEEDS = 4  # up to this number of seeds, no interval is shown
NOTES = """\
Accuracies are the mean and standard deviation over the seeds. Prompt or prefix tokens are in parentheses.
trainable: parameters without the head of the classifier, which every method trains.
rates: learning rates, chosen on the dev split.
best step: the step with the best dev accuracy, whose weights are tested.
ms a step: training time per step without evaluations.
peak MB: memory of PyTorch's allocators that forward and backward of the longest batch need in addition to the model.
95 %: bootstrap interval of the mean over the seeds."""


def prepare(cell: Row, rates: Row, model: PreTrainedModel, head_rate: float) -> Prepared:
    """Return the model with the method of a cell, and the parameter groups with their learning rates."""
    if "config" in cell:
        return attach(model, MethodConfig.from_dict(cell["config"]), head=head_rate, **rates)
    head = head_parameters(model)
    if cell.get("head_only"):
        freeze_body(model)
        return Prepared(model, group(head, rates["main"]))
    body = [p for p in model.parameters() if p not in set(head)]
    return Prepared(model, group(body, rates["main"]) + group(head, head_rate))


class Pruner(TrainerCallback):
    """A callback that reports the scores of a trial to the search, which can stop its training."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        self.trial.report(metrics["eval_accuracy"], state.global_step // args.eval_steps)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def measure_accuracy(predicted: Any) -> dict[str, float]:
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


class Study:
    """The data that all trainings share: the plan, the model's name, its tokenizer, and the texts as token ids."""

    def __init__(self, options: argparse.Namespace, plan: Row, device: torch.device) -> None:
        self.plan, self.out, self.name, self.device = plan, options.out, options.model, device
        self.settings = plan["settings"] | (plan["quick"] if options.quick else {})
        parts = load_texts(options, self.settings["examples"])
        self.classes = parts["train"].features["label"].num_classes
        self.tokenizer = models.load_tokenizer(options.model)
        self.texts = {part: self.encode(rows) for part, rows in parts.items()}
        versions = [find_version(package) for package in ("fastprefix", "torch", "transformers")]
        texts = [part.to_dict() for part in self.texts.values()]
        shared = {**self.settings, "seeds": None}  # more seeds continue a study
        self.subject = Hasher.hash([options.model, texts, versions, shared, device.type])
        about: Row = {"data": options.data, "model": options.model, "subject": self.subject, **self.settings}
        about["introduction"] = "\n".join(f"{name:14}  {value}" for name, value in about.items())
        self.record = Record.start("study", device, options.quick, **about)
        if (self.out / "study.json").exists():
            self.record.rows = read(self.out / "study.json").rows

    def encode(self, part: Dataset) -> Dataset:
        """Return texts as token ids."""
        rows = self.tokenizer(list(part["text"]), truncation=True, max_length=self.settings["max_length"])
        columns = {name: rows[name] for name in ("input_ids", "attention_mask")}
        return Dataset.from_dict({**columns, "labels": part["label"]})

    def run_cells(self, names: list[str]) -> None:
        """Search the rates of each cell, then train. Seeds are the outer loop, so a partial study covers all cells."""
        rates: dict[str, Row] = {}
        for seed in (None, *range(self.settings["seeds"])):
            for name in names:
                try:
                    if seed is None:
                        rates[name] = self.find_rates(name)
                    elif name in rates:
                        self.train_once(name, rates[name], seed)
                except Exception as error:  # the failure of one method must not lose the results of the others
                    rates.pop(name, None)
                    self.record.faults.append(fault({"seed": seed}, name, "training", error))

    def find_rates(self, name: str) -> Row:
        """Return the rates with the best dev accuracy, searched with the first seed."""
        cell, file = self.plan["cells"][name], str(self.out / "search.log")
        search = optuna.create_study(
            study_name=Hasher.hash([cell, self.subject]),
            storage=optuna.storages.JournalStorage(JournalFileBackend(file)),
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=2, reduction_factor=2),
            direction="maximize",
            load_if_exists=True,
        )

        def score(trial: optuna.Trial) -> float:
            rates = {kind: trial.suggest_float(kind, *bounds, log=True) for kind, bounds in cell["rates"].items()}
            return float(self.train(name, rates, 0, trial)["dev_accuracy"])

        states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
        done = len(search.get_trials(states=states))
        search.sampler = optuna.samplers.TPESampler(seed=done)
        search.optimize(score, max(0, self.settings["trials"] - done))
        return search.best_params

    def train_once(self, name: str, rates: Row, seed: int) -> None:
        """Train and add the resulting row, unless the record already contains it."""
        about = {"kind": "table", "method": name, "rates": rates, "seed": seed, "subject": self.subject}
        about = json.loads(json.dumps({**about, "config": self.plan["cells"][name].get("config")}))  # as in the file
        if not any(about.items() <= row.items() for row in self.record.rows):
            self.record.rows.append(about | self.train(name, rates, seed))
            self.record.write(self.out)

    def train(self, name: str, rates: Row, seed: int, trial: optuna.Trial | None = None) -> Row:
        """Train with early stopping, and test the best weights."""
        print(f"{name}, {rates}, seed {seed}", flush=True)
        torch.manual_seed(seed)
        transformers.utils.logging.disable_progress_bar()
        of, collate = self.settings, cast(Any, transformers.DataCollatorWithPadding(self.tokenizer))
        model: Any = models.load_model(self.name, "classification", self.classes, self.tokenizer.pad_token_id, seed)
        prepared = prepare(self.plan["cells"][name], rates, model.to(self.device), of["head_rate"])
        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                folder, max_steps=of["steps"], per_device_train_batch_size=of["rows"], per_device_eval_batch_size=64,
                warmup_steps=round(WARMUP * of["steps"]), seed=seed, eval_strategy="steps",
                eval_steps=of["evaluate_every"], save_strategy="best", save_total_limit=1, save_only_model=True,
                load_best_model_at_end=True, metric_for_best_model="accuracy", logging_strategy="no", report_to=[],
                disable_tqdm=True, remove_unused_columns=False, use_cpu=self.device.type == "cpu",
            )  # fmt: skip
            trainer = Trainer(
                model, arguments, collate, self.texts["train"], self.texts["dev"], compute_metrics=measure_accuracy,
                callbacks=[transformers.EarlyStoppingCallback(of["patience"]), *([Pruner(trial)] if trial else [])],
                optimizers=(torch.optim.AdamW(prepared.groups, weight_decay=0.0), None),
            )  # fmt: skip
            trainer.remove_callback(transformers.PrinterCallback)
            trained = trainer.train()
            tested: Any = trainer.predict(self.texts["test"])
        longest = sorted(self.texts["train"], key=lambda row: len(row["input_ids"]))[-of["rows"] :]
        batch = collate(longest).to(self.device)
        evaluations = sum(entry.get("eval_runtime", 0.0) for entry in trainer.state.log_history)
        return {
            "dev_accuracy": trainer.state.best_metric, "best_step": trainer.state.best_global_step,
            "test_accuracy": tested.metrics["test_accuracy"], "steps": trained.global_step,
            "trainable": prepared.count_trainable() - sum(p.numel() for p in head_parameters(model)),
            "seconds_a_step": (trained.metrics["train_runtime"] - evaluations) / trained.global_step,
            "peak_bytes": added_peak(lambda: model.train()(**batch).loss.backward(), self.device),
        }  # fmt: skip


def load_texts(options: argparse.Namespace, most: dict[str, int]) -> dict[str, Dataset]:
    """Return the parts "train", "dev" and "test". Parts without a file are split off from the training file."""
    train = data.read_rows("--data", options.data, options)
    if "label" not in train.column_names or len(set(train["label"])) < 2:
        raise BenchmarkError(f"--data {options.data}: the column of --label-column must have two or more classes")
    parts = {"train": train.class_encode_column("label")}
    label = parts["train"].features["label"]
    for part in ("dev", "test"):
        with explain(f"--{part}"):  # too few texts to split, or labels that the training texts lack
            if path := getattr(options, part):
                parts[part] = data.read_rows(f"--{part}", path, options).cast_column("label", label)
            else:
                split = parts["train"].train_test_split(round(SPLIT_OFF * len(parts["train"])), seed=0)
                parts["train"], parts[part] = split["train"], split["test"]
    return {part: of.shuffle(seed=0).select(range(min(len(of), most[part]))) for part, of in parts.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.set_defaults(out=DEFAULT_OUT / "study")
    parser.add_argument("--report", action="store_true", help="only print the tables of OUT/study.json")
    for name in ("data", "dev", "test"):
        meaning = "training texts (.tsv or .jsonl)" if name == "data" else "default: a tenth of the training texts"
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=meaning)
    data.add_columns(parser)
    parser.add_argument("--model", metavar="NAME", help="a pretrained encoder: a folder or a name on the hub")
    parser.add_argument("--plan", type=Path, default=PLAN, metavar="FILE", help="default: benchmarks/study_plan.json")
    parser.add_argument("--cells", nargs="+", metavar="NAME", help="cells of the plan (default: all)")


def run(options: argparse.Namespace) -> int:
    """Run the missing trainings, then print and write the tables. Return 1 if a training failed."""
    with explain(f"--plan {options.plan}"):
        plan = json.loads(options.plan.read_text(encoding="utf-8"))
    if options.report:
        record = read(options.out / "study.json")
    else:
        if options.data is None or options.model is None:
            raise BenchmarkError("--data (a file of labeled texts) and --model (an encoder) must be given")
        if unknown := set(options.cells or ()) - plan["cells"].keys():
            raise BenchmarkError(f"--cells {', '.join(unknown)}: the cells of the plan are {', '.join(plan['cells'])}")
        options.out.mkdir(parents=True, exist_ok=True)
        study = Study(options, plan, set_up(options))
        record = study.record
        print(record.settings["introduction"], flush=True)
        study.run_cells(options.cells or list(plan["cells"]))
    tables = "\n\n".join(table.markdown() for table in summarize(record, plan["compared"]))
    write_text(f"{record.settings['introduction']}\n\n{tables}\n\n{NOTES}\n", options.out / "study.md")
    print(f"\n{tables}\n\n{NOTES}")
    return record.conclude(options.out)


def summarize(record: Record, compared: list[list[str]]) -> list[Table]:
    """Return a table of the cells of the current subject, and a table of differences between cells for each seed."""
    subject = record.settings.get("subject")
    chosen = [row for row in record.rows if subject in (None, row["subject"]) and "search" not in row["kind"]]
    if not chosen:
        return []
    names = [row["method"] + (f" ({row['config']['num_virtual_tokens']})" if row["config"] else "") for row in chosen]
    frame, rows = pd.DataFrame(chosen).assign(name=names).drop_duplicates(["kind", "name", "seed"], keep="last"), []
    frame = frame.assign(test=100 * frame.test_accuracy, dev=100 * frame.dev_accuracy)
    for (_, name), runs in frame.groupby(["kind", "name"], sort=False):
        rates = ", ".join(f"{kind} {rate:.2g}" for kind, rate in runs.rates.iloc[0].items() if rate is not None)
        rows.append([
            name, number(runs.trainable.iloc[0], 0), rates, str(len(runs)), describe_spread(runs.test),
            describe_spread(runs.dev), number(runs.best_step.mean(), 0), number(1e3 * runs.seconds_a_step.median(), 0),
            number(runs.peak_bytes.max() / 1e6, 1),
        ])  # fmt: skip
    header = ("method", "trainable", "rates", "seeds", "test %", "dev %", "best step", "ms a step", "peak MB")
    # Differences are per seed, because a seed determines the batches, their order, and the initial head.
    scores, differences = frame[frame.kind == "table"].pivot_table("test", "seed", "method", "last"), []
    for above, below in compared:
        if above in scores and below in scores:
            each = (scores[above] - scores[below]).dropna().to_numpy()
            means = np.random.default_rng(0).choice(each, (10_000, len(each))).mean(1)
            low, high = np.quantile(means, (0.025, 0.975))
            interval = f"{low:+.1f} to {high:+.1f}" if len(each) > FEW_SEEDS else "-"
            seeds = ", ".join(f"{difference:+.1f}" for difference in each)
            differences.append([f"{above} - {below}", f"{each.mean():+.1f}", interval, seeds])
    return [Table(header, rows), Table(("difference of test %", "mean", "95 %", "of each seed"), differences)]


def describe_spread(percentages: Any) -> str:
    """Return the mean and standard deviation as text."""
    return f"{percentages.mean():.1f}" + (f" ± {percentages.std():.1f}" if len(percentages) > 1 else "")
