"""Compute the initial keys and values of a prefix from a text, from chunks of a text, or from a key/value cache.

A decoder processes a long text in pieces with a key/value cache. It needs memory for the cache and for one piece only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from ....methods import AttentionShape, CartridgeConfig
from ..models.attention import MASKS, Prefix, run_attention
from ..models.discovery import Layer, find_layers
from ..models.hooks import find_cache_parameter, read_parameter_names
from ..models.positions import find_frequencies_end
from ..models.switching import borrow_attention, find_device, find_runnable, is_plain_text, run_trial
from ..sharding.tensor_parallel import TensorParallelHeads

PIECE = 512
"""The number of tokens of a long text that are processed per forward pass."""
_NAME = "fastprefix_pieces"


@dataclass(frozen=True)
class PrefixState:
    """A prefix in memory.

    Args:
        pairs: the keys ``[Hkv, m, D]`` and values ``[Hkv, m, Dv]`` of each layer.
        biases: the biases ``[Hkv, m]`` of the keys of each layer, or None.
        prefix_position: the prefix's option of that name, or None if it is unknown.
        position_shift: the prefix's option of that name, or None for its length.
    """

    pairs: list[Prefix]
    biases: list[Tensor] | None = None
    prefix_position: str | None = None
    position_shift: int | None = None

    @property
    def length(self) -> int:
        """Return the number of tokens."""
        return int(self.pairs[0][0].shape[1])

    @property
    def shift(self) -> int:
        """Return the number of positions by which the prefix moves the tokens."""
        if self.prefix_position != "shift":
            return 0
        return self.length if self.position_shift is None else self.position_shift

    def check_shapes(self, name: str, shapes: Sequence[AttentionShape]) -> None:
        """Check that the prefix fits these attention layers, with the same number of tokens in each.

        Args:
            name: the argument that an error message names.
            shapes: the shapes of the attention layers.

        Raises:
            ValueError: if the number of layers or the shape of a key, a value or a bias differs.
        """
        tokens = next((key.shape[1] for key, _ in self.pairs if key.ndim == 3), 0)
        expected = [((s.kv_heads, tokens, s.key_size), (s.kv_heads, tokens, s.value_size)) for s in shapes]
        found = [tuple(tuple(tensor.shape) for tensor in pair) for pair in self.pairs]
        if found != expected:
            raise ValueError(f"`{name}` must have keys and values {expected} in its layers, but has {found}.")
        of_biases = [(s.kv_heads, tokens) for s in shapes]
        if self.biases is not None and (given := [tuple(bias.shape) for bias in self.biases]) != of_biases:
            raise ValueError(f"`{name}` must have key biases {of_biases} in its layers, but has {given}.")

    def pin_memory(self) -> PrefixState:
        """Return a copy in page-locked memory, which copies to a GPU fastest."""
        pairs = [(key.pin_memory(), value.pin_memory()) for key, value in self.pairs]
        biases = None if self.biases is None else [bias.pin_memory() for bias in self.biases]
        return replace(self, pairs=pairs, biases=biases)


PrefixSource = str | os.PathLike[str] | PrefixState
"""A file or directory of an adapter, or a prefix in memory."""


def make_initial_prefix(
    model: PreTrainedModel, config: Any, layers: list[Layer], tokenizer: Any, past_key_values: Any
) -> PrefixState | None:
    """Return the initial keys and values of a prefix, or None if it starts from neither a text nor a cache.

    Raises:
        ValueError: if the text or the cache does not fit the model or the options.
    """
    if getattr(config, "init", None) == "cache":
        return read_cache(model, config, layers, past_key_values)
    ids = tokenize_text(model, config, tokenizer)
    if ids is None:
        return None
    pairs, heads = compute_keys_values(model, ids, layers), TensorParallelHeads.find(model, layers)
    if heads is not None:
        pairs = [heads.gather_prefix(pair, index) for index, pair in enumerate(pairs)]
    return PrefixState(pairs)


def check_cache_given(config: Any, past_key_values: Any) -> None:
    """Check that ``past_key_values`` is given if and only if ``init`` is "cache"."""
    wanted = getattr(config, "init", None) == "cache"
    if wanted and past_key_values is None:
        raise ValueError('`past_key_values` must be a key/value cache for init="cache", but is None.')
    if past_key_values is not None and not wanted:
        raise ValueError(
            f'`past_key_values` must be None unless init="cache", but {type(config).__name__} has '
            f"init={getattr(config, 'init', None)!r}."
        )


def tokenize_text(model: PreTrainedModel, config: Any, tokenizer: Any) -> Tensor | None:
    """Return the token ids ``[m]`` of the text that a method starts from, or None without a text.

    The ids are the first m tokens of the text, or of chunks of it. A text that is too short is repeated.

    Raises:
        TypeError: if the text is not a string, or the tokenizer is not a tokenizer.
        ValueError: if the text is empty, is the path of a file, or is too short for a cartridge, if no tokenizer is
            known, or if its ids are too large for the model.
    """
    if config.init_text is None:
        return None
    if not isinstance(config.init_text, str):
        raise TypeError(f"`init_text` must be the text as a string, got {type(config.init_text).__name__}.")
    if tokenizer is not None and not callable(tokenizer):
        raise TypeError(f"`tokenizer` must be a tokenizer, got {tokenizer!r}. Load it with AutoTokenizer.")
    if os.path.isfile(config.init_text):  # noqa: PTH113 (Path.is_file raises errors for texts that cannot be paths)
        raise ValueError(
            f"`init_text` must be the text itself, but is the path of a file. Pass "
            f"Path({config.init_text!r}).read_text()."
        )
    if tokenizer is None:
        if not model.name_or_path:
            raise ValueError(
                "`tokenizer` must be given with `init_text`, since the model has no name or path to load it from."
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
        except Exception as error:  # files and the Hub raise different errors
            raise ValueError(
                f"`tokenizer` must be given with `init_text`, since none can be loaded from '{model.name_or_path}': "
                f"{error}"
            ) from error
    special = bool(getattr(config, "add_special_tokens", False))
    ids = tokenizer(config.init_text, add_special_tokens=special)["input_ids"]
    if not ids:
        raise ValueError(f"`init_text` must have at least one token, but is {config.init_text!r}.")
    length, known = config.num_virtual_tokens, getattr(model.get_input_embeddings(), "num_embeddings", None)
    if known is not None and max(ids) >= known:
        raise ValueError(
            f"`tokenizer` must be the tokenizer of `model`, which has {known} tokens, but it returns the id {max(ids)}."
        )
    if len(ids) < length and isinstance(config, CartridgeConfig):
        raise ValueError(
            f"`num_virtual_tokens` of a cartridge must be at most the number of tokens of `init_text`, which is "
            f"{len(ids)}, but is {length}."
        )
    if config.init == "chunks":
        ids = _select_chunks(ids, length, config.chunk_tokens)
    return torch.tensor((ids * -(-length // len(ids)))[:length])


def _select_chunks(ids: list[int], length: int, size: int) -> list[int]:
    """Return ``length`` ids in chunks of ``size``, whose starts are spaced evenly over a text from its first token.

    A text of at most ``length`` tokens is returned unchanged.
    """
    if len(ids) <= length:
        return ids
    sizes = [min(size, length - start) for start in range(0, length, size)]
    last = len(ids) - sizes[-1]  # start of the last chunk
    starts = [round(last * i / max(len(sizes) - 1, 1)) for i in range(len(sizes))]
    return [each for start, count in zip(starts, sizes, strict=True) for each in ids[start : start + count]]


def compute_keys_values(model: PreTrainedModel, input_ids: Tensor, layers: list[Layer]) -> list[Prefix]:
    """Compute the keys ``[Hkv, m, D]`` and values ``[Hkv, m, Dv]`` of token ids ``[m]`` in layers of a model."""
    if len(input_ids) > PIECE and _runs_in_pieces(model, layers, len(input_ids)):
        pieces = _run_in_pieces(model, input_ids)
        if all(layer.module in pieces and pieces[layer.module][0].shape[1] == len(input_ids) for layer in layers):
            return [pieces[layer.module] for layer in layers]
    found = {layer.module: layer for layer in find_layers(model, input_ids[None])}
    return [(found[layer.module].key[0], found[layer.module].value[0]) for layer in layers]


def _runs_in_pieces(model: PreTrainedModel, layers: list[Layer], length: int) -> bool:
    """Return whether the keys and values of a text are the same when several calls compute them piece by piece."""
    if not is_plain_text(model) or not all(layer.shape.causal for layer in layers):
        return False
    end = find_frequencies_end(model)
    if end is not None and length > end:
        return False
    runnable = find_runnable(model)
    return _has_only_attention(runnable) and find_cache_parameter(read_parameter_names(runnable)) is not None


_PLAIN_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
"""The classes of a cache's layers with keys and values of the tokens alone, or with those of another layer."""


