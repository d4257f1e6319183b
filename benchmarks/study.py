"""The study: measure how well the methods learn a task, over several seeds, and answer questions about them.

A plan, such as ``benchmarks/study_plan.json``, contains the settings, the cells, and the questions. A cell is a method
with its options and the bounds of its learning rates: those of the prompt, of the gates, of LoRA ("peft"), and of
everything else except the head ("main"). A cell with ``lengths`` stands for one cell per length. A question is a list
of pairs of cells: is the first one better than the second one?

Optuna searches the rates of a cell by the score on the dev split. Successive halving stops bad trials early. The best
rates are used for all seeds, with ``transformers.Trainer`` and early stopping. The best weights are tested once. Trials
are stored in ``OUT/search.log`` and finished trainings in ``OUT/study.json``, with everything that they depend on, so
that an interrupted study can continue, and so that processes with different cells can share one folder.
"""

import argparse
import functools
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import optuna
import pandas as pd
import scipy.stats
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, List
from datasets.fingerprint import Hasher
from filelock import FileLock
from optuna.storages.journal import JournalFileBackend
from transformers import PreTrainedModel, Trainer, TrainerCallback

import fastprefix
from fastprefix.methods import MethodConfig

from . import data, models
from .measure import BenchmarkError, Row, explain, fault, find_version
from .peers import Prepared, attach, freeze_body, group, head_parameters
from .report import MISSING, Table, number
from .results import FOLDER, Record, read, write_text
from .suite import DEFAULT_OUT, add_common, set_up

PLAN = Path(__file__).parent / "study_plan.json"
WARMUP = 0.06  # of the steps; then the rate falls to 0 linearly
IGNORED = -100  # the label of tokens that do not count
SPLIT_OFF = 0.1  # share of the training file that is used for dev and for test if no files are given
FEW_SEEDS = 4  # up to this number of seeds, no interval is shown
SCORES = {"classification": "accuracy", "entities": "F1 of whole entities"}
NOTES = """\
Scores are the mean and standard deviation over the seeds. Prompt or prefix tokens are in parentheses.
trainable: parameters without the head of the classifier, which every method trains.
rates: learning rates, chosen on the dev split.
best step: the step with the best dev score, whose weights are tested.
gates: smallest and largest mean gate of a layer with the best weights of the first seed, for the longest dev texts.
95 %: t interval of the mean difference over the seeds. If it contains 0, the answer is open."""


def prepare(cell: Row, rates: Row, model: PreTrainedModel, head_rate: float) -> Prepared:
    """Return the model with the method of a cell, and the parameter groups with their learning rates."""
    if "lora" in cell:
        return add_lora(cell, rates, model, head_rate)
    if "config" in cell:
        return attach(model, MethodConfig.from_dict(cell["config"]), head=head_rate, **rates)
    head = head_parameters(model)
    if cell.get("head_only"):
        freeze_body(model)
        return Prepared(model, group(head, rates["main"]))
    body = [p for p in model.parameters() if p not in set(head)]
    return Prepared(model, group(body, rates["main"]) + group(head, head_rate))


def add_lora(cell: Row, rates: Row, model: PreTrainedModel, head_rate: float) -> Prepared:
    """Return the model with LoRA, and with the method of the cell if there is one."""
    import peft

    wrapped: Any = peft.get_peft_model(model, peft.LoraConfig(modules_to_save=["classifier"], **cell["lora"]))
    head = [p for name, p in wrapped.named_parameters() if "modules_to_save" in name]
    groups = group([p for p in wrapped.parameters() if p.requires_grad and p not in set(head)], rates["peft"])
    if "config" in cell:
        fastprefix.attach(wrapped, MethodConfig.from_dict(cell["config"]))
        groups += group(list(cast(Any, model).fastprefix.parameters()), rates["main"])
    return Prepared(wrapped, groups + group(head, head_rate))


