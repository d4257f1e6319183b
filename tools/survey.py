"""What the surveys of ``transformers``' families have in common: small models with random weights, and errors."""

import argparse
import gc
import logging
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig

from fastprefix.integrations.transformers.discovery import build, parts, shrunk
from tests.float64 import Float64

BOUND = 1e-10
"""An error relative to the largest value up to which a result in float64 is exact."""
LARGEST = 200_000_000  # parameters
WINDOW, LAYERS = 4, 2
SET = {"sliding_window": WINDOW, "initializer_range": 0.2}
UNSET: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
    "videoprism": {"vision_config": {"image_size": 36, "num_frames": 2}},
    "videoprism_vision_model": {"image_size": 36, "num_frames": 2},
}
"""Options without which a family's own defaults make no model, or one that takes too long."""


@dataclass(frozen=True)
class Outcome:
    """What became of one family: errors of values and gradients, relative to the largest; or the path, and why."""

    family: str
    path: str
    errors: tuple[float, ...] = ()

    def verdict(self) -> str:
        """One of a few words to count."""
        if not self.errors:
            return self.path.partition(":")[0]
        return "exact" if max(self.errors) <= BOUND else "WRONG"

    def row(self) -> str:
        """Of the table."""
        errors = [f"{error:.1e}" for error in self.errors] or ["", ""]
        return f"| {self.family} | {self.verdict()} | {' | '.join(errors)} | {self.path.partition(': ')[2]} |"


@dataclass(frozen=True)
class Survey:
    """A tool: what it looks at, and what its report says of that."""

    description: str
    title: str
    how: str
    families: Mapping[str, str]  # model types, and the class of their model
    survey: Callable[[str, str], Outcome]

    def main(self) -> int:
        """Survey, print, write; 1 if a family is wrong or fails."""
        parser = argparse.ArgumentParser(description=self.description)
        parser.add_argument("--out", type=Path, help="write the table here, as Markdown")
        parser.add_argument("--family", nargs="+", metavar="TYPE", help="default: all")
        options = parser.parse_args()
        logging.getLogger("transformers").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")
        outcomes = []
        with Float64():
            for family in options.family or self.families:
                outcomes.append(self.survey(family, self.families[family]))
                print(outcomes[-1].row(), flush=True)
                gc.collect()  # models are cycles, and large
        text = "\n".join(self.document(outcomes)) + "\n"
        print(text.splitlines()[4])
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(text, encoding="utf-8")
        return int(any(outcome.verdict() in ("WRONG", "FAILED") for outcome in outcomes))

    def document(self, outcomes: Sequence[Outcome]) -> Iterator[str]:
        """The report, as Markdown."""
        counts = Counter(outcome.verdict() for outcome in outcomes)
        yield f"# {self.title}"
        yield ""
        yield f"transformers {transformers.__version__}, PyTorch {torch.__version__}. {self.how}"
        yield ""
        yield ", ".join(f"{verdict}: {count}" for verdict, count in counts.most_common()) + "."
        yield ""
        yield "| family | verdict | values | gradients | why |"
        yield "|---|---|---:|---:|---|"
        yield from (outcome.row() for outcome in outcomes)


def small_model(family: str, class_name: str, **options: Any) -> Any:
    """A small model of a family, in float64 and for evaluation; ``options`` set what its configuration has."""
    config: Any = AutoConfig.for_model(family, **UNSET.get(family, {}))
    own = getattr(transformers, class_name).config_class
    if not isinstance(config, own) and isinstance(config.get_text_config(), own):
        config = config.get_text_config()
    config = shrunk(config, LAYERS)
    for part in parts(config):
        for name, value in (SET | options).items():
            if vars(part).get(name) is not None:
                setattr(part, name, value)
        if part.model_type.endswith("_thinker"):
            part.vision_start_token_id = 0
        part._experts_implementation = "eager"  # the others take no float64
    config.architectures = [class_name]
    with torch.device("meta"):
        size = build(config).num_parameters()
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters are left")
    return build(config).double().eval()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((actual - expected).abs().max() / expected.abs().max())


def one_line(error: BaseException) -> str:
    """An error for a cell of a table."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:160].replace("|", "/")


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in what takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done within {seconds} s")

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
