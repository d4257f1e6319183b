"""Test that the scripts, configurations and commands of ``docs/devices.md`` train in two processes as in one."""

import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from .... import models

ROOT = Path(__file__).parents[4]
PAGE = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^```(?:text|yaml)\n# (\S+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
COMMANDS = re.findall(r"^(?:torchrun|accelerate launch) .*$", PAGE, re.MULTILINE)
NAMES = ("Qwen/Qwen3-0.6B", "meta-llama/Meta-Llama-3-70B")
LENGTHS = {"PromptTuningConfig(100)": "PromptTuningConfig(5)", "PrefixTuningConfig(2048)": "PrefixTuningConfig(5)"}
ROWS, TOKENS, STEPS = 8, 7, 3


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the scripts, a small model and rows, for two processes."""
    folder = tmp_path_factory.mktemp("launching")
    models.decoder(num_attention_heads=8, num_key_value_heads=4).float().save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, models.VOCABULARY, (ROWS, TOKENS), generator=generator)
    torch.save([{"input_ids": row, "labels": row} for row in ids], folder / "rows.pt")
    for name, text in FILES.items():
        for large, small in {**dict.fromkeys(NAMES, "model"), **LENGTHS, "size=8": "size=2"}.items():
            text = text.replace(large, small)
        text = re.sub(r"num_processes: 8", "num_processes: 2", text)
        (folder / name).write_text(text.replace("fastprefix.attach", "torch.manual_seed(0)\nfastprefix.attach"))
    return folder


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """Read the adapter that a script has saved, and remove it."""
    file = folder / "adapter" / "adapter_model.safetensors"
    adapter = load_file(file)
    file.unlink()
    return adapter


@pytest.fixture(scope="module")
def alone(workplace: Path) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Train with each script in one process."""
    script = workplace / "tensor_parallel.py"
    (workplace / "alone.py").write_text(script.read_text().replace(", distributed_config=spread", ""))
    found = {}
    for name, path in {"train.py": "train.py", script.name: "alone.py"}.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(workplace)
            patch.setattr(sys, "argv", [path, *list_options(f"{path} --learning_rate 0.3", ROWS // 2)])
            runpy.run_path(path)
        found[name] = read_adapter(workplace)
    yield found
    AcceleratorState._reset_state(reset_partial_state=True)


def list_options(command: str, rows: int) -> list[str]:
    """Return the options of the script in a command, for a short run with this number of rows per process."""
    if "train.py" not in command:
        return []
    given = shlex.split(command.partition("train.py")[2])
    short = ["--max_steps", str(STEPS), "--per_device_train_batch_size", str(rows), "--report_to", "none"]
    on_cpu = ["--use_cpu"] if command.startswith(("train.py", "torchrun")) and "--fsdp" not in command else []
    return [*given, *short, *on_cpu, "--output_dir", "run", "--save_strategy", "no", "--disable_tqdm", "true"]


def test_the_page_has_commands() -> None:
    assert len(COMMANDS) >= 5
    assert len(FILES) == 4


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_train_as_one_process(command: str, workplace: Path, alone: dict[str, dict[str, Tensor]]) -> None:
    """On a CPU, accelerate supports only DDP."""
    if "zero" in command and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    script = next(name for name in alone if name in command)
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    if command.startswith("accelerate"):
        launcher = ["accelerate.commands.launch", *shlex.split(command.partition(script)[0])[2:]]
    launched = [sys.executable, "-m", *launcher, "-m", "tests.integrations.transformers.sharding.gloo_accelerators"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ran = subprocess.run(
        [*launched, script, *list_options(command, ROWS // 4)],
        cwd=workplace,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    torch.testing.assert_close(read_adapter(workplace), alone[script], rtol=1e-4, atol=1e-5)