class Pruner(TrainerCallback):
    """A callback that reports the scores of a trial to the search, which can stop its training."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        self.trial.report(metrics["eval_score"], state.global_step // args.eval_steps)
        if self.trial.should_prune():
            raise optuna.TrialPruned


class GateRecorder(TrainerCallback):
    """A callback that stores the mean gate of each layer at every evaluation, for its last batch, the longest texts.

    Methods without gates have none.
    """

    def __init__(self, method: Any) -> None:
        self.trend: list[list[float]] = []
        self.latest: dict[int, float] = {}
        if hasattr(method, "prefix_gate"):
            self.compute, method.prefix_gate = method.prefix_gate, self.record

    def record(self, layer: int, *inputs: Any) -> Any:
        gate = self.compute(layer, *inputs)
        if gate is not None and not torch.is_grad_enabled():
            self.latest[layer] = round(float(gate.mean()), 4)
        return gate

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trend += [list(self.latest.values())] if self.latest else []


def measure_accuracy(predicted: Any) -> dict[str, float]:
    return {"score": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def measure_entities(predicted: Any, tags: list[str]) -> dict[str, float]:
    """Return the F1 of entities that have exactly the right words and the right type."""
    found, right = set[Any](), set[Any]()
    for row, (guesses, labels) in enumerate(zip(predicted.predictions.argmax(-1), predicted.label_ids, strict=True)):
        words = labels != IGNORED
        found |= {(row, *entity) for entity in list_entities([tags[tag] for tag in guesses[words]])}
        right |= {(row, *entity) for entity in list_entities([tags[tag] for tag in labels[words]])}
    return {"score": 2 * len(found & right) / max(1, len(found) + len(right))}


def list_entities(tags: list[str]) -> list[tuple[str, int, int]]:
    """Return the type, first word and end of each entity in BIO tags. An I tag after another type starts an entity."""
    entities: list[tuple[str, int, int]] = []
    for at, tag in enumerate(tags):
        mark, _, kind = tag.partition("-")
        continues = mark == "I" and at > 0 and tags[at - 1] in (f"B-{kind}", tag)
        if continues:
            entities[-1] = (kind, entities[-1][1], at + 1)
        elif mark != "O":
            entities.append((kind, at, at + 1))
    return entities


class Study:
    """The data that all trainings share: the plan, the model's name, its tokenizer, and the texts as token ids."""

    def __init__(self, options: argparse.Namespace, plan: Row, device: torch.device) -> None:
        self.out, self.name, self.device = options.out, options.model, device
        self.settings = plan["settings"] | (plan["quick"] if options.quick else {})
        self.cells = expand(plan["cells"])
        self.task: Literal["classification", "entities"] = self.settings["task"]
        parts = load_texts(options, self.task, self.settings["examples"])
        label: Any = parts["train"].features["label"]
        self.classes: list[str] = getattr(label, "feature", label).names
        self.tokenizer = models.load_tokenizer(options.model)
        self.texts = {part: self.encode(rows) for part, rows in parts.items()}
        versions = [find_version(package) for package in ("fastprefix", "torch", "transformers")]
        texts = [part.to_dict() for part in self.texts.values()]
        shared = {**self.settings, "seeds": None}  # more seeds continue a study
        self.subject = Hasher.hash([Path(options.model).name, texts, versions, shared, device.type])
        about: Row = {"data": Path(*options.data.parts[-2:]), "model": Path(options.model).name}
        about |= {"subject": self.subject, **self.settings}
        about["introduction"] = "\n".join(f"{name:14}  {value}" for name, value in about.items())
        self.record = Record.start("study", device, options.quick, **about, questions=plan["questions"])
        self.refresh()

    def refresh(self) -> None:
        """Read the rows that are in the file. Other processes may have added some."""
        if (self.out / "study.json").exists():
            self.record.rows = read(self.out / "study.json").rows

    def encode(self, part: Dataset) -> Dataset:
        """Return texts as token ids, the shortest first. In sentences of words, the first token of a word counts."""
        settings: Row = {"truncation": True, "max_length": self.settings["max_length"]}
        rows = self.tokenizer(list(part["text"]), is_split_into_words=self.task == "entities", **settings)
        columns = {name: rows[name] for name in ("input_ids", "attention_mask")}
        labels = list(part["label"])
        if self.task == "entities":
            for row, tags in enumerate(labels):
                pairs = itertools.pairwise([None, *rows.word_ids(row)])
                labels[row] = [IGNORED if word in (None, before) else tags[word] for before, word in pairs]
        encoded = Dataset.from_dict({**columns, "labels": labels})
        lengths = np.array([len(ids) for ids in columns["input_ids"]])
        return encoded.select(np.argsort(lengths, kind="stable"))  # so that evaluations need little padding

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
        cell, file = self.cells[name], str(self.out / "search.log")
        search = optuna.create_study(
            study_name=Hasher.hash([cell, self.subject]),
            storage=optuna.storages.JournalStorage(JournalFileBackend(file)),
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=2, reduction_factor=2),
            direction="maximize",
            load_if_exists=True,
        )

        def score(trial: optuna.Trial) -> float:
            rates = {kind: trial.suggest_float(kind, *bounds, log=True) for kind, bounds in cell["rates"].items()}
            return float(self.train(name, rates, 0, trial)["dev_score"])

        states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
        done = len(search.get_trials(states=states))
        search.sampler = optuna.samplers.TPESampler(seed=done)
        search.optimize(score, max(0, self.settings["trials"] - done))
        return search.best_params

    def train_once(self, name: str, rates: Row, seed: int) -> None:
        """Train and add the resulting row, unless the record already contains it."""
        about = {"method": name, "rates": rates, "seed": seed, "subject": self.subject, "cell": self.cells[name]}
        about = json.loads(json.dumps(about))  # as in the file
        self.refresh()
        if not any(about.items() <= row.items() for row in self.record.rows):
            self.write([about | self.train(name, rates, seed)])

    def write(self, rows: list[Row]) -> None:
        """Add rows to those in the file. Other processes may have added some."""
        with FileLock(self.out / "study.lock"):
            self.refresh()
            self.record.rows += rows
            self.record.write(self.out)

    def train(self, name: str, rates: Row, seed: int, trial: optuna.Trial | None = None) -> Row:
        """Train with early stopping, and test the best weights."""
        print(f"{name}, {rates}, seed {seed}", flush=True)
        torch.manual_seed(seed)
        transformers.utils.logging.disable_progress_bar()
        score_entities = functools.partial(measure_entities, tags=self.classes)
        choices: dict[str, tuple[models.TaskKind, Any, Any]] = {
            "classification": ("classification", transformers.DataCollatorWithPadding, measure_accuracy),
            "entities": ("tagging", transformers.DataCollatorForTokenClassification, score_entities),
        }
        kind, collator, score = choices[self.task]
        of, collate = self.settings, collator(self.tokenizer)
        base: Any = models.load_model(self.name, kind, len(self.classes), self.tokenizer.pad_token_id, seed)
        prepared = prepare(self.cells[name], rates, base.to(self.device), of["head_rate"])
        model, recorder = cast(Any, prepared.model), GateRecorder(getattr(base, "fastprefix", None))
        callbacks = [transformers.EarlyStoppingCallback(of["patience"]), recorder, *([Pruner(trial)] if trial else [])]
        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                folder, max_steps=of["steps"], per_device_train_batch_size=of["rows"], per_device_eval_batch_size=64,
                train_sampling_strategy="group_by_length", warmup_steps=round(WARMUP * of["steps"]), seed=seed,
                eval_strategy="steps", eval_steps=of["evaluate_every"], save_strategy="best", save_total_limit=1,
                save_only_model=True, load_best_model_at_end=True, metric_for_best_model="score",
                greater_is_better=True, logging_strategy="no", report_to=[], disable_tqdm=True,
                remove_unused_columns=False, use_cpu=self.device.type == "cpu",
            )  # fmt: skip
            trainer = Trainer(
                model, arguments, collate, self.texts["train"], self.texts["dev"], compute_metrics=score,
                callbacks=callbacks,
                optimizers=(torch.optim.AdamW(prepared.groups, weight_decay=0.0), None),
            )  # fmt: skip
            trainer.remove_callback(transformers.PrinterCallback)
            trained = trainer.train()
            tested: Any = trainer.predict(self.texts["test"])
        last = (trainer.state.best_global_step or 0) // of["evaluate_every"]
        return {
            "dev_score": trainer.state.best_metric, "best_step": trainer.state.best_global_step,
            "test_score": tested.metrics["test_score"], "steps": trained.global_step,
            "trainable": prepared.count_trainable() - sum(p.numel() for p in head_parameters(base) if p.requires_grad),
            "gates": recorder.trend[:last], "commit": self.record.environment["commit"],
        }  # fmt: skip


