"""Find out how a model counts the positions of its tokens, and shift them by the length of a prompt or prefix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.masking_utils import find_packed_sequence_indices

from .discovery import ModuleCall, find_embedding, make_few_ids, record_calls
from .hooks import CallState, count_past, count_tokens, find_cache, name_arguments, read_parameter_names


class RowShift(NamedTuple):
    """The number of positions by which each row of a call is shifted."""

    by_row: Tensor
    """The shift per row, int ``[B, 1]``."""
    largest: int


class Positions(NamedTuple):
    """The way a model counts the positions of its tokens."""

    first: int
    """The position of the first token."""
    limit: int | None
    """The number of learned positions for tokens, or None if the model has no position table."""
    by_ids: int | None
    """The padding id if positions are computed from the ids without counting padding (RoBERTa), otherwise None."""
    by_mask: bool
    """True if positions are computed from the attention mask without counting padding (OPT)."""
    by_length: int | None
    """The longest row up to which rotary frequencies are constant, or None if they do not depend on the row length."""
    reader: nn.Module
    """The module that reads ``position_ids``: the backbone, or the text model inside it."""

    @classmethod
    def find(cls, backbone: nn.Module) -> Positions:
        """Find out how a model counts positions, without running any of its layers.

        A text model inside a backbone gets positions from the backbone. They may have several dimensions (M-RoPE) or
        begin at 1.
        """
        reader = _find_text_model(backbone)
        table = _find_position_table(reader)
        asked = [module for module in (reader, table) if module is not None and module is not backbone]

        def is_enough(calls: dict[nn.Module, ModuleCall]) -> bool:
            has_rows = table is None or (table in calls and calls[table].output is not None)
            return has_rows and all(module in calls for module in asked)

        def run(**options: Any) -> dict[nn.Module, ModuleCall]:
            return record_calls(backbone, asked, is_enough, **make_few_ids(backbone, **options))[0]

        plain, padded = (run(), run(padded=True)) if asked else ({}, {})
        first, limit, by_ids, by_mask = 0, None, None, False
        if table is not None:  # rows up to the padding row, and rows before the table's offset, are not for tokens
            padding = table.padding_idx
            first = 0 if padding is None else padding + 1
            limit = table.num_embeddings - first - int(getattr(table, "offset", 0))
            by_mask = _is_last_row_different(plain, padded, table)
            if padding is not None and _is_last_row_different(plain, run(first=padding), table):
                by_ids = padding
        handed = _read_handed_ids(plain, reader)
        if handed is not None:
            first = int(handed.min())
            moved = _read_handed_ids(padded, reader)
            by_mask = by_mask or (moved is not None and not torch.equal(handed[..., -1], moved[..., -1]))
        return cls(first, limit, by_ids, by_mask, find_frequencies_end(reader), reader)

    def move_ids(self, arguments: Mapping[str, Any], by: int | RowShift) -> Tensor:
        """Return the position ids of a call, or else the model's own, shifted ``by`` one number or a number per row.

        Raises:
            ValueError: if the positions exceed the model's position table.
        """
        shift, largest = by if isinstance(by, RowShift) else (by, by)
        tokens = arguments.get("input_ids")
        device = (arguments["inputs_embeds"] if tokens is None else tokens).device
        count = count_tokens(arguments)
        given, mask, past = arguments.get("position_ids"), arguments.get("attention_mask"), count_past(arguments)
        counted = False
        if given is not None:
            positions: Tensor = given + shift
        elif self.by_ids is not None and (ids := arguments.get("input_ids")) is not None:
            seen = ids.ne(self.by_ids).long()
            positions = (seen.cumsum(-1) + past + shift) * seen + self.by_ids
        elif self.by_mask and isinstance(mask, Tensor) and mask.ndim == 2:
            seen = mask.long()
            positions = ((seen.cumsum(1) + shift) * seen - 1)[:, -count:]
        else:
            counted = True
            positions = self.first + shift + torch.arange(past, past + count, device=device)[None]
        self.check(None if counted else positions, past + count + largest, largest)
        return positions

    def check(self, positions: Tensor | None, rows: int, shift: int) -> None:
        """Raise ValueError if the positions of a call exceed the model's position table.

        Args:
            positions: the shifted positions of all tokens. None if they simply count up to ``rows``. They are not read
                while tracing. On a GPU, they are only read if ``rows`` exceeds the table.
            rows: the length of a row, including the ``shift``.
            shift: the number of positions by which the tokens are shifted.
        """
        if self.limit is None:
            return
        if positions is not None:
            if torch.compiler.is_compiling() or (positions.device.type != "cpu" and rows <= self.limit):
                return
            rows = int(positions.max()) + 1 - self.first
        if rows > self.limit:
            raise ValueError(
                f"`input_ids` must have at most {self.limit - shift} tokens, because the adapter moves them by {shift} "
                f"positions and the model has {self.limit} positions, but has {rows - shift}. Shorten the input or use "
                "fewer virtual tokens."
            )


class _Shift(CallState):
    def __init__(self) -> None:
        self.by: int | RowShift = 0


class PositionShift:
    """Shift the positions that a model reads, whether the caller passes them or the model counts them."""

    def __init__(self, backbone: nn.Module, positions: Positions) -> None:
        self.positions = positions
        self.inside = self.positions.reader is not backbone
        self.names = read_parameter_names(self.positions.reader)
        self.shift = _Shift()

    def install(self) -> list[RemovableHandle]:
        """Register the hook on a text model inside the backbone, if there is one."""
        if not self.inside:
            return []
        return [self.positions.reader.register_forward_pre_hook(self.move, with_kwargs=True)]

    def begin(self, arguments: dict[str, Any], shift: int | RowShift) -> None:
        """Shift the positions in the arguments of a backbone call. A ``shift`` of 0 changes nothing."""
        self.shift.by = shift
        if shift != 0 and not self.inside:
            arguments["position_ids"] = self.positions.move_ids(arguments, shift)

    def end(self) -> None:
        """Shift no positions until the next call begins."""
        self.shift.by = 0

    def move(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Shift the positions of the text model, which are final here (a forward pre-hook)."""
        if self.shift.by == 0:
            return None
        arguments = name_arguments(self.names, args, kwargs)
        return (), {**arguments, "position_ids": self.positions.move_ids(arguments, self.shift.by)}


