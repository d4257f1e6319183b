"""Locate an adapter in a local directory or in a repository of the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers.utils import CONFIG_NAME

from ...._version import __version__
from ..models.switching import OPTIONS
from .peft_format import read_json

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_WHOLE = ("model*.safetensors", "model*.safetensors.index.json")
"""The weight files in a checkpoint of a whole model."""


def is_repository(directory: str | os.PathLike[str]) -> bool:
    """Return whether a string has the form of a repository name and is not an existing path."""
    return isinstance(directory, str) and _REPOSITORY.fullmatch(directory) is not None and not Path(directory).exists()


def locate(
    directory: str | os.PathLike[str],
    files: Sequence[str],
    revision: str | None = None,
    token: bool | str | None = None,
) -> Path:
    """Return the local path of an adapter. If it is on the Hub, download it to the Hub's cache.

    Args:
        directory: a path, or the name of a repository.
        files: patterns of the files to download. For a checkpoint of a whole model with an adapter, the model's weights
            are downloaded instead.
        revision: a branch, a tag or a commit of the repository.
        token: the access token for the Hub.

    Raises:
        FileNotFoundError: if neither the path nor the repository exists, or the Hub cannot be reached.
        ValueError: if a revision is given for a local path.
    """
    if not is_repository(directory):
        if revision is not None:
            raise ValueError(f"`revision` must be None for a local path, got {revision!r} for '{directory}'.")
        return Path(directory)

    def download(patterns: Sequence[str]) -> Path:
        found = snapshot_download(
            str(directory),
            revision=revision,
            token=token,
            allow_patterns=list(patterns),
            library_name="fastprefix",
            library_version=__version__,
        )
        return Path(found)

    try:
        folder = download([*files, CONFIG_NAME])
        if (folder / CONFIG_NAME).is_file() and OPTIONS in read_json(folder / CONFIG_NAME):
            folder = download([CONFIG_NAME, *_WHOLE])
    except Exception as error:  # an error of the network, the server or the name
        raise FileNotFoundError(
            f"`directory` '{directory}' does not exist locally and cannot be read from the Hub: {error}"
        ) from error
    if not folder.is_dir() or not any(folder.iterdir()):
        raise FileNotFoundError(
            f"`directory` '{directory}' on the Hub must contain an adapter, but has none of {', '.join(files)}."
        )
    return folder
