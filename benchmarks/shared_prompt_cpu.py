"""A soft prompt run once for the whole batch, on the CPU: ``python -m benchmarks.shared_prompt_cpu --out FILE``.

Rivals, by turns on one frozen Llama-shaped model: the model without a prompt (the floor), the prompt methods on the
shared path, prompt tuning on the textbook path, the methods merged for inference, and PEFT's prompt tuning. Measured:
a training step (forward + backward), the prefill (a forward pass that fills a cache), decoding a token after it, and
what step and prefill add to memory at their peak. Ratios compare medians with the floor's.
"""

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import fastprefix
from fastprefix.methods import MethodConfig

from . import environment, models, report
from .memory import added_peak
from .methods import ADEPT_WIDTH, DEPT_RANK, FLOOR, all_methods
from .models import Size
from .timing import Clock, Failure, Job, Samples, interleave

FULL = Size(layers=6, width=512, heads=8, vocabulary=4096, rows=16, length=128)
QUICK = Size(layers=2, width=64, heads=2, vocabulary=512, rows=2, length=16)
LENGTHS = (20, 60, 100)
DECODED = 32  # tokens
HEADER = ("method", "step ms", "x floor", "MB", "x floor", "prefill ms", "x floor", "MB", "token ms", "x floor")
TARGETS = {"step at S = 100": 1.15, "step at S = 60": 1.10, "step's memory": 1.10, "prefill after merging": 1.05}
"""At most so many times the floor's."""

Prepare = Callable[[PreTrainedModel], nn.Module]


@dataclass(frozen=True)
class Rival:
    """A way to a prompt; ``trains`` is False after merging."""

    name: str
    prepare: Prepare
    trains: bool = True


def rivals(S: int, length: int) -> list[Rival]:
    """All of them, at a prompt of S tokens."""
    prompt = partial(fastprefix.PromptTuningConfig, S)
    dept = partial(fastprefix.DePTConfig, S, rank=DEPT_RANK, max_length=length + DECODED)
    adept = partial(fastprefix.ADePTConfig, S, bottleneck_dim=ADEPT_WIDTH)
    ours: dict[str, Callable[..., MethodConfig]] = {"PT": prompt, "DePT": dept, "ADePT": adept}
    chosen = [Rival(FLOOR, _floor)]
    chosen += [Rival(f"{name} shared", partial(_attached, make(shared_prompt=True))) for name, make in ours.items()]
    chosen += [Rival("PT textbook", partial(_attached, prompt(shared_prompt=False)))]
    chosen += [Rival(f"{name} merged", partial(_merged, make()), trains=False) for name, make in ours.items()]
    return [*chosen, *([Rival("PEFT PT", partial(_peft, S))] if importlib.util.find_spec("peft") else [])]


def _floor(model: PreTrainedModel) -> nn.Module:
    floor = next(method for method in all_methods() if method.name == FLOOR)
    return floor.prepare(model, "causal_lm", 0).model


def _attached(config: MethodConfig, model: PreTrainedModel) -> nn.Module:
    return fastprefix.attach(model, config)


def _merged(config: MethodConfig, model: PreTrainedModel) -> nn.Module:
    return fastprefix.merge(fastprefix.attach(model, config))


def _peft(S: int, model: PreTrainedModel) -> nn.Module:
    import peft

    wrapped: nn.Module = peft.get_peft_model(model, peft.PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=S))
    return wrapped


