"""Run PEFT models on this package's kernels with the same API, the same parameters and the same results."""

from __future__ import annotations

import copy
import functools
import warnings
from contextlib import nullcontext
from typing import Any, TypeVar

import peft
import torch
import transformers
from packaging.version import Version
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..transformers.checking import conformance
from ..transformers.models.discovery import Layer, find_layers
from ..transformers.models.hooks import Forward, Interception, MethodReplacement
from ..transformers.models.switching import evaluating, find_device, list_adapting_users, seed_generators
from ..transformers.prompts.shared_prompt import find_reason_against_layers, share_always
from ..transformers.sharding.tensor_parallel import is_tensor_parallel
from .adaption_prompt import AdaptionPromptAcceleration, find_adapted_attentions, find_reason_not_fusable
from .prefix import CachedPrefix, PrefixAcceleration, PromptLearning
from .prompt import PromptAcceleration

ATTRIBUTE = "fastprefix"
"""The attribute of an accelerated model that holds its ``Acceleration``."""
_PREFIXES, _ADAPTION = ("PREFIX_TUNING", "CARTRIDGE"), "ADAPTION_PROMPT"
_PROMPTS = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")
KINDS = (*_PREFIXES, *_PROMPTS, _ADAPTION)
"""The PEFT methods that can be accelerated."""

_PEFT_WITHOUT_CACHE, _TRANSFORMERS_WITH_CACHE = Version("0.22"), Version("5.24.0.dev0")
"""Older versions of PEFT pass ``past_key_values`` on, which this version of ``transformers`` renamed to ``cache``."""

Model = TypeVar("Model", bound=PeftModel)


class Acceleration:
    """The changes that ``accelerate`` made to a model, which ``decelerate`` undoes."""

    def __init__(self, peft_model: Any, hooks: CachedPrefix | None, prompt_path: str | None) -> None:
        self.handles: list[Any] = [] if hooks is None else [hooks]
        if not isinstance(hooks, PromptLearning):
            self.handles.append(Interception(peft_model, _refuse_names))
            if hasattr(peft_model, "generate"):
                self.handles.append(MethodReplacement(peft_model, "generate", _refuse_names))
        self.prompt_path = prompt_path
        """Hold "shared" if the prompt runs once for the whole batch, or "textbook: " and why it runs on PEFT's path.

        It is None for prefixes and adaption prompts.

        A call for which sharing is not exact (for example with dropout in training) runs the prompt in every row.
        """

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in reversed(self.handles):
            handle.remove()