def expand(cells: dict[str, Row]) -> dict[str, Row]:
    """Return the cells with one length each, and the length in the name of each cell with a prompt or prefix."""
    expanded: dict[str, Row] = {}
    for name, cell in cells.items():
        if "config" not in cell:
            expanded[name] = cell
            continue
        for length in cell["lengths"]:
            config = {**cell["config"], "num_virtual_tokens": length}
            rest = {key: value for key, value in cell.items() if key not in ("lengths", "config")}
            expanded[f"{name} ({length})"] = {**rest, "config": config}
    return expanded


def load_texts(options: argparse.Namespace, task: str, most: dict[str, int]) -> dict[str, Dataset]:
    """Return the parts "train", "dev" and "test". Parts without a file are split off from the training file."""
    train = read_part("--data", options.data, task, options)
    if "label" not in train.column_names or len(set(flatten(train["label"]))) < 2:
        raise BenchmarkError(f"--data {options.data}: the column of --label-column must have two or more classes")
    label = ClassLabel(names=sorted(set(flatten(train["label"]))))
    parts = {"train": cast_labels(train, label)}
    for part in ("dev", "test"):
        with explain(f"--{part}"):  # too few texts to split, or labels that the training texts lack
            if path := getattr(options, part):
                parts[part] = cast_labels(read_part(f"--{part}", path, task, options), label)
            else:
                split = parts["train"].train_test_split(round(SPLIT_OFF * len(parts["train"])), seed=0)
                parts["train"], parts[part] = split["train"], split["test"]
    return {part: of.shuffle(seed=0).select(range(min(len(of), most[part]))) for part, of in parts.items()}


