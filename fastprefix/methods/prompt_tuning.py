"""Prompt tuning (Lester et al., "The power of scale for parameter-efficient prompt tuning", EMNLP 2021)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from .base import MethodConfig, PromptMethod, check_choice, check_positive, register


@dataclass(kw_only=True)
class PromptTuningConfig(MethodConfig):
    """A soft prompt ``[m, d]`` before the embeddings. The usual length is 100, the usual learning rate 0.3.

    Args:
        init: "random", normal with the table's own standard deviation; "vocab", rows of the table drawn without
            replacement; "text", the rows of a text's tokens, repeated to m.
        init_text: the text, for ``init="text"``.
        init_vocab_size: "vocab" draws from that many first rows, 5,000 in the paper; None: from all.
        shared_prompt: whether the prompt runs once for the whole batch, with the values and gradients of the textbook's
            path, which runs it in every row. None: where that is exact; True: or else an error; False: no.
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
            raise ValueError(f'init_text goes with init="text", got init={self.init!r}, init_text={self.init_text!r}')
        if self.init_vocab_size is not None:
            check_positive("init_vocab_size", self.init_vocab_size)


class PromptTuning(PromptMethod):
    """The prompt, and nothing else."""

    config: PromptTuningConfig

    def reset_parameters(self, table: Tensor, init_ids: Tensor | None) -> None:
        """Initialise the prompt as ``init`` says."""
        self._reset_prompt(self.prompt, table, init_ids)

    def _reset_prompt(self, prompt: Tensor, table: Tensor, init_ids: Tensor | None) -> None:
        with torch.no_grad():
            if self.config.init == "random":
                nn.init.normal_(prompt, std=float(table.float().std()))
            else:
                prompt.copy_(table[self._rows(init_ids).to(table.device)])

    def _rows(self, init_ids: Tensor | None) -> Tensor:
        """Which rows of the table the prompt starts from."""
        length = self.config.num_virtual_tokens
        if self.config.init == "vocab":
            choices = min(self.shape.vocabulary, self.config.init_vocab_size or self.shape.vocabulary)
            if choices < length:
                raise ValueError(f'init="vocab" draws {length} different rows, and there are only {choices}')
            return torch.randperm(choices)[:length]
        if init_ids is None:
            raise ValueError('init="text" takes the token ids of the text')
        return init_ids


register("prompt_tuning", PromptTuningConfig, PromptTuning)
