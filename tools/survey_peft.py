"""Which families PEFT's prefixes and prompts run on accelerated: ``python -m tools.survey_peft --out FILE``.

Every family of ``transformers`` with a language model is built small, with random weights and short sliding windows,
and gets a PEFT prefix and a PEFT prompt. PEFT alone is the oracle, in float64: logits and gradients without padding and
with padding on the left, with both kinds of gradient checkpointing and two forwards before a backward, generated
tokens, and a call after a generation.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

import fastprefix
from fastprefix.integrations.transformers.conformance import Float64
from fastprefix.integrations.transformers.shared_prompt import has_dropout

from .survey import BOUND, LAYERS, WINDOW, Outcome, Survey, one_line, relative_error, small_model, time_limit

VIRTUAL, TOKENS, SECONDS = 5, 7, 120
KINDS = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}


def families() -> dict[str, str]:
    """Model types with a kind of adapter, and the class of their model with a language head."""
    names = {
        **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        **MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    pairs = itertools.product(sorted(names.items()), KINDS)
    return {f"{family} {kind}": name if isinstance(name, str) else name[0] for (family, name), kind in pairs}


def survey(family: str, class_name: str) -> Outcome:
    """One family with one kind of adapter."""
    name, _, kind = family.partition(" ")
    try:
        with time_limit(SECONDS):
            return _survey(family, name, class_name, kind)
    except TimeoutError as error:
        return Outcome(family, f"FAILED: {one_line(error)}")


def _survey(family: str, name: str, class_name: str, kind: str) -> Outcome:
    try:
        base = small_model(name, class_name, is_decoder=name in ("bert", "roberta"))
    except Exception as error:
        return Outcome(family, f"not built: {one_line(error)}")
    try:
        model = _tuned(base, kind)
        expected = dict(_results(model))
    except Exception as error:
        return Outcome(family, f"fails with PEFT alone: {one_line(error)}")
    try:
        fastprefix.accelerate(model)
    except ValueError as error:
        return Outcome(family, f"refused: {one_line(error)}")
    except Exception as error:
        return Outcome(family, f"FAILED: {one_line(error)}")
    path = model.fastprefix.prompt_path or "accelerated"
    try:
        actual = dict(_results(model, accelerated=True))
        errors = {what: _error(actual[what], value) for what, value in expected.items()}
        if "gradients" in expected:
            again = {what: value for what, value in actual.items() if what not in expected}
            errors |= {what: _error(value, expected["gradients"]) for what, value in again.items()}
    except Exception as error:
        return Outcome(family, f"FAILED: {one_line(error)}")
    wrong = ", ".join(f"{what} {error:.0e}" for what, error in errors.items() if not error <= BOUND)
    values = max(error for what, error in errors.items() if "gradients" not in what)
    gradients = max(error for what, error in errors.items() if "gradients" in what)
    return Outcome(family, f"{path.partition(':')[0]}: {wrong or path.partition(': ')[2]}", (values, gradients))


def _tuned(base: Any, kind: str) -> Any:
    two_halves = base.config.is_encoder_decoder
    options: dict[str, Any] = {
        "task_type": "SEQ_2_SEQ_LM" if two_halves else "CAUSAL_LM",
        "num_virtual_tokens": VIRTUAL,
    }
    model: Any = peft.get_peft_model(base, KINDS[kind](**options)).double().eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def _results(model: Any, accelerated: bool = False) -> Iterator[tuple[str, Tensor]]:
    """What a model computes, by what was asked of it."""
    ids = _ids()  # a generation comes first: some models remember positions of the rows
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    yield "tokens", model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    yield "logits", _logits(model, 0).detach()
    yield "gradients", _gradients(model, 0)
    yield "logits left", _logits(model, 3).detach()
    yield "gradients left", _gradients(model, 3)
    with model.disable_adapter():
        yield "logits disabled", _logits(model, 3).detach()
    base = model.get_base_model()
    if accelerated and base.supports_gradient_checkpointing and not has_dropout(base):
        for reentrant in (False, True):
            base._set_gradient_checkpointing(True, functools.partial(_checkpoint, use_reentrant=reentrant))
            base.enable_input_require_grads()
            model.train()
            yield f"gradients reentrant={reentrant}", _gradients(model, 0, several=True)
            model.eval()
            base.gradient_checkpointing_disable()


def _checkpoint(run: Callable[..., Any], *args: Any, use_reentrant: bool) -> Any:
    """Checkpoint a layer that runs again in float64 too: autograd switches modes of PyTorch's functions off."""

    def widened(*args: Any) -> Any:
        with Float64():
            return run(*args)

    return checkpoint(widened, *args, use_reentrant=use_reentrant)


def _ids() -> Tensor:
    return torch.randint(10, 100, (3, TOKENS), generator=torch.Generator().manual_seed(0))


def _logits(model: Any, padding: int) -> Tensor:
    """Logits, those of padding cut off."""
    ids = _ids()
    mask = torch.ones_like(ids)
    if not model.config.is_encoder_decoder:
        mask[1, :padding] = 0
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
        return logits[:, -TOKENS:][mask.bool()]
    mask[1, TOKENS - padding :] = 0
    logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :4]).logits
    assert isinstance(logits, Tensor)
    return logits


def _gradients(model: Any, padding: int, several: bool = False) -> Tensor:
    """Every gradient; with ``several``, other calls run between forward and backward."""
    model.zero_grad()
    logits = _logits(model, padding)
    if several:
        _logits(model, 3)
        with torch.no_grad(), model.disable_adapter():
            _logits(model, 3)
    loss = (logits * torch.arange(logits.numel(), dtype=logits.dtype).cos().reshape(logits.shape)).sum()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _error(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else 1.0
    return relative_error(actual, expected)


HOW = (
    f"Each family has {LAYERS} layers, sliding windows of {WINDOW} tokens, {VIRTUAL} virtual tokens and {TOKENS} "
    f"tokens in 3 rows. Exact: values and gradients within {BOUND:.0e} of the largest of PEFT's own."
)
SURVEY = Survey(__doc__ or "", "PEFT's prefixes and prompts, accelerated, by family", HOW, families(), survey)


if __name__ == "__main__":
    raise SystemExit(SURVEY.main())
