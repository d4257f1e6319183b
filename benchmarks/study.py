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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import fastprefix
from fastprefix.methods import MethodConfig, PrefixMethod

from . import data, models
from .measure import BenchmarkError, added_peak, describe_environment
from .options import DEFAULT_OUT, add_common, is_from_hub, positive, prepare_hub, set_up
from .peers import Prepared, attach, freeze_body, group
from .report import Plot, Table, number
from .results import write_text

DESCRIPTION = "Train a pretrained encoder on labelled text with full fine-tuning and every method: test accuracy."
WARMUP = 0.06  # of the steps; then the rate falls to 0 linearly
EVALUATION_ROWS = 64
SPLIT_OFF, SPLIT_SEED = 0.1, 0  # of the training file, for dev and for test, where no file is given
SHORT_PROMPT = 0.6  # of the tokens of the budget: DePT and ADePT with 60 of 100, as published
BOTTLENECK = 8  # of residual networks at the equal budget, where the default of 128 would leave nothing for the rest
SOFTWARE = ("fastprefix", "torch", "transformers")
NOTES = """\
Mean and standard deviation over the seeds. trainable: without the head of the classifier, which every method trains too.
rates: of the prompt / of the rest, chosen on the dev split. best step: with the best dev accuracy, whose weights are
tested. ms a step: median of forward, backward and optimizer. peak MB: what forward and backward of the longest batch add
to the model, by PyTorch's allocators."""
DEFAULTS: dict[str, Any] = {
    "steps": 600, "length_steps": 600, "search_steps": 150, "evaluate_every": 50, "patience": 4, "rows": 16,
    "max_length": 64, "head_rate": 1e-2, "train_examples": 4000, "dev_examples": 500, "test_examples": None, "seeds": 3,
    "lengths": (10, 50, 100, 200), "pretrain_steps": 2000, "prompt_tokens": 100, "prefix_tokens": 20,
}  # fmt: skip
QUICK = DEFAULTS | {
    "steps": 4, "length_steps": 4, "search_steps": 2, "evaluate_every": 2, "patience": 2, "rows": 4, "max_length": 16,
    "train_examples": 32, "dev_examples": 16, "test_examples": 16, "seeds": 2, "lengths": (2, 4), "pretrain_steps": 4,
    "prompt_tokens": 20, "prefix_tokens": 16,
}  # fmt: skip
SHARED = ("evaluate_every", "patience", "rows", "max_length", "head_rate")
"""Options that change the outcome of every training."""


class Rates(NamedTuple):
    """Learning rates of the prompt, of the gates, and of everything else but the head. None: there is nothing of it."""

    main: float | None = None
    prompt: float | None = None
    gate: float | None = None


# ---- peers ---------------------------------------------------------------------------------------------------------

Make = Callable[[PreTrainedModel, int, int], MethodConfig]
"""Return a configuration for a model, a budget and the longest input."""


@dataclass(frozen=True)
class StudyPeer:
    """A row of the table. ``config`` is None for the whole model ("full") and for its head alone ("head")."""

    key: str
    config: MethodConfig | None = None
    group: str = "reference"

    @property
    def entry(self) -> "Entry":
        """Return the name and the candidates of the rates."""
        return ENTRIES[self.key]


class Entry(NamedTuple):
    """A method before its size is fitted to a model and a budget. The published rates come first."""

    name: str
    group: str
    candidates: tuple[Rates, ...]
    make: Make | None = None


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


def plain(make: Callable[[int], MethodConfig]) -> Make:
    """Use as many tokens as the budget allows."""
    return lambda model, budget, length: make(find_largest(model, make, budget))


def short_prompt(model: PreTrainedModel, budget: int) -> int:
    """Return the tokens of a prompt that leaves a part of the budget to an offset."""
    return max(1, round(SHORT_PROMPT * find_largest(model, fastprefix.PromptTuningConfig, budget)))


def make_dept(model: PreTrainedModel, budget: int, length: int) -> MethodConfig:
    """Fit the rank."""
    tokens = short_prompt(model, budget)
    return fastprefix.DePTConfig.for_budget(model, trainable=budget, num_virtual_tokens=tokens, max_length=length)


def make_adept(model: PreTrainedModel, budget: int, length: int) -> MethodConfig:
    """Fit the bottleneck."""
    tokens = short_prompt(model, budget)
    return fastprefix.ADePTConfig.for_budget(model, trainable=budget, num_virtual_tokens=tokens)


