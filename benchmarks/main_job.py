"""The main job: every method on real text, on an encoder and on a decoder, against the frozen floor and PEFT."""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import contest, data, environment, figures, hub, models, plots, report, subjects
from .contest import Contest, Result, Rounds
from .data import Corpus
from .methods import FLOOR, all_methods
from .options import QUICK_NOTE, add_common, device_for, is_of_hub, positive, silence_libraries
from .plots import Panel
from .results import read
from .subjects import Subject
from .timing import NOISE, Samples

DESCRIPTION = "Tunes an encoder and a decoder on real text with every method: speed, memory and loss in one table each."
ROUNDS = {
    "quick": Rounds(steps=24, evaluations=4, warmup=2),
    "cpu": Rounds(steps=32, evaluations=4, warmup=3),
    "cuda": Rounds(steps=120, evaluations=10, warmup=10),
}
HEADER = (
    "method", "trainable", "forward ms", "x floor", "fwd + bwd ms", "x floor", "tokens/s", "peak MB",
    "loss first", "last",
)  # fmt: skip
NOISY = "~"
NOTES = f"""\
frozen floor: the model itself without prompt or prefix; its fwd + bwd brings the gradient down to the embeddings, as
every method must. Medians of interleaved rounds; tokens/s of the text (no padding, no prompt) in fwd + bwd; peak MB:
what fwd + bwd add to the model, by PyTorch's allocators; loss: on held-out text, before and after training. A
classifier's head is trained with every method, and counted. {NOISY}: noise, p20 or p80 of the time (of a ratio: of one
of its two times) is more than {NOISE:.0%} off the median."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The main job's options."""
    add_common(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", type=Path, metavar="FILE", help="text from a .tsv (with header) or .jsonl file")
    source.add_argument("--dataset", metavar="NAME[/CONFIG]", help="text from a data set of the Hugging Face hub")
    parser.add_argument("--text-column", metavar="NAME", help="column of the text (default: guessed)")
    parser.add_argument("--label-column", metavar="NAME", help="column of the labels (default: guessed)")
    parser.add_argument("--model", metavar="NAME", help="a model of the hub or a local folder, in place of the two")
    parser.add_argument("--steps", type=positive, help="training steps")
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> int:
    """Run the main job; 0 if every method came through, 1 otherwise."""
    start = time.perf_counter()
    silence_libraries()
    device = device_for(options.device)
    size_name = "quick" if options.quick else device.type
    rounds = ROUNDS[size_name]
    if options.steps is not None:
        rounds = replace(rounds, steps=options.steps)
    if options.dataset or is_of_hub(options.model):
        hub.prepare()
    corpus = _corpus(options)
    facts = environment.describe(device)
    record = {
        "suite": "main",
        "arguments": {k: v for k, v in vars(options).items() if k != "out"},
        "environment": facts,
        "corpus": corpus.describe(),
    }
    size = models.SIZES[size_name]
    if options.model:
        chosen = subjects.named(options.model, corpus, size, rounds.steps, device, options.seed)
    else:
        chosen = subjects.built(corpus, size, rounds.steps, device, options.seed)
    print(_introduction(corpus, facts), flush=True)

    results: list[tuple[Subject, list[Result]]] = []
    for subject in chosen:
        results.append((subject, _run_one(subject, rounds, options.seed)))
        print(f"\n{_table(*results[-1])}", flush=True)
        # After every model: whoever stops the run keeps what is done.
        _write(record | {"seconds": time.perf_counter() - start}, results, options.out)
    return _conclusion(results, options.out, time.perf_counter() - start)


def _corpus(options: argparse.Namespace) -> Corpus:
    columns = {"text_column": options.text_column, "label_column": options.label_column}
    if options.data:
        return data.from_file(options.data, options.seed, **columns)
    if options.dataset:
        return data.from_hub(options.dataset, options.seed, **columns)
    return data.python_documentation(options.seed)


def _run_one(subject: Subject, rounds: Rounds, seed: int) -> list[Result]:
    methods = all_methods()
    with tqdm(
        total=rounds.ticks(len(methods), subject.task), desc=subject.title, unit="step", leave=False, file=sys.stderr
    ) as bar:
        bar.set_postfix_str("setting up")
        match = Contest(subject.model, subject.task, methods, seed)

        def tick(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        return match.run(rounds, tick)


def _introduction(corpus: Corpus, facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {facts[name]}" for name in ("fastprefix", "torch", "transformers"))
    peers = f"peft {facts['peft']}" if facts["peft"] else "peft is not installed: no peers"
    busy = environment.busy(facts)
    return "\n".join(
        [
            f"text    {corpus.describe()}",
            f"device  {facts['device_name']} ({facts['device']}), {facts['threads']} threads",
            f"with    {versions}, {peers}",
            *([f"warning {busy}"] if busy else []),
        ]
    )


def _table(subject: Subject, results: list[Result]) -> str:
    floor = contest.floor_of(results)
    return f"**{subject.title}**: {subject.describe()}\n\n" + report.table(HEADER, [_row(r, floor) for r in results])


def _row(result: Result, floor: Result) -> list[str]:
    if result.failure:
        return [result.method.name, f"FAILED in {result.failure.stage}: {result.failure.message}"]
    return [
        result.method.name,
        report.number(result.trainable, 0),
        *_time(result.forward, floor.forward),
        *_time(result.step, floor.step),
        report.number(result.tokens_per_second, 0),
        report.number(result.peak_bytes / 1e6 if result.peak_bytes is not None else None),
        report.number(result.held_out_losses[0][1], 3),
        report.number(result.held_out_losses[-1][1], 3),
    ]


def _time(samples: Samples, floor: Samples) -> tuple[str, str]:
    """Milliseconds and the multiple of the floor's, each marked where it is noise."""
    noisy = samples.noisy, samples.noisy or (bool(floor.seconds) and floor.noisy)
    cells = report.number(1e3 * samples.median), report.number(contest.times_floor(samples, floor), 2)
    first, second = (NOISY * marked + cell for marked, cell in zip(noisy, cells, strict=True))
    return first, second


def _record(subject: Subject, results: list[Result]) -> dict[str, Any]:
    floor = contest.floor_of(results)
    return {
        "title": subject.title,
        "description": subject.describe(),
        "weights": subject.weights,
        "tokens_per_step": subject.task.tokens_per_step(),
        "methods": [result.record(floor) for result in results],
    }


def _write(record: dict[str, Any], results: list[tuple[Subject, list[Result]]], out: Path) -> None:
    path = out / "main_job.json"
    report.write_json(record | {"subjects": [_record(*pair) for pair in results]}, path)
    tables = "\n\n".join(_table(*pair) for pair in results)
    remarks = filter(None, (environment.busy(record["environment"]), record["arguments"]["quick"] and QUICK_NOTE))
    report.write_text("\n\n".join([tables, NOTES, *remarks]) + "\n", out / "main_job.md")
    curves = [_curves(*pair) for pair in results]
    plots.curves(curves, out / "main_job_loss.png", FLOOR, "step", "loss on held-out text")
    figures.draw(figures.main_job(read(path)), out / "main_job_time.png")


def _curves(subject: Subject, results: list[Result]) -> Panel[tuple[int, float]]:
    return Panel(subject.title, {r.method.name: r.held_out_losses for r in results if r.held_out_losses})


def _conclusion(results: list[tuple[Subject, list[Result]]], out: Path, seconds: float) -> int:
    print(f"\n{NOTES}\n\n{seconds:.0f} s; JSON, tables and plots in {out}")
    failures = [
        (subject.title, r.method.name, r.failure) for subject, of_model in results for r in of_model if r.failure
    ]
    for title, name, failure in failures:
        print(f"\n{title}, {name}, failed:\n{failure.traceback}", file=sys.stderr)
    return 1 if failures else 0
