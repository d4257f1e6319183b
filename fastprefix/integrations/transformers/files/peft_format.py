"""Read and write adapters in PEFT's format, without PEFT.

PEFT passes a prefix as a key/value cache, which corresponds to ``prefix_position="shift"``. PEFT does not save the
module that computes a prefix or a prompt (a projection, the network of P-tuning). An adapter is therefore read as plain
prefix tuning or prompt tuning.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ....methods import (
    MethodConfig,
    MultitaskPrompt,
    MultitaskPromptConfig,
    PrefixMethod,
    PrefixTuningConfig,
    PromptMethod,
    PromptTuningConfig,
    PTuning,
    VisualMethod,
)
from ..adapter import Hooks, find_state
from ..merging import refuse_more_than_keys
from ..models.discovery import Layer, find_layers
from ..models.hooks import find_cache_parameter, read_parameter_names
from ..models.switching import evaluating, find_device
from ..prompts.multitask import PEFT_NAMES
from ..sharding.fully_sharded import gathering_around, open_root, reshard
from ..sharding.tensor_parallel import TensorParallelHeads, is_tensor_parallel

PREFIXES, PROMPTS = ("PREFIX_TUNING", "CARTRIDGE"), ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")
_EMBEDDINGS = "prompt_embeddings"
_TASKS = {
    "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS",
}


def convert_from_peft(
    path: Path, tensors: Mapping[str, Tensor], model: PreTrainedModel, description: Any = None
) -> tuple[MethodConfig, dict[str, Tensor]]:
    """Convert a PEFT directory to a configuration and parameters under this package's names.

    Args:
        path: the path of ``adapter_config.json``.
        tensors: the tensors in ``adapter_model.safetensors``.
        model: the base model.
        description: the content of ``adapter_config.json``. None reads that file.

    Raises:
        ValueError: if the directory was not written by PEFT, or has an unsupported method or another model's adapter.
    """
    description = _check_description(path, _read_description(path) if description is None else description)
    if description["peft_type"] in PROMPTS:
        _check_heads(model)
    rows = tensors.get(_EMBEDDINGS, torch.empty(0))
    if rows.ndim != 2 or rows.numel() == 0:
        raise ValueError(f"{_EMBEDDINGS!r} in {path.parent} must be a non-empty matrix, but is {tuple(rows.shape)}.")
    if len(rows) != description.get("num_virtual_tokens"):
        count = description.get("num_virtual_tokens")
        raise ValueError(f"`num_virtual_tokens` in {path} is {count}, but the adapter has {len(rows)} virtual tokens.")
    modules = _find_modules(model, description["modules_to_save"])
    parameters, names = _read_modules(path, tensors, model, modules)
    factors = PEFT_NAMES if description["peft_type"] == "MULTITASK_PROMPT_TUNING" else {"rows": _EMBEDDINGS}
    if left := sorted(tensors.keys() - set(factors.values()) - names):
        raise ValueError(f"The adapter does not fit this model, which has no parameters for {', '.join(left)}.")
    options: dict[str, Any] = {"num_virtual_tokens": len(rows), "modules_to_save": modules}
    if description["peft_type"] == "MULTITASK_PROMPT_TUNING":
        return _make_multitask(path, tensors, options, parameters)
    if description["peft_type"] in PROMPTS:
        return PromptTuningConfig(**options), {"prompt": rows, **parameters}
    frozen = description["num_frozen_tokens"]
    config = PrefixTuningConfig(prefix_position="shift", num_frozen_tokens=frozen, **options)
    return config, {**_split_rows(model, rows, frozen), **parameters}


def convert_to_peft(
    model: PreTrainedModel, method: PromptMethod | PrefixMethod | VisualMethod, modules: Iterable[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert an attached method and its trainable modules to PEFT's configuration and tensors.

    Raises:
        ValueError: if no method of PEFT computes the same.
    """
    modules = list(modules)
    if isinstance(method, VisualMethod):
        raise ValueError(f'`format="peft"` does not support {type(method.config).__name__}, which PEFT does not have.')
    if isinstance(method, PromptMethod):
        if method.changes_tokens:
            raise ValueError(
                '`format="peft"` supports prompt tuning and shifted prefixes, but the method is '
                f'{type(method.config).__name__}. Use format="fastprefix".'
            )
        _check_heads(model)
        with gathering_around(model, [method]):
            rows = (method.shared if isinstance(method, MultitaskPrompt) else method.prompt).detach().clone()
        kind: dict[str, Any] = {**_describe_prompt(method), "token_dim": rows.shape[1]}
    else:
        rows, frozen = _make_rows(model, method)
        shape = method.shapes[0]
        kind = {
            **({"peft_type": "CARTRIDGE", "num_frozen_tokens": frozen} if frozen else {"peft_type": "PREFIX_TUNING"}),
            "token_dim": shape.kv_heads * shape.key_size,
            "num_attention_heads": shape.kv_heads,
            "num_layers": len(method.shapes),
        }
        if not frozen:
            kind["prefix_projection"] = False
    description = {
        **kind,
        "task_type": _find_task(model),
        "base_model_name_or_path": model.name_or_path or None,
        "inference_mode": True,
        "modules_to_save": modules or None,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": len(rows),
    }
    parameters = {f"base_model.{name}": tensor.detach().clone() for name, tensor in _list_state(model, modules)}
    if isinstance(method, MultitaskPrompt):
        parameters |= {PEFT_NAMES[name]: getattr(method, name).detach() for name in ("columns", "rows")}
    return description, {_EMBEDDINGS: rows, **parameters}


