"""Save and load adapters: ``adapter_model.safetensors`` holds the parameters, ``adapter_config.json`` the options.

The header of the tensor file holds the options too, and that copy counts: one file is replaced in one step, two are
not, so an interrupted save leaves either the old adapter or the new one, complete. Both files carry the id of the save
that wrote them. Different ids tell an interrupted save from a file that was edited by hand.

Adapters can also be read from a checkpoint of the whole model, as Trainer and ``save_pretrained`` write it for an
attached model: the model's configuration holds the adapter's options, and its weights hold the adapter's parameters.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ...._version import __version__
from ....methods import MethodConfig, PrefixTuningConfig
from ....methods.base import check_choice
from ..adapter import MODULE, Adapter, find_trainable_modules
from ..attachment import (
    DEFAULT,
    Model,
    attach_empty,
    detach,
    get_active_name,
    get_attachment,
    set_adapter,
    use_adapter,
)
from ..models.switching import OPTIONS, Inputs
from ..models.tuners import find_base_model
from ..prefixes.initial import PrefixState
from ..sharding.agreement import agree, do_together, leads
from ..sharding.fully_sharded import reshard
from ..sharding.tensor_parallel import gather_full_tensor, write_whole
from . import peft_format
from .cartridge_format import NAMES as CARTRIDGES
from .cartridge_format import find_cartridge, read_cartridge
from .hub import locate


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file in this context.

    Raises:
        ValueError: it cannot be read, and why.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except Exception as error:  # a damaged file fails in its own way, when it is opened or when a tensor is read
        raise ValueError(f"The safetensors file {path} cannot be read: {error}") from error


def read_whole_checkpoint(folder: Path, model: PreTrainedModel) -> tuple[MethodConfig, dict[str, Tensor]] | None:
    """Read the method and its parameters from a checkpoint of the whole model, or return None if the folder has none.

    Raises:
        ValueError: it is of another model, or damaged.
    """
    path = folder / CONFIG_NAME
    files = _list_files(folder)
    if not path.is_file() or not files:
        return None
    description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if OPTIONS not in description:
        return None
    if description.get("model_type") != model.config.model_type:
        raise ValueError(
            f"{path} is of a {description.get('model_type')} model, but `model` is a {model.config.model_type} model."
        )
    config = MethodConfig.from_dict(description[OPTIONS])
    renamed = {f"{MODULE}.": ""}
    renamed |= {
        f"{name}.": f"modules_to_save.{name}." for name in find_trainable_modules(model, config.modules_to_save)
    }
    tensors: dict[str, Tensor] = {}
    for path in files:
        with open_safetensors(path) as file:
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                for begin, instead in renamed.items():
                    if key.startswith(begin):
                        tensors[instead + key.removeprefix(begin)] = file.get_tensor(key)
    return config, tensors


def _list_files(folder: Path) -> list[Path]:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        return sorted({folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    return [folder / SAFE_WEIGHTS_NAME] if (folder / SAFE_WEIGHTS_NAME).is_file() else []


CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_HEADER = "fastprefix"
_ABOUT = ("base_model_type", "base_model_class", "base_model_name_or_path", "fastprefix_version")
"""What a header says beside the options."""
_LABELS = "base_model_labels"
"""The names of the labels that a saved head is for."""
_SAVE_ID = "save_id"
_SAMPLES = 1024  # numbers of a tensor that ranks compare
_INFORMATIVE = ("base_model_name_or_path",)
"""What may be changed by hand, since nothing is made of it."""


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    format: Literal["fastprefix", "peft"] = "fastprefix",
) -> None:
    """Write an adapter of a model into a directory, which is made if need be.

    Of a sharded model, all ranks call this, and the first of them writes. The files do not depend on the number of
    ranks. Where a rank is missing or dies, the others raise an error within 30 seconds, and a file that was there stays
    as it was.

    Args:
        model: a model with a method attached.
        directory: where to; one for each adapter.
        name: of the adapter; None: the one in use.
        format: "fastprefix"; or "peft", as ``peft.PeftModel.from_pretrained`` reads it: a prompt on a language model,
            or a shifted prefix, written as rows or as keys and values, whatever they were computed from.

    Raises:
        ValueError: the model has no method attached, or none of that name, one that was merged into the model's own
            weights, or one that the format has no place for.
        RuntimeError: another rank of a sharded model failed or did not come.
    """
    check_choice("format", format, ("fastprefix", "peft"))
    attachment, base = get_attachment(model), find_base_model(model)
    with use_adapter(base, attachment.active if name is None else attachment.check_known(name)):
        if format == "peft":
            adapter = _get_savable(base)
            description, tensors = peft_format.convert_to_peft(base, adapter.method, adapter.saved_modules)
            metadata = {"format": "pt"}
        else:
            description, tensors = _describe(base), {**_collect_parameters(base)}
            metadata = {}
        agree(base, "save an adapter", f"{attachment.active}, {format}, {description}")
        whole = _gather(base, tensors)

        def write() -> None:
            if not leads(base):
                return
            if format == "fastprefix":
                metadata.update(_sign(description, whole))
            _write(Path(directory), description, whole, metadata)

        do_together(base, "save an adapter", write)


def _gather(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in full on the CPU, in the first rank of a sharded model alone."""
    keeps, whole = leads(model), {}
    for name, tensor in tensors.items():
        full = gather_full_tensor(tensor)
        if keeps:
            whole[name] = full.detach().cpu().contiguous()
    return whole


