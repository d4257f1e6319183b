"""Do things that must fail on both ranks of a tensor-parallel model, and write the errors of each rank.

``test_sharding`` runs ``python -m tests.integrations.transformers.sharding.sharded_failures FOLDER`` in two processes.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from torch import distributed
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

import fastprefix
from fastprefix.integrations.transformers.files import saving
from fastprefix.integrations.transformers.sharding import agreement

from .... import models

TIMEOUT = 2.0  # seconds that ranks wait for each other here


def attach_different_lengths(model: Any, rank: int, folder: Path) -> None:
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(4 + rank))


def attach_different_texts(model: Any, rank: int, folder: Path) -> None:
    fastprefix.attach(model, fastprefix.CartridgeConfig(4, init_text=f"the document of rank {rank}"))


def attach_on_one_rank(model: Any, rank: int, folder: Path) -> None:
    if rank == 0:
        fastprefix.attach(model, fastprefix.PrefixTuningConfig(4))


def attach_what_one_rank_cannot(model: Any, rank: int, folder: Path) -> None:
    modules = ["nothing"] if rank == 1 else []
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(4, modules_to_save=modules))


def load_from_different_folders(model: Any, rank: int, folder: Path) -> None:
    fastprefix.load_adapter(model, folder / ("adapter" if rank == 0 else "other"))


def load_what_one_rank_has_not(model: Any, rank: int, folder: Path) -> None:
    fastprefix.load_adapter(model, folder / ("adapter" if rank == 0 else "missing"))


def save_on_one_rank(model: Any, rank: int, folder: Path) -> None:
    fastprefix.load_adapter(model, folder / "adapter")
    if rank == 1:
        fastprefix.save_adapter(model, folder / "adapter")


def save_where_nothing_can_be_written(model: Any, rank: int, folder: Path) -> None:
    fastprefix.load_adapter(model, folder / "adapter")
    fastprefix.save_adapter(model, folder / "model" / "config.json")


def save_while_the_first_rank_dies(model: Any, rank: int, folder: Path) -> None:
    fastprefix.load_adapter(model, folder / "adapter")
    with mock.patch.object(saving, "save_file", side_effect=KeyboardInterrupt("died")):
        fastprefix.save_adapter(model, folder / "adapter")


FAILURES: list[Callable[[Any, int, Path], None]] = [
    attach_different_lengths,
    attach_different_texts,
    attach_on_one_rank,
    attach_what_one_rank_cannot,
    load_from_different_folders,
    load_what_one_rank_has_not,
    save_on_one_rank,
    save_where_nothing_can_be_written,
    save_while_the_first_rank_dies,
]


def main(name: str) -> None:
    """Try everything. Each rank writes its errors."""
    distributed.init_process_group("gloo")
    rank, folder = distributed.get_rank(), Path(name)
    if rank == 0:
        models.decoder().save_pretrained(folder / "model")
        for path, length in (("adapter", 4), ("other", 5)):
            plain = fastprefix.attach(models.decoder(), fastprefix.PrefixTuningConfig(length))
            fastprefix.save_adapter(plain, folder / path)
    distributed.barrier()
    errors = {}
    for number, function in enumerate(FAILURES, 1):
        options = {"distributed_config": DistributedConfig(tp_size=2)}
        model = LlamaForCausalLM.from_pretrained(folder / "model", **options)
        files = sorted((folder / "adapter").iterdir())
        begin, before = time.monotonic(), [file.read_bytes() for file in files]
        try:
            function(model, rank, folder)
            errors[function.__name__] = "nothing"
        except (Exception, KeyboardInterrupt) as error:
            errors[function.__name__] = f"{type(error).__name__}: {error}"
        seconds = time.monotonic() - begin
        distributed.barrier()
        agreement._ROUNDS[0, 1] = 100 * number  # the ranks are at different places: begin anew
        if sorted((folder / "adapter").iterdir()) != files or before != [file.read_bytes() for file in files]:
            errors[function.__name__] += " and changed the files"
        if seconds > 3 * TIMEOUT + 2.0:
            errors[function.__name__] += f" after {seconds:.1f} seconds"
        distributed.barrier()
    (folder / f"errors-{rank}.json").write_text(json.dumps(errors))
    distributed.destroy_process_group()


if __name__ == "__main__":
    with mock.patch.object(agreement, "TIMEOUT", TIMEOUT), mock.patch.object(agreement, "_BEAT", 0.5):
        main(*sys.argv[1:])