def _make_multitask(
    path: Path, tensors: Mapping[str, Tensor], options: dict[str, Any], parameters: dict[str, Tensor]
) -> tuple[MethodConfig, dict[str, Tensor]]:
    """Return the configuration and the parameters of a multitask prompt."""
    shared, columns, rows = (tensors.get(key, torch.empty(0)) for key in PEFT_NAMES.values())
    tasks, rank = len(columns), rows.shape[-2] if rows.ndim == 3 else 0
    fits = columns.shape == (tasks, len(shared), rank) and rows.shape == (tasks, rank, shared.shape[1])
    if not fits or columns.numel() == 0:
        shapes = {key: tuple(tensors[key].shape) for key in PEFT_NAMES.values() if key in tensors}
        raise ValueError(f"{', '.join(PEFT_NAMES.values())} in {path.parent} must have matching shapes, got {shapes}.")
    found = {"shared": shared, "columns": columns, "rows": rows}
    config = MultitaskPromptConfig(num_tasks=tasks, rank=rank, **options)
    return config, {**found, **parameters}


def _describe_prompt(method: PromptMethod) -> dict[str, Any]:
    """Return PEFT's type of a prompt, with the options of its encoder if PEFT has one."""
    if isinstance(method, MultitaskPrompt):
        tasks, rank = method.config.num_tasks, method.config.rank
        return {"peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": tasks, "num_ranks": rank}
    if not isinstance(method, PTuning):
        return {"peft_type": "PROMPT_TUNING"}
    of = method.config
    return {
        "peft_type": "P_TUNING",
        "encoder_reparameterization_type": of.encoder.upper(),
        "encoder_hidden_size": of.encoder_hidden_dim or method.shape.width,
        "encoder_num_layers": of.encoder_num_layers,
    }


def _run_as_a_cache(model: PreTrainedModel, parameters: Mapping[str, Tensor]) -> Tensor:
    """Return a model's hidden states of three tokens after a cache with a prefix, as PEFT passes one."""
    cache, layers = DynamicCache(), sum(name.startswith("prefix.keys.") for name in parameters)
    pairs = [(join_frozen(parameters, "keys", i), join_frozen(parameters, "values", i)) for i in range(layers)]
    heads = TensorParallelHeads.find(model, find_layers(model) if is_tensor_parallel(model) else [])
    for i, pair in enumerate(pairs if heads is None else heads.take_prefixes(pairs)):
        key, value = (tensor.to(find_device(model), model.dtype) for tensor in pair)
        cache.update(key[None], value[None], i)
    return _run_three_tokens(model, cache.get_seq_length(), **{_require_cache(model): cache})


def join_frozen(parameters: Mapping[str, Tensor], which: str, layer: int) -> Tensor:
    """Return the keys or values of all tokens of a layer, with the frozen tokens first."""
    names = (f"prefix.frozen_{which}.{layer}", f"prefix.{which}.{layer}")
    return torch.cat([parameters[name] for name in names if name in parameters], dim=1)


