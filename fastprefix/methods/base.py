"""Base classes of the methods: configurations that can be saved, and modules that the integrations call."""

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
"""The configuration class and the method class by name. Saved adapters contain this name."""


def register(
    name: str, config: type[MethodConfig], method: type[PromptMethod] | type[PrefixMethod] | type[VisualMethod]
) -> None:
    """Register a method under a name."""
    METHODS[name] = (config, method)


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    same_kind = (choice for choice in choices if isinstance(choice, bool) == isinstance(value, bool))  # 1 equals True
    if not any(value == choice for choice in same_kind):
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
    """The usual learning rates of a method with Adam."""

    prompt: float = 0.3
    """The rate of a soft prompt (Lester et al., EMNLP 2021)."""
    rest: float = 5e-3
    """The rate of prefixes (Liu et al., P-tuning v2, ACL 2022), offsets, and modules that stay trainable."""
    gates: float | None = None
    """The rate of gates. None uses ``rest``."""


OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "prefix_projection": ('reparameterization="mlp"',),
    "encoder_hidden_size": ("hidden_dim", "encoder_hidden_dim"),
    "r": ("rank", "bottleneck_dim"),
    "prompt_tuning_init": ("init",),
    "prompt_tuning_init_text": ("init_text",),
    "encoder_reparameterization_type": ("encoder",),
    "adapter_len": ("num_virtual_tokens",),
    "num_tokens": ("num_virtual_tokens",),
    "prefix_length": ("num_virtual_tokens",),
    "prompt_length": ("num_virtual_tokens",),
}
"""Options of this package by the names that others use. The first that a method has is suggested in error messages."""


@dataclass(kw_only=True)
class MethodConfig:
    """The options of a method.

    An option whose value can be private, such as a document, is a field with ``repr=False``. Its value appears in none
    of ``repr``, ``to_dict`` and ``list_choices``, and attached methods do not keep it.

    Args:
        num_virtual_tokens: length ``m`` of the prompt or prefix.
        modules_to_save: names of modules of the base model that stay trainable and are saved with the adapter. None
            selects the head if the model class has a newly initialized one (classification, question answering).
    """

    kind: ClassVar[str]  # "prompt", "prefix" or "visual"
    learning_rates: ClassVar[LearningRates] = LearningRates()

    num_virtual_tokens: int = dataclasses.field(kw_only=False)
    modules_to_save: list[str] | None = None

    def __new__(cls, *_: Any, **options: Any) -> Self:
        """Refuse unknown options with a message that lists the known ones, before the dataclass refuses them."""
        if wrong := cls._wrong_names(options):
            raise TypeError(wrong)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_positive("num_virtual_tokens", self.num_virtual_tokens)
        names = self.modules_to_save
        if names is not None and not (isinstance(names, list | tuple) and all(isinstance(of, str) for of in names)):
            raise TypeError(f"`modules_to_save` must be a list of names, got {self.modules_to_save!r}")

    @classmethod
    def method_name(cls) -> str:
        """Return the method's name, which saved adapters contain."""
        return next(name for name, (config, _) in METHODS.items() if config is cls)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain data, with the method's name. Private texts are empty."""
        return {"method": self.method_name(), **dataclasses.asdict(self.without_private())}

    def without_private(self) -> Self:
        """Return the configuration with empty texts and without tensors where values are private."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if not field.repr}
        given = {name: value for name, value in values.items() if value is not None}
        emptied: dict[str, Any] = {name: None if isinstance(value, Tensor) else "" for name, value in given.items()}
        return dataclasses.replace(self, **emptied) if emptied else self

    def list_choices(self) -> list[tuple[str, Any]]:
        """Return the names and values of the options that differ from their defaults and are not private."""
        options = ((field, getattr(self, field.name)) for field in dataclasses.fields(self) if field.repr)
        return [(field.name, value) for field, value in options if value is not None and value != field.default]

    @staticmethod
    def from_dict(options: dict[str, Any]) -> MethodConfig:
        """Create a configuration from the result of ``to_dict``.

        Raises:
            ValueError: the method is unknown, or does not have one of the options.
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
        """Return an error message about unknown options that suggests similar ones, or None if all are known."""
        known = sorted(field.name for field in dataclasses.fields(cls))
        unknown = sorted(set(names) - set(known))
        if not unknown:
            return None
        close = [
            match
            for name in unknown
            for match in [*(o for o in OTHER_NAMES.get(name, ()) if o.partition("=")[0] in known)][:1]
            or difflib.get_close_matches(name, known, n=1)
        ]
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        return f"{cls.__name__} has no option {', '.join(unknown)}.{hint} Its options are {', '.join(known)}"


