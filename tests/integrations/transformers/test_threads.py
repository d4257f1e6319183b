"""Test that threads can call one model at the same time."""

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

import fastprefix

from ... import models

CALLS = 40
"""The number of calls in each thread."""
METHODS: dict[str, Any] = {
    "prefix": fastprefix.PrefixTuningConfig(4, prefix_position="shift"),
    "prefix-mlp": fastprefix.PrefixTuningConfig(4, reparameterization="mlp", hidden_dim=8),
    "apt": fastprefix.APTConfig(4),
    "apt-cls": fastprefix.APTConfig(4, pooling="cls"),
    "llama-adapter": fastprefix.LlamaAdapterConfig(4),
    "prompt": fastprefix.PromptTuningConfig(4),
    "dept": fastprefix.DePTConfig(4, rank=2, max_length=32),
    "adept": fastprefix.ADePTConfig(4, bottleneck_dim=4),
    "prompt-in-every-row": fastprefix.PromptTuningConfig(4, shared_prompt=False),
    "adept-in-every-row": fastprefix.ADePTConfig(4, bottleneck_dim=4, shared_prompt=False),
}


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    former = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(former)


def t5() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2}
    config = T5Config(**sizes, vocab_size=models.VOCABULARY, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).double().eval()


def find_failures(model: Any, trains: bool) -> list[str]:
    """Call a model in two threads with inputs of different lengths, and return what is not as in one thread."""
    ids = torch.arange(3, 75).view(2, 36)
    given = [ids[:, :5], ids[:, 5:17]]

    def run(tokens: Tensor) -> Tensor:
        more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
        logits: Tensor = model(input_ids=tokens, **more).logits
        return logits

    expected, failures = [run(tokens).detach() for tokens in given], []
    barrier = threading.Barrier(2)

    def work(which: int) -> None:
        barrier.wait()
        for _ in range(CALLS):
            try:
                with torch.set_grad_enabled(trains and which == 1):
                    torch.testing.assert_close(run(given[which]).detach(), expected[which], rtol=1e-10, atol=1e-10)
            except Exception as error:  # the threads fail in different places
                failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_threads_share_a_decoder(method: str, trains: bool) -> None:
    """With ``trains``, one of the threads records a graph."""
    model = fastprefix.attach(models.decoder(), METHODS[method], check=False)
    models.randomize(model)
    assert find_failures(model, trains) == []


@pytest.mark.parametrize("method", ["prefix-mlp", "prompt", "adept"])
@pytest.mark.parametrize("make", [models.encoder, t5])
def test_threads_share_an_encoder(make: Callable[[], Any], method: str) -> None:
    model = fastprefix.attach(make(), METHODS[method], check=False)
    models.randomize(model)
    assert find_failures(model, trains=False) == []