def check_as_a_cache(model: PreTrainedModel, hooks: Hooks, parameters: Mapping[str, Tensor]) -> None:
    """Refuse a model whose outputs with an attached prefix differ from those with PEFT's cache.

    The modules that the adapter trains stay on the model in both runs.
    """
    actual = _run_three_tokens(model, 0)
    hooks.remove()
    try:
        expected = _run_as_a_cache(model, parameters)
    finally:
        hooks.install(model)
    error, scale = float((actual - expected).abs().max()), float(expected.abs().max())
    rounding = 0.1 if torch.finfo(model.dtype).bits == 16 else 1e-4
    if not error <= rounding * scale:
        raise ValueError(
            f"`model` must shift its positions by a prefix as PEFT's cache does, but {type(model).__name__} does not "
            f"(its outputs differ by {error:.1e} in a trial). Load the adapter with PEFT and use fastprefix.accelerate."
        )


def _run_three_tokens(model: PreTrainedModel, past: int, **kwargs: Any) -> Tensor:
    """Return the hidden states of three tokens after one padding token."""
    ids = torch.arange(4, device=find_device(model))[None]
    mask = torch.ones(1, past + 4, dtype=torch.long, device=find_device(model))
    mask[0, past] = 0
    open_root(model)
    with evaluating(model), torch.no_grad():
        hidden: Tensor = model.base_model(input_ids=ids, attention_mask=mask, **kwargs).last_hidden_state
    reshard(model)
    return hidden[:, 1:].double()


def parse_json(text: str | bytes, source: str) -> Any:
    """Parse JSON from a source, which an error names.

    Raises:
        ValueError: if the text is not JSON.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{source} cannot be read: {error}") from error


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: if the file is not JSON.
    """
    return parse_json(path.read_bytes(), f"The JSON file {path}")


def _read_description(path: Path) -> Any:
    """Read PEFT's configuration."""
    if not path.is_file():
        raise ValueError(f"{path.parent} was not written by fastprefix.save_adapter or PEFT: it has no {path.name}.")
    return read_json(path)


def _check_description(path: Path, description: Any) -> dict[str, Any]:
    """Return PEFT's configuration, after checking that this package supports the method."""
    kind = description.get("peft_type") if isinstance(description, dict) else None
    if kind not in (*PREFIXES, *PROMPTS):
        raise ValueError(f"`peft_type` in {path} must be one of {', '.join((*PREFIXES, *PROMPTS))}, but is {kind!r}.")
    if description.get("num_transformer_submodules") not in (None, 1):
        raise ValueError(
            f"`num_transformer_submodules` in {path} must be 1, since adapters of encoder-decoders cannot be loaded."
        )
    assert isinstance(description, dict)
    frozen = description.setdefault("num_frozen_tokens", 0)
    if not isinstance(frozen, int):
        raise ValueError(f"`num_frozen_tokens` in {path} must be a whole number, but is {frozen!r}.")
    modules = description["modules_to_save"] = description.get("modules_to_save") or []
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise ValueError(f"`modules_to_save` in {path} must be a list of names, but is {modules!r}.")
    return description


def _find_modules(model: nn.Module, endings: Iterable[str]) -> list[str]:
    """Return the names of the modules that PEFT trains and saves: those whose full name ends in one of ``endings``."""
    ends = tuple(endings)
    return [name for name, _ in model.named_modules() if name and f"base_model.{name}".endswith(ends)]


