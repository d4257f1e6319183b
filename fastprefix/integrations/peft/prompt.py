"""PEFT's prompts on a decoder, run once for the whole batch; ``shared_prompt`` says why that is exact."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..transformers.attention import CARRIED, GivenPrefix, Prefix
from ..transformers.discovery import Layer
from ..transformers.hooks import by_name, find_cache, not_checkpointed, reentrant
from ..transformers.positions import Positions
from ..transformers.prefix import PrefixCache
from ..transformers.shared_prompt import has_dropout, reaching
from .prefix import CachedPrefix


class PromptAcceleration(CachedPrefix):
    """PEFT goes on putting the prompt before every row; the backbone takes it off again and runs it once.

    PEFT asks for its prompt in ``get_prompt`` and then calls the model. What it gets is a placeholder without gradient,
    and the prompt itself waits for the call of the backbone. ``layers`` are the attention layers.
    """

    def __init__(self, peft_model: Any, layers: list[Layer]) -> None:
        super().__init__(peft_model.base_model)
        self.layers = layers
        self.peft_model = peft_model
        self.drops = has_dropout(self.backbone)
        self.positions = Positions.of(self.backbone)
        self.calling = False  # PEFT's forward or generate is in progress, and nobody else asks for the prompt
        self.prompt: Tensor | None = None  # [1, m, d], waiting for the call of the backbone
        self.ran: Any = None  # the prompt's run, waiting for that call's end
        self.handles += [
            peft_model.register_forward_pre_hook(self.open_call),
            peft_model.register_forward_hook(self.close_call, always_call=True),
            self.backbone.register_forward_hook(self.restore_prompt, always_call=True),
        ]
        peft_model.get_prompt = self.get_prompt
        if hasattr(peft_model, "generate"):
            peft_model.generate = self.generate

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Tensor:
        """The prompt in every row, as PEFT has it; in PEFT's own calls a placeholder for it."""
        peft_model = self.peft_model
        get_prompt = functools.partial(type(peft_model).get_prompt, peft_model)
        if not self.calling:
            every_row: Tensor = get_prompt(batch_size, task_ids)
            return every_row
        prompt: Tensor = get_prompt(1, task_ids)
        self.prompt = prompt
        return prompt.detach().expand(batch_size, -1, -1)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the backbone: run the prompt once, then the tokens after it."""
        prompt, self.prompt = self.prompt, None
        if prompt is None:
            return super().begin(module, args, kwargs)
        arguments = by_name(self.names, args, kwargs)
        embeds = arguments["inputs_embeds"]
        prompt, tokens = prompt.to(embeds), embeds[:, prompt.shape[1] :]
        if self._shares(arguments):
            self.ran, cache = self._run(prompt, arguments)
            arguments["inputs_embeds"] = tokens
            arguments[self.cache_name] = cache
            types = arguments.get("token_type_ids")
            if types is not None:
                arguments["token_type_ids"] = types[:, prompt.shape[1] :]
        else:
            arguments["inputs_embeds"] = torch.cat([prompt.expand(embeds.shape[0], -1, -1), tokens], dim=1)
        return super().begin(module, (), arguments)

    def restore_prompt(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the backbone: the prompt's hidden states before every row's, for PEFT's heads and labels."""
        ran, self.ran = self.ran, None
        if ran is None or output is None:
            return output
        if isinstance(output, tuple):
            return (_before(ran.last_hidden_state, output[0]), *output[1:])
        output.last_hidden_state = _before(ran.last_hidden_state, output.last_hidden_state)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(map(_before, ran.hidden_states, output.hidden_states))
        return output

    def open_call(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the PEFT model."""
        self.calling = True

    def close_call(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the PEFT model, called whatever happened."""
        lost = output is not None and self.prompt is not None
        self.calling, self.prompt = False, None
        if lost:
            raise RuntimeError(f"{type(self.peft_model.base_model).__name__} did not call its decoder with the prompt")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's ``generate``."""
        self.calling = True
        try:
            return type(self.peft_model).generate(self.peft_model, *args, **kwargs)
        finally:
            self.calling, self.prompt = False, None

    def remove(self) -> None:
        """Take everything back."""
        super().remove()
        del self.peft_model.get_prompt
        self.peft_model.__dict__.pop("generate", None)

    def __getstate__(self) -> dict[str, Any]:
        """What lives only while a model runs is not copied or pickled."""
        return {**self.__dict__, "calling": False, "prompt": None, "ran": None}

    def _shares(self, arguments: dict[str, Any]) -> bool:
        """Whether the prompt can run once in this call."""
        cache, mask = find_cache(arguments), arguments.get("attention_mask")
        drops = self.drops and self.backbone.training  # anew in every row
        counted = getattr(self.backbone.config, "output_router_logits", False) or arguments.get("output_router_logits")
        plain = mask is None or mask.ndim == 2
        filled = cache is not None and cache.get_seq_length() > 0
        return plain and not (drops or counted or filled or reentrant(self.backbone))

    def _run(self, prompt: Tensor, arguments: dict[str, Any]) -> tuple[Any, PrefixCache]:
        """What the model makes of the prompt ``[1, m, d]``, and its keys and values in every layer."""
        seen = {layer.module: _Seen() for layer in self.layers}
        states = arguments.get("output_hidden_states")
        length, options = prompt.shape[1], {}
        if self.positions.by_length is not None:
            positions = self.positions.moved(arguments, 0)
            prompt, options["position_ids"] = reaching(prompt, positions[..., :1, :length], positions.amax())
        with not_checkpointed(self.backbone):
            ran = self.backbone.forward(
                inputs_embeds=prompt,
                use_cache=False,
                output_hidden_states=states,
                return_dict=True,
                **options,
                **{CARRIED: seen},
            )
        ran.last_hidden_state = ran.last_hidden_state[:, :length]
        if states:
            ran.hidden_states = tuple(state[:, :length] for state in ran.hidden_states)
        prefixes = {}
        for layer in self.layers:
            key, value = seen[layer.module].pair
            prefixes[layer.module] = GivenPrefix(key[:, :length], value[:, :length], window=layer.window)
        return ran, PrefixCache(len(self.layers), length, prefixes)


class _Seen:
    """A binding that gives no prefix, and keeps what the attention is called with."""

    pair: Prefix

    def prefix(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """None; the keys and values of the one row are kept."""
        self.pair = key[0], value[0]

    def gates(self, query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[None, None]:
        """None: there is no prefix."""
        return None, None

    def bias(self, query: Tensor) -> None:
        """None: there is no prefix."""


def _before(prompt: Tensor, tokens: Tensor) -> Tensor:
    """``[1, m, d]`` before ``[B, N, d]``."""
    return torch.cat([prompt.expand(tokens.shape[0], -1, -1), tokens], dim=1)
