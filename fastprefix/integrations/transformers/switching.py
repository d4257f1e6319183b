"""Whether this package's attention can take the place of a model's own: tried, call by call.

A model may join masks, cut them, or pass arguments that only its own attention knows. So it is run on a few tokens,
some of them padding: with its own eager attention over the masks that SDPA would get, then with this package's. In the
second run every call's result is replaced by the first run's: each call is compared on the same inputs, and rounding
does not add up. Calls are made in float64, so that what remains of it is far below the effect of anything that is lost.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention import FULL_MASKS, MASKS, NAME, fastprefix_attention
from .borrowing import borrowed
from .inputs import Inputs, candidates, is_plain_text
from .masks import added, full_mask

_NAME = "fastprefix_trial"
_BOUND = 1e-4  # of the largest value: eager attention takes its softmax in float32
_DONE: WeakKeyDictionary[nn.Module, Trial] = WeakKeyDictionary()


class Trial(NamedTuple):
    """The name under which this package's attention does what a model's own does, and what that was tried on."""

    attention: str
    inputs: Inputs


class _Call(NamedTuple):
    """What a model's own attention made of a call: ``[B, N, H, Dv]``, zeros for queries that see nothing, which may be
    NaN and spread; and which of them ``[B, N]`` do see anything.
    """

    module: nn.Module
    output: Tensor
    scale: float
    sees: Tensor | None


class _Differs(Exception):  # noqa: N818 (it is an answer)
    """A call's result is not the model's own."""


def tried(model: PreTrainedModel, example_inputs: Inputs | None = None) -> Trial:
    """A model's trial, held once, or anew with a caller's ``example_inputs``.

    Raises:
        ValueError: this package's attention does something else, or the model does not run on the inputs that its
            configuration suggests.
    """
    if example_inputs is not None or model not in _DONE:
        inputs, calls = _run_own(model, candidates(model) if example_inputs is None else [example_inputs])
        _DONE[model] = Trial(_compared(model, inputs, calls), inputs)
    return _DONE[model]


def takes_text(model: PreTrainedModel) -> bool:
    """Whether a model runs on token ids in one sequence, and on nothing else."""
    return is_plain_text(model) and set(tried(model).inputs) <= {"input_ids", "attention_mask", "use_cache"}


def _run_own(model: PreTrainedModel, choices: Iterable[Inputs]) -> tuple[Inputs, list[_Call]]:
    """The first inputs on which the model runs, and what its own attention makes of them."""
    failures: list[Exception] = []
    for inputs in choices:
        calls: list[_Call] = []
        try:
            with borrowed(model, _NAME, _recorder(calls), full_mask):
                model.base_model(**inputs)
        except Exception as error:  # whatever a family makes of such inputs
            failures.append(error)
        else:
            return inputs, calls
    why = f": {type(failures[-1]).__name__}: {failures[-1]}" if failures else ""
    raise ValueError(
        f"example_inputs takes keyword arguments on which {type(model).__name__} runs, since it does not run on "
        f"{model.main_input_name} of a size that its configuration says{why}"
    ) from (failures[-1] if failures else None)


def _compared(model: PreTrainedModel, inputs: Inputs, calls: list[_Call]) -> str:
    """The name of the attention that gives what the model's own gave."""
    for name in (NAME, FULL_MASKS):
        try:
            with borrowed(model, _NAME, _comparison(calls), MASKS[name]):
                model.base_model(**inputs)
        except Exception as error:  # it differs, or cannot be done: a family that joins masks has no use for none
            differs = error
        else:
            return name
    raise ValueError(
        f"model takes one whose attention is all in its arguments, got {type(model).__name__}: {differs}"
    ) from differs


def _recorder(calls: list[_Call]) -> Callable[..., Any]:
    """An attention function: the module's own, recorded."""

    def own(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        function = _eager_attention(module)
        attention_mask = added(attention_mask, query.dtype)
        output = function(module, *_wide(query, key, value, attention_mask), **_wide_values(kwargs))[0]
        if (sees := _sees(attention_mask)) is not None:
            output = output.masked_fill(~sees[..., None, None], 0.0)
        calls.append(_Call(module, output, float(value.abs().max()), sees))
        return output.to(query.dtype), None

    return own


def _comparison(calls: list[_Call]) -> Callable[..., Any]:
    """An attention function: this package's, compared with the calls in order, whose results it gives."""
    expected = iter(calls)

    def ours(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        call = next(expected, None)
        what = type(module).__name__
        if call is None or call.module is not module:
            raise _Differs(f"{what} is called only where attention is not eager")
        output, _ = fastprefix_attention(module, *_wide(query, key, value, attention_mask), **_wide_values(kwargs))
        if output.shape != call.output.shape:
            raise _Differs(f"{what} gives {list(output.shape)} instead of {list(call.output.shape)}")
        difference = (output - call.output).abs()
        if call.sees is not None:
            difference = difference.masked_fill(~call.sees[..., None, None], 0.0)
        if not difference.max() <= _BOUND * call.scale:
            raise _Differs(f"{what} differs by {float(difference.max()) / call.scale:.1e} of its largest value")
        return call.output.to(query.dtype), None

    return ours


def _eager_attention(module: nn.Module) -> Any:
    """What the file of a module's class calls by this name, in every family; this package's where there is none."""
    homes = (sys.modules.get(each.__module__) for each in type(module).__mro__)
    found = (getattr(home, "eager_attention_forward", None) for home in homes)
    return next((function for function in found if function is not None), fastprefix_attention)


def _sees(mask: Tensor | None) -> Tensor | None:
    """Which queries see any key, in all heads, ``[B, N]``; None: all of them."""
    if mask is None or mask.ndim != 4:
        return None
    visible = mask > torch.finfo(mask.dtype).min / 2
    return visible.any(dim=3).all(dim=1)


def _wide(*values: Any) -> tuple[Any, ...]:
    return tuple(value.double() if _is_real(value) else value for value in values)


def _wide_values(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if _is_real(value) else value for name, value in kwargs.items()}


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
