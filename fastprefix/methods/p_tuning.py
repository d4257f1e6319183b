"""P-tuning (Liu et al., "GPT understands, too", arXiv 2103.10385)."""

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .base import LearningRates, check_choice, check_positive, register
from .computed_prompt import ComputedPrompt, ComputedPromptConfig


@dataclass(kw_only=True)
class PTuningConfig(ComputedPromptConfig):
    """A prompt that an encoder computes from an embedding ``E [m, d]`` in each step.

    ``E`` starts at normal(0, 1). The layers of the encoder start with PyTorch's default initialization. Inference does
    not need the encoder, only the prompt that it computes.

    Args:
        encoder: "mlp" or "lstm". "mlp" has three linear layers ``d -> h -> h -> d`` with ReLU between them. "lstm" has
            a bidirectional LSTM with hidden states of size ``h``, followed by two linear layers ``2 h -> 2 h -> d``
            with ReLU between them.
        encoder_hidden_dim: hidden size ``h``. None uses the width ``d`` of the model.
        encoder_num_layers: number of layers of the LSTM. The MLP ignores this option.
    """

    learning_rates: ClassVar[LearningRates] = LearningRates(prompt=1e-3)

    encoder: Literal["mlp", "lstm"] = "mlp"
    encoder_hidden_dim: int | None = None
    encoder_num_layers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("encoder", self.encoder, ("mlp", "lstm"))
        if self.encoder_hidden_dim is not None:
            check_positive("encoder_hidden_dim", self.encoder_hidden_dim)
        check_positive("encoder_num_layers", self.encoder_num_layers)


class PTuning(ComputedPrompt):
    """An embedding and its encoder."""

    config: PTuningConfig

    def __init__(self, config: PTuningConfig, shape: Any) -> None:
        super().__init__(config, shape)
        d = shape.width
        h = config.encoder_hidden_dim or d
        self.embedding = nn.Parameter(torch.empty(config.num_virtual_tokens, d))
        if config.encoder == "lstm":
            self.lstm = nn.LSTM(d, h, config.encoder_num_layers, bidirectional=True)
        widths: tuple[int, ...] = (2 * h, 2 * h, d) if config.encoder == "lstm" else (d, h, h, d)
        linear = [nn.Linear(*pair) for pair in itertools.pairwise(widths)]
        self.mlp = nn.Sequential(*[each for layer in linear for each in (nn.ReLU(), layer)][1:])

    def reset_parameters(self, table: Tensor, init_ids: Tensor | None) -> None:
        """Draw ``E`` from normal(0, 1), and use PyTorch's default initialization for the layers."""
        nn.init.normal_(self.embedding)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.LSTM):
                module.reset_parameters()

    def compute_prompt(self) -> Tensor:
        """Encode the embedding. The LSTM ignores autocast, because PyTorch's LSTM has no float16 on the CPU."""
        if self.config.encoder == "mlp":
            states: Tensor = self.embedding
        else:
            with torch.autocast(self.embedding.device.type, enabled=False):
                states = self.lstm(self.embedding)[0]
        prompt: Tensor = self.mlp(states)
        return prompt


register("p_tuning", PTuningConfig, PTuning)
