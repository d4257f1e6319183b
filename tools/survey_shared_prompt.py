"""Which decoder families share a prompt, and how exactly: ``python -m tools.survey_shared_prompt --out FILE``.

Every family of ``transformers`` with a language model is built small, with random weights and short sliding windows,
and gets a prompt twice: on the path that ``attach`` chooses, and on the textbook's. In float64, without and with
padding, logits and the prompt's gradient are compared.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import fastprefix
from tests.float64 import Float64

from .survey import BOUND, LAYERS, WINDOW, one_line, quiet, relative_error, small_model

PROMPT, TOKENS = 5, 7


@dataclass
class Outcome:
    """What became of one family: the path of the prompt, or why there is none, and errors relative to the largest."""

    family: str
    path: str
    logits: float | None = None
    gradient: float | None = None

    def verdict(self) -> str:
        """One of a few words to count."""
        if self.path != "shared":
            return self.path.partition(":")[0]
        assert self.logits is not None
        assert self.gradient is not None
        return "exact" if max(self.logits, self.gradient) <= BOUND else "WRONG"

    def row(self) -> str:
        """Of the table."""
        errors = [f"{e:.1e}" if e is not None else "" for e in (self.logits, self.gradient)]
        return f"| {self.family} | {self.verdict()} | {' | '.join(errors)} | {self.path.partition(': ')[2]} |"


def families() -> dict[str, str]:
    """Model types, and the class of their language model."""
    names = {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    return {family: name if isinstance(name, str) else name[0] for family, name in sorted(names.items())}


def survey(family: str, class_name: str) -> Outcome:
    """One family."""
    try:
        models = [small_model(family, class_name, is_decoder=True) for _ in range(2)]
    except Exception as error:
        return Outcome(family, f"not built: {one_line(error)}")
    try:
        for model, shared in zip(models, (None, False), strict=True):
            fastprefix.attach(model, fastprefix.PromptTuningConfig(PROMPT, shared_prompt=shared))
        path = models[0].fastprefix.prompt_path
        if path != "shared":
            return Outcome(family, path)
        errors = [
            [relative_error(*pair) for pair in zip(*map(_run, models, (left, left)), strict=True)] for left in (0, 3)
        ]
    except Exception as error:
        return Outcome(family, f"refused: {one_line(error)}")
    logits, gradients = zip(*errors, strict=True)
    return Outcome(family, path, max(logits), max(gradients))


def _run(model: Any, padding: int) -> tuple[Tensor, Tensor]:
    """Logits of the tokens that are no padding, and the prompt's gradient."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.fastprefix.prompt.copy_(torch.randn(model.fastprefix.prompt.shape, generator=generator))
    ids = torch.randint(10, 100, (3, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    (logits * torch.arange(logits.numel(), dtype=logits.dtype).cos().reshape(logits.shape)).sum().backward()
    gradient = model.fastprefix.prompt.grad
    model.fastprefix.prompt.grad = None
    return logits.detach(), gradient


def document(outcomes: list[Outcome]) -> Iterator[str]:
    """The report, as Markdown."""
    counts = Counter(outcome.verdict() for outcome in outcomes)
    yield "# One prompt for the whole batch: which families"
    yield ""
    yield (
        f"`python -m tools.survey_shared_prompt`, transformers {transformers.__version__}, PyTorch "
        f"{torch.__version__}: small random models in float64, {LAYERS} layers or one of every kind, {PROMPT} prompt "
        f"tokens, rows of {TOKENS} tokens without and with padding on the left, sliding windows of {WINDOW}. Errors "
        f"against the textbook's path, relative to the largest value; exact: at most {BOUND:g}."
    )
    yield ""
    yield ", ".join(f"{verdict}: {count}" for verdict, count in counts.most_common()) + "."
    yield ""
    yield "| family | path | logits | prompt's gradient | why |"
    yield "|---|---|---:|---:|---|"
    yield from (outcome.row() for outcome in outcomes)


def main() -> int:
    """Survey, print, write; 1 if a family that shares is not exact."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the table here, as Markdown")
    parser.add_argument("--family", nargs="+", metavar="TYPE", help="default: all")
    options = parser.parse_args()
    quiet()
    known = families()
    outcomes = []
    with Float64():
        for family in options.family or known:
            outcomes.append(survey(family, known[family]))
            print(outcomes[-1].row(), flush=True)
    text = "\n".join(document(outcomes)) + "\n"
    print(text.splitlines()[4])
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")
    return int(any(outcome.verdict() == "WRONG" for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