def _refuse_names(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a call, but refuse adapter names, which PEFT's own path would ignore."""
    if kwargs.get("adapter_names") is not None:
        raise ValueError(
            "`adapter_names` must not be given to a PEFT model with adaption prompts, or with a prompt that runs in "
            "every row. Run each adapter in its own batch, with set_adapter."
        )
    return forward(*args, **kwargs)


def accelerate(peft_model: Model, check: bool = True) -> Model:
    """Run a PEFT model on this package's kernels.

    The model's API, ``state_dict``, files and results stay the same. A prefix is not expanded to the batch or
    concatenated, masks do not cover it, and gradient checkpointing works with it. A prompt runs once for the whole
    batch if that is exact (see ``peft_model.fastprefix.prompt_path``). All adapters of the model are accelerated, not
    only the active one.

    Args:
        peft_model: a PEFT model with PREFIX_TUNING, CARTRIDGE, PROMPT_TUNING, P_TUNING, MULTITASK_PROMPT_TUNING or
            ADAPTION_PROMPT. Multitask prompts run in every row if the rows have different tasks.
        check: whether to compare a small accelerated copy of the model with PEFT's own results first, once per class
            and configuration. A prompt with different results stays on PEFT's path. Without the check, or if no small
            copy runs, the model itself is compared on four tokens.

    Returns:
        The same model.

    Warns:
        UserWarning: if the installed PEFT generates wrong tokens with the installed ``transformers``.

    Raises:
        TypeError: if ``peft_model`` is not a PEFT model.
        ValueError: if the model cannot be accelerated. The message gives the reason, and the model is unchanged.
    """
    if not isinstance(peft_model, PeftModel):
        raise TypeError(f"`peft_model` must be a peft.PeftModel, but is {type(peft_model).__name__}.")
    _accelerate(peft_model, check)
    if _generates_wrong_tokens(peft_model):
        warnings.warn(
            f"`generate` of this model returns wrong tokens, accelerated or not, because PEFT {peft.__version__} loses "
            f'the cache of transformers {transformers.__version__}. Install "transformers<5.24" or a newer PEFT. '
            "Training is not affected.",
            stacklevel=2,
        )
    return peft_model


def _accelerate(peft_model: Model, check: bool) -> Model:
    """Accelerate without the warning."""
    _check(peft_model)
    setattr(peft_model, ATTRIBUTE, _make_acceleration(peft_model, check))
    return peft_model


def _generates_wrong_tokens(peft_model: PeftModel) -> bool:
    """Return whether PEFT loses the key/value cache of this model, so that every token starts anew."""
    if Version(peft.__version__) >= _PEFT_WITHOUT_CACHE:
        return False
    if Version(transformers.__version__) < _TRANSFORMERS_WITH_CACHE:
        return False
    model: Any = peft_model.get_base_model()
    kind = _get_kind(peft_model)
    in_decoder = kind in _PREFIXES or (kind in _PROMPTS and not model.config.is_encoder_decoder)
    return in_decoder and model.can_generate()


def _make_acceleration(peft_model: Any, check: bool) -> Acceleration:
    report = _compare_small_copy(peft_model) if check else None
    is_prompt = _get_kind(peft_model) in _PROMPTS
    if report is not None and not report.agrees:
        if is_prompt:
            return Acceleration(peft_model, None, f"textbook: {report.wrong[0]}")
        raise ValueError(report.describe("Use the PEFT model as it is."))
    is_verified = report is not None and any(finding.verdict == "ok" for finding in report.findings)
    if not is_prompt:
        return Acceleration(peft_model, _install(peft_model, _find_layers(peft_model), is_verified), None)
    try:
        layers = _find_layers(peft_model)
        reason = find_reason_against_layers(peft_model.get_base_model(), layers)
        if reason is None:
            return Acceleration(peft_model, _install(peft_model, layers, is_verified), "shared")
    except ValueError as error:
        reason = str(error)
    return Acceleration(peft_model, None, f"textbook: {reason}")


def decelerate(peft_model: Model) -> Model:
    """Undo ``accelerate``, so that the PEFT model runs on PEFT's own code again, and return the model.

    Raises:
        ValueError: if the model is not accelerated.
    """
    acceleration = vars(peft_model).get(ATTRIBUTE)
    if not isinstance(acceleration, Acceleration):
        raise ValueError(
            f"`peft_model` must be an accelerated model, but {_get_class_name(peft_model)} is not. Call "
            "fastprefix.accelerate first."
        )
    acceleration.remove()
    delattr(peft_model, ATTRIBUTE)
    return peft_model


def _check(peft_model: Any) -> None:
    """Refuse models that cannot be accelerated, before anything is changed."""
    kind, model = _get_kind(peft_model), peft_model.get_base_model()
    if ATTRIBUTE in vars(peft_model):
        raise ValueError("`peft_model` is already accelerated.")
    if kind not in KINDS:
        raise ValueError(f"`peft_model` must have one of {', '.join(KINDS)}, but has {kind}.")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"`peft_model` must wrap a transformers model, but wraps {_get_class_name(model)}.")
    if list_adapting_users(model):
        raise ValueError("`peft_model` must have a base model without an adapter of this package. Detach it first.")
    if peft_model._adapters_disabled:
        raise ValueError("`peft_model` must have its adapter enabled. Leave disable_adapter() first.")
    if kind == _ADAPTION:
        for adapted in find_adapted_attentions(peft_model):
            if (reason := find_reason_not_fusable(adapted)) is not None:
                raise ValueError(
                    f"`peft_model` must have adaption prompts that fit into one attention call, but {reason}."
                )