def networked(residual: bool, gate: bool) -> Make:
    """Use as many tokens as prefix tuning, and the widest network within the budget, although export drops it."""

    def make(model: PreTrainedModel, budget: int, length: int) -> MethodConfig:
        tokens = find_largest(model, fastprefix.PrefixTuningConfig, budget)

        def config(width: int) -> MethodConfig:
            return fastprefix.ResidualPrefixConfig(
                tokens, hidden_dim=width, bottleneck_dim=BOTTLENECK, residual=residual, gate=gate
            )

        return config(find_largest(model, config, budget))

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
    "pt": Entry("PT", "prompt", PROMPT_RATES, plain(fastprefix.PromptTuningConfig)),
    "dept": Entry("DePT", "prompt", DEPT_RATES, make_dept),
    "adept": Entry("ADePT", "prompt", ADEPT_RATES, make_adept),
    "prefix": Entry("prefix tuning", "prefix", PREFIX_RATES, plain(fastprefix.PrefixTuningConfig)),
    "apt": Entry("APT", "prefix", PREFIX_RATES, plain(fastprefix.APTConfig)),
    "apt-gates": Entry("APT, slow gates", "prefix", GATED_RATES, plain(fastprefix.APTConfig)),
    "mlp": Entry("MLP prefix", "prefix", NETWORK_RATES, networked(*NETWORKS["mlp"])),
    "mlp+gate": Entry("MLP prefix + gate", "prefix", NETWORK_RATES, networked(*NETWORKS["mlp+gate"])),
    "residual": Entry("residual prefix", "prefix", NETWORK_RATES, networked(*NETWORKS["residual"])),
    "residual+gate": Entry("residual prefix + gate", "prefix", NETWORK_RATES, networked(*NETWORKS["residual+gate"])),
}
LENGTH_METHODS = ("prefix", *NETWORKS)
COMPARED = (  # the findings of the papers: the first above the second
    ("DePT", "PT"), ("ADePT", "DePT"), ("ADePT", "PT"), ("APT", "prefix tuning"), ("APT, slow gates", "prefix tuning"),
    ("residual prefix + gate", "MLP prefix"), ("residual prefix + gate", "prefix tuning"),
)  # fmt: skip


def fit_peer(key: str, model: PreTrainedModel, options: argparse.Namespace) -> StudyPeer:
    """Return a row of the table, as large as the budget of its group allows.

    The budgets are those of a plain prompt and of a plain prefix. A prompt as large as a usual prefix would have hundreds
    of tokens, hence two budgets.
    """
    entry = ENTRIES[key]
    if entry.make is None:
        return StudyPeer(key)
    plain_configs = {
        "prompt": fastprefix.PromptTuningConfig(options.prompt_tokens),
        "prefix": fastprefix.PrefixTuningConfig(options.prefix_tokens),
    }
    try:
        budget = count_parameters(model, plain_configs[entry.group])
        return StudyPeer(key, entry.make(model, budget, options.max_length), entry.group)
    except ValueError as error:
        option = f"--{entry.group}-tokens"
        raise BenchmarkError(f"{entry.name} has no size within the budget of {option} ({error}); give more") from error


def size_peer(key: str, tokens: int) -> StudyPeer:
    """Return a prefix method with so many tokens, whatever it costs. Networks have the default widths."""
    config: MethodConfig = fastprefix.PrefixTuningConfig(tokens)
    if key in NETWORKS:
        residual, gate = NETWORKS[key]
        config = fastprefix.ResidualPrefixConfig(tokens, residual=residual, gate=gate)
    return StudyPeer(key, config, "length")


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


# ---- training ------------------------------------------------------------------------------------------------------


