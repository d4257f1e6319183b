"""Print versions, devices and usable backends, and the reasons why others are not usable (``fastprefix info``).

With ``--model``, also print how prompts would run on a model, and how many of its layers would get prefixes.
"""

import argparse
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from . import _native
from ._version import __version__
from .ops.backends import BACKENDS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``info``."""
    parser.add_argument(
        "--model",
        metavar="NAME_OR_PATH",
        help="also print how prompts would run on this model and why, and how many attention layers would get a "
        "prefix. This only reads the configuration of the model",
    )


def main(args: argparse.Namespace) -> int:
    """Print the report and return the exit status."""
    for line in list_lines():
        print(line)
    return 0 if args.model is None else _describe(args.model)


def _describe(name: str) -> int:
    """Print how methods would run on a model, and return the exit status, which is 1 if the model does not exist."""
    from huggingface_hub.errors import StrictDataclassError

    from .integrations.transformers.preview import preview

    print()
    if not Path(name).is_dir() and not could_be_of_hub(name):
        print(f"--model {name}: no such folder", file=sys.stderr)
        return 1
    try:
        for line in preview(name):
            print(line)
    except (OSError, ValueError, StrictDataclassError) as error:
        print(f"`--model` must be a local folder or the name of a model on the hub: {error}", file=sys.stderr)
        return 1
    return 0


def could_be_of_hub(name: str) -> bool:
    """Return True if a model on the Hugging Face hub can have this name. Other names are paths."""
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it exists, but is not exported

    try:
        validate_repo_id(name)
    except ValueError:
        return False
    return True


def list_lines() -> Iterator[str]:
    """Yield the lines of the report."""
    yield f"fastprefix    {__version__}"
    yield f"python        {platform.python_version()} on {platform.platform()}"
    yield f"torch         {torch.__version__}"
    for package in ("triton", "transformers"):
        yield f"{package:<13} {_version(package)}"
    yield f"cpu           {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    yield f"c++ kernels   {_native.describe()}"
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices.append(torch.device("cuda", index))
            memory = properties.total_memory / 2**30
            yield f"cuda:{index}        {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB"
    else:
        yield "cuda          none"
    yield ""
    for device in devices:
        for backend in BACKENDS.values():
            reason = backend.refusal(device)
            yield f"{backend.name:<8} on {device!s:<8} {'usable' if reason is None else f'not usable: {reason}'}"


def _version(package: str) -> str:
    """Return the version of a package from its metadata, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