def _get_savable(model: PreTrainedModel) -> Adapter:
    """Return the adapter in use.

    Raises:
        ValueError: it cannot be saved, and why.
    """
    adapter = get_attachment(model).adapter
    adapter.check_untouched(model)
    if adapter.outside is not None:
        raise ValueError(
            f"`model` must have an adapter that is not merged, since now {adapter.outside}: save it before merging."
        )
    return adapter


def _describe(model: PreTrainedModel) -> dict[str, Any]:
    """Return the options of the adapter in use, and of which model it is."""
    adapter = _get_savable(model)
    has_head = not find_trainable_modules(model, None).keys().isdisjoint(adapter.saved_modules)
    labels = getattr(model.config, "id2label", None) if has_head else None
    return {
        **adapter.config.to_dict(),
        "base_model_type": model.config.model_type,
        "base_model_class": type(model).__name__,
        "base_model_name_or_path": model.name_or_path,
        "fastprefix_version": __version__,
        **({_LABELS: list(labels.values())} if labels else {}),
    }


def _sign(description: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, str]:
    """Add the id of a save to the options, and return the header with them."""
    description[_SAVE_ID] = _compute_save_id(description, tensors)
    return {_HEADER: _format_description(description)}


CARRIED = "fastprefix"
"""The folder in a directory of PEFT's that has the adapters of this package, one file each."""


_FILES = (CONFIG_FILE, WEIGHTS_FILE, f"{CARRIED}/*.safetensors", *CARTRIDGES)
"""The files of an adapter that are downloaded from the hub."""


def _locate_carried(directory: Path, name: str) -> Path:
    return directory / CARRIED / f"{quote(name, safe='')}.safetensors"


def write_carried(model: PreTrainedModel, directory: Path) -> None:
    """Write the adapter in use into a directory of PEFT's, in one file."""
    name = get_active_name(model)
    if name is not None:
        tensors = _gather(model, _collect_parameters(model))
        if not leads(model):
            return
        metadata = _sign(_describe(model), tensors)
        path = _locate_carried(directory, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, lambda place: save_file(tensors, place, metadata=metadata))


def read_carried(model: PreTrainedModel, directory: Path) -> None:
    """Read the parameters of the adapter in use from what ``write_carried`` wrote.

    Raises:
        ValueError: it is not there, damaged, or another adapter.
    """
    name = get_active_name(model)
    if name is not None:
        path = _locate_carried(directory, name)
        if not path.is_file():
            raise ValueError(f"`model` has the adapter {name!r}, but {directory} has none of that name.")
        header, tensors = _read(path)
        config = None if header is None else _parse_header(path, header, model)
        if config != get_attachment(model).adapter.config:
            raise ValueError(f"`model` has the adapter {name!r}, but {path} has one with other options.")
        fill(_collect_parameters(model), tensors)


