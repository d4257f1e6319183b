"""Base classes of methods: configurations that can be saved, and the modules that integrations call."""

from __future__ import annotations

import dataclasses
import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.prompt_embedding import prompt_embedding
from .shapes import AttentionShape, EmbeddingShape, VisionShape

if TYPE_CHECKING:
    from typing_extensions import Self

METHODS: dict[str, tuple[type[MethodConfig], type[PromptMethod] | type[PrefixMethod] | type[VisualMethod]]] = {}
"""Configuration and method by name, the name that saved adapters carry."""


def register(
    name: str, config: type[MethodConfig], method: type[PromptMethod] | type[PrefixMethod] | type[VisualMethod]
) -> None:
    """Make a method known under a name."""
    METHODS[name] = (config, method)


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_finite(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`{name}` must be a finite number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number, got {value!r}")


def check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be a whole number of at least 1, got {value!r}")
    if value < 1:
        raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}")


def check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be a whole number, got {value!r}")
    if value < 0:
        raise ValueError(f"`{name}` must be at least 0, got {value!r}")


class LearningRates(NamedTuple):
    """The rates at which a method is usually trained with Adam."""

    prompt: float = 0.3
    """The rate of a soft prompt (Lester et al., EMNLP 2021)."""
    rest: float = 5e-3
    """The rate of prefixes (Liu et al., P-tuning v2, ACL 2022), offsets, and modules that stay trainable."""
    gates: float | None = None
    """The rate of gates. None: that of the rest."""


PEFT_OPTIONS: dict[str, tuple[str, ...]] = {
    "prefix_projection": ('reparameterization="mlp"',),
    "encoder_hidden_size": ("hidden_dim", "encoder_hidden_dim"),
    "r": ("rank", "bottleneck_dim"),
    "prompt_tuning_init": ("init",),
    "prompt_tuning_init_text": ("init_text",),
    "encoder_reparameterization_type": ("encoder",),
    "adapter_len": ("num_virtual_tokens",),
}
"""Options of this package by PEFT's names. Where there are several, the first that a method has is meant."""


@dataclass(kw_only=True)
class MethodConfig:
    """A method's options.

    Args:
        num_virtual_tokens: length ``m`` of the prompt or prefix.
        modules_to_save: names of modules of the base model that stay trainable and are saved with the adapter. None:
            the head, where the model is one with a freshly initialised head (classification, question answering).
    """

    kind: ClassVar[str]  # "prompt", "prefix" or "visual"
    learning_rates: ClassVar[LearningRates] = LearningRates()

    num_virtual_tokens: int = dataclasses.field(kw_only=False)
    modules_to_save: list[str] | None = None

    def __new__(cls, *_: Any, **options: Any) -> Self:
        """Refuse options that there are not before the dataclass does, and say which there are."""
        if wrong := cls._wrong_names(options):
            raise TypeError(wrong)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_positive("num_virtual_tokens", self.num_virtual_tokens)

    @classmethod
    def method_name(cls) -> str:
        """Return the name under which adapters of this method are saved."""
        return next(name for name, (config, _) in METHODS.items() if config is cls)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain data, with the method's name."""
        return {"method": self.method_name(), **dataclasses.asdict(self)}

    def list_choices(self) -> list[tuple[str, Any]]:
        """Return the names and values of the options that are not at their defaults."""
        options = ((field, getattr(self, field.name)) for field in dataclasses.fields(self))
        return [(field.name, value) for field, value in options if value is not None and value != field.default]

    @staticmethod
    def from_dict(options: dict[str, Any]) -> MethodConfig:
        """Return the configuration that ``to_dict`` described.

        Raises:
            ValueError: an unknown method, or an option that the method does not have.
        """
        options = dict(options)
        name = options.pop("method", None)
        check_choice("method", name, tuple(METHODS))
        config = METHODS[str(name)][0]
        if wrong := config._wrong_names(options):
            raise ValueError(wrong)
        return config(**options)

    @classmethod
    def _wrong_names(cls, names: Iterable[str]) -> str | None:
        """Return a message about names that are no options, with the closest ones that are, or None."""
        known = sorted(field.name for field in dataclasses.fields(cls))
        unknown = sorted(set(names) - set(known))
        if not unknown:
            return None
        close = [
            match
            for name in unknown
            for match in [*(o for o in PEFT_OPTIONS.get(name, ()) if o.partition("=")[0] in known)][:1]
            or difflib.get_close_matches(name, known, n=1)
        ]
        hint = f" (meant: {', '.join(close)}?)" if close else ""
        return f"{cls.__name__} has no option {', '.join(unknown)}{hint}; it takes {', '.join(known)}"