def _has_only_attention(model: Any) -> bool:
    """Return whether all layers of a model's cache hold keys and values. Convolutions, for example, hold states."""
    try:
        layers = DynamicCache(config=model.config).layers
    except (AttributeError, KeyError, TypeError, ValueError):  # a configuration that describes no such cache
        return False
    return all(type(layer).__name__ in _PLAIN_LAYERS for layer in layers)


def _run_in_pieces(model: PreTrainedModel, input_ids: Tensor) -> dict[nn.Module, Prefix]:
    """Run ids ``[m]`` in pieces, and return each attention module's keys and values, which share the cache's memory."""
    seen: dict[nn.Module, Prefix] = {}

    def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        seen[module] = key[0], value[0]
        return run_attention(module, query, key, value, mask, **kwargs)

    runnable = find_runnable(model)
    name = str(find_cache_parameter(read_parameter_names(runnable)))
    attention = run_trial(model).attention
    cache = DynamicCache()  # no configuration: with one, layers with a window would keep only the window
    with borrow_attention(model, _NAME, record, MASKS[attention]):
        for piece in input_ids.to(find_device(model)).split(PIECE):
            runnable(input_ids=piece[None], use_cache=True, **{name: cache})
    return seen


def read_cache(model: PreTrainedModel, config: Any, layers: list[Layer], past_key_values: Any) -> PrefixState:
    """Read the keys, values and biases of a cache for layers of a model.

    Args:
        model: the model of the layers.
        config: the method's options. ``num_virtual_tokens`` must equal the length of the cache, or with
            ``key_bias=True`` be at least as large.
        layers: the attention layers that get a prefix.
        past_key_values: a ``transformers`` cache, or a sequence with one entry per layer. An entry is (key, value), or
            with biases (key, value, bias) or (key, bias, value), the order of Attention Matching. Keys and values are
            ``[1, Hkv, t, D]`` or ``[Hkv, t, D]``. Biases lack the last dimension.

    Raises:
        TypeError: if ``past_key_values`` is neither.
        ValueError: if it does not fit the layers or the options.
    """
    entries = _list_entries(past_key_values)
    modules = [layer.module for layer in layers]
    indices: list[Any] = [getattr(module, "layer_idx", None) for module in modules]
    if not all(isinstance(index, int) for index in indices):
        raise ValueError(
            f"`model` must have numbered attention layers to read a cache, but {type(model).__name__} does not."
        )
    sources = find_shared_sources(model, indices)
    heads = TensorParallelHeads.find(model, layers)
    pairs: list[Prefix] = []
    biases, has_biases = [], False
    for index, layer in zip(indices, layers, strict=True):
        place = sources.get(index, index)
        if place >= len(entries):
            raise ValueError(
                f"`past_key_values` must have an entry for each of the {len(layers)} layers, but has {len(entries)}."
            )
        entry = entries[place] if heads is None else heads.gather_entry(entries[place], len(pairs))
        key, value, bias = _check_entry(entry, layer, place, config.num_virtual_tokens)
        missing = config.num_virtual_tokens - key.shape[1]
        if missing and not config.key_bias:
            raise ValueError(
                f"`num_virtual_tokens` must be the length of the cache, which is {key.shape[1]} in layer {place}, but "
                f"is {config.num_virtual_tokens}. With key_bias=True, shorter layers are padded with masked keys."
            )
        bias = key.new_zeros(key.shape[:2]) if bias is None else bias
        has_biases = has_biases or bool(bias.any()) or missing > 0
        pairs.append((F.pad(key, (0, 0, 0, missing)), F.pad(value, (0, 0, 0, missing))))
        biases.append(F.pad(bias, (0, missing), value=-torch.inf))
    if has_biases and not config.key_bias:
        raise ValueError("`key_bias` must be True for a cache with key biases, but is False.")
    return PrefixState(pairs, biases if config.key_bias else None)