def _find_carried(directory: Path, name: str) -> Path | None:
    """Return the file of an adapter in a directory of PEFT's: that of a name, or the only one. None: it has none.

    Raises:
        ValueError: it has several, and none of that name.
    """
    files = sorted((directory / CARRIED).glob("*.safetensors"))
    own = _locate_carried(directory, name)
    if len(files) > 1 and own not in files:
        names = [unquote(path.stem) for path in files]
        raise ValueError(f"`name` must be that of one of the adapters in {directory}, which are {names}, got {name!r}.")
    return own if own in files else next(iter(files), None)


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
    """Attach the method that was saved in a directory, with its parameters, and use it; returns the model.

    Args:
        model: the model that it was saved from, or one like it.
        directory: of the adapter, or the name of a repository on the Hugging Face hub, such as "organization/name".
        name: that it gets on this model.
        example_inputs: as for ``attach``.
        revision: of the repository: a branch, a tag or a commit.
        token: for the hub; None: the one that is stored on this machine.
        freeze_peft: whether what PEFT trains is frozen while this adapter is in use.

    The directory may be one of PEFT's, with PROMPT_TUNING, P_TUNING or MULTITASK_PROMPT_TUNING of a language model,
    PREFIX_TUNING or CARTRIDGE; one that a PEFT model with LoRA or the like has saved while an adapter of this package
    was on it (of several, that of this ``name``); a checkpoint of the whole attached model, as Trainer writes it, of
    which the adapter alone is read; or a file of the Cartridges authors' code, such as ``cache_last.pt``, or the
    directory with it. No code from a file is run. Tokens that were frozen stay frozen.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: the adapter is damaged or of another model, or the model has one of that name; the model is left as
            it was. Or a revision of a local directory.
    """
    base = find_base_model(model)
    folder = locate_adapter(directory, revision, token)
    config, tensors, is_of_peft = _read_adapter_together(base, folder, name)
    if not is_of_peft or not isinstance(config, PrefixTuningConfig):
        _attach(model, config, tensors, name, example_inputs, freeze_peft)
        return model
    former = get_active_name(base)
    with use_adapter(base, None):
        expected = peft_format.run_as_a_cache(base, tensors)
    _attach(model, config, tensors, name, None, freeze_peft)
    try:
        peft_format.check_as_a_cache(base, expected)
    except ValueError:
        _take_off(model, name, former)
        raise
    return model


def read_prefix(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: bool | str | None = None,
) -> PrefixState:
    """Read a saved prefix into memory, for ``swap_prefix`` or ``attach(..., past_key_values=state.pairs)``.

    Args:
        model: the model that it was saved from, or one like it, which is not changed.
        directory: as for ``load_adapter``.
        revision: of a repository on the hub.
        token: for the hub.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: the adapter is damaged, of another model, or has more than free keys and values.
    """
    folder, base = locate_adapter(directory, revision, token), find_base_model(model)
    assert isinstance(base, PreTrainedModel)
    config, tensors, _ = _read_adapter_together(base, folder, DEFAULT)
    kinds = {name.rpartition(".")[0] for name in tensors}
    known = {"prefix.keys", "prefix.values", "prefix.frozen_keys", "prefix.frozen_values", "key_biases"}
    if not isinstance(config, PrefixTuningConfig) or not kinds <= known:
        raise ValueError(
            f"`directory` must have a prefix of free keys and values, but '{directory}' has {type(config).__name__} "
            f"with {', '.join(sorted(kinds - known)) or 'no prefix'}."
        )
    layers = sum(name.startswith("prefix.keys.") for name in tensors)
    pairs = [
        (peft_format.join_frozen(tensors, "keys", i), peft_format.join_frozen(tensors, "values", i))
        for i in range(layers)
    ]
    biases = [tensors[f"key_biases.{i}"] for i in range(layers)] if config.key_bias else None
    return PrefixState(pairs, biases, config.prefix_position)


def locate_adapter(
    directory: str | os.PathLike[str], revision: str | None = None, token: bool | str | None = None
) -> Path:
    """Return the local path of an adapter in a directory or in a repository of the hub (see ``locate``)."""
    return locate(directory, _FILES, revision, token)