class MethodModule(nn.Module, ABC):
    """Hold the configuration of a method, and describe it where the method is printed."""

    config: Any

    def extra_repr(self) -> str:
        """Return the options that are not at their defaults, and the number of parameters."""
        options = [f"{name}={value!r}" for name, value in self.config.list_choices()]
        return ", ".join([*options, f"{sum(p.numel() for p in self.parameters()):,} parameters"])


class PromptMethod(MethodModule):
    """A soft prompt before the tokens and, by method, an offset on them. Changes what enters the first layer."""

    changes_tokens: ClassVar[bool] = False
    """True if the method adds an offset to the tokens' embeddings."""
    changes_positions: ClassVar[bool] = False
    """True if that offset depends on the position of a token, rather than on the token."""
    prompt: Tensor
    """The prompt, ``[m, d]``: a parameter, or in a ``ComputedPrompt`` a property that computes it."""

    def __init__(self, config: Any, shape: EmbeddingShape) -> None:
        super().__init__()
        self.config = config
        self.shape = shape
        self._make_prompt()
        self.prompt_path: str | None = None
        """How a model runs the prompt: "shared", once for the whole batch, or "textbook: " and why not. Known from
        ``attach`` on; dropout while training and the like decide anew in every call, and it is the last call's.
        """

    def _make_prompt(self) -> None:
        """Make the parameters of the prompt."""
        self.prompt = nn.Parameter(torch.empty(self.config.num_virtual_tokens, self.shape.width))

    def list_prompt_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the prompt is made of, which are trained at the rate of prompts."""
        assert isinstance(self.prompt, nn.Parameter)
        return [self.prompt]

    def baked(self) -> PromptMethod:
        """Return a method for inference that computes nothing again that does not depend on the input.

        Raises:
            ValueError: there is nothing of that kind, and why.
        """
        raise ValueError(f"{type(self).__name__} has nothing that could be computed before the input is known")

    def repeat_prompt(self, batch: int) -> Tensor:
        """Return the prompt of each row of a batch, ``[B, m, d]``."""
        return self.prompt.expand(batch, -1, -1)

    @abstractmethod
    def reset_parameters(self, table: Tensor, init_ids: Tensor | None) -> None:
        """Initialise; ``table`` is the embedding table, ``init_ids`` ``[m]`` are a text's, for ``init="text"``."""

    def offset(self, tokens: int, first_position: int, dtype: torch.dtype) -> dict[str, Any]:
        """Return the offset as arguments of ``prompt_embedding``, for tokens from ``first_position`` on."""
        return {}

    def embed(self, input_ids: Tensor, table: Tensor, first_position: int, with_prompt: bool) -> Tensor:
        """``[B, m + N, d]``, or ``[B, N, d]`` without the prompt, as when it is in the cache already."""
        prompt = self.prompt.to(table.dtype) if with_prompt else None
        offset = self.offset(input_ids.shape[1], first_position, table.dtype)
        return prompt_embedding(input_ids, table, prompt, **offset)