def flatten(labels: Any) -> list[str]:
    """Return the labels of texts, or of the words of all texts."""
    return [label for of_text in labels for label in ([of_text] if isinstance(of_text, str) else of_text)]


def cast_labels(part: Dataset, label: ClassLabel) -> Dataset:
    """Return texts with numbers as labels of the texts or of their words."""
    numbers = [label.str2int(of_text) for of_text in part["label"]]
    of_words = isinstance(part["label"][0], list)
    features = {"text": part.features["text"], "label": List(label) if of_words else label}
    return Dataset.from_dict({"text": part["text"], "label": numbers}, features=Features(features))


def read_part(option: str, path: Path, task: str, options: argparse.Namespace) -> Dataset:
    """Read labeled texts, or sentences whose words have tags: a word and its tag per line, blank lines between."""
    if task == "classification":
        return data.read_rows(option, path, options)
    with explain(f"{option} {path}"):
        blocks = [block.splitlines() for block in path.read_text(encoding="utf-8").strip().split("\n\n")]
        pairs = [[line.split("\t") for line in block] for block in blocks]
        return Dataset.from_dict({
            "text": [[word for word, _ in block] for block in pairs],
            "label": [[tag for _, tag in block] for block in pairs],
        })  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.set_defaults(out=DEFAULT_OUT / "study")
    parser.add_argument("--report", action="store_true", help="only print the tables of OUT/study.json")
    for name in ("data", "dev", "test"):
        meaning = (
            "training texts (.tsv or .jsonl; for entities, tagged words)"
            if name == "data"
            else "default: a tenth of the training texts"
        )
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
        cells = expand(plan["cells"])
        if unknown := set(options.cells or ()) - cells.keys():
            raise BenchmarkError(f"--cells {', '.join(unknown)}: the cells of the plan are {', '.join(cells)}")
        options.out.mkdir(parents=True, exist_ok=True)
        study = Study(options, plan, set_up(options))
        record = study.record
        print(record.settings["introduction"], flush=True)
        study.run_cells(options.cells or list(cells))
        study.write([])
    tables = "\n\n".join(table.markdown() for table in summarize(record))
    write_text(f"{record.settings['introduction']}\n\n{tables}\n\n{NOTES}\n", options.out / "study.md")
    print(f"\n{tables}\n\n{NOTES}")
    return 0 if options.report else record.print_faults()