def _compare_small_copy(peft_model: Any) -> conformance.ConformanceReport:
    """Compare a small copy of a PEFT model before and after acceleration, with the active adapter's options."""
    config = _shrink_config(peft_model.active_peft_config)

    def make(base: PreTrainedModel) -> tuple[Any, Any]:
        seed_generators(base)
        right: Any = get_peft_model(base, config).double()  # PEFT's parameters are float32
        return right, _accelerate(copy.deepcopy(right), check=False)

    options = {name: str(value) for name, value in sorted(vars(config).items())}
    base, kind, tasks = peft_model.get_base_model(), _get_kind(peft_model), _count_tasks(peft_model)
    last = functools.partial(torch.full, fill_value=tasks - 1) if tasks else None  # of rows with the same task
    with share_always():
        return conformance.check_pair(base, kind, str(options), make, last)


def _shrink_config(config: Any) -> Any:
    """Return the options of a PEFT adapter with three virtual tokens, without those that PEFT reads from the base."""
    small = copy.deepcopy(config)
    limits = {"num_virtual_tokens": 3, "adapter_len": 3, "adapter_layers": 1, "encoder_hidden_size": 8}
    read = ("token_dim", "num_attention_heads", "num_layers", "base_model_name_or_path", "tokenizer_name_or_path")
    for name, value in vars(small).items():
        if name in limits and value is not None:
            setattr(small, name, min(value, limits[name]))
        elif name in read:
            setattr(small, name, None)
        elif name in ("encoder_dropout", "num_frozen_tokens"):
            setattr(small, name, type(value)(0))
    if hasattr(small, "prompt_tuning_init"):
        small.prompt_tuning_init, small.prompt_tuning_init_text = "RANDOM", None
    if hasattr(small, "prompt_tuning_init_state_dict_path"):
        small.prompt_tuning_init_state_dict_path = None
    small.inference_mode = False
    return small


def _find_layers(peft_model: Any) -> list[Layer]:
    """Return the attention layers of the base model. If a small copy exists, the base model runs only once.

    Raises:
        ValueError: if the model does not run, or its attention does not use the attention interface.
    """
    model = peft_model.get_base_model()
    # PEFT's adapted attention does not support tensor parallelism.
    fails = _get_kind(peft_model) == _ADAPTION and is_tensor_parallel(model)
    try:
        conformance.adopt_small_trial(model)
        with peft_model.disable_adapter() if fails else nullcontext():
            return find_layers(model)
    except Exception as error:  # families raise different errors
        why = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"`peft_model` must be a model that runs on the fastprefix kernels: {why}") from error


def _install(peft_model: Any, layers: list[Layer], is_verified: bool) -> CachedPrefix:
    """Set the hooks for the kernels. Compare the results in a trial first, unless a small copy was verified.

    Raises:
        ValueError: if the trial fails or its results differ from PEFT's. The model is unchanged.
    """
    if is_verified:
        return _make_hooks(peft_model, layers)
    with evaluating(peft_model), torch.no_grad():
        try:
            expected, base = _run_trial(peft_model), _run_trial_without(peft_model)
        except Exception as error:  # PEFT and families raise different errors
            raise ValueError(f"`peft_model` must run with PEFT alone, but a trial of it failed: {error!r}") from error
        hooks = None
        try:
            rounding = _measure_rounding(peft_model, layers, base)
            hooks = _make_hooks(peft_model, layers)
            effect = float((_select_tokens(expected, base) - base).abs().max())
            small = 0.1 if torch.finfo(peft_model.get_base_model().dtype).bits == 16 else 1e-3
            _compare(_run_trial(peft_model), expected, rounding + small * effect, "in a trial")
            _compare(_run_trial_without(peft_model), base, rounding, "in a trial without the adapter")
        except BaseException as error:
            if hooks is not None:
                hooks.remove()
            if isinstance(error, ValueError) or not isinstance(error, Exception):
                raise
            raise ValueError(
                f"`peft_model` must be a model that runs on the fastprefix kernels, but a trial failed: {error!r}"
            ) from error
    return hooks


def _make_hooks(peft_model: Any, layers: list[Layer]) -> CachedPrefix:
    kind, model = _get_kind(peft_model), peft_model.get_base_model()
    if kind in _PREFIXES:
        return PrefixAcceleration(peft_model, _number_layers(model, layers))
    if kind in _PROMPTS:
        return PromptAcceleration(peft_model, layers)
    return AdaptionPromptAcceleration(peft_model, layers)