class VisualMethod(MethodModule):
    """Rows beside the tokens of an image, in every layer of a vision transformer."""

    def __init__(self, config: Any, shape: VisionShape) -> None:
        super().__init__()
        self.config = config
        self.shape = shape
        self.prompt_path: str | None = None
        """How a model runs the rows: "shared", once for the whole batch, or "textbook: " and why not."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Initialize."""

    @abstractmethod
    def make_rows(self, layer: int, former: Tensor | None, batch: int) -> Tensor:
        """Return the rows ``[B, P, d]`` of a layer.

        ``former`` ``[B, P', d]`` is what the layer before made of its rows, None before the first layer.
        """

    def reads_tokens(self, layer: int) -> bool:
        """Return whether a layer's ``make_image_rows`` is given the most attended tokens of the layer before."""
        return False

    def make_image_rows(self, layer: int, given: Tensor | None) -> Tensor | None:
        """Return rows ``[B, A, d]`` of a layer that differ by image beside those of ``make_rows``, or None.

        ``given`` are the ``config.num_attribute`` tokens ``[B, A, d]`` with the largest attention of the class token in
        the layer before, if ``reads_tokens``, and else what the layer before made of these rows (None: it had none).
        """
        return None

    def sees_tokens(self, training: bool) -> str | None:
        """Return the reason for which rows differ by image, or None if they are the same for all of a batch."""
        return None

    def strength(self, layer: int) -> float | None:
        """Return the share of a separate softmax over the rows in what a layer's tokens get; None: one joint softmax.

        With a share, rows are not attended to one another: each gets its own value.
        """
        return None


class PrefixMethod(MethodModule):
    """A prefix of keys and values for every attention layer, and its gates."""

    def __init__(self, config: Any, shapes: Sequence[AttentionShape]) -> None:
        super().__init__()
        self.config = config
        self.shapes = tuple(shapes)

    @abstractmethod
    def reset_parameters(self, text_keys_values: Sequence[tuple[Tensor, Tensor]] | None) -> None:
        """Initialise; ``text_keys_values`` are the frozen model's own for the text, for ``init="text"``."""

    @classmethod
    def chosen_layers(cls, config: Any, shapes: Sequence[AttentionShape]) -> Sequence[int]:
        """Which of a model's attention layers get a prefix."""
        return range(len(shapes))

    @abstractmethod
    def prefixes(self) -> list[tuple[Tensor, Tensor]]:
        """Prefix keys ``[Hkv, m, D]`` and values ``[Hkv, m, Dv]`` of every layer, computed once a step."""

    def projected_states(self, layer: int) -> Tensor | None:
        """States ``[m, d]`` that the layer itself projects to its prefix, in place of ``prefixes``; None: none."""
        return None

    def baked(self) -> PrefixMethod:
        """Return a method for inference that computes nothing again that does not depend on the input.

        Raises:
            ValueError: there is nothing of that kind, and why.
        """
        raise ValueError(f"{type(self).__name__} has nothing that could be computed before the input is known")

    def needs_hidden(self) -> bool:
        """Return whether the gates are computed from hidden states."""
        return False

    def prefix_gate(
        self, layer: int, hidden: Tensor | None, attended: Tensor | None, sequences: Tensor | None = None
    ) -> Tensor | None:
        """Return the prefix gate of a layer, or None.

        ``hidden`` ``[B, N, d]`` is what enters the layer, ``attended`` bool ``[B, N]`` says which tokens are no
        padding (None: all), and ``sequences`` int ``[B, N]`` which sequence of a packed row each belongs to, counted
        up (None: one a row); they are there only where ``needs_hidden`` says so.
        """
        return None

    def output_gate(self, layer: int) -> Tensor | None:
        """Return the output gate of a layer, or None for one joint softmax."""
        return None

    def head_parameters(self) -> dict[str, Literal["keys", "queries"]]:
        """Return the parameters whose first dimension is the heads of a layer, and if those are of keys or queries.

        Their names end with the number of the layer. Tensor parallelism gives each rank its own rows of them.
        """
        return {}

    def key_bias(self, layer: int) -> Tensor | None:
        """Return the biases ``[Hkv, m]`` of a layer's prefix keys, or None."""
        return None

    def frozen_tokens(self) -> int:
        """Return how many of the first tokens have keys and values that need no gradient."""
        return 0

    def position_shift(self) -> int:
        """Return by how many positions the tokens are moved up."""
        if self.config.prefix_position != "shift":
            return 0
        shift: int | None = getattr(self.config, "position_shift", None)
        return int(self.config.num_virtual_tokens) if shift is None else shift
