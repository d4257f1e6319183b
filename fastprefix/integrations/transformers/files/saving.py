"""Save and load adapters: ``adapter_model.safetensors`` holds the parameters, ``adapter_config.json`` the options.

The header of the tensor file also holds the options, and loading uses that copy. A single file can be replaced
atomically, but two files cannot. An interrupted save therefore leaves either the old adapter or the new one, complete.
Both files carry the id of the save that wrote them, which distinguishes an interrupted save (different ids) from a file
that was edited by hand. Files in PEFT's format have the same header, but no id.

Adapters can also be read from a checkpoint of the whole model, as Trainer and ``save_pretrained`` write it for an
attached model. Its configuration holds the adapter's options, and its weights include the adapter's parameters.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote, unquote

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ...._version import __version__
from ....methods import MethodConfig, PrefixTuningConfig
from ....methods.base import check_choice
from ..adapter import MODULE, Adapter, find_state, find_trainable_modules, list_labels
from ..attachment import (
    DEFAULT,
    Model,
    attach_empty,
    check_name,
    find_attachment,
    get_active_name,
    get_attachment,
    restoring_adapters,
    use_adapter,
)
from ..models.switching import OPTIONS, Inputs
from ..models.tuners import find_base_model
from ..prefixes.initial import PrefixState
from ..sharding.agreement import agree, do_together, leads
from ..sharding.fully_sharded import reshard
from ..sharding.partitioned import find_whole_shape
from ..sharding.tensor_parallel import gather_full_tensor, write_whole
from . import peft_format
from .cartridge_format import NAMES as CARTRIDGES
from .cartridge_format import find_cartridge, read_cartridge
from .hub import locate
from .replacing import replace_file


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file in this context.

    Raises:
        ValueError: if the file cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except Exception as error:  # damaged files raise different errors, on opening or on reading a tensor
        raise ValueError(f"The safetensors file {path} cannot be read: {error}") from error


_MODULES = "modules_to_save."
"""The beginning of the names of tensors that belong to trained modules of the model."""


class SavedAdapter(NamedTuple):
    """The options and the parameters of an adapter in a file."""

    config: MethodConfig
    tensors: dict[str, Tensor]
    is_of_peft: bool = False
    labels: list[str] | None = None
    """The names of the labels that its head is for."""


def read_whole_checkpoint(folder: Path, model: PreTrainedModel) -> SavedAdapter | None:
    """Read an adapter from a checkpoint of a whole model, or return None if the folder has none.

    Raises:
        ValueError: if the checkpoint is damaged or belongs to another type of model.
    """
    path = folder / CONFIG_NAME
    files = _list_files(folder)
    if not path.is_file() or not files:
        return None
    description: dict[str, Any] = peft_format.read_json(path)
    if OPTIONS not in description:
        return None
    if description.get("model_type") != model.config.model_type:
        raise ValueError(
            f"{path} belongs to a {description.get('model_type')} model, but `model` is a {model.config.model_type} "
            "model."
        )
    config = MethodConfig.from_dict(description[OPTIONS])
    saved = find_trainable_modules(model, config.modules_to_save)
    own, known = _list_saved_names(model, saved)
    tensors: dict[str, Tensor] = {}
    for path in files:
        with open_safetensors(path) as file:
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                if key in known:
                    tensors[known[key]] = file.get_tensor(key)
                elif key.startswith(own):
                    tensors[key.removeprefix(own)] = file.get_tensor(key)
                elif any(key.startswith(f"{name}.") for name in saved):  # the model lacks it, which ``fill`` refuses
                    tensors[f"{_MODULES}{key}"] = file.get_tensor(key)
    if all(name.startswith(_MODULES) for name in tensors):
        raise ValueError(
            f"{folder} has the options of an adapter in {CONFIG_NAME}, but not its parameters. The model was probably "
            "saved again after from_pretrained, which drops them. Load the adapter from the first checkpoint."
        )
    has_labels = _has_head(model, saved) and "id2label" in description
    labels = list(description["id2label"].values()) if has_labels else None
    _check_labels(folder, labels, (description.get("architectures") or [""])[0], model)
    return SavedAdapter(config, tensors, labels=labels)


def _list_saved_names(model: PreTrainedModel, modules: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Return the beginning of the names of a method's parameters in a checkpoint of a whole model, and further names.

    The latter are the names that the state of trained modules can have there, mapped to those in an adapter. A
    checkpoint has only one of the names of a tied tensor, and ``save_pretrained`` renames the modules of some families.
    """
    state = {tensor: f"{_MODULES}{name}" for name, tensor in find_state(model, modules).items()}
    whole = {name: each for name, each in model.state_dict(keep_vars=True).items() if isinstance(each, Tensor)}
    known = {name: state[tensor] for name, tensor in whole.items() if tensor in state}
    own = f"{MODULE}."
    if getattr(model, "hf_quantizer", None) is not None:  # conversions of quantized weights cannot all be reverted
        return own, known
    shapes = {own: (0,)} | {name: find_whole_shape(tensor) for name, tensor in whole.items()}
    blanks = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    renamed = {blank: name for name, blank in revert_weight_conversion(model, blanks).items()}
    known |= {renamed[blanks[name]]: key for name, key in known.items() if blanks[name] in renamed}
    return renamed.get(blanks[own], own), known