def _find_text_model(backbone: nn.Module) -> nn.Module:
    """Return the innermost model inside a backbone that holds the input embeddings and reads ``position_ids``."""
    embedding = find_embedding(backbone)
    models = (module for module in backbone.modules() if isinstance(module, PreTrainedModel))
    readers = [model for model in models if "position_ids" in read_parameter_names(model)]
    return next((m for m in reversed(readers) if any(child is embedding for child in m.modules())), backbone)


def _find_position_table(reader: nn.Module) -> nn.Embedding | None:
    """Return the table of learned positions of a text model, or None."""
    for name, module in reader.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and leaf in ("position_embeddings", "embed_positions", "wpe"):
            return module
    return None


def _read_handed_ids(calls: dict[nn.Module, ModuleCall], reader: nn.Module) -> Tensor | None:
    """Return the positions that a backbone passes to the text model inside it, or None."""
    ids: Tensor | None = calls[reader].name_arguments(reader).get("position_ids") if reader in calls else None
    return ids


def _is_last_row_different(
    plain: dict[nn.Module, ModuleCall], padded: dict[nn.Module, ModuleCall], table: nn.Embedding
) -> bool:
    """Return whether padding before a token changes the row of the table that the token gets."""
    rows = [calls[table].output for calls in (plain, padded) if table in calls]
    return (
        len(rows) == 2
        and all(isinstance(each, Tensor) for each in rows)
        and not torch.equal(rows[0][0, -1], rows[1][0, -1])
    )


def find_frequencies_end(reader: nn.Module) -> int | None:
    """Return the longest row up to which rotary frequencies do not depend on its length (LongRoPE, dynamic NTK)."""
    configs = [module.config for module in reader.modules() if isinstance(module, PreTrainedModel)]
    limits: list[int] = []
    for config in configs:
        rope = getattr(config, "rope_parameters", None)
        for each in (rope, *rope.values()) if isinstance(rope, dict) else ():
            if not isinstance(each, dict):
                continue
            kind, longest = str(each.get("rope_type", "default")), getattr(config, "max_position_embeddings", None) or 0
            if "dynamic" in kind:
                limits.append(longest)
            elif kind == "longrope" or "long_factor" in each:
                former = getattr(config, "original_max_position_embeddings", None)
                limits.append(each.get("original_max_position_embeddings") or former or longest)
    return min(limits, default=None)


def find_packed_sequences(arguments: Mapping[str, Any], backbone: Any) -> Tensor | None:
    """Return the index of the sequence that each token ``[B, N]`` of packed rows belongs to, or None for plain rows.

    The rule is the same as in ``transformers``. Without a mask and a cache, a position that does not continue the
    previous one begins another sequence. Positions with several dimensions are ``[4, B, N]``, the text positions first.
    A trace cannot read positions and always gets indices.
    """
    positions, use_cache = arguments.get("position_ids"), arguments.get("use_cache")
    cached = getattr(backbone.config, "use_cache", False) if use_cache is None else use_cache
    if backbone.training and getattr(backbone, "gradient_checkpointing", False):
        cached = False  # like transformers itself decides inside the call
    if positions is None or cached:
        return None
    if positions.ndim == 3 and len(positions) == 4:
        positions = positions[0]
    if positions.ndim != 2 or arguments.get("attention_mask") is not None or find_cache(arguments) is not None:
        return None
    return find_packed_sequence_indices(positions)


def is_packed(arguments: Mapping[str, Any], backbone: Any) -> bool:
    """Return whether the rows of a call are packed sequences. Always return False while tracing."""
    return not torch.compiler.is_compiling() and find_packed_sequences(arguments, backbone) is not None


def refuse_packed(arguments: Mapping[str, Any], backbone: Any) -> None:
    """Refuse packed sequences. Only the first sequence of a row would see the prompt or have correct positions."""
    if is_packed(arguments, backbone):
        raise ValueError(
            "`position_ids` must describe one sequence per row, but the rows are packed. A prompt in every row, an "
            "offset and a sliding window count from the beginning of a row."
        )
