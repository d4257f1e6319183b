"""On which families prefix methods are right: ``python -m tools.survey_prefixes --out FILE``.

Every family of ``transformers`` is built small, with random weights and short sliding windows, and gets prefix tuning.
Its outputs and the gradients of all prefixes are compared in float64, without and with padding, with the family's own
eager attention over keys and values to which the prefix was concatenated.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

import fastprefix
from fastprefix.integrations.transformers.attention import BINDING, added, full_mask
from fastprefix.integrations.transformers.switching import Implementation, attention_implementation, candidates

from .survey import BOUND, LAYERS, WINDOW, Outcome, Survey, one_line, relative_error, small_model, time_limit

PREFIX, ROWS, TOKENS, SECONDS = 3, 3, 7, 60
Results = tuple[Tensor, Tensor]  # a model's output, and the gradients of all prefixes
PADDINGS = ("none", "left", "right")


def families() -> dict[str, str]:
    """Model types, and the class of their model, its head left out."""
    names = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_MAPPING_NAMES}
    return {family: name if isinstance(name, str) else name[0] for family, name in sorted(names.items())}


def survey(family: str, class_name: str) -> Outcome:
    """One family."""
    try:
        model_class = getattr(transformers, class_name)
        if issubclass(model_class, transformers.PreTrainedModel) and not model_class._can_set_attn_implementation():
            return Outcome(family, "refused: its attention does not go through the attention interface")
        with time_limit(SECONDS):
            model = small_model(family, class_name)
    except Exception as error:
        return Outcome(family, f"not built: {one_line(error)}")
    inputs = _runs_on(model)
    if isinstance(inputs, Exception):
        return Outcome(family, f"not run: {one_line(inputs)}")
    try:
        with time_limit(SECONDS):
            fastprefix.attach(model, fastprefix.PrefixTuningConfig(PREFIX))
    except Exception as error:
        return Outcome(family, f"refused: {one_line(error)}")
    try:
        with time_limit(SECONDS):
            masks = [{}] if "attention_mask" not in inputs else [_padding(side) for side in PADDINGS]
            errors = [_errors(model, {**inputs, **mask}) for mask in masks]
    except Exception as error:
        return Outcome(family, f"FAILED: {one_line(error)}")
    return Outcome(family, "compared", tuple(map(max, zip(*errors, strict=True))))


def _runs_on(model: Any) -> dict[str, Any] | Exception:
    """The first inputs, made up from its configuration, on which a model runs."""
    failure: Exception = ValueError("nothing is known of its inputs")
    for inputs in candidates(model):
        try:
            with time_limit(SECONDS):
                model(**(varied := _varied(inputs)))
        except Exception as error:
            failure = error
        else:
            return varied
    return failure


def _varied(inputs: dict[str, Any]) -> dict[str, Any]:
    """More tokens, and random ones."""
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, TOKENS)
    random = {
        name: torch.randint(10, 100, shape, generator=generator)
        for name, value in inputs.items()
        if isinstance(value, Tensor) and name != "attention_mask" and not value.is_floating_point()
    }
    mask = {"attention_mask": torch.ones(shape, dtype=torch.long)} if "attention_mask" in inputs else {}
    images = {
        name: torch.randn(ROWS, *value.shape[1:], generator=generator, dtype=value.dtype)
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point() and random
    }
    return {**inputs, **random, **mask, **images}


def _padding(side: str) -> dict[str, Tensor]:
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[1, {"none": slice(0), "left": slice(3), "right": slice(-3, None)}[side]] = 0
    return {"attention_mask": mask}


def _errors(model: Any, inputs: dict[str, Any]) -> tuple[float, float]:
    """Of outputs at tokens that are no padding, and of the prefixes' gradients."""
    actual = _run(model, inputs)
    with textbook(model):
        expected = _run(model, inputs)
    values, gradients = map(relative_error, actual, expected)
    return values, gradients


def _run(model: Any, inputs: dict[str, Any]) -> Results:
    """All outputs that depend on the prefixes, and gradients; with padding, the first without the padding's rows, since
    others may have pooled them.
    """
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(2)  # of models that hide some of their input at random
    parameters = list(model.fastprefix.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    outputs = [value for value in model(**inputs).to_tuple() if isinstance(value, Tensor) and value.requires_grad]
    mask = inputs.get("attention_mask")
    if mask is not None and not mask.all():
        outputs = [output[mask.bool()] if output.shape[:2] == mask.shape else output for output in outputs[:1]]
    output = torch.cat([output.flatten() for output in outputs])
    weights = torch.arange(len(output), dtype=output.dtype).cos()
    gradients = torch.autograd.grad((output * weights).sum(), parameters, allow_unused=True)
    return output.detach(), torch.cat([g.flatten() for g in gradients if g is not None])


@contextmanager
def textbook(model: Any) -> Iterator[None]:
    """The family's own eager attention, over keys and values with the prefix in front of them."""
    with attention_implementation(model, "textbook", _textbook, full_mask), mock.patch.object(Implementation, "check"):
        yield


def _textbook(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    attention_mask = added(attention_mask, query.dtype)
    binding = getattr(module, BINDING, None)
    if binding is not None:
        rows, tokens = key.shape[0], key.shape[2]
        pk, pv = (x.expand(rows, -1, -1, -1) for x in binding.prefix(query, key, value))
        columns = (pk.shape[2], 0)
        if attention_mask is not None:
            attention_mask = nn.functional.pad(attention_mask[..., :tokens], columns)
        if isinstance(bias := kwargs.get("position_bias"), Tensor):
            kwargs["position_bias"] = nn.functional.pad(bias[..., :tokens], columns)
        key, value = torch.cat([pk, key], dim=2), torch.cat([pv, value], dim=2)
    eager: Any = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
    result: tuple[Tensor, Tensor] = eager(module, query, key, value, attention_mask, **kwargs)
    return result


SURVEY = Survey(
    __doc__ or "",
    "Prefix methods: which families",
    f"`python -m tools.survey_prefixes`: small random models in float64, {LAYERS} layers or one of every kind, "
    f"{PREFIX} prefix tokens, text of {TOKENS} tokens without padding and with padding on either side, sliding windows "
    f"of {WINDOW}. Errors of outputs and of the prefixes' gradients against the family's own eager attention over "
    f"concatenated keys and values, relative to the largest value; exact: at most {BOUND:g}.",
    families(),
    survey,
)

if __name__ == "__main__":
    raise SystemExit(SURVEY.main())