def _read_adapter_together(
    model: PreTrainedModel, folder: Path, name: str
) -> tuple[MethodConfig, dict[str, Tensor], bool]:
    """Read an adapter, which must be the same for all ranks of a sharded model."""
    found = do_together(model, "read an adapter", lambda: read_adapter(model, folder, name))
    config, tensors, _ = found
    samples = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        step = max(tensor.numel() // _SAMPLES, 1)
        sample = tensor.flatten()[::step].contiguous()
        samples.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        samples.update(sample.view(torch.uint8).numpy().tobytes())
    agree(model, "load an adapter", f"{config.to_dict()}, {samples.hexdigest()}")
    return found


def read_adapter(model: PreTrainedModel, folder: Path, name: str) -> tuple[MethodConfig, dict[str, Tensor], bool]:
    """Read the options and parameters of an adapter, and whether it is one of PEFT's."""
    path = folder / WEIGHTS_FILE
    if (carried := _find_carried(folder, name)) is not None:
        path = carried
    if path.is_file():
        header, tensors = _read(path)
        if header is not None:
            return _parse_header(path, header, model), tensors, False
        with use_adapter(model, None):
            return *peft_format.convert_from_peft(folder / CONFIG_FILE, tensors, model), True
    if (found := read_whole_checkpoint(folder, model)) is not None:
        return *found, False
    if (cartridge := find_cartridge(folder)) is not None:
        with use_adapter(model, None):
            return *read_cartridge(cartridge, model), False
    pickled = folder / "adapter_model.bin"
    if not folder.is_dir():
        raise FileNotFoundError(f"`directory` '{folder}' does not exist.")
    why = f". It has {pickled.name}, a pickle, which is never opened" if pickled.is_file() else ""
    raise FileNotFoundError(f"`directory` '{folder}' has no {WEIGHTS_FILE}{why}.")


def _attach(
    model: nn.Module,
    config: MethodConfig,
    tensors: dict[str, Tensor],
    name: str,
    example_inputs: Inputs | None,
    freeze_peft: bool,
) -> None:
    """Attach a method with its parameters, or leave the model as it was."""
    former = get_active_name(model)
    attach_empty(model, config, name, example_inputs, freeze_peft)
    try:
        fill(_collect_parameters(find_base_model(model)), tensors)
    except ValueError:
        _take_off(model, name, former)
        raise


def _take_off(model: nn.Module, name: str, former: str | None) -> None:
    """Take an adapter off, and use the one that was in use before."""
    detach(model, name)
    if former is not None:
        set_adapter(model, former)


def _collect_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return what an adapter consists of: the method's parameters and those of the modules that stay trainable."""
    reshard(model)  # what NumPy has looked at, as in writing a file, FSDP2 could not free
    parameters = dict(model.get_submodule(MODULE).named_parameters())
    for name in get_attachment(model).adapter.saved_modules:
        for key, parameter in model.get_submodule(name).named_parameters():
            parameters[f"modules_to_save.{name}.{key}"] = parameter
    return parameters


def _read(path: Path) -> tuple[str | None, dict[str, Tensor]]:
    """Read the options in an adapter's header (None if it is not of this package) and its tensors."""
    with open_safetensors(path) as file:
        header = (file.metadata() or {}).get(_HEADER)
        return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)


def _parse_header(path: Path, header: str, model: PreTrainedModel) -> MethodConfig:
    """Return the options in a header, checked against the model's type."""
    description: dict[str, Any] = json.loads(header)
    if missing := [name for name in _ABOUT if name not in description]:
        raise ValueError(f"The header of {path} is damaged: it has no {', '.join(missing)}.")
    _check_unedited(path.with_name(CONFIG_FILE), description)
    base, *_ = (description.pop(name) for name in _ABOUT)
    description.pop(_SAVE_ID, None)
    labels = description.pop(_LABELS, None)
    if base != model.config.model_type:
        raise ValueError(f"{path} is an adapter of a {base} model, but `model` is a {model.config.model_type} model.")
    if labels is not None and hasattr(model.config, "num_labels") and len(labels) != model.config.num_labels:
        raise ValueError(
            f"{path} has a head for {len(labels)} labels ({', '.join(labels[:5])}{', ...' * (len(labels) > 5)}), but "
            f"`model` has one for {model.config.num_labels}: load the model with num_labels={len(labels)}."
        )
    return MethodConfig.from_dict(description)


def _check_unedited(path: Path, header: dict[str, Any]) -> None:
    """Refuse options that were edited by hand, which would have no effect. A file of another save is not looked at."""
    if _SAVE_ID not in header or not path.is_file():
        return
    way_out = (
        "The options belong to the parameters and are stored with them in "
        f"{WEIGHTS_FILE}. Undo the change or delete {CONFIG_FILE}, and the adapter is loaded as it was saved"
    )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`{CONFIG_FILE}` must be JSON, but {path} cannot be read: {error}. {way_out}") from error
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
    """Return the id of a save, a digest of what is saved."""
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
    _replace(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata=metadata))
    _replace(folder / CONFIG_FILE, lambda path: path.write_text(_format_description(description), encoding="utf-8"))


def fill(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    """Copy tensors into parameters, all or, where names or shapes differ, none."""
    if parameters.keys() != tensors.keys():
        raise ValueError(f"the adapter does not fit this model: {_compare_names(parameters, tensors)}.")
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            actual, expected = tuple(tensors[name].shape), tuple(parameter.shape)
            raise ValueError(f"the adapter does not fit this model: {name} must be {expected}, but is {actual}.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            write_whole(parameter, tensors[name])


def _compare_names(of_model: Collection[str], of_adapter: Collection[str]) -> str:
    """Say what one side alone has: layers, where the names differ in their numbers, or else the first few names."""
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
        parts += [f"{side} alone has {shown}"] if names else []
    return ", and ".join(parts)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place, then move it there in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