def _number_layers(model: PreTrainedModel, layers: list[Layer]) -> dict[int, Layer]:
    """Return the attention layers by their indices in a key/value cache.

    Raises:
        ValueError: if the layers are not numbered, or some of them would not attend to the whole prefix of a cache.
    """
    if model.config.is_encoder_decoder:
        layers = [layer for layer in layers if layer.shape.role == "decoder"]
    if local := [layer.name for layer in layers if layer.local]:
        raise ValueError(
            "`peft_model` must be a model whose layers attend to all earlier tokens or a sliding window of them, but "
            f"these layers do not: {local}."
        )
    numbered: dict[Any, Layer] = {getattr(layer.module, "layer_idx", None): layer for layer in layers}
    if numbered.keys() != set(range(len(layers))):
        raise ValueError(
            f"`peft_model` must be a model with numbered attention layers, but those of {_get_class_name(model)} have "
            "no layer_idx."
        )
    return numbered


def _run_trial(model: Any) -> Tensor:
    """Return a model's output for four tokens, the last of which is padding."""
    ids = torch.arange(4, device=find_device(model))[None]
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    more |= {"task_ids": ids[:, 0]} if _count_tasks(model) else {}
    output: Tensor = model(input_ids=ids, attention_mask=(ids < 3).long(), return_dict=True, **more)[0]
    return output.double()


def _run_trial_without(peft_model: Any) -> Tensor:
    """Return the output of the same trial without the adapter.

    PEFT's ``disable_adapter`` fails on prompts of models that cannot generate.
    """
    if peft_model.active_peft_config.is_prompt_learning:
        return _run_trial(peft_model.base_model)
    with peft_model.disable_adapter():
        return _run_trial(peft_model)


def _select_tokens(expected: Tensor, base: Tensor) -> Tensor:
    """Return the results for the tokens alone, since the output also has logits of a prompt."""
    return expected[:, -base.shape[1] :] if expected.ndim == 3 else expected


def _measure_rounding(peft_model: Any, layers: list[Layer], base: Tensor) -> float:
    """Return a bound for the effect of rounding on the results of a trial, as the model amplifies it.

    The model runs without its adapter and on its own attention. Each attention output is changed by about one unit in
    the last place of its largest value at the same token. Two summation orders differ by a few such units.
    """
    signs = torch.Generator().manual_seed(0)

    def move(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        sign = torch.randint(0, 2, first.shape, generator=signs).to(first) * 2 - 1
        moved = first + sign * torch.finfo(first.dtype).eps * first.abs().amax(dim=-1, keepdim=True)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    model = peft_model.get_base_model()
    handles = [layer.module.register_forward_hook(move) for layer in layers]
    try:
        moved = _run_trial_without(peft_model)
    finally:
        for handle in handles:
            handle.remove()
    return 16 * float((moved - base).abs().max()) + 16 * torch.finfo(model.dtype).eps * float(base.abs().max())


def _compare(actual: Tensor, expected: Tensor, bound: float, where: str) -> None:
    """Check that the kernels give PEFT's results.

    Two summation orders differ by rounding. A lost or misplaced prefix makes a difference of about its whole effect.

    Raises:
        ValueError: if the results differ by more than ``bound``.
    """
    error = float((actual - expected).abs().max()) if actual.shape == expected.shape else float("inf")
    if not error <= bound:
        raise ValueError(f"`peft_model` would not give PEFT's results, which differ by {error:.1e} {where}.")


def _count_tasks(model: Any) -> int:
    """Return the number of tasks of a PEFT model whose calls accept ``task_ids``, or 0."""
    is_multitask = isinstance(model, PeftModel) and _get_kind(model) == "MULTITASK_PROMPT_TUNING"
    return int(model.active_peft_config.num_tasks) if is_multitask else 0


def _get_kind(peft_model: Any) -> str:
    kind = peft_model.peft_type
    return str(getattr(kind, "value", kind))


def _get_class_name(model: object) -> str:
    return type(model).__name__
