"""Check a method on a small copy of a model against the textbook.

The copy has the class and the configuration of the model, but narrow heads, one layer of every kind and random weights.
The method is attached to the copy. Values and the gradients of all trained parameters are compared in float64 with
``textbook``, in the situations in which models are used. The cost does not depend on the size of the model. Reports are
cached in the process, and nothing is written to disk.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import statistics
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from transformers import PreTrainedModel, StaticCache
from transformers.utils import logging
from transformers.utils.generic import ModelOutput

from ....methods import METHODS, MethodConfig, PrefixMethod, VisualMethod
from ..adapter import MODULE
from ..models.discovery import (
    CONTEXT,
    CopyError,
    find_embedding,
    find_method_layers,
    find_running_inputs,
    list_configs,
    list_ordinary_ids,
    make_small_copy,
    shrink_config,
)
from ..models.hooks import find_cache, find_cache_parameter, read_parameter_names
from ..models.positions import find_frequencies_end
from ..models.switching import (
    Inputs,
    adopt_trial,
    is_of_text,
    is_plain_text,
    preserve_random_state,
    preserve_state,
    propose_images,
    seed_generators,
)
from ..prompts.multitask import count_tasks
from ..prompts.prompt import choose_placeholder_id, needs_ids
from ..sharding.tensor_parallel import is_sharded
from ..vision.textbook import VisionTextbook
from ..vision.visual_prompt import PIXELS, find_vision_stack
from .textbook import PrefixTextbook, PromptTextbook

BOUND = 1e-10
"""The largest error in float64 that counts as agreement, relative to the largest value."""
_VIRTUAL_TOKENS, _ROWS, _TOKENS, _LONG = 3, 2, 7, CONTEXT + 2
_PADDING = 3
_WORDS = 48
_NEW = 3  # generated tokens, since beam search first chooses among beams in its second step
_DRAWS = 8
_TINY = 2_000_000
"""The number of parameters up to which a model is as cheap to run as its small copy."""
_LARGEST = 100_000_000
"""The number of parameters up to which a model without a small copy is checked directly."""
_PACKAGE = str(Path(__file__).parents[2])

_PAIRED = (
    *("ids", "left padding", "right padding", "a row alone", "long inputs", "beam search"),
    *("forward called directly", "gradient checkpointing", "tuples", "autocast"),
)
"""The situations for pairs of models that accept the arguments of the base model, but have their own caches."""

Verdict = Literal["ok", "differs", "fails", "refused", "not applicable"]


class Float64(TorchFunctionMode):
    """A context in which operations use float64 where code requests float32.

    Without it, the norms, rotary embeddings and routers of ``transformers`` compute in float32.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is Tensor.float:
            return args[0] if args[0].dtype is torch.float64 else args[0].double()
        widened = {name: self._widen(value) for name, value in (kwargs or {}).items()}
        return function(*map(self._widen, args), **widened)

    def _widen(self, value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value


@dataclass(frozen=True)
class Finding:
    """The result of one situation.

    The verdict "differs" means a difference of ``error``, relative to the largest value. "refused" means that
    fastprefix raised an error, "fails" any other error. "not applicable" means that the model or its textbook does not
    support the situation.
    """

    situation: str
    verdict: Verdict
    error: float = 0.0
    reason: str = ""

    def __str__(self) -> str:
        if self.verdict == "differs":
            return f"{self.situation}: differs from the textbook by {self.error:.1e} of the largest value"
        return f"{self.situation}: {self.verdict}" + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class ConformanceReport:
    """The results of all situations of a method on a model family."""

    family: str
    method: str
    findings: tuple[Finding, ...]

    @property
    def wrong(self) -> tuple[Finding, ...]:
        """Return the findings that differ from the textbook, or that fail in the most basic situation."""
        basic = {"ids"}
        return tuple(
            f
            for f in self.findings
            if f.verdict == "differs" or (f.situation in basic and f.verdict in ("fails", "refused"))
        )

    @property
    def agrees(self) -> bool:
        """Return whether no finding is wrong."""
        return not self.wrong

    def describe(self, alternative: str) -> str:
        """Return an error message with the family, the situation and the ``alternative``."""
        first = self.wrong[0]
        what = f"differ from the textbook by {first.error:.1e}" if first.verdict == "differs" else "cannot be computed"
        why = f" ({first.reason})" if first.reason else ""
        case = f"{self.method} on {self.family}: with {first.situation}, its values or gradients"
        return f"{case} {what}{why}. {alternative}"

    def __str__(self) -> str:
        return "\n".join([f"{self.method} on {self.family}", *(f"  {finding}" for finding in self.findings)])


class _Key(NamedTuple):
    model_class: type
    config: str
    method: str
    options: str


_NO_COPY = Finding("ids", "not applicable", reason="no small copy of the model runs")
_REPORTS: dict[_Key, ConformanceReport] = {}
_COPIES: dict[tuple[type, str], PreTrainedModel | None] = {}
_LOCK = threading.RLock()


def forget_reports() -> None:
    """Forget all reports, for example after changing the code of a model in the process."""
    _REPORTS.clear()
    _COPIES.clear()


def list_reports(model: PreTrainedModel, method: str) -> list[ConformanceReport]:
    """Return the cached reports of a method on a model's class and configuration, for any options of the method."""
    contents = describe_structure(model)
    return [report for key, report in _REPORTS.items() if key[:3] == (type(model), contents, method)]


def check(
    model: PreTrainedModel,
    config: MethodConfig,
    attach: Callable[[PreTrainedModel, MethodConfig], Any],
    names: Sequence[str] | None = None,
) -> ConformanceReport:
    """Compare a method with the textbook in every situation that a model's class and configuration support.

    Args:
        model: the model, which is not changed. If no small copy of it can be built, a full copy is used.
        config: the configuration of the method.
        attach: a function that attaches a method to a model without checking.
        names: the names of the situations to check. None checks all situations.

    Returns:
        The report, which is cached if ``names`` is None.
    """
    small = shrink_method_config(model, config)
    options = json.dumps(small.to_dict(), sort_keys=True, default=str)
    key = _Key(type(model), describe_structure(model), config.method_name(), options)

    def compare(plain: PreTrainedModel) -> tuple[Finding, ...]:
        return _compare_method(plain, small, attach, names)

    return _report(model, key, type(config).__name__, compare, is_remembered=names is None)


def check_pair(
    model: PreTrainedModel,
    method: str,
    options: str,
    make: Callable[[PreTrainedModel], tuple[Any, Any]],
    choose_tasks: Callable[[int], Tensor] | None = None,
) -> ConformanceReport:
    """Compare two models that must give the same results, such as an accelerated model and the original.

    Args:
        model: the base model of both, which is not changed.
        method: the name of the method in the report.
        options: a description of everything except the base model that determines the result of ``make``.
        make: a function that returns the expected model and the other model, given a small copy of the base model.
        choose_tasks: a function that returns the argument ``task_ids`` for a number of rows. None if the models have no
            such argument.
    """
    key = _Key(type(model), describe_structure(model), method, options)
    return _report(model, key, method, lambda plain: _compare_pair(plain, make, choose_tasks))


def _report(
    model: PreTrainedModel,
    key: _Key,
    method: str,
    compare: Callable[[PreTrainedModel], tuple[Finding, ...]],
    is_remembered: bool = True,
) -> ConformanceReport:
    """Return the cached report, or compare on a copy of the model."""
    with _LOCK:
        if is_remembered and key in _REPORTS:
            return _REPORTS[key]
        plain = make_copy(model)
        if plain is None:
            findings: tuple[Finding, ...] = (_NO_COPY,)
        else:
            with _silence():
                findings = compare(plain)
        report = ConformanceReport(type(model).__name__, method, findings)
        if is_remembered and plain is not None:
            _REPORTS[key] = report
        return report


def _compare_pair(
    plain: PreTrainedModel,
    make: Callable[[PreTrainedModel], tuple[Any, Any]],
    choose_tasks: Callable[[int], Tensor] | None,
) -> tuple[Finding, ...]:
    try:
        with Float64(), preserve_random_state(plain):
            right, other = make(copy.deepcopy(plain))
    except Exception as error:
        return (_find_fault("ids", error),)
    for each in (right, other):
        _randomize(p for p in each.parameters() if p.requires_grad)
        each.eval()
    subject, book = (
        _Subject(each.__call__, each, [p for p in each.parameters() if p.requires_grad], choose_tasks)
        for each in (other, right)
    )
    return _collect_findings(Situations(subject, book, plain, paired=True), _PAIRED)


@contextmanager
def _silence() -> Iterator[None]:
    """Silence warnings of model families about the sizes of a small copy."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def describe_structure(model: PreTrainedModel) -> str:
    """Return the parts of a model's configuration that determine its computation, with small sizes, as JSON."""
    try:
        config = shrink_config(model.config)
    except Exception:  # families check for sizes that they do not support
        config = model.config
    contents = config.to_dict()
    for name in ("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype"):
        contents.pop(name, None)
    return json.dumps(contents, sort_keys=True, default=str)


def make_copy(model: PreTrainedModel) -> PreTrainedModel | None:
    """Return a small copy of a model in float64, or a full copy if no small copy can be built.

    Return None if the model is too large for a full copy, or its weights are not floating-point numbers in memory.
    """
    copied: Any = copy.deepcopy(_get_small_copy(model))
    if copied is None:
        unusual = any(p.is_meta or not p.is_floating_point() for p in model.parameters())
        if unusual or model.num_parameters() > _LARGEST:
            return None
        copied = copy.deepcopy(model).double().eval()
    if getattr(copied, "generation_config", None) is not None:
        copied.generation_config.eos_token_id = None  # always generate the requested number of tokens
    plain: PreTrainedModel = copied
    return plain


def _get_small_copy(model: PreTrainedModel) -> PreTrainedModel | None:
    key = (type(model), describe_structure(model))
    if key not in _COPIES:
        config = copy.deepcopy(model.config)
        for part in list_configs(config):
            capped = getattr(part, "attn_logit_softcapping", None) is not None  # older fused attentions ignore it
            part._attn_implementation_internal = "eager" if capped else None
        with Float64(), preserve_random_state():
            try:
                _COPIES[key] = make_small_copy(config, type(model), torch.float64)
            except CopyError:
                _COPIES[key] = None
        if len(_COPIES) > 8:
            del _COPIES[next(iter(_COPIES))]
    return _COPIES[key]


def choose_stand_in(model: PreTrainedModel) -> PreTrainedModel:
    """Return the small copy of a model to run trials on, or the model itself if it is small or has no copy.

    A model that is sharded over processes is never cheap to run.
    """
    cheap = model.num_parameters() <= _TINY and not is_sharded(model)
    small = None if cheap else _get_small_copy(model)
    return model if small is None else small


def adopt_small_trial(model: PreTrainedModel) -> None:
    """Use the trial of a model's small copy, if it has one, as the trial of the model."""
    small = choose_stand_in(model)
    if small is not model:
        adopt_trial(model, small)


def shrink_method_config(model: PreTrainedModel, config: MethodConfig) -> MethodConfig:
    """Return a method's options with short prompts, narrow networks and a random initialization."""
    limits = {"num_virtual_tokens": _VIRTUAL_TOKENS, "hidden_dim": 8, "bottleneck_dim": 4, "rank": 4, "layers": 2}
    limits |= {"num_frozen_tokens": 1, "position_shift": _VIRTUAL_TOKENS + 1, "encoder_hidden_dim": 8}
    limits |= {"prompt_codewords": 3, "offset_codewords": 3, "num_tasks": 2}
    limits |= {"num_shared": 2, "num_attribute": 2, "bank": 3}
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in limits and type(value) is int:
            changed[field.name] = min(value, limits[field.name])
        elif field.name == "layers" and isinstance(value, list):  # a small copy has at least two layers
            changed[field.name] = [0, 1][: len(value)]
        elif field.name.endswith("_block"):  # also a divisor of the small width
            changed[field.name] = math.gcd(value, 8)
        elif field.name == "max_length" and type(value) is int:
            changed[field.name] = 64
        elif field.name == "init" and value not in ("random", "normal"):
            changed[field.name] = "normal" if config.kind == "prefix" else "random"
        elif field.name in ("init_text", "source"):
            changed[field.name] = None
        elif field.name in ("source_init", "source_task"):
            changed[field.name] = field.default
        elif isinstance(value, float) and "dropout" in field.name:
            changed[field.name] = 0.0
        elif field.name == "modules_to_save" and value is not None:
            small = _get_small_copy(model)
            known = {name for name, _ in (model if small is None else small).named_modules()}
            changed[field.name] = [name for name in value if name in known]
    return dataclasses.replace(config, **changed)


class _Subject(NamedTuple):
    """A function of a model's keyword arguments, with its model and its trained parameters."""

    run: Callable[..., Any]
    model: Any
    trained: list[Tensor]
    choose_tasks: Callable[[int], Tensor] | None = None  # returns ``task_ids`` for a number of rows

    def call(self, **inputs: Any) -> Any:
        """Run the function, with rows of different tasks if the method has tasks."""
        return self.run(**inputs, **self.make_tasks(inputs))

    def make_tasks(self, inputs: Inputs) -> dict[str, Tensor]:
        """Return the argument ``task_ids``, or no argument if the method has no tasks."""
        rows = next((inputs[name] for name in ("input_ids", "inputs_embeds") if name in inputs), None)
        return {} if self.choose_tasks is None or rows is None else {"task_ids": self.choose_tasks(len(rows))}


def _compare_method(
    plain: PreTrainedModel, config: MethodConfig, attach: Callable[..., Any], names: Sequence[str] | None
) -> tuple[Finding, ...]:
    """Attach a method to a copy, randomize its parameters, and compare it in all situations."""
    attached = copy.deepcopy(plain)
    try:
        with Float64(), preserve_random_state(plain):
            attach(attached, config)
    except Exception as error:
        return (_find_fault("ids", error),)
    trained = {name: p for name, p in attached.named_parameters() if p.requires_grad}
    _randomize(trained.values())
    book_model = copy.deepcopy(plain).requires_grad_(False)
    heads = dict(book_model.named_parameters())
    for name, parameter in trained.items():
        if name in heads:
            heads[name].data.copy_(parameter.data)
            heads[name].requires_grad_(True)
    leaves: list[Tensor] = [heads.get(name, parameter) for name, parameter in trained.items()]
    with Float64():
        book = _make_textbook(book_model, config, attached.fastprefix)
    parameters: list[Tensor] = list(trained.values())
    count = count_tasks(attached.fastprefix)
    choose = (lambda rows: torch.arange(rows) % count) if count else None
    situations = Situations(
        _Subject(attached.__call__, attached, parameters, choose), _Subject(book, book_model, leaves, choose), plain
    )
    return _collect_findings(situations, names)


def _collect_findings(situations: Situations, names: Sequence[str] | None) -> tuple[Finding, ...]:
    with preserve_random_state(situations.plain):
        with Float64():
            found = list(situations.find_all(names))
        if names is None or "autocast" in names:  # last, since it rounds the weights
            found.append(situations.compare_autocast())
    return tuple(found)


def _make_textbook(model: PreTrainedModel, config: MethodConfig, method: Any) -> Callable[..., Any]:
    if isinstance(method, VisualMethod):
        return VisionTextbook(model, method, find_vision_stack(model))
    if issubclass(METHODS[config.method_name()][1], PrefixMethod):
        return PrefixTextbook(model, method, find_method_layers(model, config))
    # An id that differs from the method's own placeholder, since the result must not depend on it.
    needs_own = needs_ids(model.config)
    placeholder = choose_placeholder_id(model.config) if needs_own else list_ordinary_ids(model.config, _WORDS)[-1]
    return PromptTextbook(model, method, placeholder)


def _randomize(parameters: Any, seed: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_((0.3 * noise).to(parameter))


def _find_fault(situation: str, error: BaseException) -> Finding:
    """Return the finding for an error: "refused" if this package raised it, otherwise "fails"."""
    frames = traceback.extract_tb(error.__traceback__)
    is_own = bool(frames) and frames[-1].filename.startswith(_PACKAGE) and str(frames[-1].line).startswith("raise ")
    return Finding(situation, "refused" if is_own else "fails", reason=format_error(error))


def format_error(error: BaseException, most: int = 200) -> str:
    """Return the type and the message of an error in one line of at most ``most`` characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:most]


class _Absent(Exception):  # noqa: N818 (not an error)
    """Raised if a situation does not apply to a model."""


Run = Callable[..., Any]
"""A model or its textbook, as a function of the model's keyword arguments."""

Make = Callable[[Run], list[Tensor]]
"""A function that runs a situation on either of them and returns the tensors to compare."""


class Situations:
    """The situations in which a method is compared with the textbook, on one small model."""

    def __init__(self, subject: _Subject, book: _Subject, plain: PreTrainedModel, paired: bool = False) -> None:
        self.paired = paired
        self.subject = subject
        self.book = book
        self.plain = plain
        self.config = plain.config
        self.names = read_parameter_names(plain.base_model)
        self.is_text = is_of_text(plain)
        self.is_plain = is_plain_text(plain)
        self.cache_name = find_cache_parameter(self.names)
        self.caches = self.is_plain and self.cache_name is not None and plain.can_generate()
        self.results: dict[str, Any] = {}  # of the textbook, by the key of the run
        generator = torch.Generator().manual_seed(1)
        ordinary = torch.tensor(list_ordinary_ids(self.config, _WORDS))
        self.long_ids = ordinary[torch.randint(len(ordinary), (_ROWS, _LONG), generator=generator)]
        self.ids = self.long_ids[:, :_TOKENS]
        if self.is_text and not self._runs_on_text():
            self.is_text = self.is_plain = self.caches = False

    def _runs_on_text(self) -> bool:
        try:
            with preserve_state(self.plain), torch.no_grad():
                self.plain(**self._make_inputs(self.ids))
        except Exception:  # a model that requires other inputs besides text
            return False
        return True

    def find_all(self, names: Sequence[str] | None = None) -> Iterator[Finding]:
        """Yield the finding of each situation except autocast."""
        for name, situation in self._list_situations().items():
            if names is None or name in names:
                yield _judge(name, situation)

    def _list_situations(self) -> dict[str, Callable[[], Compared]]:
        def compare(key: str, run: Make, gradients: bool = True) -> Callable[[], Compared]:
            return functools.partial(self._compare_alike, key, run, gradients)

        def compare_cached(key: str, run: Make, gradients: bool = True) -> Callable[[], Compared]:
            return functools.partial(self._compare_cached, key, run, gradients)

        chosen: dict[str, Callable[[], Compared]] = {"ids": compare("ids", self._run_plainest)}
        if isinstance(getattr(self.subject.model, MODULE, None), VisualMethod):
            chosen["several images"] = compare("several images", self._run_several_images)
        if self.is_text:
            chosen |= {f"{side} padding": compare(side, self._run_padded(side)) for side in ("left", "right")}
            chosen["a row alone"] = compare("alone", self._run_alone)
        if self.is_plain:
            chosen |= {
                "inputs_embeds": compare("embeds", self._run_embeddings),
                "explicit positions": self._compare_positions,
                "three-dimensional positions": compare("3-D positions", self._run_three_dimensions),
                "token types": compare("types", self._run_types),
                "boxes": compare("boxes", self._run_boxes),
                "long inputs": compare("long", self._run_long),
                "packed sequences": self._compare_packed,
            }
        if self.caches:
            chosen |= {
                "a cached continuation": compare_cached("pieces", self._run_in_pieces("none")),
                "a cached continuation with left padding": compare_cached(
                    "left pieces", self._run_in_pieces("left", _PADDING)
                ),
                "a static cache": compare_cached(
                    "static", self._run_in_pieces("left", _PADDING, self._make_static_cache), gradients=False
                ),
                "a copied cache": compare_cached("copied", self._run_copied, gradients=False),
                "a second turn of generation": self._compare_second_turn,
            }
        if self.is_text and self.plain.can_generate():
            chosen["beam search"] = self._compare_beams
        chosen |= {
            "forward called directly": self._compare_direct,
            "gradient checkpointing": functools.partial(self._compare_checkpointing, False),
            "reentrant gradient checkpointing": functools.partial(self._compare_checkpointing, True),
            "hidden states": compare("states", self._run_states(True), gradients=False),
            "selected hidden states": compare("selected", self._run_states([0, -1]), gradients=False),
            "tuples": compare("tuples", self._run_tuples, gradients=False),
        }
        if self.is_plain:  # last, since some models remember the image positions of an earlier call
            chosen["images"] = compare("images", self._run_images)
        return chosen

    # Comparisons

    def _compare_alike(self, key: str, run: Make, gradients: bool = True) -> Compared:
        """Compare the same run of the method and the textbook."""
        expected = self._expect(key, self.book, run, gradients)
        return _compare(_evaluate(self.subject, run, gradients), expected)

    def _compare_cached(self, key: str, run: Make, gradients: bool) -> Compared:
        """Compare a run of several calls with a cache, unless the plain model itself differs with a cache."""
        compared = self._compare_alike(key, run, gradients)
        if compared.error > BOUND and not self._continues():
            raise _Absent("the model itself gives other results with a cache than without")
        return compared

    def _compare_positions(self) -> Compared:
        """Compare rows with explicit positions that leave a gap after the prompt."""
        compared = self._compare_alike("positions", self._run_positions)
        gradients = self._expect("positions", self.book, self._run_positions).gradients
        if compared.error > BOUND and gradients and not any(bool(each.any()) for each in gradients):
            raise _Absent("the model treats a gap in the positions as the start of another sequence")
        return compared

    def _continues(self) -> bool:
        """Return whether the model without a method gives the same results in two calls as in one."""
        ids = torch.cat([self.ids[:, :_VIRTUAL_TOKENS], self.ids], dim=1)  # as long as with the virtual tokens
        plain = _Subject(self.plain.__call__, self.plain, [])
        pieces = _evaluate(plain, self._run_in_pieces("none", ids=ids), gradients=False)
        whole = _evaluate(plain, lambda run: _extract_values(run(**self._make_inputs(ids)))[:1], gradients=False)
        return _compare(_Numbers([torch.cat(pieces.values, dim=1)], []), whole).error <= BOUND

    def _expect(self, key: str, book: _Subject, run: Make, gradients: bool = True) -> _Numbers:
        """Return the textbook's values and gradients. The situation is not applicable if the textbook fails."""
        if key not in self.results:
            try:
                self.results[key] = _evaluate(book, run, gradients)
            except _Absent as absent:
                self.results[key] = absent
            except Exception as error:  # any error of the model family
                self.results[key] = _Absent(format_error(error))
        result: _Numbers | _Absent = self.results[key]
        if isinstance(result, _Absent):
            raise result
        return result

    # Runs, of the method or of the textbook

    def _make_inputs(self, ids: Tensor, padding: str = "none") -> dict[str, Any]:
        """Return arguments for ids ``[B, N]``. All rows except the first have padding."""
        mask = torch.ones_like(ids)
        mask[1:, {"none": slice(0), "left": slice(_PADDING), "right": slice(-_PADDING, None)}[padding]] = 0
        pad = getattr(self.config.get_text_config(), "pad_token_id", None)
        inputs: dict[str, Any] = {"attention_mask": mask}
        inputs["input_ids"] = ids.masked_fill(mask == 0, pad if type(pad) is int and pad >= 0 else 0)
        if self.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids[:, :2]
        if "bbox" in self.names:
            inputs["bbox"] = torch.arange(1, 5).expand(*ids.shape, 4)
        if self.cache_name is not None:
            inputs["use_cache"] = False
        return inputs

    @functools.cached_property
    def _plainest_inputs(self) -> dict[str, Any]:
        """The plainest arguments on which the model runs."""
        return self._make_inputs(self.ids) if self.is_text else dict(find_running_inputs(self.plain))

    def _run_padded(self, padding: str) -> Make:
        return lambda run: _extract_values(
            run(**(inputs := self._make_inputs(self.ids, padding))), inputs["attention_mask"]
        )

    def _run_plainest(self, run: Run) -> list[Tensor]:
        return _extract_values(run(**self._plainest_inputs))

    def _run_several_images(self, run: Run) -> list[Tensor]:
        pixels = self._plainest_inputs[PIXELS]
        return _extract_values(run(**{**self._plainest_inputs, PIXELS: torch.cat([pixels, 0.5 - pixels.flip(-1)])}))

    def _run_alone(self, run: Run) -> list[Tensor]:
        return _extract_values(run(**self._make_inputs(self.ids[1:])))

    def _run_long(self, run: Run) -> list[Tensor]:
        return _extract_values(run(**self._make_inputs(self.long_ids)))

    def _run_embeddings(self, run: Run) -> list[Tensor]:
        self._require("inputs_embeds")
        inputs = self._make_inputs(self.ids, "left")
        with torch.no_grad():
            rows = self.plain.get_input_embeddings()(inputs.pop("input_ids"))
        return _extract_values(run(inputs_embeds=rows, **inputs), inputs["attention_mask"])

    def _run_positions(self, run: Run) -> list[Tensor]:
        self._require("position_ids")
        positions = torch.arange(2, 2 + _TOKENS).expand(_ROWS, -1)
        return _extract_values(run(**self._make_inputs(self.ids), position_ids=positions))

    def _run_three_dimensions(self, run: Run) -> list[Tensor]:
        if not any("section" in str(vars(part).get("rope_parameters")) for part in list_configs(self.config)):
            raise _Absent("positions have one dimension")
        steps = torch.arange(_TOKENS)
        positions = torch.stack([steps, steps // 2, steps % 3])[:, None].expand(-1, _ROWS, -1)
        return _extract_values(run(**self._make_inputs(self.ids), position_ids=positions))

    def _run_types(self, run: Run) -> list[Tensor]:
        self._require("token_type_ids")
        inputs = self._make_inputs(self.ids, "left")
        return _extract_values(run(**inputs, token_type_ids=self.ids % 2), inputs["attention_mask"])

    def _run_boxes(self, run: Run) -> list[Tensor]:
        self._require("bbox")
        corners = torch.stack([self.ids % 5, self.ids % 7, self.ids % 5 + 9, self.ids % 7 + 9], dim=-1)
        return _extract_values(run(**{**self._make_inputs(self.ids), "bbox": corners}))

    def _run_images(self, run: Run) -> list[Tensor]:
        return _extract_values(run(**make_image_inputs(self.plain, self.ids[:1])))

    def _compare_packed(self) -> Compared:
        """Compare two packed sequences in one row with each sequence alone."""
        self._require("position_ids")
        if not self.caches:
            raise _Absent("sequences cannot be packed")
        cuts = (slice(0, 3), slice(3, _TOKENS))
        positions = torch.cat([torch.arange(cut.stop - cut.start) for cut in cuts])[None]

        def run_packed(run: Run) -> list[Tensor]:
            return _extract_values(run(input_ids=self.ids[:1], position_ids=positions, use_cache=False))

        def run_alone(run: Run) -> list[Tensor]:
            each = [_extract_values(run(input_ids=self.ids[:1, cut], use_cache=False))[0] for cut in cuts]
            return [torch.cat(each, dim=1)]

        plain = _Subject(self.plain.__call__, self.plain, [])
        together = self._expect("plain packed", plain, run_packed, gradients=False)
        if _compare(together, self._expect("plain apart", plain, run_alone, gradients=False)).error > BOUND:
            raise _Absent("the model does not tell packed sequences apart")
        return _compare(_evaluate(self.subject, run_packed), self._expect("apart", self.book, run_alone))

    def _run_in_pieces(
        self, padding: str, cut: int = 4, cache: Callable[[], Any] = lambda: None, ids: Tensor | None = None
    ) -> Make:
        """Run ids in two calls, the second with the cache of the first."""

        def run_pieces(run: Run) -> list[Tensor]:
            inputs = self._make_inputs(self.ids if ids is None else ids, padding)
            row, mask = inputs["input_ids"], inputs["attention_mask"]
            first = self._run_step(run, row[:, :cut], mask[:, :cut], cache())
            second = self._run_step(run, row[:, cut:], mask, find_cache(first))
            return [*_extract_values(first, mask[:, :cut])[:1], *_extract_values(second, mask[:, cut:])[:1]]

        return run_pieces

    def _run_step(self, run: Run, ids: Tensor, mask: Tensor, cache: Any) -> Any:
        given = {} if cache is None else {str(self.cache_name): cache}
        return run(input_ids=ids, attention_mask=mask, use_cache=True, **given)

    def _make_static_cache(self) -> Any:
        return StaticCache(config=self.plain.config, max_cache_len=_TOKENS + _VIRTUAL_TOKENS + 2)

    def _run_copied(self, run: Run) -> list[Tensor]:
        mask = torch.ones_like(self.ids)
        first = self._run_step(run, self.ids[:, :4], mask[:, :4], None)
        copied = copy.deepcopy(find_cache(first))
        second = self._run_step(run, self.ids[:, 4:], mask, find_cache(first))
        other = self._run_step(run, self.ids[:, 4:].flip(1), mask, copied)
        return [_extract_values(second)[0], _extract_values(other)[0]]

    def _generate(self, subject: _Subject, **options: Any) -> tuple[_Numbers, Any]:
        """Generate some tokens. Return the logits and beam scores, and the whole output."""
        model: Any = subject.model
        with torch.no_grad():
            output = model.generate(
                do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0,
                max_new_tokens=_NEW, **options, **subject.make_tasks(options),
            )  # fmt: skip
        scores = getattr(output, "sequences_scores", None)
        return _Numbers([torch.stack(output.logits), *([] if scores is None else [scores])], []), output

    def _expect_generated(self, key: str, **options: Any) -> _Numbers:
        """Return the results of the textbook's generation without a cache. In a pair, both models use their caches."""
        caching = {} if self.paired else {"use_cache": False}

        def run(_: Run) -> list[Tensor]:
            return self._generate(self.book, **options, **caching)[0].values

        return self._expect(key, self.book, run, gradients=False)

    def _compare_beams(self) -> Compared:
        inputs = {k: v for k, v in self._make_inputs(self.ids, "left").items() if k in ("input_ids", "attention_mask")}
        options = {"num_beams": 3, "num_return_sequences": 3, "output_scores": True}
        expected = self._expect_generated("beams", **inputs, **options)
        compared = _compare(self._generate(self.subject, **inputs, **options)[0], expected)
        return self._excuse_plain_model(compared, inputs, options)

    def _excuse_plain_model(self, compared: Compared, inputs: Inputs, options: Inputs) -> Compared:
        """Return an error of cached generation, unless the model without a method also differs with a cache."""
        if compared.error > BOUND and find_frequencies_end(self.plain) is not None:
            raise _Absent("rotary frequencies depend on the length of a row, and a cache keeps those of a shorter row")
        if compared.error > BOUND:
            plain = _Subject(self.plain.__call__, self.plain, [])
            # As long as with the virtual tokens: rotary frequencies may change with the length of a row.
            longer = {name: torch.cat([value[:, :_VIRTUAL_TOKENS], value], dim=1) for name, value in inputs.items()}
            kept, anew = (self._generate(plain, **longer, **options, use_cache=cached)[0] for cached in (True, False))
            if _compare(kept, anew).error > BOUND:
                raise _Absent("the model itself gives other results with a cache than without")
        return compared

    def _compare_second_turn(self) -> Compared:
        """Compare two turns of generation with one cache."""
        mask = torch.ones_like(self.ids)
        self._expect_generated("first turn", input_ids=self.ids, attention_mask=mask)
        first = self._generate(self.subject, input_ids=self.ids, attention_mask=mask)[1]
        turn = torch.cat([first.sequences, self.ids[:, :3]], dim=1)
        inputs = {"input_ids": turn, "attention_mask": torch.ones_like(turn)}
        kept = {str(self.cache_name): find_cache(first)}
        actual = self._generate(self.subject, **inputs, **kept)[0]
        return self._excuse_plain_model(_compare(actual, self._expect_generated("second turn", **inputs)), inputs, {})

    def _compare_direct(self) -> Compared:
        subject = self.subject._replace(run=self.subject.model.forward)
        return _compare(_evaluate(subject, self._run_plainest), self._expect("ids", self.book, self._run_plainest))

    def _compare_checkpointing(self, reentrant: bool) -> Compared:
        model: Any = self.subject.model
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise _Absent("the model has no gradient checkpointing")

        def run_training(run: Run) -> list[Tensor]:
            self.book.model.train()
            return self._run_plainest(run)

        with _preserve_buffers(self.book.model):
            expected = self._expect("training", self.book, run_training)
        _enable_checkpointing(model, reentrant)
        model.train()
        try:
            with _preserve_buffers(model):
                compared = _compare(_evaluate(self.subject, run_training), expected)
            if reentrant and compared.error > BOUND and not self._checkpoints_reentrantly():
                raise _Absent("the model itself gives other gradients with reentrant gradient checkpointing")
            return compared
        finally:
            model.gradient_checkpointing_disable()
            model.eval()
            self.book.model.eval()

    def _checkpoints_reentrantly(self) -> bool:
        """Return whether the model without a method has the same gradients with reentrant checkpointing."""
        model: Any = copy.deepcopy(self.plain).train()
        weight = getattr(find_embedding(model), "weight", None)
        weight = next(model.parameters()) if weight is None else weight
        plain, found = _Subject(model.__call__, model, [weight.requires_grad_(True)]), []
        for kind in (False, True):
            _enable_checkpointing(model, kind)
            found.append(_evaluate(plain, self._run_plainest))
        return _compare(*found).error <= BOUND

    def _run_states(self, which: Any) -> Make:
        return lambda run: _extract_values(run(**self._plainest_inputs, output_hidden_states=which))

    def _run_tuples(self, run: Run) -> list[Tensor]:
        output = run(**self._plainest_inputs, return_dict=False)
        return [value for value in output if isinstance(value, Tensor) and value.is_floating_point()]

    def compare_autocast(self) -> Finding:
        """Compare under bfloat16 autocast, outside ``Float64``, after rounding the weights of both to float32.

        The error of the method must be at most four times the error of the textbook. If a router chooses a different
        expert, either error can be arbitrarily large. So if one draw of the parameters fails, the median of several
        draws decides.
        """
        name = "autocast"
        try:
            for each in (self.subject, self.book):
                each.model.float()
            draws = [self._compare_rounded()]
            for seed in range(_DRAWS) if not _is_close(draws) else ():
                _randomize([*self.subject.trained], seed)
                _randomize([*self.book.trained], seed)
                draws.append(self._compare_rounded())
        except _Absent as absent:
            return Finding(name, "not applicable", reason=str(absent))
        except Exception as error:
            return _find_fault(name, error)
        return Finding(name, "ok" if _is_close(draws) else "differs", draws[0][1].error, draws[0][1].where)

    def _compare_rounded(self) -> tuple[Compared, Compared]:
        """Return the errors of the textbook and of the method under autocast."""
        self.results = {}
        exact = self._expect("float32", self.book, self._run_plainest)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = self._expect("bfloat16", self.book, self._run_plainest)
            actual = _evaluate(self.subject, self._run_plainest)
        return _compare(rounded, exact), _compare(actual, exact)

    def _require(self, name: str) -> None:
        if name not in self.names:
            raise _Absent(f"the model has no {name}")


def _is_close(draws: list[tuple[Compared, Compared]]) -> bool:
    """Return whether the median error of a method under autocast is comparable to the textbook's own error."""
    own, ours = (statistics.median(each.error for each in errors) for errors in zip(*draws, strict=True))
    return math.isfinite(ours) and bool(ours <= max(4 * own, 0.05))


@contextmanager
def _preserve_buffers(model: torch.nn.Module) -> Iterator[None]:
    """Restore the buffers that training changes, such as the running means of a batch norm."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in kept and buffer.shape == kept[name].shape:
                    buffer.copy_(kept[name])


def _enable_checkpointing(model: Any, reentrant: bool) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = functools.partial(_checkpoint, use_reentrant=reentrant)


def _checkpoint(function: Callable[..., Any], *args: Any, use_reentrant: bool) -> Any:
    """Checkpoint a function in ``Float64``, including its recomputation in the backward pass."""

    def run_wide(*inputs: Any) -> Any:
        with Float64():
            return function(*inputs)

    return checkpoint.checkpoint(run_wide, *args, use_reentrant=use_reentrant)


def make_image_inputs(model: PreTrainedModel, ids: Tensor) -> dict[str, Any]:
    """Return arguments with an image between two halves of ids ``[1, N]``.

    Raises:
        _Absent: if the model has no images, or their size is unknown.
    """
    base: Any = model.base_model
    token = next(
        (v for n in ("image_token_id", "image_token_index") if type(v := getattr(model.config, n, 0)) is int), 0
    )
    if not hasattr(base, "get_image_features") or token == 0:
        raise _Absent("the model has no images")
    names = read_parameter_names(base)
    for images in propose_images(model):
        try:
            with preserve_state(model), torch.no_grad():
                features = base.get_image_features(**images)
                features = getattr(features, "pooler_output", features)
        except Exception:  # any error that the family raises on such images
            continue
        features = features if isinstance(features, list | tuple) else [features]
        count = sum(each.shape[:-1].numel() for each in features)
        start = getattr(model.config, "vision_start_token_id", None)
        before = ids[:, :3] if start is None else torch.cat([ids[:, :3], torch.full((1, 1), start)], 1)
        row = torch.cat([before, torch.full((1, count), token), ids[:, 3:]], 1)
        types = {n: (row == token).int() for n in ("mm_token_type_ids",) if n in names}
        types |= {n: torch.zeros_like(row) for n in ("token_type_ids",) if n in names}
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "use_cache": False, **images, **types}
    raise _Absent("no small images are known")


def _extract_values(output: Any, mask: Tensor | None = None) -> list[Tensor]:
    """Return the values of an output without padding tokens. With padding, pooled values are only used if alone."""
    if not isinstance(output, ModelOutput):
        return [value for value in output if isinstance(value, Tensor) and value.is_floating_point()]
    skipped = ("attentions", "encoder_", "past", "loss", "cross_", "router")
    named = [(n, v) for n, v in output.items() if not any(word in n for word in skipped)]
    flat = [each for _, value in named for each in (value if isinstance(value, list | tuple) else [value])]
    tensors = [value for value in flat if isinstance(value, Tensor) and value.is_floating_point()]
    if mask is None or bool(mask.all()):
        return tensors
    rows = [value[mask.bool()] for value in tensors if value.shape[:2] == mask.shape]
    return rows or tensors[:1]


class _Numbers(NamedTuple):
    values: list[Tensor]
    gradients: list[Tensor]


def _judge(name: str, situation: Callable[[], Compared]) -> Finding:
    try:
        compared = situation()
    except _Absent as absent:
        return Finding(name, "not applicable", reason=str(absent))
    except Exception as error:
        return _find_fault(name, error)
    return Finding(name, "ok" if compared.error <= BOUND else "differs", *compared)


class Compared(NamedTuple):
    """The largest error, relative to the largest value, and whether it is in the values or the gradients."""

    error: float
    where: str


def _evaluate(subject: _Subject, run: Make, gradients: bool = True) -> _Numbers:
    """Return values and the gradients of a fixed linear combination of them, with a fixed random seed."""
    seed_generators(subject.model)
    with torch.set_grad_enabled(gradients):
        values = run(subject.call)
    if not gradients or not subject.trained:
        return _Numbers([value.detach() for value in values], [])
    output = torch.cat([value.flatten() for value in values])
    weights = torch.arange(len(output)).to(output.dtype).cos()
    if output.requires_grad:
        torch.autograd.backward([output], [weights])  # checkpointed layers are recomputed here, also under ``Float64``
    found = [parameter.grad for parameter in subject.trained]
    for parameter in subject.trained:
        parameter.grad = None
    pairs = zip(found, subject.trained, strict=True)
    return _Numbers([value.detach() for value in values], [torch.zeros_like(p) if g is None else g for g, p in pairs])


def _compare(actual: _Numbers, expected: _Numbers) -> Compared:
    values = Compared(_measure_error(actual.values, expected.values), "values")
    if not expected.gradients:
        return values
    scale = max(float(g.abs().max()) for g in expected.gradients)
    return max(values, Compared(_measure_error(actual.gradients, expected.gradients, 1e-3 * scale), "gradients"))


def _measure_error(actual: list[Tensor], expected: list[Tensor], least: float = 0.0) -> float:
    """Return the largest error, relative to the largest value of its tensor, which counts as ``least`` if smaller."""
    if [value.shape for value in actual] != [value.shape for value in expected]:
        return math.inf
    errors = [
        float((a - e).abs().max()) / max(float(e.abs().max()), least, 1e-300)
        for a, e in zip(actual, expected, strict=True)
    ]
    return max(errors, default=0.0) if all(map(math.isfinite, errors)) else math.inf  # ``max`` would skip NaN
