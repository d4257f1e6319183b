"""What the surveys of ``transformers``' families have in common: small models with random weights, and errors."""

import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig

from fastprefix.integrations.transformers.preview import build, parts, shrunk

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
}
"""Options without which a family's own defaults make no model."""


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


def quiet() -> None:
    """Nothing of what models say when they are made."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


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