class MethodModule(nn.Module, ABC):
    """A module with a method's configuration, which it shows when it is printed."""

    config: Any

    def extra_repr(self) -> str:
        """Return the options that differ from their defaults, and the number of parameters."""
        options = [f"{name}={value!r}" for name, value in self.config.list_choices()]
        return ", ".join([*options, f"{sum(p.numel() for p in self.parameters()):,} parameters"])


class PromptMethod(MethodModule):
    """A soft prompt before the tokens. Some methods also add an offset to the embeddings of the tokens."""

    changes_tokens: ClassVar[bool] = False
    """True if the method adds an offset to the tokens' embeddings."""
    changes_positions: ClassVar[bool] = False
    """True if the offset depends on the position of a token instead of its embedding."""
    prompt: Tensor
    """The prompt, ``[m, d]``. It is a parameter, or in a ``ComputedPrompt`` a property that computes it."""

    def __init__(self, config: Any, shape: EmbeddingShape) -> None:
        super().__init__()
        self.config = config
        self.shape = shape
        self._make_prompt()
        self.prompt_path: str | None = None
        """Hold "shared" if the prompt runs once for the whole batch, or "textbook: " and why it runs in every row.

        ``attach`` sets it. Calls update it if, for example, dropout in training changes the path.
        """

    def _make_prompt(self) -> None:
        """Create the parameters of the prompt."""
        self.prompt = nn.Parameter(torch.empty(self.config.num_virtual_tokens, self.shape.width))

    def list_prompt_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the prompt, which use the learning rate of prompts."""
        assert isinstance(self.prompt, nn.Parameter)
        return [self.prompt]

    def baked(self) -> PromptMethod:
        """Return an equivalent method for inference, in which all that does not depend on the input is precomputed.

        Raises:
            ValueError: nothing can be precomputed. The message explains why.
        """
        raise ValueError(f"{type(self).__name__} has nothing that can be computed before the input is known")

    def repeat_prompt(self, batch: int) -> Tensor:
        """Return the prompt of each row of a batch, ``[B, m, d]``."""
        return self.prompt.expand(batch, -1, -1)

    @abstractmethod
    def reset_parameters(self, table: Tensor, init_ids: Tensor | None) -> None:
        """Initialize the parameters.

        Args:
            table: the embedding table.
            init_ids: the token ids ``[m]`` of the text for ``init="text"``, else None.
        """

    def offset(self, tokens: int, first_position: int, dtype: torch.dtype) -> dict[str, Any]:
        """Return the offset of ``tokens`` tokens from ``first_position`` on, as arguments of ``prompt_embedding``."""
        return {}

    def embed(self, input_ids: Tensor, table: Tensor, first_position: int, with_prompt: bool) -> Tensor:
        """Return the input embeddings ``[B, m + N, d]``, or ``[B, N, d]`` without the prompt if the cache has it."""
        prompt = self.prompt.to(table.dtype) if with_prompt else None
        offset = self.offset(input_ids.shape[1], first_position, table.dtype)
        return prompt_embedding(input_ids, table, prompt, **offset)


class VisualMethod(MethodModule):
    """Prompt tokens in the layers of a vision transformer, in addition to the tokens of an image."""

    def __init__(self, config: Any, shape: VisionShape) -> None:
        super().__init__()
        self.config = config
        self.shape = shape
        self.prompt_path: str | None = None
        """Hold "shared" if the prompt runs once for the whole batch, or "textbook: " and why it runs in every row."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Initialize the parameters."""

    @abstractmethod
    def make_rows(self, layer: int, former: Tensor | None, batch: int) -> Tensor:
        """Return the prompt tokens ``[B, P, d]`` that enter a layer.

        ``former [B, P', d]`` are the prompt tokens that the layer before returned, or None for the first layer.
        """

    def reads_tokens(self, layer: int) -> bool:
        """Return True if ``make_image_rows`` of a layer needs the most attended tokens of the layer before."""
        return False

    def make_image_rows(self, layer: int, given: Tensor | None) -> Tensor | None:
        """Return additional prompt tokens ``[B, A, d]`` of a layer that depend on the image, or None.

        If ``reads_tokens`` is True, ``given [B, A, d]`` are the ``config.num_attribute`` tokens with the largest
        attention of the class token in the layer before. Otherwise, ``given`` are the image-dependent prompt tokens
        that the layer before returned, or None if it had none.
        """
        return None

    def sees_tokens(self, training: bool) -> str | None:
        """Return the reason why prompt tokens differ between images, or None if they are the same in a batch."""
        return None

    def strength(self, layer: int) -> float | None:
        """Return the weight of a layer's separate softmax over the prompt tokens, or None for one joint softmax.

        With a separate softmax, prompt tokens do not attend to other tokens. The attention output of each one is its
        own value.
        """
        return None


