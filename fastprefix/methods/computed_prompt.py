"""Prompts that are computed from parameters, such as a product of small matrices or the output of an encoder."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import MethodConfig, PromptMethod, check_choice
from .prompt_tuning import PromptTuning, PromptTuningConfig


@dataclass(kw_only=True)
class ComputedPromptConfig(MethodConfig):
    """The options that all computed prompts share.

    Args:
        shared_prompt: see ``PromptTuningConfig``.
    """

    kind: ClassVar[str] = "prompt"
    init_text: ClassVar[None] = None  # the parameters are not embeddings of tokens

    shared_prompt: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("shared_prompt", self.shared_prompt, (None, True, False))


class ComputedPrompt(PromptMethod):
    """A prompt that is computed from parameters in each step. ``baked`` returns a plain prompt for inference."""

    def _make_prompt(self) -> None:
        """Create nothing. The subclass creates its own parameters."""

    @property
    def prompt(self) -> Tensor:  # type: ignore[override]
        """Compute the prompt, ``[m, d]``."""
        return self.compute_prompt()

    @abstractmethod
    def compute_prompt(self) -> Tensor:
        """Compute the prompt, ``[m, d]``."""

    def list_prompt_parameters(self) -> list[nn.Parameter]:
        """Return all parameters."""
        return list(self.parameters())

    def baked(self) -> PromptTuning:
        """Return prompt tuning with the current prompt.

        Raises:
            ValueError: the method also has an offset.
        """
        if self.changes_tokens:
            raise ValueError(
                f"{type(self).__name__} has an offset that depends on the input, so its prompt alone cannot replace it"
            )
        return make_plain_prompt(self)


def make_plain_prompt(method: PromptMethod) -> PromptTuning:
    """Return prompt tuning with a copy of the current prompt of another method."""
    of: Any = method.config
    config = PromptTuningConfig(
        of.num_virtual_tokens, modules_to_save=of.modules_to_save, shared_prompt=of.shared_prompt
    )
    plain = PromptTuning(config, method.shape)
    with torch.no_grad():
        plain.prompt = nn.Parameter(method.prompt.detach().clone())
    plain.prompt_path = method.prompt_path
    return plain