def _list_entries(cache: Any) -> list[Any]:
    """Return (key, value, bias) of each entry of a cache."""
    if isinstance(cache, Cache):
        return [_read_layer(layer, place) for place, layer in enumerate(cache.layers)]
    wrong = TypeError(
        "`past_key_values` must be a transformers Cache or a sequence of (key, value) or (key, value, bias), but "
        f"is {type(cache).__name__}."
    )
    if not isinstance(cache, Sequence):
        raise wrong
    entries = []
    for entry in cache:
        if not isinstance(entry, Sequence) or len(entry) not in (2, 3) or not all(map(torch.is_tensor, entry)):
            raise wrong
        most = max(tensor.ndim for tensor in entry)
        biases = [tensor for tensor in entry if tensor.ndim < most]
        pair = [tensor for tensor in entry if tensor.ndim == most]
        if len(pair) != 2:
            raise ValueError(
                f"`past_key_values` must have keys and values of the same rank and biases of one rank less, but has "
                f"shapes {[tuple(tensor.shape) for tensor in entry]}."
            )
        entries.append((pair[0], pair[1], biases[0] if biases else None))
    return entries


def _read_layer(layer: Any, place: int) -> tuple[Any, Any, Any]:
    """Return (key, value, bias) of a layer of a cache, without the unfilled rows of a static cache.

    Raises:
        ValueError: if the layer does not hold the keys of all its tokens.
    """
    key, value, bias = (getattr(layer, name, None) for name in ("keys", "values", "beta"))
    if isinstance(key, Tensor) and isinstance(value, Tensor):
        filled = int(layer.get_seq_length())
        if filled > key.shape[-2]:
            raise ValueError(
                f"`past_key_values` must hold the keys of all tokens, but layer {place} holds {key.shape[-2]} of "
                f"{filled}. Caches with sliding windows, quantized caches and those after a prefix do not. Fill a "
                "DynamicCache() that is created without a configuration."
            )
        if getattr(layer, "is_compileable", False):
            key, value = key[..., :filled, :], value[..., :filled, :]
    return key, value, bias