def _list_files(folder: Path) -> list[Path]:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        return sorted({folder / name for name in peft_format.read_json(index)["weight_map"].values()})
    return [folder / SAFE_WEIGHTS_NAME] if (folder / SAFE_WEIGHTS_NAME).is_file() else []


CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_HEADER = "fastprefix"
_VERSION = "fastprefix_version"
_ABOUT = ("base_model_type", "base_model_class", "base_model_name_or_path", _VERSION)
"""The entries of a header other than the options."""
_LABELS = "base_model_labels"
"""The names of the labels that a saved head is for."""
_SAVE_ID = "save_id"
_SAMPLES = 1024  # values per tensor that the ranks compare
_INFORMATIVE = ("base_model_name_or_path",)
"""Entries that may be edited by hand, since nothing reads them."""


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    format: Literal["fastprefix", "peft"] = "fastprefix",
) -> None:
    """Save an adapter of a model in a directory, which is created if necessary.

    On a sharded model all ranks must call this, and the first rank writes. The files do not depend on the number of
    ranks. If a rank is missing or dies, the other ranks raise an error within 30 seconds, and existing files are
    unchanged.

    Args:
        model: a model with a method attached.
        directory: the directory to write to. Use a separate directory for each adapter.
        name: the name of the adapter. None selects the adapter in use.
        format: "fastprefix", or "peft" for files that ``peft.PeftModel.from_pretrained`` reads. "peft" supports prompts
            on language models and shifted prefixes. It stores the computed embeddings, or keys and values, without the
            network that computed them.

    Raises:
        ValueError: if the model has no method attached, if no adapter has that name, if the adapter was merged into the
            model's own weights, if the format does not support the adapter, or if the directory contains an adapter of
            another library, adapters that a PEFT model saved, or a whole model. Nothing is written.
        RuntimeError: if another rank of a sharded model failed or did not arrive.
    """
    check_choice("format", format, ("fastprefix", "peft"))
    attachment, base = get_attachment(model), find_base_model(model)
    with use_adapter(base, attachment.active if name is None else attachment.check_known(name)):
        if format == "peft":
            adapter = _get_savable(base)
            description, tensors = peft_format.convert_to_peft(base, adapter.method, adapter.saved_modules)
        else:
            description, tensors = _describe(base), _collect_state(base)
        agree(base, "save an adapter", f"{attachment.active}, {format}, {description}")
        whole = _gather(base, tensors)

        def write() -> None:
            if not leads(base):
                return
            refuse_occupied(Path(directory), description, f"`directory` must be a separate folder, but '{directory}'")
            if format == "peft":
                metadata = {"format": "pt", _HEADER: _format_description(description)}
            else:
                metadata = _sign(description, whole)
            _write(Path(directory), description, whole, metadata)

        do_together(base, "save an adapter", write)


def refuse_occupied(folder: Path, description: Mapping[str, Any], what: str) -> None:
    """Refuse a folder in which an adapter would overwrite other files, or one of the two could not be loaded.

    Args:
        folder: the folder to write to.
        description: the options to write. In PEFT's format, they may replace those of the same method.
        what: the beginning of the error message, which names the argument.

    Raises:
        ValueError: if the folder contains an adapter of another library, adapters that a PEFT model saved, or a whole
            model.
    """
    has_adapter = (folder / CONFIG_FILE).exists() or (folder / WEIGHTS_FILE).exists()
    kind = _read_options(folder / CONFIG_FILE).get("peft_type")
    if has_adapter and not is_own(folder) and (kind is None or kind != description.get("peft_type")):
        found = f"an adapter of {'another library' if kind is None else f'PEFT ({kind})'}, which would be overwritten"
    elif _list_carried(folder):
        found = f"adapters that a PEFT model saved in {CARRIED!r}, which load_adapter would read instead"
    elif "model_type" in _read_options(folder / CONFIG_NAME):
        found = "a whole model, which from_pretrained could then not load"
    else:
        return
    raise ValueError(f"{what} contains {found}. Pass another one.")