def summarize(record: Record) -> list[Table]:
    """Return a table of the cells of the current subject, and a table of the questions with their answers."""
    subject = record.settings["subject"]
    current = [row for row in record.rows if row["subject"] == subject]
    # The options or the rates of a cell may have been changed. Seeds from before would be those of another cell.
    newest = {row["method"]: (row["cell"], row["rates"]) for row in current}
    frame = pd.DataFrame([row for row in current if (row["cell"], row["rates"]) == newest[row["method"]]])
    if frame.empty:
        return []
    frame = frame.drop_duplicates(["method", "seed"], keep="last")
    frame, rows = frame.assign(test=100 * frame.test_score, dev=100 * frame.dev_score), []
    for name, runs in frame.groupby("method", sort=False):
        rates = ", ".join(f"{kind} {rate:.2g}" for kind, rate in runs.rates.iloc[0].items() if rate is not None)
        gates = runs.gates.iloc[0][-1:]
        rows.append([
            str(name), number(runs.trainable.iloc[0], 0), rates, str(len(runs)), describe_spread(runs.test),
            describe_spread(runs.dev), number(runs.best_step.mean(), 0),
            f"{min(gates[0]):.2f} to {max(gates[0]):.2f}" if gates else MISSING,
        ])  # fmt: skip
    header = ("method", "trainable", "rates", "seeds", "test %", "dev %", "best step", "gates")
    # Differences are per seed, because a seed determines the batches, their order, and the initial head.
    scores, answers = frame.pivot_table("test", "seed", "method", "last"), []
    for question, above, below in list_pairs(record):
        if above in scores and below in scores:
            answers.append([question, f"{above} - {below}", *answer((scores[above] - scores[below]).dropna())])
    return [
        Table(header, rows),
        Table(("question", "difference of test %", "mean", "95 %", "each seed", "answer"), answers),
    ]


def list_pairs(record: Record) -> list[tuple[str, str, str]]:
    """Return the questions of a study, with a pair of cells for each."""
    return [(question, *pair) for question, pairs in record.settings["questions"].items() for pair in pairs]


def publish(study: str, title: str) -> str:
    """Return the table of a committed study that has a column with this title, for cog.

    Unlike results with times (``report.publish``), a study may run on a busy machine.
    """
    record = read(FOLDER / study / "study.json")
    table = next(table for table in summarize(record) if title in table.header)
    known = {row["method"] for row in record.rows}
    asked = {question for question, *pair in list_pairs(record) if known.issuperset(pair)}
    partial = dict.fromkeys(
        question for question, *pair in list_pairs(record) if question in asked and not known.issuperset(pair)
    )
    rest = ["", "Measured only for some pairs of cells so far:", "", *(f"- {each}" for each in partial)]
    return "\n".join(["", table.markdown(), *(rest if partial and title == "answer" else []), "", ""])


def answer(differences: pd.Series) -> list[str]:
    """Return the mean of differences, its interval, the differences, and whether the first cell is better."""
    each = differences.to_numpy()
    # With few seeds, a bootstrap interval of percentiles is too narrow: it misses 0 in 16 % of equal cells, not in 5 %.
    half = scipy.stats.t.ppf(0.975, len(each) - 1) * each.std(ddof=1) / len(each) ** 0.5 if len(each) > 1 else 0.0
    low, high = each.mean() - half, each.mean() + half
    enough = len(each) > FEW_SEEDS
    verdict = "open" if not enough or low <= 0.0 <= high else "yes" if low > 0.0 else "no"
    interval = f"{low:+.1f} to {high:+.1f}" if enough else MISSING
    return [f"{each.mean():+.1f}", interval, ", ".join(f"{difference:+.1f}" for difference in each), verdict]


def describe_spread(percentages: Any) -> str:
    """Return the mean and standard deviation as text."""
    return f"{percentages.mean():.1f}" + (f" ± {percentages.std():.1f}" if len(percentages) > 1 else "")