class Work:
    """What is measured of one rival."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.model, self.ids, self.mask = model, ids, torch.ones_like(ids)

    def step(self) -> None:
        """Forward and backward."""
        self.model.train()
        self.model(input_ids=self.ids, attention_mask=self.mask, labels=self.ids).loss.backward()
        self.model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def prefill(self) -> None:
        """All tokens at once, into a cache, and the logits of the last."""
        self.model.eval()
        self.model(input_ids=self.ids, attention_mask=self.mask, use_cache=True, logits_to_keep=1)

    def decode(self, clock: Clock) -> float:
        """Seconds a token: so many more tokens take so much longer."""
        return (clock(partial(self._generate, DECODED)) - clock(partial(self._generate, 1))) / (DECODED - 1)

    @torch.no_grad()
    def _generate(self, tokens: int) -> None:
        self.model.eval()
        options = {"max_new_tokens": tokens, "do_sample": False, "use_cache": True, "eos_token_id": None}
        self.model.generate(input_ids=self.ids, attention_mask=self.mask, pad_token_id=0, **options)


@dataclass
class Figures:
    """What was measured of one rival; None where it does not apply, or failed."""

    step: Samples | None = None
    prefill: Samples | None = None
    decode: Samples | None = None
    step_bytes: int | None = None
    prefill_bytes: int | None = None
    failures: list[Failure] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """What the JSON keeps."""
        times = {name: getattr(self, name) for name in ("step", "prefill", "decode")}
        return {
            **{name: samples and samples.summary() for name, samples in times.items()},
            "step_bytes": self.step_bytes,
            "prefill_bytes": self.prefill_bytes,
            "failures": [asdict(failure) for failure in self.failures],
        }


def measure(size: Size, S: int, rounds: int) -> dict[str, Figures]:
    """All rivals at one length, by name."""
    base = models.build_decoder(size, pad=0, end=1, seed=0)
    ids = torch.randint(2, size.vocabulary, (size.rows, size.length), generator=torch.Generator().manual_seed(0))
    clock = Clock(torch.device("cpu"))
    chosen = rivals(S, size.length)
    figures = {rival.name: Figures() for rival in chosen}
    works = {rival.name: Work(rival.prepare(models.with_shared_weights(base)), ids) for rival in chosen}
    trained = {rival.name: works[rival.name] for rival in chosen if rival.trains}

    def timed(what: str, jobs: dict[str, Job]) -> None:
        samples, failures = interleave(jobs, range(rounds + 1), warmup=1, stage=what)
        for name, of_rival in samples.items():
            setattr(figures[name], what, of_rival)
        for name, failure in failures.items():
            figures[name].failures.append(failure)

    timed("step", {name: partial(_timed, clock, work.step) for name, work in trained.items()})
    timed("prefill", {name: partial(_timed, clock, work.prefill) for name, work in works.items()})
    timed("decode", {name: partial(_decoded, clock, work) for name, work in works.items()})
    for name, work in works.items():
        if figures[name].step is not None:
            figures[name].step_bytes = added_peak(work.step, clock.device)
        if figures[name].prefill is not None:
            figures[name].prefill_bytes = added_peak(work.prefill, clock.device)
    return figures


def _timed(clock: Clock, work: Callable[[], None], _: int) -> float:
    return clock(work)


def _decoded(clock: Clock, work: Work, _: int) -> float:
    return work.decode(clock)


def rows(figures: dict[str, Figures]) -> list[list[str]]:
    """The table's."""
    floor = figures[FLOOR]

    def times(samples: Samples | None, of_floor: Samples | None) -> list[str]:
        ratio = samples.median / of_floor.median if samples and of_floor else None
        return [report.number(1e3 * samples.median if samples else None, 2), report.number(ratio, 2)]

    lines = []
    for name, of_rival in figures.items():
        peak, of_floor = of_rival.step_bytes, floor.step_bytes
        lines.append(
            [
                name,
                *times(of_rival.step, floor.step),
                report.number(peak / 1e6 if peak is not None else None),
                report.number(peak / of_floor if peak is not None and of_floor else None, 2),
                *times(of_rival.prefill, floor.prefill),
                report.number(of_rival.prefill_bytes / 1e6 if of_rival.prefill_bytes is not None else None),
                *times(of_rival.decode, floor.decode),
            ]
        )
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Measure, print tables, write JSON; 1 if a rival failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    parser.add_argument("--rounds", type=int, help="default: 15; 2 with --quick")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompt", type=int, nargs="+", default=LENGTHS, metavar="S", help="lengths of the prompt")
    parser.add_argument("--quick", action="store_true", help="a tiny model: whether it runs, not how fast")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    size, rounds = (QUICK, 2) if options.quick else (FULL, 15)
    results = {}
    for S in options.prompt:
        results[S] = measure(size, S, options.rounds or rounds)
        print(f"S = {S}\n\n{report.table(HEADER, rows(results[S]))}\n", flush=True)
    failures = [(S, name, f) for S, all_ in results.items() for name, of in all_.items() for f in of.failures]
    for S, name, failure in failures:
        print(f"S = {S}, {name}, failed in {failure.stage}: {failure.message}")
    if options.out:
        document = {
            "environment": environment.describe(torch.device("cpu")),
            "size": asdict(size),
            "targets": TARGETS,
            "results": {S: {name: of.record() for name, of in all_.items()} for S, all_ in results.items()},
        }
        report.write_json(document, options.out)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
