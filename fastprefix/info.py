"""``python -m fastprefix info``: versions, devices, and which backends are usable, with the reason where not."""

import argparse
import platform
from collections.abc import Iterator
from importlib import metadata

import torch

from ._version import __version__
from .ops.backends import BACKENDS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``info`` has no options."""


def main(args: argparse.Namespace) -> int:
    """Print everything."""
    for line in lines():
        print(line)
    return 0


def lines() -> Iterator[str]:
    """What is printed."""
    yield f"fastprefix    {__version__}"
    yield f"python        {platform.python_version()} on {platform.platform()}"
    for package in ("torch", "triton", "transformers"):
        yield f"{package:<13} {_version(package)}"
    yield f"cpu           {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
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
    """From the package's metadata: nothing is imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
