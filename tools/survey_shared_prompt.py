"""Which decoder families share a prompt, and how exactly: ``python -m tools.survey_shared_prompt --out FILE``.

Every family of ``transformers`` with a language model is built small, with random weights and short sliding windows,
and gets a prompt twice: on the path that ``attach`` chooses, and on the textbook's. In float64, without and with
padding, logits and the prompt's gradient are compared.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import fastprefix

from .survey import BOUND, LAYERS, WINDOW, Outcome, Survey, one_line, relative_error, small_model

PROMPT, TOKENS = 5, 7


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
    return Outcome(family, path, tuple(map(max, zip(*errors, strict=True))))


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


SURVEY = Survey(
    __doc__ or "",
    "One prompt for the whole batch: which families",
    f"`python -m tools.survey_shared_prompt`: small random models in float64, {LAYERS} layers or one of every kind, "
    f"{PROMPT} prompt tokens, rows of {TOKENS} tokens without and with padding on the left, sliding windows of "
    f"{WINDOW}. Errors against the textbook's path, relative to the largest value; exact: at most {BOUND:g}; textbook: "
    "the prompt runs in every row, and why.",
    families(),
    survey,
)

if __name__ == "__main__":
    raise SystemExit(SURVEY.main())
