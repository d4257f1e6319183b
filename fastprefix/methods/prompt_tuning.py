"""Prompt tuning (Lester et al., "The power of scale for parameter-efficient prompt tuning", EMNLP 2021)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from .base import MethodConfig, PromptMethod, check_choice, check_positive, register


@dataclass(kw_only=True)
class PromptTuningConfig(MethodConfig):
    """A soft prompt ``[m, d]`` in front of the input embeddings.

    The usual length is 100 and the usual learning rate is 0.3.

    Args:
        init: initial values of the prompt. "random" draws from a normal distribution with the standard deviation of the
            embedding table. "vocab" draws entries of the embedding table without replacement. "text" uses the
            embeddings of a text's tokens, repeated to length m.
        init_text: the text for ``init="text"``.
        init_vocab_size: "vocab" draws from the first ``init_vocab_size`` entries of the embedding table. The paper uses
            5,000. None draws from all entries.
        shared_prompt: controls whether the prompt runs once for the whole batch instead of in every row. None runs it
            once if values and gradients are exactly those of running it in every row, except in training on a GPU if
            it saves too few tokens to be faster. True always runs it once and raises an error if that is not exact.
            False always runs it in every row.
    """

    kind: ClassVar[str] = "prompt"

    init: Literal["random", "vocab", "text"] = "random"
    init_text: str | None = None
    init_vocab_size: int | None = 5000
    shared_prompt: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("init", self.init, ("random", "vocab", "text"))
        check_choice("shared_prompt", self.shared_prompt, (None, True, False))
        if (self.init == "text") != (self.init_text is not None):
            raise ValueError(
                '`init_text` must be given with init="text" and only then, got '
                f"init={self.init!r} {'without' if self.init_text is None else 'with'} `init_text`"
            )
        if self.init_vocab_size is not None:
            check_positive("init_vocab_size", self.init_vocab_size)


class PromptTuning(PromptMethod):
    """A prompt whose embeddings are parameters."""

    config: PromptTuningConfig

    def reset_parameters(self, table: Tensor, init_ids: Tensor | None) -> None:
        """Initialize the prompt as specified by ``init``."""
        self._reset_prompt(self.prompt, table, init_ids)

    def _reset_prompt(self, prompt: Tensor, table: Tensor, init_ids: Tensor | None) -> None:
        with torch.no_grad():
            if self.config.init == "random":
                nn.init.normal_(prompt, std=float(table.float().std()))
            else:
                prompt.copy_(table[self._rows(init_ids).to(table.device)])

    def _rows(self, init_ids: Tensor | None) -> Tensor:
        """Return the ids ``[m]`` of the tokens whose embeddings the prompt starts from."""
        length = self.config.num_virtual_tokens
        if self.config.init == "vocab":
            choices = min(self.shape.vocabulary, self.config.init_vocab_size or self.shape.vocabulary)
            if choices < length:
                raise ValueError(
                    f'`num_virtual_tokens` must be at most {choices}, the number of embeddings that init="vocab" draws '
                    f"from, got {length}"
                )
            return torch.randperm(choices)[:length]
        if init_ids is None:
            raise ValueError('`init_ids` must be the token ids of the text for init="text", got None')
        return init_ids


register("prompt_tuning", PromptTuningConfig, PromptTuning)
