"""``python -m benchmarks study``: options, trainings with progress, and what is printed and written."""

import argparse
import hashlib
import json
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from .. import environment, hub, models, report
from ..options import device_for, is_of_hub, positive, silence_libraries
from ..timing import Failure
from . import batches, contestants, plan, pretraining, summary, texts, training
from .contestants import ENTRIES, LENGTH_METHODS, Budget, Contestant
from .plan import Findings, Plan
from .store import Store
from .texts import Sizes, Source, Texts
from .training import Bench
from .trials import Outcome, Setting, Subject, Trial

DESCRIPTION = """Trains a pretrained encoder on labelled text with full fine-tuning and every method, at equal budgets
and over several seeds: learning rates searched on a dev split, early stopping, test accuracy with its deviation."""
DEFAULT_OUT = Path(__file__).parents[1] / "out" / "study"
SOFTWARE = ("fastprefix", "torch", "transformers")


@dataclass(frozen=True)
class Defaults:
    """What options that are not given are."""

    setting: Setting
    sizes: Sizes
    seeds: int
    lengths: tuple[int, ...]
    pretrain_steps: int
    prompt_tokens: int
    prefix_tokens: int


WHOLE = Defaults(
    Setting(
        steps=600,
        length_steps=600,
        search_steps=150,
        evaluate_every=50,
        patience=4,
        rows=16,
        max_length=64,
        head_rate=1e-2,
    ),
    Sizes(train=4000, dev=500, test=None),
    seeds=3,
    lengths=(10, 50, 100, 200),
    pretrain_steps=2000,
    prompt_tokens=100,
    prefix_tokens=20,
)
QUICK = Defaults(
    Setting(
        steps=4, length_steps=4, search_steps=2, evaluate_every=2, patience=2, rows=4, max_length=16, head_rate=1e-2
    ),
    Sizes(train=32, dev=16, test=16),
    seeds=2,
    lengths=(2, 4),
    pretrain_steps=4,
    prompt_tokens=20,
    prefix_tokens=16,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The study's options."""
    parser.add_argument("--data", type=Path, metavar="FILE", required=True, help="training texts: .tsv or .jsonl")
    parser.add_argument("--dev", type=Path, metavar="FILE", help="dev texts (default: a tenth of the training texts)")
    parser.add_argument("--test", type=Path, metavar="FILE", help="test texts (default: a tenth of the training texts)")
    parser.add_argument("--text-column", metavar="NAME", help="column of the text (default: guessed)")
    parser.add_argument("--label-column", metavar="NAME", help="column of the labels (default: guessed)")
    parser.add_argument("--model", metavar="NAME", help="a local folder or a model of the hub (default: see below)")
    parser.add_argument(
        "--pretrain-steps", type=positive, help="without --model: of a small encoder on the text itself"
    )
    parser.add_argument("--methods", nargs="+", choices=ENTRIES, default=list(ENTRIES), metavar="METHOD",
                        help=f"rows of the table: {', '.join(ENTRIES)}")  # fmt: skip
    parser.add_argument(
        "--lengths", nargs="*", type=positive, metavar="N", help="prefix lengths to compare; none: skip"
    )
    parser.add_argument("--length-methods", nargs="+", choices=LENGTH_METHODS, default=list(LENGTH_METHODS),
                        metavar="METHOD", help=f"to compare over lengths: {', '.join(LENGTH_METHODS)}")  # fmt: skip
    parser.add_argument("--seeds", type=positive, help="seeds 0 to N - 1")
    parser.add_argument("--length-seeds", type=positive, help="of the comparison over lengths (default: --seeds)")
    parser.add_argument("--prompt-tokens", type=positive, help="the prompt methods' budget: a plain prompt of so many")
    parser.add_argument("--prefix-tokens", type=positive, help="the prefix methods' budget: a plain prefix of so many")
    parser.add_argument("--train-examples", type=positive, help="how many to draw")
    parser.add_argument("--dev-examples", type=positive, help="how many to draw")
    parser.add_argument("--test-examples", type=positive, help="how many to draw (default: all)")
    for name, meaning in (
        ("steps", "of a training, at most"),
        ("length-steps", "of a training of the comparison over lengths, at most"),
        ("search-steps", "of a training that scores learning rates"),
        ("evaluate-every", "steps between evaluations on the dev split"),
        ("patience", "evaluations without a better one before a training ends"),
        ("rows", "texts in a batch"),
        ("max-length", "tokens of a text"),
    ):
        parser.add_argument(f"--{name}", type=positive, help=meaning)
    parser.add_argument("--head-rate", type=float, help="learning rate of the classifier's head, with every method")
    parser.add_argument("--device", type=torch.device, help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument("--report", action="store_true", help="train nothing: tables and plots of the finished runs")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it works")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder for finished runs, tables and plots")


def run(options: argparse.Namespace) -> int:
    """Run the study; 0 if every training came through, 1 if one failed or it was interrupted."""
    silence_libraries()
    device = device_for(options.device)
    defaults = QUICK if options.quick else WHOLE
    given = texts.load(
        Source(options.data, options.dev, options.test, options.text_column, options.label_column),
        _with_given(defaults.sizes, {name: getattr(options, f"{name}_examples") for name in ("train", "dev", "test")}),
    )
    setting = _with_given(defaults.setting, vars(options))
    if is_of_hub(options.model):
        hub.prepare()
    name = options.model or str(_pretrained(given, setting, defaults, options, device))
    bench, model = _bench(name, given, setting, device)
    facts = environment.describe(device)
    budget = contestants.budget_for(
        model, options.prompt_tokens or defaults.prompt_tokens, options.prefix_tokens or defaults.prefix_tokens
    )
    software = {package: facts[package] for package in SOFTWARE} | {"device": device.type}
    subject = Subject(_fingerprint(model), bench.texts.fingerprint(), software)
    table = contestants.at_budget(list(dict.fromkeys(options.methods)), model, budget, setting.max_length)
    study = _plan(options, defaults, setting, subject, table)
    introduction = _introduction(name, model, budget, study, given, facts)
    print(introduction, flush=True)
    record = {
        "suite": "study",
        "arguments": {k: v for k, v in vars(options).items() if k != "out"},
        "environment": facts,
        "introduction": introduction,
    }
    return _Study(study, bench, options, record).run()


def _plan(
    options: argparse.Namespace, defaults: Defaults, setting: Setting, subject: Subject, table: list[Contestant]
) -> Plan:
    lengths = defaults.lengths if options.lengths is None else options.lengths
    seeds = range(options.seeds or defaults.seeds)
    return Plan(
        table=table,
        lengths=plan.over_lengths(options.length_methods, lengths),
        seeds=seeds,
        length_seeds=range(options.length_seeds or len(seeds)),
        setting=setting,
        subject=subject,
    )


Record = TypeVar("Record", Setting, Sizes)


def _with_given(defaults: Record, given: dict[str, Any]) -> Record:
    names = [field.name for field in fields(defaults)]
    return replace(defaults, **{name: given[name] for name in names if given.get(name) is not None})


def _pretrained(
    given: Texts, setting: Setting, defaults: Defaults, options: argparse.Namespace, device: torch.device
) -> Path:
    size = replace(models.SIZES["quick" if options.quick else "cpu"], rows=setting.rows, length=setting.max_length)
    steps = options.pretrain_steps or defaults.pretrain_steps
    with tqdm(total=steps, desc="pretraining an encoder", unit="step", leave=False, file=sys.stderr) as bar:
        return pretraining.encoder(given, size, steps, options.out, device, bar.update)


def _bench(name: str, given: Texts, setting: Setting, device: torch.device) -> tuple[Bench, PreTrainedModel]:
    words = models.load_tokenizer(name)

    def load(seed: int) -> PreTrainedModel:
        model = models.load_model(name, "classification", len(given.class_names), words.pad_token_id, seed)
        nn.Module.to(model, device)
        return model

    return Bench(load, batches.encode(given, words, setting.max_length), device), load(0)


def _fingerprint(model: PreTrainedModel) -> str:
    """Changes with the weights and with what the configuration says (dropout, for one)."""
    digest = hashlib.sha256(json.dumps(model.config.to_diff_dict(), sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _introduction(
    name: str, model: PreTrainedModel, budget: Budget, study: Plan, texts: Texts, facts: dict[str, Any]
) -> str:
    config, setting = model.config, study.setting
    versions = ", ".join(f"{package} {facts[package]}" for package in SOFTWARE)
    return "\n".join(
        [
            f"text    {texts.describe()}",
            f"model   {name}: {model.num_parameters() / 1e6:.1f} M parameters, {config.num_hidden_layers} layers of "
            f"{config.hidden_size}",
            f"budget  {budget.prompt:,} parameters for prompt methods, {budget.prefix:,} for prefix methods",
            f"train   {setting.steps} steps of {setting.rows} texts of at most {setting.max_length} tokens; dev split "
            f"every {setting.evaluate_every} steps, patience {setting.patience}; rates by {setting.search_steps} steps "
            f"of seed {study.seeds[0]}; head's rate {setting.head_rate:g}; {len(study.seeds)} seeds",
            f"lengths {setting.length_steps} steps, {len(study.length_seeds)} seeds"
            if study.lengths
            else "lengths none",
            f"device  {facts['device_name']} ({facts['device']}), {facts['threads']} threads",
            f"with    {versions}",
        ]
    )


class _Study:
    """A plan being carried out: what is in the store is taken from there."""

    def __init__(self, study: Plan, bench: Bench, options: argparse.Namespace, record: dict[str, Any]) -> None:
        self.plan, self.bench, self.out, self.record = study, bench, options.out, record
        self.store = Store(self.out / "runs")
        self.report_only: bool = options.report
        self.findings = Findings()
        self.failures: list[tuple[Trial, Failure]] = []
        self.kept = 0

    def run(self) -> int:
        """Train what is missing, print and write what came out."""
        interrupted = False
        with tqdm(total=self.plan.steps(), unit="step", leave=False, file=sys.stderr) as self.bar:
            try:
                plan.carry_out(self.plan, self._outcome, self.findings)
            except KeyboardInterrupt:
                interrupted = True
        self._write_tables()
        summary.draw(self.findings, self.out)
        print(f"\n{summary.tables(self.findings)}\n\n{summary.NOTES}\n\nJSON, tables and plots in {self.out}")
        if self.kept:
            print(f"{self.kept} finished runs were there already")
        for trial, failure in self.failures:
            print(f"\n{trial.contestant.name}, seed {trial.seed}, failed:\n{failure.traceback}", file=sys.stderr)
        if interrupted:
            print("interrupted: finished runs are kept, the same command goes on from here", file=sys.stderr)
        return 1 if interrupted or self.failures else 0

    def _outcome(self, trial: Trial) -> Outcome | None:
        outcome = self.store.get(trial)
        if outcome is not None:
            self.kept += 1
            self._no_longer_to_do(trial.steps)
            return outcome
        if self.report_only:
            return None
        before = self.bar.n
        self.bar.set_description_str(f"{trial.contestant.name}, {'search' if trial.search else f'seed {trial.seed}'}")
        try:
            outcome = training.run(trial, self.bench, self.bar.update)
        except Exception as error:  # a method's own fault must not lose the others' results
            self.failures.append((trial, Failure.of(error, "training")))
        else:
            self.store.put(trial, outcome)
            self._write_tables()
        self._no_longer_to_do(trial.steps - (self.bar.n - before))
        return outcome

    def _no_longer_to_do(self, steps: int) -> None:
        """Steps that need no time are no progress: the time that remains is reckoned from the others."""
        self.bar.total -= steps

    def _write_tables(self) -> None:
        report.write_json(self.record | summary.record(self.findings), self.out / "study.json")
        text = f"{self.record['introduction']}\n\n{summary.tables(self.findings)}\n\n{summary.NOTES}\n"
        (self.out / "study.md").write_text(text, encoding="utf-8")