class Watcher(TrainerCallback):
    """Time the steps, keep the best weights, read the gates, and stop if the dev split improves no more."""

    def __init__(self, model: PreTrainedModel, patience: int, probe: data.Batch | None) -> None:
        self.model, self.patience, self.probe = model, patience, probe
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.seconds: list[float] = []
        self.curve: list[dict[str, float]] = []
        self.gates: list[dict[str, Any]] = []
        self.best: tuple[tuple[float, float], int, list[Tensor]] | None = None

    def read_gates(self, step: int) -> None:
        """Record the gates after so many steps."""
        values = read_gates(self.model, self.probe) if self.probe is not None else None
        self.gates += [{"step": step, "values": values}] if values else []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Read the gates before training."""
        self.read_gates(0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock, and evaluate after the last step."""
        self.seconds.append(time.perf_counter() - self.start)
        control.should_evaluate |= state.global_step == state.max_steps

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Keep the weights if they are the best so far: by accuracy, then by loss."""
        score = (metrics["eval_accuracy"], -metrics["eval_loss"])
        self.curve.append({"step": state.global_step, "accuracy": score[0], "loss": -score[1]})
        self.read_gates(state.global_step)
        if self.best is None or score > self.best[0]:
            self.best = score, state.global_step, [p.detach().clone() for p in self.parameters]
            self.waited = 0
        else:
            self.waited += 1
            control.should_training_stop |= self.waited >= self.patience

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best weights back."""
        assert self.best is not None
        for parameter, value in zip(self.parameters, self.best[2], strict=True):
            parameter.copy_(value)


@torch.no_grad()
def read_gates(model: PreTrainedModel, batch: data.Batch) -> list[list[float]] | None:
    """Return the gates of every layer and prefix token, averaged over a batch, or None if there are none."""
    method = getattr(model, "fastprefix", None)
    if not isinstance(method, PrefixMethod):
        return None
    was_training, attended = model.training, batch["attention_mask"].bool()
    hidden: Any = [None] * len(method.shapes)
    if method.needs_hidden():
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        hidden = model.eval()(**inputs, output_hidden_states=True).hidden_states
    gates = [method.prefix_gate(layer, hidden[layer], attended) for layer in range(len(method.shapes))]
    model.train(was_training)
    tokens, means = method.config.num_virtual_tokens, []
    for gate in gates:
        if gate is not None:
            values = gate[:, 0][attended] if gate.ndim == 4 else gate  # one for each query: leave padding out
            means.append(values.expand(*values.shape[:-1], tokens).reshape(-1, tokens).mean(dim=0).tolist())
    return means or None


def set_arguments(
    folder: str, device: torch.device, steps: int, rows: int, seed: int, **more: Any
) -> TrainingArguments:
    """Return the arguments of every training."""
    return TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=rows, per_device_eval_batch_size=EVALUATION_ROWS,
        lr_scheduler_type="linear", warmup_steps=round(WARMUP * steps), max_grad_norm=1.0, weight_decay=0.0, seed=seed,
        save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
        use_cpu=device.type == "cpu", dataloader_pin_memory=False, **more,
    )  # fmt: skip