def is_own(folder: Path) -> bool:
    """Return whether this package wrote the adapter in a folder."""
    return bool(_is_signed(folder / WEIGHTS_FILE)) or _VERSION in _read_options(folder / CONFIG_FILE)


def _read_options(path: Path) -> dict[str, Any]:
    """Read a JSON file of options, or return none if the file is missing, damaged or contains something else."""
    try:
        found = peft_format.read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _gather(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return full tensors on the CPU of the first rank. Other ranks of a sharded model get an empty dictionary."""
    keeps, whole = leads(model), {}
    for name, tensor in tensors.items():
        full = gather_full_tensor(tensor)
        if keeps:
            whole[name] = full.detach().cpu().contiguous()
    return whole


def _get_savable(model: PreTrainedModel) -> Adapter:
    """Return the adapter in use.

    Raises:
        ValueError: if the adapter cannot be saved.
    """
    adapter = get_attachment(model).adapter
    adapter.check_untouched(model)
    if adapter.outside is not None:
        raise ValueError(
            f"The merged adapter of `model` cannot be saved, since {adapter.outside}. Save it before you merge it."
        )
    return adapter


def _describe(model: PreTrainedModel) -> dict[str, Any]:
    """Return the options of the adapter in use and a description of its base model."""
    adapter = _get_savable(model)
    labels = list_labels(model) if _has_head(model, adapter.saved_modules) else []
    return {
        **adapter.config.to_dict(),
        "base_model_type": model.config.model_type,
        "base_model_class": type(model).__name__,
        "base_model_name_or_path": model.name_or_path,
        _VERSION: __version__,
        **({_LABELS: labels} if labels else {}),
    }


def _has_head(model: PreTrainedModel, names: Iterable[str]) -> bool:
    """Return whether a head of the model is among the named modules."""
    return not find_trainable_modules(model, None).keys().isdisjoint(names)


def _sign(description: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, str]:
    """Add the id of the save to the options, and return the header with both."""
    description[_SAVE_ID] = _compute_save_id(description, tensors)
    return {_HEADER: _format_description(description)}


CARRIED = "fastprefix"
"""The subfolder of a PEFT directory for the adapters of this package, one file each."""


_FILES = (CONFIG_FILE, WEIGHTS_FILE, f"{CARRIED}/*.safetensors", *CARTRIDGES)
"""The patterns of an adapter's files for downloads from the Hub."""


def _locate_carried(directory: Path, name: str) -> Path:
    """Return the path of an adapter's file, which is not that of a PEFT adapter called like the subfolder."""
    stem = quote(name, safe="").replace("adapter_model", "adapter%5Fmodel")
    return directory / CARRIED / f"{stem}.safetensors"


def _list_carried(directory: Path) -> dict[str, Path]:
    """Return the files of adapters in a PEFT directory by name."""
    files = sorted((directory / CARRIED).glob("*.safetensors"))
    return {unquote(path.stem): path for path in files if path.name != WEIGHTS_FILE and _is_signed(path) is not False}


def _is_signed(path: Path) -> bool | None:
    """Return whether this package wrote a file of tensors, or None if the file is damaged."""
    try:
        with open_safetensors(path) as file:
            return _HEADER in (file.metadata() or {})
    except ValueError:
        return None


def write_carried(model: PreTrainedModel, directory: Path) -> Callable[[], None]:
    """Read the adapter in use, and return a function that writes it into a PEFT directory as a single file.

    The function also removes the files of adapters that the model does not have.

    Raises:
        ValueError: if the adapter cannot be saved, or the directory contains an adapter of this package that PEFT would
            overwrite.
    """
    if is_own(directory):
        raise ValueError(
            f"`save_directory` must be a separate folder, but '{directory}' contains an adapter of fastprefix, which "
            "PEFT would overwrite. Pass another folder."
        )
    attachment, name = find_attachment(model), get_active_name(model)
    description, tensors = ({}, {}) if name is None else (_describe(model), _gather(model, _collect_state(model)))

    def write() -> None:
        if not leads(model):
            return
        if name is not None:
            metadata = _sign(description, tensors)
            path = _locate_carried(directory, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, lambda place: save_file(tensors, place, metadata=metadata))
        for each, path in _list_carried(directory).items():
            if (attachment is None or each not in attachment.adapters) and _is_signed(path):
                path.unlink(missing_ok=True)

    return write


def read_carried(model: PreTrainedModel, directory: Path) -> Callable[[], None]:
    """Read the file that ``write_carried`` wrote, and return a function that loads it into the adapter in use.

    The function does nothing if no adapter is in use.

    Raises:
        ValueError: if the file is missing or damaged, or contains another adapter.
    """
    name = get_active_name(model)
    if name is None:
        return lambda: None
    path = _list_carried(directory).get(name)
    if path is None:
        raise ValueError(f"`model` has an adapter {name!r}, but {directory} contains no adapter of that name.")
    description, tensors = _read(path)
    config = None if description is None else _parse_header(path, description, model)[0]
    if config is None or _to_json(config) != _to_json(get_attachment(model).adapter.config):
        raise ValueError(f"`model` has an adapter {name!r} with other options than the one in {path}.")
    return lambda: fill(_collect_state(model), tensors)


def _to_json(config: MethodConfig) -> str:
    """Return the options as a file stores them, without private texts and with lists in place of tuples."""
    return json.dumps(config.to_dict())


def _find_carried(directory: Path, name: str) -> Path | None:
    """Return the file of an adapter in a PEFT directory: the file of that name, the only file, or None without files.

    Raises:
        ValueError: if the directory has several adapters and none of that name.
    """
    files = _list_carried(directory)
    if len(files) > 1 and name not in files:
        raise ValueError(f"`name` must be one of the adapters {list(files)} in {directory}, got {name!r}.")
    return files.get(name) or next(iter(files.values()), None)


def load_adapter(
    model: Model,
    directory: str | os.PathLike[str],
    *,
    name: str = DEFAULT,
    example_inputs: Inputs | None = None,
    revision: str | None = None,
    token: bool | str | None = None,
    freeze_peft: bool = False,
) -> Model:
    """Attach a saved adapter with its parameters, and make it the adapter in use.

    ``directory`` can be any of the following:

    - a directory that ``save_adapter`` or ``push_to_hub`` wrote,
    - a PEFT directory with PREFIX_TUNING or CARTRIDGE, or for a language model PROMPT_TUNING, P_TUNING or
      MULTITASK_PROMPT_TUNING,
    - a directory that a PEFT model (with LoRA, for example) saved while an adapter of this package was attached to it;
      if it contains several adapters, ``name`` selects one,
    - a checkpoint of a whole model with an adapter, as Trainer writes it, from which only the adapter is read,
    - a file of the Cartridges authors' code, such as ``cache_last.pt``, or its directory.

    Loading never runs code from a file. Frozen tokens stay frozen.

    Args:
        model: the model that the adapter was saved from, or a similar one.
        directory: the adapter's directory, or the name of a repository on the Hugging Face Hub, such as
            "organization/name".
        name: the name for the adapter on this model.
        example_inputs: as for ``attach``.
        revision: a branch, a tag or a commit of the repository.
        token: the access token for the Hub. None uses the token stored on this machine.
        freeze_peft: whether PEFT's trainable parameters are frozen while this adapter is in use.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: if there is no adapter in the directory.
        TypeError: if ``name`` is not a string.
        ValueError: if the adapter is damaged or does not fit the model, if the model already has an adapter of that
            name, or if ``revision`` is given for a local directory. The model is unchanged.
        RuntimeError: if another rank of a sharded model failed or did not arrive.
    """
    check_name(name)
    base = find_base_model(model)
    folder = locate_adapter(directory, revision, token)
    attach_saved(model, _read_adapter_together(base, folder, name), name, example_inputs, freeze_peft)
    return model


def attach_saved(
    model: nn.Module,
    saved: SavedAdapter,
    name: str,
    example_inputs: Inputs | None = None,
    freeze_peft: bool = False,
) -> None:
    """Attach an adapter that was read, or leave the model unchanged."""
    config, tensors, is_of_peft, labels = saved
    if not is_of_peft or not isinstance(config, PrefixTuningConfig):
        _attach(model, config, tensors, name, example_inputs, freeze_peft)
        get_attachment(model).adapter.name_labels(find_base_model(model), labels)
        return
    with restoring_adapters(model):
        _attach(model, config, tensors, name, example_inputs, freeze_peft)
        peft_format.check_as_a_cache(find_base_model(model), get_attachment(model).hooks, tensors)


def read_prefix(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: bool | str | None = None,
) -> PrefixState:
    """Load a saved prefix into memory, for ``swap_prefix`` or ``attach(..., past_key_values=state.pairs)``.

    Args:
        model: the model that the prefix was saved from, or a similar one. It is not changed.
        directory: as for ``load_adapter``.
        revision: a branch, a tag or a commit of a repository on the Hub.
        token: the access token for the Hub.

    Returns:
        The keys, the values and the key biases of the prefix, and how it moves the tokens.

    Raises:
        FileNotFoundError: if there is no adapter in the directory.
        ValueError: if the adapter is damaged, belongs to another kind of model, or consists of more than free keys and
            values.
    """
    folder, base = locate_adapter(directory, revision, token), find_base_model(model)
    assert isinstance(base, PreTrainedModel)
    config, tensors, *_ = _read_adapter_together(base, folder, DEFAULT)
    kinds = {name.rpartition(".")[0] for name in tensors}
    known = {"prefix.keys", "prefix.values", "prefix.frozen_keys", "prefix.frozen_values", "key_biases"}
    if not isinstance(config, PrefixTuningConfig) or not kinds <= known:
        raise ValueError(
            f"`directory` must contain a prefix of free keys and values, but '{directory}' contains "
            f"{type(config).__name__} with {', '.join(sorted(kinds - known)) or 'no prefix'}."
        )
    layers = sum(name.startswith("prefix.keys.") for name in tensors)
    _check_prefix(directory, config, tensors, layers)
    pairs = [
        (peft_format.join_frozen(tensors, "keys", i), peft_format.join_frozen(tensors, "values", i))
        for i in range(layers)
    ]
    biases = [tensors[f"key_biases.{i}"] for i in range(layers)] if config.key_bias else None
    return PrefixState(pairs, biases, config.prefix_position, config.position_shift)


def _check_prefix(
    directory: str | os.PathLike[str], config: PrefixTuningConfig, tensors: Mapping[str, Tensor], layers: int
) -> None:
    """Check that a file has the keys, values and biases of all tokens in every layer."""
    parts = {"": config.num_virtual_tokens - config.num_frozen_tokens, "frozen_": config.num_frozen_tokens}
    expected = {
        f"prefix.{kind}{which}.{i}": tokens
        for i in range(layers)
        for kind, tokens in parts.items()
        for which in ("keys", "values")
        if tokens or not kind
    }
    if config.key_bias:
        expected |= {f"key_biases.{i}": config.num_virtual_tokens for i in range(layers)}
    found = {name: tensor.shape[1] for name, tensor in tensors.items() if tensor.ndim > 1}
    wrong = sorted(name for name in {*tensors, *expected} if found.get(name) != expected.get(name))
    if wrong or not layers:
        raise ValueError(f"`directory` '{directory}' contains a damaged prefix: {', '.join(wrong[:3]) or 'no layers'}.")


def locate_adapter(
    directory: str | os.PathLike[str], revision: str | None = None, token: bool | str | None = None
) -> Path:
    """Return the local path of an adapter in a directory or in a repository of the Hub (see ``locate``)."""
    return locate(directory, _FILES, revision, token)


def _read_adapter_together(model: PreTrainedModel, folder: Path, name: str) -> SavedAdapter:
    """Read an adapter, which must be the same on all ranks of a sharded model."""
    found = do_together(model, "read an adapter", lambda: read_adapter(model, folder, name))
    config, tensors, *_ = found
    samples = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        step = max(tensor.numel() // _SAMPLES, 1)
        sample = tensor.flatten()[::step].contiguous()
        samples.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        samples.update(sample.view(torch.uint8).numpy().tobytes())
    agree(model, "load an adapter", f"{config.to_dict()}, {samples.hexdigest()}")
    return found


def read_adapter(model: PreTrainedModel, folder: Path, name: str) -> SavedAdapter:
    """Read an adapter in any of the formats.

    Raises:
        FileNotFoundError: if there is no adapter in the folder.
        ValueError: if the adapter is damaged or belongs to another model, or ``folder`` is one of an adapter's files.
    """
    if folder.is_file() and folder.suffix in (".safetensors", ".json", ".bin"):
        raise ValueError(f"`directory` must be the directory of an adapter, not a file in it. Pass '{folder.parent}'.")
    path = folder / WEIGHTS_FILE
    if (carried := _find_carried(folder, name)) is not None:
        path = carried
    if path.is_file():
        description, tensors = _read(path)
        if description is not None and "peft_type" not in description:
            config, labels = _parse_header(path, description, model)
            return SavedAdapter(config, tensors, labels=labels)
        with use_adapter(model, None):
            found = peft_format.convert_from_peft(folder / CONFIG_FILE, tensors, model, description)
        return SavedAdapter(*found, is_of_peft=True)
    if (saved := read_whole_checkpoint(folder, model)) is not None:
        return saved
    if (cartridge := find_cartridge(folder)) is not None:
        with use_adapter(model, None):
            return SavedAdapter(*read_cartridge(cartridge, model))
    pickled = folder / "adapter_model.bin"
    if not folder.is_dir():
        raise FileNotFoundError(f"`directory` '{folder}' does not exist.")
    why = f". Its {pickled.name} is a pickle file, which is never loaded" if pickled.is_file() else ""
    if checkpoint := get_last_checkpoint(folder):
        why = f", but has checkpoints of Trainer. Pass one of them, such as '{checkpoint}'"
    raise FileNotFoundError(f"`directory` '{folder}' does not contain {WEIGHTS_FILE}{why}.")


def _attach(
    model: nn.Module,
    config: MethodConfig,
    tensors: dict[str, Tensor],
    name: str,
    example_inputs: Inputs | None,
    freeze_peft: bool,
) -> None:
    """Attach a method with its parameters, or leave the model unchanged."""
    with restoring_adapters(model):
        attach_empty(model, config, name, example_inputs, freeze_peft)
        fill(_collect_state(find_base_model(model)), tensors)


def _collect_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the state of an adapter: the parameters of the method, and the state of the modules that it trains."""
    reshard(model)  # FSDP2 could not free gathered parameters that NumPy views, as when a file is written
    state = find_state(model, get_attachment(model).adapter.saved_modules)
    own: dict[str, Tensor] = dict(model.get_submodule(MODULE).named_parameters())
    return own | {f"{_MODULES}{name}": tensor for name, tensor in state.items()}


def _read(path: Path) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Return the options in an adapter's header (None if this package did not write it) and its tensors."""
    with open_safetensors(path) as file:
        header = (file.metadata() or {}).get(_HEADER)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    description = None if header is None else peft_format.parse_json(header, f"The header of {path}")
    if header is not None and not isinstance(description, dict):
        raise ValueError(f"The header of {path} must be a JSON object, but is {header[:40]!r}.")
    return description, tensors


def _parse_header(
    path: Path, description: dict[str, Any], model: PreTrainedModel
) -> tuple[MethodConfig, list[str] | None]:
    """Return the options and the labels in a header, after checking them against the model."""
    if missing := [name for name in _ABOUT if name not in description]:
        raise ValueError(f"The header of {path} is damaged, since it lacks {', '.join(missing)}.")
    _check_unedited(path.with_name(CONFIG_FILE), description)
    base, base_class, _, version = (description.pop(name) for name in _ABOUT)
    description.pop(_SAVE_ID, None)
    labels = description.pop(_LABELS, None)
    if labels is not None and not (isinstance(labels, list) and all(isinstance(label, str) for label in labels)):
        raise ValueError(f"The header of {path} is damaged, since its {_LABELS} are not a list of names.")
    if base != model.config.model_type:
        raise ValueError(f"{path} is an adapter for a {base} model, but `model` is a {model.config.model_type} model.")
    _check_labels(path, labels, base_class, model)
    try:
        return MethodConfig.from_dict(description), labels
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} was saved by fastprefix {version}, but fastprefix {__version__} cannot read its options: {error}"
        ) from error


