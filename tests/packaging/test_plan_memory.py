"""Test the plan of memory against numbers computed by hand and against a real shard."""

from pathlib import Path

import pytest
from transformers import LlamaConfig

from tools import plan_memory as plan
from tools.plan_memory import Layout

from .. import models

ROWS, LENGTH, TOKENS = 2, 16, 6


@pytest.fixture
def config() -> LlamaConfig:
    return LlamaConfig(**models.SIZES)


@pytest.mark.parametrize("layout", [Layout(1, 1), Layout(2, 1), Layout(1, 2), Layout(2, 2)], ids=str)
def test_simulated_weights_are_those_computed_by_hand(layout: Layout, config: LlamaConfig) -> None:
    with plan.simulating(layout.tp * layout.fsdp):
        found = plan.make_plan(config, layout, "prefix", TOKENS, ROWS, LENGTH)
    ranks = layout.tp * layout.fsdp
    assert found.weights == plan.count_weights(config, layout)
    whole = 2 * models.LAYERS * models.KV_HEADS * TOKENS * (models.WIDTH // models.HEADS) * 4
    assert found.adapter == found.gradients == found.optimizer // 2 == whole // ranks
    assert found.activations > found.checkpointed > models.LAYERS * ROWS * LENGTH * models.WIDTH * 2
    assert (found.gathered > 0) == (layout.fsdp > 1)


def test_activations_are_spread_by_heads(config: LlamaConfig) -> None:
    alone, spread = (plan.count_saved(config, Layout(tp, 1), "prefix", TOKENS, ROWS, LENGTH)[0] for tp in (1, 2))
    assert alone / 2 < spread < alone


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_the_command_prints_a_table(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LlamaConfig(**models.SIZES).save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), "--devices", "4", "--method", method, "--tokens", "8", "--length", "16"]
    assert plan.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "| GiB of a rank | FSDP2 4 | TP 2 x FSDP2 2 |" in printed
    assert "| fits 80 GiB, checkpointed | yes | yes |" in printed


def test_another_kind_of_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.encoder().config.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        plan.main(["--model", str(tmp_path)])
    assert "Llama-shaped" in capsys.readouterr().err