def _list_state(model: nn.Module, modules: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the state of each module by full names. PEFT trains a copy of each module, also of tied ones."""
    for module in modules:
        yield from find_state(model, [module]).items()


def _read_modules(
    path: Path, tensors: Mapping[str, Tensor], model: nn.Module, modules: Iterable[str]
) -> tuple[dict[str, Tensor], set[str]]:
    """Return the state of the trained modules under this package's names, and the names in PEFT's file.

    Raises:
        ValueError: if the copies of tied modules differ.
    """
    found: dict[Tensor, str] = {}  # PEFT's first name of each tensor of the model
    names = set()
    for name, tensor in _list_state(model, modules):
        if (key := f"base_model.{name}") in tensors:
            names.add(key)
            first = found.setdefault(tensor, key)
            if not torch.equal(tensors[first], tensors[key]):
                raise ValueError(f"{first} and {key} in {path.parent} must be equal, since `model` ties them.")
    return {f"modules_to_save.{key.removeprefix('base_model.')}": tensors[key] for key in found.values()}, names


def _split_rows(model: PreTrainedModel, rows: Tensor, frozen: int) -> dict[str, Tensor]:
    """Split PEFT's rows ``[m, 2 L Hkv D]`` into keys and values by layer. The first ``frozen`` tokens are separate."""
    layers = _check_layers(model, find_layers(model))
    first = layers[0].whole_shape
    if rows.shape[1] != 2 * len(layers) * first.kv_heads * first.key_size:
        raise ValueError(
            f"The adapter does not fit this model: {_EMBEDDINGS} must have {2 * len(layers)} times {first.kv_heads} "
            f"times {first.key_size} columns, but has {rows.shape[1]}."
        )
    blocks = rows.view(len(rows), 2 * len(layers), first.kv_heads, -1).permute(1, 2, 0, 3)
    names = [f"{which}.{i}" for i in range(len(layers)) for which in ("keys", "values")]
    parameters = {f"prefix.{name}": block[:, frozen:] for name, block in zip(names, blocks, strict=True)}
    if frozen:
        parameters |= {f"prefix.frozen_{name}": block[:, :frozen] for name, block in zip(names, blocks, strict=True)}
    return parameters


def _make_rows(model: PreTrainedModel, method: PrefixMethod) -> tuple[Tensor, int]:
    """Return a prefix as PEFT's rows ``[m, 2 L Hkv D]``, and the number of frozen tokens at its start.

    Gates that do not depend on the input are multiplied in.
    """
    if method.config.prefix_position != "shift":
        raise ValueError(
            '`prefix_position` must be "shift" for format="peft", since PEFT moves the tokens by the prefix length.'
        )
    if method.needs_hidden() or method.output_gate(0) is not None:
        raise ValueError(f'`format="peft"` does not support the gates of {type(method.config).__name__}.')
    refuse_more_than_keys(method, 'format="peft"')
    _check_layers(model, find_layers(model))
    with gathering_around(model, [method]):
        baked = method.baked()
    blocks = [block for pair in baked.prefixes() for block in pair]
    return torch.stack(blocks).detach().permute(2, 0, 1, 3).flatten(1), baked.frozen_tokens()


def _check_layers(model: PreTrainedModel, layers: list[Layer]) -> list[Layer]:
    """Return the layers if PEFT's rows fit them: all of equal shape, and numbered in the order of their calls."""
    name = type(model).__name__
    if [getattr(layer.module, "layer_idx", None) for layer in layers] != list(range(len(layers))):
        raise ValueError(f"`model` must have numbered attention layers for a PEFT prefix, but {name} does not.")
    shapes = {(layer.shape.kv_heads, layer.shape.key_size, layer.shape.value_size) for layer in layers}
    if len(shapes) > 1 or layers[0].shape.key_size != layers[0].shape.value_size:
        raise ValueError(f"`model` must have heads of one size in every layer for a PEFT prefix, but {name} does not.")
    _require_cache(model)
    if any(layer.local for layer in layers):
        raise ValueError(
            "`model` must have layers that attend to all earlier tokens or a sliding window of them for a PEFT prefix, "
            f"but {name} "
            "has other layers."
        )
    return layers


def _require_cache(model: PreTrainedModel) -> str:
    name = find_cache_parameter(read_parameter_names(model.base_model))
    if name is None:
        raise ValueError(f"`model` must have a key/value cache for a PEFT prefix, but {type(model).__name__} has none.")
    return name


def _check_heads(model: PreTrainedModel) -> None:
    """Refuse models with pooling heads. They pool PEFT's prompts too, but here they see only the caller's tokens."""
    if _find_task(model) != "CAUSAL_LM":
        raise ValueError(f"`model` must be a causal language model for a PEFT prompt, but is {type(model).__name__}.")


def _find_task(model: PreTrainedModel) -> str:
    head = re.search(r"For(\w+)$", type(model).__name__)
    task = _TASKS.get("" if head is None else head.group(1))
    return task or ("CAUSAL_LM" if model.can_generate() else "FEATURE_EXTRACTION")