def _check_labels(path: Path, labels: list[str] | None, base_class: str, model: PreTrainedModel) -> None:
    """Check that the model has a head for the labels of a saved head, in the same order.

    Raises:
        ValueError: if the model has no head, or one for other labels.
    """
    if labels is None:
        return
    shown = f"{len(labels)} labels ({', '.join(labels[:5])}{', ...' * (len(labels) > 5)})"
    if not find_trainable_modules(model, None):
        raise ValueError(
            f"{path} has a head for {shown}, but {type(model).__name__} has none. Load the model as {base_class} with "
            f"num_labels={len(labels)}."
        )
    attachment = find_attachment(model)  # an adapter in use may have other labels
    names = list_labels(model) if attachment is None else attachment.list_own_labels(model)
    if len(labels) != len(names):
        raise ValueError(
            f"{path} has a head for {shown}, but `model` has one for {len(names)}. Load the model with "
            f"num_labels={len(labels)}."
        )
    if names != labels and sorted(names) == sorted(labels):
        raise ValueError(
            f"{path} has a head for {shown}, but `model` has the same labels in another order "
            f"({', '.join(names[:5])}). Load the model with id2label={dict(enumerate(labels))}."
        )


def _check_unedited(path: Path, header: dict[str, Any]) -> None:
    """Refuse options that were edited by hand, which would have no effect. Ignore a file of another save."""
    if _SAVE_ID not in header or not path.is_file():
        return
    way_out = (
        "The options belong to the parameters and are stored with them in "
        f"{WEIGHTS_FILE}. Undo the change or delete {CONFIG_FILE} to load the adapter as it was saved"
    )
    try:
        found = peft_format.read_json(path)
    except ValueError as error:
        raise ValueError(f"`{CONFIG_FILE}` must be JSON, but is not. {error}. {way_out}") from error
    if not isinstance(found, dict) or found.get(_SAVE_ID) != header[_SAVE_ID]:
        return
    names = sorted((header.keys() | found.keys()) - set(_INFORMATIVE))
    edits = [
        f"{name}: {_format_option(header, name)} -> {_format_option(found, name)}"
        for name in names
        if name not in header or name not in found or header[name] != found[name]
    ]
    if edits:
        raise ValueError(f"`{CONFIG_FILE}` in {path.parent} was edited by hand ({', '.join(edits)}). {way_out}")