@dataclass(frozen=True)
class Study:
    """Hold what all trainings share: the model by seed, its tokenizer, the texts as token ids, options, and the device."""

    load: Callable[[int], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    texts: dict[str, Dataset]
    options: argparse.Namespace
    device: torch.device
    subject: dict[str, Any]

    def describe(self, peer: StudyPeer, rates: Rates, seed: int, search: bool) -> dict[str, Any]:
        """Return all that the outcome of a training depends on, as plain data."""
        options = vars(self.options)
        steps = options["length_steps" if peer.group == "length" else "steps"]
        described = {
            "method": peer.entry.name, "trains": peer.key if peer.config is None else "method",
            "config": peer.config.to_dict() if peer.config else None, "rates": rates._asdict(), "seed": seed,
            "search": search, "steps": min(options["search_steps"], steps) if search else steps,
            **{name: options[name] for name in SHARED}, **self.subject,
        }  # fmt: skip
        plain_data: dict[str, Any] = json.loads(json.dumps(described))
        return plain_data

    def train(self, peer: StudyPeer, rates: Rates, seed: int, search: bool = False) -> dict[str, Any]:
        """Return the outcome of a training, which is read from its file if it was finished before."""
        trial = self.describe(peer, rates, seed, search)
        key = hashlib.sha256(json.dumps(trial, sort_keys=True).encode()).hexdigest()[:16]
        path: Path = self.options.out / "runs" / f"{peer.key}-{'search' if search else 'run'}-seed{seed}-{key}.json"
        if path.exists():
            outcome: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["outcome"]
            return outcome
        print(f"{peer.entry.name}, {'search' if search else 'run'}, seed {seed}, {trial['steps']} steps", flush=True)
        outcome = self.run(peer, rates, seed, search, trial["steps"])
        write_text(json.dumps({"trial": trial, "outcome": outcome}), path)
        return outcome

    def run(self, peer: StudyPeer, rates: Rates, seed: int, search: bool, steps: int) -> dict[str, Any]:
        """Train, stop early, and test the best weights."""
        torch.manual_seed(seed)
        model, options, collate = self.load(seed), self.options, DataCollatorWithPadding(self.tokenizer)
        prepared = prepare(peer, rates, model, options.head_rate)
        dev = self.texts["dev"]
        probe = None if search else collate([dev[i] for i in range(min(EVALUATION_ROWS, len(dev)))]).to(self.device)
        watcher = Watcher(model, options.patience, probe)
        with tempfile.TemporaryDirectory() as folder:
            more = {"eval_strategy": "steps", "eval_steps": options.evaluate_every}
            trainer = Trainer(
                model, set_arguments(folder, self.device, steps, options.rows, seed, **more), collate,
                train_dataset=self.texts["train"], eval_dataset=dev, callbacks=[watcher],
                compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
                optimizers=(torch.optim.AdamW(prepared.groups, weight_decay=0.0), None),
            )  # fmt: skip
            trainer.train()
            watcher.restore()
            tested = None if search else trainer.predict(self.texts["test"]).metrics["test_accuracy"]
        assert watcher.best is not None
        head = sum(p.numel() for p in models.head_parameters(model))
        longest = sorted(self.texts["train"], key=lambda row: len(row["input_ids"]))[-options.rows :]
        batch = collate(longest).to(self.device)
        (accuracy, negative_loss), step, _ = watcher.best
        return {
            "dev_accuracy": accuracy, "dev_loss": -negative_loss, "best_step": step, "steps": len(watcher.seconds),
            "test_accuracy": tested, "trainable": prepared.count_trainable() - head, "head": head,
            "seconds_a_step": statistics.median(watcher.seconds),
            "peak_bytes": None if search else added_peak(lambda: model.train()(**batch).loss.backward(), self.device),
            "curve": watcher.curve, "gates": watcher.gates,
        }  # fmt: skip


def pretrain(texts: Sequence[str], options: argparse.Namespace, device: torch.device) -> Path:
    """Return the folder of a small encoder pretrained on the training texts (masked language modelling), made once."""
    size = models.SIZES["quick" if options.quick else "cpu"]._replace(length=options.max_length)
    steps, rows = options.pretrain_steps, options.rows
    digest = hashlib.sha256(json.dumps([*size, steps, rows, *texts]).encode()).hexdigest()
    folder: Path = options.out / f"encoder-{digest[:16]}"
    if folder.exists():
        return folder
    print(f"pretraining an encoder, {steps} steps", flush=True)
    words = data.train_tokenizer(list(texts), size.vocabulary)
    words.add_special_tokens({"mask_token": "<mask>"})
    config = models.configure("classification", size, words.pad_token_id)
    config.vocab_size = len(words)
    torch.manual_seed(0)
    model = BertForMaskedLM(config)
    encoded = [{"input_ids": ids} for ids in words(list(texts), truncation=True, max_length=size.length)["input_ids"]]
    collate = DataCollatorForLanguageModeling(words, mlm_probability=0.15, seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = set_arguments(scratch, device, steps, rows, 0, learning_rate=1e-3)
        Trainer(model, arguments, collate, train_dataset=encoded).train()
    words.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


# ---- texts ---------------------------------------------------------------------------------------------------------


def load_texts(options: argparse.Namespace) -> tuple[dict[str, Dataset], list[str]]:
    """Return the three parts and the classes. Parts without a file are split off from the training file."""
    parts: dict[str, Dataset] = {}
    for part, path in (("train", options.data), ("dev", options.dev), ("test", options.test)):
        if path is not None:
            rows = data.read_file(
                path, "--data" if part == "train" else f"--{part}", options.text_column, options.label_column
            )
            if "label" not in rows.column_names:
                raise BenchmarkError(f"{path}: name the column of the labels with --label-column")
            parts[part] = rows
        else:
            count = round(SPLIT_OFF * len(parts["train"]))
            if count < 1:
                raise BenchmarkError(
                    f"{options.data.name}: too few examples to split some off; give a file with --{part}"
                )
            split = parts["train"].train_test_split(count, seed=SPLIT_SEED)
            parts["train"], parts[part] = split["train"], split["test"]
    classes = data.list_classes(options.data.name, parts["train"])
    if len(classes) < 2:
        raise BenchmarkError(f"{options.data.name}: two or more classes are needed, got {classes}")
    for part, rows in parts.items():
        if unknown := sorted(set(rows["label"]) - set(classes)):
            raise BenchmarkError(f"--{part}: labels that the training file does not have: {unknown}")
        count = getattr(options, f"{part}_examples")
        if count is not None and count < len(rows):
            rows = rows.shuffle(seed=SPLIT_SEED).select(range(count))
        parts[part] = data.number_labels(rows, classes)
    return parts, classes


def encode(part: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Return token ids, each text cut to a length."""
    rows = tokenizer(list(part["text"]), truncation=True, max_length=max_length)
    columns = {name: rows[name] for name in ("input_ids", "attention_mask")}
    return Dataset.from_dict({**columns, "labels": part["label"]})


def find_fingerprint(model: PreTrainedModel) -> str:
    """Return a digest of the weights and of the configuration."""
    digest = hashlib.sha256(json.dumps(model.config.to_diff_dict(), sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---- command -------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_common(parser)
    parser.set_defaults(out=DEFAULT_OUT / "study")
    parser.add_argument("--report", action="store_true", help="train nothing: tables and plots of OUT/study.json")
    for name, meaning in (("data", "training texts: .tsv or .jsonl"), ("dev", "default: a tenth of the training texts"),
                          ("test", "default: a tenth of the training texts")):  # fmt: skip
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=meaning)
    parser.add_argument("--text-column", metavar="NAME", help="default: guessed")
    parser.add_argument("--label-column", metavar="NAME", help="default: guessed")
    parser.add_argument(
        "--model", metavar="NAME", help="a folder or a model of the hub (default: pretrain a small one)"
    )
    parser.add_argument("--methods", nargs="+", choices=ENTRIES, default=list(ENTRIES), metavar="METHOD",
                        help=f"rows of the table: {', '.join(ENTRIES)}")  # fmt: skip
    parser.add_argument(
        "--lengths", nargs="*", type=positive, metavar="N", help="prefix lengths to compare; none: skip"
    )
    parser.add_argument("--length-methods", nargs="+", choices=LENGTH_METHODS, default=list(LENGTH_METHODS),
                        metavar="METHOD", help=f"to compare over lengths: {', '.join(LENGTH_METHODS)}")  # fmt: skip
    parser.add_argument("--length-seeds", type=positive, help="of the comparison over lengths (default: --seeds)")
    parser.add_argument("--head-rate", type=float, help="learning rate of the head, with every method")
    for name in DEFAULTS.keys() - {"lengths", "head_rate"}:
        parser.add_argument(f"--{name.replace('_', '-')}", type=positive, help=f"default: {DEFAULTS[name]}")


def run(options: argparse.Namespace) -> int:
    """Train what is missing, print and write tables and plots. Return 1 if a training failed or was interrupted."""
    path: Path = options.out / "study.json"
    if options.report:
        if not path.exists():
            raise BenchmarkError(f"--report: {path} does not exist")
        return write(json.loads(path.read_text(encoding="utf-8")), options.out)
    if options.data is None:
        raise BenchmarkError("--data is needed: a .tsv or .jsonl file of labelled texts")
    for name, value in (QUICK if options.quick else DEFAULTS).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    device, failures = set_up(options), list[str]()
    study, document = set_up_study(options, device)
    print(document["introduction"], flush=True)
    try:
        carry_out(study, document, failures)
    except KeyboardInterrupt:
        failures.append("interrupted: finished trainings are kept, the same command continues")
    status = write(document, options.out)
    print("\n".join(failures), file=sys.stderr)
    return 1 if failures else status


def set_up_study(options: argparse.Namespace, device: torch.device) -> tuple[Study, dict[str, Any]]:
    """Read the texts, load the model, and begin the document of results."""
    texts, classes = load_texts(options)
    if is_from_hub(options.model):
        prepare_hub()
    name = options.model or str(pretrain(list(texts["train"]["text"]), options, device))
    words = models.load_tokenizer(name)

    def load(seed: int) -> PreTrainedModel:
        model = models.load_model(name, "classification", len(classes), words.pad_token_id, seed)
        nn.Module.to(model, device)
        return model

    encoded = {part: encode(rows, words, options.max_length) for part, rows in texts.items()}
    facts, model = describe_environment(device), load(0)
    digest = hashlib.sha256(json.dumps([part.to_dict() for part in encoded.values()]).encode()).hexdigest()
    software = {package: facts[package] for package in SOFTWARE} | {"device": device.type}
    subject = {"model": find_fingerprint(model), "texts": digest, "software": software}
    counts = ", ".join(f"{len(rows):,} {part}" for part, rows in texts.items())
    size = f"{model.num_parameters() / 1e6:.1f} M parameters, {model.config.num_hidden_layers} layers"
    introduction = "\n".join([
        f"text    {options.data.name}: {counts} examples, {len(classes)} classes",
        f"model   {name}: {size} of {model.config.hidden_size}",
        f"train   {', '.join(f'{option} {getattr(options, option)}' for option in ('steps', 'seeds', *SHARED))}",
        f"device  {facts['device_name']} ({facts['device']}), {facts['threads']} threads",
        f"with    {', '.join(f'{package} {facts[package]}' for package in SOFTWARE)}",
    ])  # fmt: skip
    arguments = {name: value for name, value in vars(options).items() if name != "out"}
    head = {"suite": "study", "arguments": arguments, "environment": facts, "introduction": introduction}
    return Study(load, words, encoded, options, device, subject), {**head, "table": [], "lengths": {}}


def carry_out(study: Study, document: dict[str, Any], failures: list[str]) -> None:
    """Search rates with the first seed, then train every seed. An interrupted study has some seeds of all methods."""
    options, model = study.options, study.load(0)

    def attempt(peer: StudyPeer, rates: Rates, seed: int, search: bool = False) -> dict[str, Any] | None:
        try:
            return study.train(peer, rates, seed, search)
        except Exception:  # the failure of one method must not lose the results of the others
            failures.append(f"{peer.entry.name}, seed {seed}, failed:\n{traceback.format_exc()}")
            return None

    def search(peer: StudyPeer) -> tuple[Rates | None, list[dict[str, Any]]]:
        found = [(attempt(peer, rates, 0, search=True), rates) for rates in peer.entry.candidates]
        scored = [(outcome["dev_accuracy"], -outcome["dev_loss"], rates) for outcome, rates in found if outcome]
        best = max(scored, key=lambda entry: entry[:2])[2] if scored else None
        return best, [{"rates": rates._asdict(), "dev_accuracy": accuracy} for accuracy, _, rates in scored]

    def add_row(peer: StudyPeer, rates: Rates | None, searched: list[dict[str, Any]]) -> tuple[StudyPeer, Any, Any]:
        row = {
            "method": peer.entry.name, "group": peer.group, "config": peer.config.to_dict() if peer.config else None,
            "rates": rates._asdict() if rates else None, "search": searched, "runs": {},
        }  # fmt: skip
        return peer, rates, row

    def run_seeds(rows: list[tuple[StudyPeer, Any, Any]], seeds: int) -> None:
        for seed in range(seeds):
            for peer, rates, row in rows:
                if rates is not None and (outcome := attempt(peer, rates, seed)) is not None:
                    row["runs"][str(seed)] = outcome
                    write_text(json.dumps(document, default=str), options.out / "study.json")

    peers = [fit_peer(key, model, options) for key in dict.fromkeys(options.methods)]
    rows = [add_row(peer, *search(peer)) for peer in peers]
    document["table"] = [row for *_, row in rows]
    run_seeds(rows, options.seeds)
    over_lengths = []
    for key in options.length_methods if options.lengths else ():
        middle = sorted(options.lengths)[(len(options.lengths) - 1) // 2]
        best, searched = search(size_peer(key, middle))  # one rate for all lengths
        of_key = [add_row(size_peer(key, length), best, searched) for length in options.lengths]
        by_length = {str(length): row for length, (*_, row) in zip(options.lengths, of_key, strict=True)}
        document["lengths"][ENTRIES[key].name] = by_length
        over_lengths += of_key
    run_seeds(over_lengths, options.length_seeds or options.seeds)


# ---- report --------------------------------------------------------------------------------------------------------


def write(document: dict[str, Any], out: Path) -> int:
    """Print and write the tables and the plots."""
    tables = "\n\n".join(table.markdown() for table in summarize(document))
    text = f"{document['introduction']}\n\n{tables}\n\n{NOTES}\n"
    write_text(json.dumps(document, default=str), out / "study.json")
    write_text(text, out / "study.md")
    draw(document, out)
    print(f"\n{tables}\n\n{NOTES}\n\nJSON, tables and plots in {out}")
    return 0


def summarize(document: dict[str, Any]) -> list[Table]:
    """Return the methods at their budgets, their differences, and the prefix methods over lengths."""
    header = ("method", "trainable", "rates", "seeds", "test %", "dev %", "best step", "ms a step", "peak MB")
    rows = []
    for row in document["table"]:
        if row["runs"]:
            runs = pd.DataFrame(row["runs"].values())
            rows.append([
                name_row(row), number(runs.trainable.iloc[0], 0), describe_rates(Rates(**row["rates"])), str(len(runs)),
                describe_spread(runs.test_accuracy), describe_spread(runs.dev_accuracy),
                number(runs.best_step.mean(), 0), number(1e3 * runs.seconds_a_step.median(), 0),
                number(runs.peak_bytes.max() / 1e6, 1),
            ])  # fmt: skip
    tables = [Table(header, rows)]
    accuracies = {row["method"]: read_accuracies(row) for row in document["table"] if row["runs"]}
    rows = []
    for above, below in COMPARED:  # seed by seed: the same batches in the same order, and the same head at the start
        if above in accuracies and below in accuracies:
            differences = (100 * (accuracies[above] - accuracies[below])).dropna()
            each = ", ".join(f"{difference:+.1f}" for difference in differences)
            rows.append([f"{above} - {below}", f"{differences.mean():+.1f}", each])
    tables += [Table(("difference of test %", "mean", "of each seed"), rows)] if rows else []
    if lengths := read_lengths(document):
        columns = list(dict.fromkeys(length for of in lengths.values() for length in of))
        rows = []
        for name, of in lengths.items():
            means = [100 * scores.mean() for scores in of.values()]
            cells = (describe_spread(of[length]) if length in of else "-" for length in columns)
            rows.append([name, *cells, number(max(means) - min(means), 1)])
        tables.append(Table(("test % with a prefix of", *columns, "largest - least"), rows))
    return tables


def read_accuracies(row: dict[str, Any]) -> "pd.Series[float]":
    """Return the test accuracies by seed."""
    return pd.Series({seed: outcome["test_accuracy"] for seed, outcome in row["runs"].items()}, dtype=float)


def read_lengths(document: dict[str, Any]) -> dict[str, dict[str, "pd.Series[float]"]]:
    """Return the test accuracies by method and length."""
    found = {
        name: {length: read_accuracies(row) for length, row in rows.items() if row["runs"]}
        for name, rows in document["lengths"].items()
    }
    return {name: of for name, of in found.items() if of}


def describe_rates(rates: Rates) -> str:
    """Describe rates: of the prompt / of the rest, and of the gates."""
    text = " / ".join(f"{rate:g}" for rate in (rates.prompt, rates.main) if rate is not None)
    return text if rates.gate is None else f"{text}, gates {rates.gate:g}"


def describe_spread(shares: "pd.Series[float]") -> str:
    """Return the mean and the standard deviation in percent."""
    mean = f"{100 * shares.mean():.1f}"
    return f"{mean} ± {100 * shares.std():.1f}" if len(shares) > 1 else mean


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


def draw(document: dict[str, Any], out: Path) -> None:
    """Plot accuracies by method, gates over the training, and accuracies over lengths."""
    tested = {name_row(row): 100 * read_accuracies(row) for row in document["table"] if row["runs"]}
    panels = {"test accuracy of every seed": pd.DataFrame(tested).T}
    Plot(panels, "method", "% of the test texts", "dots").draw(out / "study_accuracy.png")
    gates: dict[str, pd.DataFrame] = {}
    for row in document["table"]:
        readings = next((outcome["gates"] for outcome in row["runs"].values()), [])
        if readings:  # one line for each layer
            values = {r["step"]: [statistics.mean(layer) for layer in r["values"]] for r in readings}
            gates[name_row(row)] = pd.DataFrame(values).T.rename(columns=lambda layer: f"layer {layer + 1}")
    if gates:
        Plot(gates, "step", "gate, mean over dev texts and tokens", "line").draw(out / "study_gates.png")
    if lengths := read_lengths(document):
        curves = {name: pd.Series({int(n): 100 * s.mean() for n, s in of.items()}) for name, of in lengths.items()}
        panels = {"test accuracy over lengths": pd.DataFrame(curves)}
        Plot(panels, "prefix tokens", "% of the test texts, mean of the seeds", "line").draw(out / "study_lengths.png")