class PrefixMethod(MethodModule):
    """A prefix of keys and values for each attention layer, and its gates."""

    def __init__(self, config: Any, shapes: Sequence[AttentionShape]) -> None:
        super().__init__()
        self.config = config
        self.shapes = tuple(shapes)

    @abstractmethod
    def reset_parameters(self, text_keys_values: Sequence[tuple[Tensor, Tensor]] | None) -> None:
        """Initialize the parameters.

        ``text_keys_values`` are the initial keys and values of each layer, such as those that the frozen model
        computes for a text, or None.
        """

    @classmethod
    def chosen_layers(cls, config: Any, shapes: Sequence[AttentionShape]) -> Sequence[int]:
        """Return the indices of the attention layers that get a prefix."""
        return range(len(shapes))

    @abstractmethod
    def prefixes(self) -> list[tuple[Tensor, Tensor]]:
        """Return the prefix keys ``[Hkv, m, D]`` and values ``[Hkv, m, Dv]`` of every layer, once per step."""

    def projected_states(self, layer: int) -> Tensor | None:
        """Return states ``[m, d]`` that the layer projects to its prefix, or None to use ``prefixes`` instead."""
        return None

    def baked(self) -> PrefixMethod:
        """Return an equivalent method for inference, in which all that does not depend on the input is precomputed.

        Raises:
            ValueError: nothing can be precomputed. The message explains why.
        """
        raise ValueError(f"{type(self).__name__} has nothing that can be computed before the input is known")

    def needs_hidden(self) -> bool:
        """Return True if the gates are computed from hidden states."""
        return False

    def prefix_gate(
        self, layer: int, hidden: Tensor | None, attended: Tensor | None, sequences: Tensor | None = None
    ) -> Tensor | None:
        """Return the prefix gate of a layer, or None.

        ``hidden``, ``attended`` and ``sequences`` are None unless ``needs_hidden`` returns True.

        Args:
            layer: index of the layer among those with a prefix.
            hidden: the hidden states ``[B, N, d]`` that enter the layer.
            attended: bool ``[B, N]``, False for padding. None means no padding.
            sequences: int ``[B, N]``, the number of each token's sequence in a packed row, in ascending order. None
                means one sequence per row.
        """
        return None

    def output_gate(self, layer: int) -> Tensor | None:
        """Return the output gate of a layer, or None for one joint softmax."""
        return None

    def head_parameters(self) -> dict[str, Literal["keys", "queries"]]:
        """Return the names of the parameters whose first dimension is a layer's key heads or query heads.

        The names end with the number of the layer. Tensor parallelism splits these parameters by head between ranks.
        """
        return {}

    def key_bias(self, layer: int) -> Tensor | None:
        """Return the biases ``[Hkv, m]`` of a layer's prefix keys, or None."""
        return None

    def frozen_tokens(self) -> int:
        """Return the number of tokens at the start of the prefix whose keys and values need no gradient."""
        return 0

    def position_shift(self) -> int:
        """Return the number of positions by which the tokens are shifted."""
        if self.config.prefix_position != "shift":
            return 0
        shift: int | None = getattr(self.config, "position_shift", None)
        return int(self.config.num_virtual_tokens) if shift is None else shift
