"""Run the textbook of visual prompts: rows in every image, without the kernels of this package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from ....methods import VisualMethod
from ..checking.textbook import switch_to_textbook
from ..models.attention import find_eager_attention, make_additive
from .visual_prompt import VisionStack

_NAME = "fastprefix_vision_textbook"
_BOOK = "_fastprefix_vision_textbook"


class VisionTextbook:
    """A plain model with a method's rows in every image, after the leading tokens.

    Args:
        model: a model without adapters. The textbook modifies it.
        method: the method, whose parameters are read in every call.
        stack: the layers of that model.
    """

    def __init__(self, model: PreTrainedModel, method: VisualMethod, stack: VisionStack) -> None:
        self.model = model
        self.method = method
        self.place = stack.leading
        self.tokens = 0  # tokens of an image
        self.rows = 0  # rows in the current layer
        self.image_rows = 0  # how many of them, at the end, differ by image
        self.attention: Tensor | None = None  # attention of the class token to the tokens of the image
        self.layers = {module: index for index, module in enumerate(stack.attentions)}
        switch_to_textbook(model, _NAME, self._attend_anywhere)
        for index, (block, attention) in enumerate(zip(stack.blocks, stack.attentions, strict=True)):
            setattr(attention, _BOOK, self)
            block.register_forward_pre_hook(self._make_entry(index), with_kwargs=True)
        stack.blocks[-1].register_forward_hook(self._leave)
        stack.part.register_forward_hook(self._crop)

    def __call__(self, **inputs: Any) -> Any:
        """Return the model's output."""
        return self.model(**inputs)

    def _make_entry(self, index: int) -> Any:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            former, apart = (self.rows, self.image_rows) if index else (0, 0)
            self.tokens = given.shape[1] - former
            behind = self.place + former
            plain = given[:, self.place : behind - apart]
            own: Tensor | None = given[:, behind - apart : behind] if apart else None
            rows = self.method.make_rows(index, plain if index else None, len(given))
            if self.method.reads_tokens(index):
                assert self.attention is not None
                patches = self.attention[:, self.place :].argsort(1, descending=True)
                chosen = patches[:, : self.method.config.num_attribute] + behind
                own = torch.stack([image[places] for image, places in zip(given, chosen, strict=True)])
            own = self.method.make_image_rows(index, own)
            self.image_rows = 0 if own is None else own.shape[1]
            rows = rows if own is None else torch.cat([rows, own], dim=1)
            self.rows = rows.shape[1]
            state = torch.cat([given[:, : self.place], rows.to(given), given[:, behind:]], dim=1)

            def exchange(value: Any) -> Any:
                return state if value is given else None if isinstance(value, Tensor) else value

            return tuple(map(exchange, args)), {name: exchange(value) for name, value in kwargs.items()}

        return enter

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Remove the rows after the last layer (a forward hook)."""
        states = output[0] if isinstance(output, tuple) else output
        states = self._remove_rows(states)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def _crop(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Remove the rows from the hidden states of the inner layers (a forward hook of the model)."""
        states = output.get("hidden_states") if isinstance(output, ModelOutput) else None
        if states is None:
            return output
        output["hidden_states"] = tuple(each if each is None else self._keep_tokens(each) for each in states)
        return output

    def _keep_tokens(self, states: Tensor) -> Tensor:
        """Return states ``[B, N + P, d]`` without their P rows, for any P."""
        last = states.shape[1] - (self.tokens - self.place)
        return torch.cat([states[:, : self.place], states[:, last:]], dim=1)

    def _remove_rows(self, states: Tensor) -> Tensor:
        return torch.cat([states[:, : self.place], states[:, self.place + self.rows :]], dim=1)

    @staticmethod
    def _attend_anywhere(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        book: VisionTextbook | None = getattr(module, _BOOK, None)
        mask = None if book is not None else make_additive(attention_mask, query.dtype)
        share = None if book is None else book.method.strength(book.layers[module])
        if book is None or share is None:
            eager = find_eager_attention(module)
            assert eager is not None
            return eager(module, query, key, value, mask, **kwargs)
        return book.attend_apart(query, key, value, kwargs["scaling"], share), None

    def attend_apart(self, query: Tensor, key: Tensor, value: Tensor, scale: float, share: float) -> Tensor:
        """Attend from tokens to tokens and to rows in separate softmaxes. The output of a row is its own value."""
        own = torch.zeros(key.shape[2], dtype=torch.bool)
        own[self.place : self.place + self.rows] = True
        scores = query @ key.mT * scale
        to_tokens = scores.masked_fill(own, -torch.inf).softmax(-1) @ value
        to_rows = scores.masked_fill(~own, -torch.inf).softmax(-1) @ value
        seen = scores[:, :, 0].masked_fill(own, -torch.inf).softmax(-1).mean(1)
        self.attention = torch.cat([seen[:, : self.place], seen[:, self.place + self.rows :]], dim=1)
        output = (1 - share) * to_tokens + share * to_rows
        return torch.where(own[:, None], value, output).transpose(1, 2)