def _format_option(options: dict[str, Any], name: str) -> str:
    return json.dumps(options[name]) if name in options else "nothing"


def _compute_save_id(description: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Return the id of a save, which is a digest of its content."""
    digest = hashlib.sha256(_format_description(description).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _format_description(description: dict[str, Any]) -> str:
    return json.dumps(description, indent=2) + "\n"


def _write(folder: Path, description: dict[str, Any], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write both files."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata=metadata))
    replace_file(folder / CONFIG_FILE, lambda path: path.write_text(_format_description(description), encoding="utf-8"))


def fill(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into parameters and buffers. If any name, shape or kind of number differs, copy none.

    Raises:
        ValueError: if a name, a shape or the kind of number (integer or floating-point) differs.
    """
    if state.keys() != tensors.keys():
        raise ValueError(f"The adapter does not fit this model: {_compare_names(state, tensors)}.")
    for name, tensor in state.items():
        if tensors[name].shape != tensor.shape:
            actual, expected = tuple(tensors[name].shape), tuple(tensor.shape)
            raise ValueError(f"The adapter does not fit this model: {name} must be {expected}, but is {actual}.")
        if tensors[name].is_floating_point() != tensor.is_floating_point():
            kind = "floating-point" if tensor.is_floating_point() else "integer"
            raise ValueError(f"The adapter is damaged: {name} must be {kind}, but is {tensors[name].dtype}.")
    with torch.no_grad():
        for name, tensor in state.items():
            write_whole(tensor, tensors[name])


def _compare_names(of_model: Collection[str], of_adapter: Collection[str]) -> str:
    """Describe the difference between two sets of names: the number of layers, or else the first few names."""
    here, there = (
        Counter(re.sub(r"\.\d+(?=\.|$)", "", name, count=1) for name in names) for names in (of_model, of_adapter)
    )
    if here.keys() == there.keys():
        name = next(name for name in here if here[name] != there[name])
        return f"the adapter has {there[name]} layers, the model {here[name]}"
    sides = {"the model": set(of_model) - set(of_adapter), "the adapter": set(of_adapter) - set(of_model)}
    parts = []
    for side, names in sides.items():
        shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        parts += [f"only {side} has {shown}"] if names else []
    return ", and ".join(parts)