def _check_entry(
    entry: tuple[Tensor, Tensor, Tensor | None], layer: Layer, place: int, longest: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return an entry without its batch dimension after checking that it fits a layer."""
    key, value, bias = entry
    if not isinstance(key, Tensor) or not isinstance(value, Tensor):
        raise ValueError(f"`past_key_values` must be a filled cache, but has no keys for layer {place}.")
    shape = layer.whole_shape
    length = key.shape[-2]
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "keys": (key, (length, shape.key_size)),
        "values": (value, (length, shape.value_size)),
    }
    if bias is not None:
        expected["biases"] = bias, (length,)
    for name, (tensor, ends) in expected.items():
        full = (shape.kv_heads, *ends)
        if tuple(tensor.shape) not in (full, (1, *full)):
            raise ValueError(
                f"`past_key_values` must have {name} {[1, *full]} in layer {place}, but has {list(tensor.shape)}."
            )
    if length > longest:
        raise ValueError(
            f"`num_virtual_tokens` must be the length of the cache, {length} in layer {place}, but is {longest}."
        )
    key, value = key.reshape(shape.kv_heads, length, -1), value.reshape(shape.kv_heads, length, -1)
    return key, value, None if bias is None else bias.reshape(shape.kv_heads, length).to(key)


def find_shared_sources(model: PreTrainedModel, indices: Iterable[int]) -> dict[int, int]:
    """Map each layer that stores nothing in a cache to the layer whose keys and values it reads.

    The source is the last layer of the same type that stores its own keys and values.
    """
    config: Any = model.config.get_text_config(decoder=True)
    kept = config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", None) or 0)
    types = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    return {
        index: max(source for source in range(kept) if types[source] == types[index])
        for index in indices
        if index >= kept
    }
