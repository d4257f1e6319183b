"""Run methods on a plain model in the slow textbook way, without the kernels and hooks of this package.

A prompt runs in every row: placeholder ids precede the caller's ids, their embeddings are replaced by the prompt, and
the mask includes them. A prefix is concatenated to the keys and values of each attention call, with the eager attention
of the model's own file. ``conformance`` compares attached methods with this implementation.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.utils.generic import ModelOutput

from .... import reference
from ....methods import PrefixMethod, PromptMethod
from ..models.attention import find_eager_attention, make_additive, make_full_mask
from ..models.discovery import Layer, find_backbone, find_embedding, find_entry, find_first_tensor
from ..models.hooks import count_tokens, find_cache, name_arguments, read_parameter_names
from ..models.switching import is_plain_text, set_attention
from ..prompts.multitask import list_task_handles

_NAME = "fastprefix_textbook"
_BOOK = "_fastprefix_textbook"


def switch_to_textbook(model: PreTrainedModel, name: str, attend: Callable[..., Any]) -> None:
    """Make a model and all models inside it run on a textbook's attention, with full masks."""
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, make_full_mask)
    set_attention(model, name)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.config._attn_implementation_internal = name


_GATES = "fastprefix_textbook_gates"
_POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe", "position_embedding")


class PromptTextbook:
    """A plain model with a prompt method in every row.

    Args:
        model: a model without adapters. The textbook changes it permanently.
        method: the method, whose parameters are read in every call.
        placeholder: the id at the places of the prompt.
    """

    def __init__(self, model: PreTrainedModel, method: PromptMethod, placeholder: int) -> None:
        self.model = model
        self.method = method
        self.placeholder = placeholder
        halves = model.config.is_encoder_decoder
        self.backbone: nn.Module = model.get_encoder() if halves else find_backbone(model)
        if halves:
            model.get_decoder().register_forward_pre_hook(self._show_prompt, with_kwargs=True)
        self.names = read_parameter_names(self.backbone)
        self.inserted = 0
        self.tokens = 0
        self.embedded = False  # True once the ids of the call in progress are embedded
        self.past = 0  # the tokens in the cache of the call in progress
        embedding: Any = (model.get_encoder() if halves else model).get_input_embeddings()
        entry = find_entry(self.backbone, embedding) if is_plain_text(model) else embedding
        self.block = None if entry is embedding else entry
        self.first = _find_first_position(model)
        self.backbone.register_forward_pre_hook(self._begin, with_kwargs=True)
        self.backbone.register_forward_hook(self._end)
        embedding.register_forward_hook(self._embed)
        list_task_handles(method, self.backbone, model)

    def __call__(self, **inputs: Any) -> Any:
        """Return the model's output for the caller's tokens."""
        return self.model(**inputs)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = name_arguments(self.names, args, kwargs)
        length = self.method.config.num_virtual_tokens
        ids, rows = arguments.get("input_ids"), arguments.get("inputs_embeds")
        given = rows if ids is None else ids
        if given is None:
            return None
        cache = None if self.model.config.is_encoder_decoder else find_cache(arguments)
        past = 0 if cache is None else int(cache.get_seq_length())
        self.inserted, self.past = (length, 0) if past == 0 else (0, past - length)
        self.tokens, self.embedded = given.shape[1], False
        mask = arguments.get("attention_mask")
        if mask is not None:
            arguments["attention_mask"] = torch.cat([mask.new_ones(len(mask), length), mask], dim=1)
        positions = arguments.get("position_ids")
        if positions is not None:
            front = torch.arange(self.inserted, device=positions.device).expand(*positions.shape[:-1], -1)
            arguments["position_ids"] = torch.cat([front + self.first, positions + length], dim=-1)
        for name, value in arguments.items():
            if name not in ("input_ids", "attention_mask", "position_ids") and _is_of_tokens(value, given):
                arguments[name] = torch.cat([value.new_zeros(len(value), self.inserted, *value.shape[2:]), value], 1)
        if rows is not None:
            arguments["inputs_embeds"] = self._change(rows)
        elif self.block is not None:
            arguments["inputs_embeds"] = self._put_prompt(self._run_block(arguments.pop("input_ids"), mask, positions))
        else:
            arguments["input_ids"] = nn.functional.pad(given, (self.inserted, 0), value=self.placeholder)
        return (), {name: value for name, value in arguments.items() if value is not None or name in kwargs}

    def _show_prompt(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let all tokens of the decoder attend to the prompt before the encoder's tokens (a forward pre-hook)."""
        arguments = name_arguments(read_parameter_names(module), args, kwargs)
        mask, states = arguments.get("encoder_attention_mask"), arguments.get("encoder_hidden_states")
        if mask is None or states is None:
            return None
        extended = nn.functional.pad(mask, (states.shape[1] - mask.shape[1], 0), value=1)
        return (), {**arguments, "encoder_attention_mask": extended}

    def _embed(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Replace the placeholders' embeddings by the prompt, and add the offset to the tokens (a forward hook)."""
        if self.embedded or self.tokens == 0 or output.ndim != 3 or output.shape[1] != self.inserted + self.tokens:
            return None
        self.embedded = True  # GPT-2 calls the embedding again with token types
        return self._change(output[:, self.inserted :])

    def _change(self, rows: Tensor) -> Tensor:
        """Return embeddings with the offset, preceded by the prompt."""
        at = torch.arange(rows.shape[0] * rows.shape[1]).view(rows.shape[:2])
        offset = self.method.offset(rows.shape[1], self.past, rows.dtype)
        return self._put_prompt(reference.prompt_embedding(at, rows.flatten(0, 1), **offset))

    def _put_prompt(self, rows: Tensor) -> Tensor:
        prompt = self.method.repeat_prompt(len(rows))[:, : self.inserted] if self.inserted else rows[:, :0]
        return torch.cat([prompt.to(rows.dtype), rows], dim=1)

    def _run_block(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        assert self.block is not None
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        inserted, self.inserted = self.inserted, 0
        try:
            names = read_parameter_names(self.block)
            output: Tensor = self.block(**{name: value for name, value in given.items() if name in names})
        finally:
            self.inserted = inserted
        return output

    def _end(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        """Remove the prompt from the output, and pool the first token instead (a forward hook of the backbone)."""
        if self.inserted == 0 or self.model.config.is_encoder_decoder:
            return None
        cropped = _crop(output, self.inserted, self.inserted + self.tokens)
        if not isinstance(getattr(module, "pooler", None), nn.Module):
            return cropped
        if not isinstance(cropped, ModelOutput):
            return cropped[0], _pool(module, cropped[0]), *cropped[2:]
        if cropped.get("pooler_output") is not None:
            cropped["pooler_output"] = _pool(module, cropped[0])
        return cropped


def _pool(module: Any, states: Tensor) -> Tensor:
    """Return the pooled output of a backbone for states. ALBERT's pooler only gets the first token."""
    pooled: Tensor
    if isinstance(module.pooler, nn.Linear):
        pooled = module.pooler_activation(module.pooler(states[:, 0]))
    else:
        pooled = module.pooler(states)
    return pooled


def _is_of_tokens(value: Any, given: Tensor) -> bool:
    is_integer = isinstance(value, Tensor) and not value.is_floating_point()
    return is_integer and value.ndim >= 2 and value.shape[:2] == given.shape[:2]


def _crop(output: Any, first: int, rows: int, states: bool = False) -> Any:
    """Return an output without the ``first`` tokens of all states that have ``rows`` tokens."""
    if isinstance(output, ModelOutput):
        for name, value in list(output.items()):
            output[name] = _crop(value, first, rows, "hidden_state" in name)
        return output
    if isinstance(output, tuple):
        return tuple(_crop(value, first, rows, states) for value in output)
    has_rows = isinstance(output, Tensor) and output.ndim >= 3 and output.shape[-2] == rows
    return output[..., first:, :] if has_rows and (states or output.ndim == 3) else output


def _find_text_part(model: PreTrainedModel) -> nn.Module:
    """Return the innermost model around the input embeddings, whose positions are only those of tokens."""
    embedding = find_embedding(model)
    parts = [m for m in model.modules() if isinstance(m, PreTrainedModel) and embedding in set(m.modules())]
    return parts[-1] if parts else model


def _find_position_tables(model: PreTrainedModel) -> list[nn.Embedding]:
    named = _find_text_part(model).named_modules()
    return [m for name, m in named if isinstance(m, nn.Embedding) and name.rpartition(".")[2] in _POSITION_TABLES]


def _find_rotary_embeddings(model: PreTrainedModel) -> list[nn.Module]:
    modules = _find_text_part(model).modules()
    return [m for m in modules if "rotary" in type(m).__name__.lower() and "position_ids" in read_parameter_names(m)]


def _find_first_position(model: PreTrainedModel) -> int:
    """Return the position that the model gives the first token of a row."""
    if not is_plain_text(model):
        return 0
    seen: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(name_arguments(read_parameter_names(module), args, kwargs)["position_ids"])

    handles = [m.register_forward_pre_hook(record, with_kwargs=True) for m in _find_rotary_embeddings(model)]
    try:
        if handles:
            with torch.no_grad():
                model(input_ids=torch.tensor([[5, 6, 7]]))
    except Exception:  # assume 0 for a model that needs more than ids
        seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    if seen:
        return int(seen[0].min())
    tables = _find_position_tables(model)
    return 0 if not tables or tables[0].padding_idx is None else tables[0].padding_idx + 1


class PrefixTextbook:
    """A plain model with a prefix method, on the eager attention function in the file of the model's class.

    Args:
        model: a model without adapters. The textbook changes it permanently.
        method: the method, whose parameters are read in every call.
        layers: the attention layers of that model, in the method's order.
    """

    def __init__(self, model: PreTrainedModel, method: PrefixMethod, layers: list[Layer]) -> None:
        self.model = model
        self.method = method
        self.layers = {layer.module: index for index, layer in enumerate(layers)}
        self.found = layers
        self.prefixes: list[tuple[Tensor, Tensor]] = []
        self.hidden: dict[int, Tensor] = {}
        self.gates: dict[int, tuple[Tensor, Tensor]] = {}  # the pooled gates, and a mask of the rows that have begun
        self.padding: dict[str, Tensor | None] = {}
        self.past = self.tokens = 0
        self.counts = True  # the model counts the positions of the call itself
        self.shift = method.position_shift()
        switch_to_textbook(model, _NAME, self._attend_anywhere)
        for layer in layers:
            match = re.match(r"(.*\.\d+)(\.|$)", layer.name)
            if method.needs_hidden() and match is not None:
                entered = model.get_submodule(match.group(1))
                entered.register_forward_pre_hook(self._make_recorder(self.layers[layer.module]), with_kwargs=True)
            setattr(layer.module, _BOOK, self)
        model.base_model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.base_model.register_forward_hook(self._end)
        if model.config.is_encoder_decoder:
            model.get_encoder().register_forward_pre_hook(self._begin_encoder, with_kwargs=True)
        if self.shift:
            self._move_positions()

    def __call__(self, **inputs: Any) -> Any:
        """Return the model's output."""
        return self.model(**inputs)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the padding and the cache of a call (a forward pre-hook of the backbone)."""
        inputs = name_arguments(read_parameter_names(module), args, kwargs)
        mask, cache = inputs.get("attention_mask"), find_cache(inputs)
        self.past = 0 if cache is None else int(cache.get_seq_length())
        self.tokens = count_tokens(inputs)
        self.counts = inputs.get("position_ids") is None
        self.padding = {"encoder": mask, "decoder": mask}
        if self.model.config.is_encoder_decoder:
            self.padding["decoder"] = inputs.get("decoder_attention_mask")
        self.gates = dict(getattr(cache, _GATES, {})) if self.past else {}
        self.prefixes = [] if self.method.projected_states(0) is not None else self.method.prefixes()

    def _begin_encoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Reset the state for an encoder, which ``generate`` calls directly (a forward pre-hook)."""
        mask = name_arguments(read_parameter_names(module), args, kwargs).get("attention_mask")
        self.gates = {}
        self.padding = {"encoder": mask, "decoder": None}
        self.prefixes = [] if self.method.projected_states(0) is not None else self.method.prefixes()

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Store the gates of the sequences on the cache (a forward hook of the backbone)."""
        cache = find_cache(output)
        if self.gates and cache is not None:
            setattr(cache, _GATES, self.gates)

    def _move_positions(self) -> None:
        """Shift all position tables and rotary embeddings by the length of the prefix."""
        with torch.no_grad():
            for table in _find_position_tables(self.model):
                if table.padding_idx is not None:
                    table.register_forward_pre_hook(self._move_rows)
                else:
                    table.weight[: -self.shift] = table.weight[self.shift :].clone()
        for module in _find_rotary_embeddings(self.model):
            module.register_forward_pre_hook(self._move, with_kwargs=True)

    def _move_rows(self, table: Any, args: tuple[Any, ...]) -> Any:
        """Shift the rows of a table, except for the row of padding if the model counts the positions itself."""
        padding = args[0] == table.padding_idx if self.counts else torch.zeros_like(args[0], dtype=torch.bool)
        return (torch.where(padding, args[0], args[0] + self.shift), *args[1:])

    def _move(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = name_arguments(read_parameter_names(module), args, kwargs)
        return (), {**arguments, "position_ids": arguments["position_ids"] + self.shift}

    def _make_recorder(self, index: int) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = find_first_tensor(args, kwargs)
            assert hidden is not None
            self.hidden[index] = hidden

        return record

    @staticmethod
    def _attend_anywhere(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        mask = make_additive(attention_mask, query.dtype)
        if mask is not None:
            mask = mask[..., : key.shape[2]]
        book: PrefixTextbook | None = getattr(module, _BOOK, None)
        if book is None:
            return (find_eager_attention(module) or _attend_plainly)(module, query, key, value, mask, **kwargs)
        return book.attend(module, query, key, value, mask, kwargs)

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> Any:
        """Attend to the prefix and the tokens in one softmax, or in two if the method has an output gate."""
        index = self.layers[module]
        pk, pv = (tensor.to(query).expand(len(query), -1, -1, -1) for tensor in self._find_prefix(module, index))
        gate, output_gate = self._compute_gate(index, query), self.method.output_gate(index)
        if output_gate is not None:
            output = (find_eager_attention(module) or _attend_plainly)(module, query, key, value, mask, **kwargs)[0]
            own = self._attend_to_prefix(index, query, pk, pv, gate, kwargs) * output_gate.to(query)[:, None, None]
            return output + own.transpose(1, 2), None
        if gate is None or gate.ndim < 4:
            if gate is not None:
                pk, pv = (tensor * gate.unsqueeze(-1) for tensor in (pk, pv))
            return self._attend_jointly(module, query, key, value, mask, kwargs, pk, pv, slice(None))
        rows = []
        for i in range(query.shape[2]):  # every query has its own gates
            own = gate[:, :, i].unsqueeze(-1)
            row = slice(i, i + 1)
            rows.append(self._attend_jointly(module, query, key, value, mask, kwargs, pk * own, pv * own, row)[0])
        return torch.cat(rows, dim=1), None

    def _attend_jointly(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        kwargs: dict[str, Any],
        pk: Tensor,
        pv: Tensor,
        rows: slice,
    ) -> Any:
        """Attend from the queries in ``rows`` to the prefix and the tokens in one softmax."""
        columns = (pk.shape[2], 0)
        window = self.found[self.layers[module]].window if self.shift else None
        if mask is None and window is not None:
            mask = query.new_zeros(1, 1, query.shape[2], key.shape[2])
        key_bias = self.method.key_bias(self.layers[module])
        if mask is None and key_bias is not None:
            mask = query.new_zeros(1, 1, query.shape[2], key.shape[2])
        if mask is not None:
            mask = nn.functional.pad(mask, columns)
            if (hidden := self._find_hidden(self.layers[module], query)) is not None:
                mask = mask.masked_fill(nn.functional.pad(hidden, (0, key.shape[2])), torch.finfo(mask.dtype).min)
            if key_bias is not None:
                own = key_bias.to(mask).repeat_interleave(query.shape[1] // key.shape[1], 0)[None, :, None]
                mask = mask + nn.functional.pad(own, (0, key.shape[2]))
            mask = mask[:, :, rows]
        bias = kwargs.get("position_bias")
        if isinstance(bias, Tensor):
            kwargs = {**kwargs, "position_bias": nn.functional.pad(bias[..., : key.shape[2]], columns)[:, :, rows]}
        key, value = torch.cat([pk, key], dim=2), torch.cat([pv, value], dim=2)
        return (find_eager_attention(module) or _attend_plainly)(module, query[:, :, rows], key, value, mask, **kwargs)

    def _find_hidden(self, index: int, query: Tensor) -> Tensor | None:
        """Return a bool mask ``[N, m]`` of the prefix keys that a sliding window hides from each query, or None."""
        window = self.found[index].window if self.shift else None
        if window is None:
            return None
        first = self.past + max(self.tokens - query.shape[2], 0)  # some layers get only the last queries
        ahead = torch.arange(query.shape[2])[:, None] + first + self.shift - torch.arange(self.shift)
        return ahead >= window

    def _attend_to_prefix(
        self, index: int, query: Tensor, pk: Tensor, pv: Tensor, gate: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor:
        """Attend to the prefix alone, ``[B, H, N, Dv]``. A query gets 0 if a window hides the whole prefix from it."""
        groups = query.shape[1] // pk.shape[1]
        pk, pv = pk.repeat_interleave(groups, 1), pv.repeat_interleave(groups, 1)
        weights = query.new_ones(1) if gate is None else gate.to(query)
        weights = weights if weights.ndim == 4 else weights.unsqueeze(-2)
        scale = kwargs.get("scaling")
        scores = query @ pk.mT * weights * (query.shape[-1] ** -0.5 if scale is None else scale)
        if (cap := kwargs.get("softcap")) is not None:
            scores = cap * torch.tanh(scores / cap)
        if (bias := self.method.key_bias(index)) is not None:
            scores = scores + bias.to(query).repeat_interleave(groups, 0)[:, None]
        if (hidden := self._find_hidden(index, query)) is None:
            hidden = torch.zeros(1, 1, dtype=torch.bool)
        everything = hidden.all(-1, keepdim=True)
        scores = scores.masked_fill(hidden & ~everything, -torch.inf)
        output: Tensor = (scores.softmax(-1).masked_fill(everything, 0.0) * weights) @ pv
        return output

    def _find_prefix(self, module: nn.Module, index: int) -> tuple[Tensor, Tensor]:
        states = self.method.projected_states(index)
        if states is None:
            return self.prefixes[index]
        size = self.found[index].shape
        names = (("k_proj", "v_proj"), ("key", "value"), ("k_lin", "v_lin"), ("k", "v"))
        known = [pair for pair in names if all(isinstance(getattr(module, n, None), nn.Module) for n in pair)]
        if not known:
            raise NotImplementedError(
                f"The textbook does not know the names of the projections in {type(module).__name__}."
            )
        key, value = (getattr(module, name)(states.to(next(module.parameters()))) for name in known[0])
        key = key.unflatten(-1, (size.kv_heads, size.key_size))
        norm = getattr(module, "k_norm", None)
        key = norm(key) if isinstance(norm, nn.Module) else key
        return key.transpose(0, 1), value.unflatten(-1, (size.kv_heads, size.value_size)).transpose(0, 1)

    def _compute_gate(self, index: int, query: Tensor) -> Tensor | None:
        """Return the prefix gate, broadcastable to ``[B, Hkv, m]`` or ``[B, Hq, N, m]``."""
        attended = self.padding["encoder" if self.found[index].shape.role == "encoder" else "decoder"]
        hidden = self.hidden.get(index)
        if attended is not None and hidden is not None:
            attended = attended[:, -hidden.shape[1] :].bool()
        gate = self.method.prefix_gate(index, hidden, attended)
        if gate is None:
            return None
        if gate.ndim == 3 and self.method.needs_hidden():
            begun = torch.ones(len(gate), dtype=torch.bool) if attended is None else attended.any(dim=1)
            if index in self.gates:  # the gates of rows that had begun in an earlier call
                held, former = self.gates[index]
                gate, begun = torch.where(former[:, None, None], held, gate), begun | former
            self.gates[index] = gate, begun
        gate = gate.to(query)
        return gate if gate.ndim >= 3 else gate.reshape((1,) * (3 - gate.ndim) + gate.shape)


def _attend_plainly(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: Any = None, **_: Any
) -> tuple[Tensor, None]:
    """Attend in the standard way, for a module without an eager attention in its file."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores if mask is None else scores + mask
    return (scores.softmax(-1) @ value).transpose(1, 2), None
