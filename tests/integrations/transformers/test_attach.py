"""Test methods on transformers models: values and gradients against the textbook, caches, copies, detaching."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

import fastprefix
from fastprefix.integrations.transformers.attachment import get_method

from ... import models
from ...textbook import textbook

PROMPTS: dict[str, Callable[[], Any]] = {
    "prompt_tuning": lambda: fastprefix.PromptTuningConfig(5),
    "dept": lambda: fastprefix.DePTConfig(5, rank=3, max_length=32),
    "accept": lambda: fastprefix.ACCEPTConfig(5, max_length=32, prompt_block=8, prompt_codewords=3, offset_block=4),
    "accept-offset": lambda: fastprefix.ACCEPTConfig(5, max_length=32, codebook_prompt=False, offset_codewords=2),
    "accept-prompt": lambda: fastprefix.ACCEPTConfig(5, max_length=32, codebook_offset=False, rank=3),
    "adept": lambda: fastprefix.ADePTConfig(5, bottleneck_dim=3),
    "multitask": lambda: fastprefix.MultitaskPromptConfig(5, num_tasks=1, rank=2),
    "p-tuning": lambda: fastprefix.PTuningConfig(5, encoder_hidden_dim=6),
    "p-tuning-lstm": lambda: fastprefix.PTuningConfig(5, encoder="lstm", encoder_hidden_dim=6),
    "ulpt": lambda: fastprefix.ULPTConfig(5, rank=3, seed=4),
}
PREFIXES: dict[str, Callable[[], Any]] = {
    "prefix": lambda: fastprefix.PrefixTuningConfig(5),
    "prefix-mlp": lambda: fastprefix.PrefixTuningConfig(5, reparameterization="mlp", hidden_dim=16),
    "prefix-shift": lambda: fastprefix.PrefixTuningConfig(5, prefix_position="shift"),
    "apt": lambda: fastprefix.APTConfig(5),
    "apt-cls": lambda: fastprefix.APTConfig(5, pooling="cls"),
    "apt-query": lambda: fastprefix.APTConfig(5, pooling="query"),
    "prefix-own": lambda: fastprefix.PrefixTuningConfig(5, softmax="own"),
    "apt-own": lambda: fastprefix.APTConfig(5, softmax="own"),
    "llama-adapter": lambda: fastprefix.LlamaAdapterConfig(5),
    "residual": lambda: fastprefix.ResidualPrefixConfig(5, bottleneck_dim=8, hidden_dim=16),
}
METHODS = {**PROMPTS, **PREFIXES}
FAMILIES: dict[str, Callable[..., Any]] = {"encoder": models.encoder, "decoder": models.decoder}
PADDINGS = ["none", "right", "left"]


def attached(family: str, method: str, **options: Any) -> Any:
    """Return a model, built with these options, and a method with random parameters on it."""
    model = fastprefix.attach(FAMILIES[family](**options), METHODS[method]())
    models.randomize(model)
    return model


def loss_and_gradients(model: PreTrainedModel, inputs: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Return the logits that ``rows`` chooses, and the gradients of a fixed combination of them."""
    model.zero_grad()
    logits = model(**inputs).logits
    chosen = logits[rows] if logits.ndim == 3 else logits
    weights = torch.arange(chosen.numel(), dtype=chosen.dtype).cos().reshape(chosen.shape)
    (chosen * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": chosen.detach(), **gradients}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check that results are equal to float64 rounding and that the same parameters have gradients."""
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("method", PREFIXES)
@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_methods_match_the_textbook(family: str, method: str, padding: str) -> None:
    model, inputs = attached(family, method), models.batch(padding)
    rows = inputs["attention_mask"].bool()  # a padding token's own logits mean nothing
    fused = loss_and_gradients(model, inputs, rows)
    assert sum("fastprefix" in name for name in fused) == len(list(get_method(model).parameters()))
    with textbook(model):
        expected = loss_and_gradients(model, inputs, rows)
    assert_same(fused, expected)


def test_prefix_matches_a_key_value_cache() -> None:
    """A shifted prefix equals a key/value cache of m tokens that is expanded to the batch."""
    model, inputs = attached("decoder", "prefix-shift"), models.batch()
    cache = DynamicCache()
    for layer, (pk, pv) in enumerate(get_method(model).prefixes()):
        cache.update(pk.detach().expand(3, -1, -1, -1), pv.detach().expand(3, -1, -1, -1), layer)
    actual = model(**inputs).logits
    mask = torch.cat([torch.ones(3, 5, dtype=torch.long), inputs["attention_mask"]], dim=1)
    plain = fastprefix.detach(model)
    expected = plain(input_ids=inputs["input_ids"], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def textbook_prompt(model: PreTrainedModel, ids: Tensor, method: Any) -> Tensor:
    """Return embeddings with prompt and offset, computed in the simplest way."""
    e = model.get_input_embeddings()(ids)
    if hasattr(method, "a"):
        e = e + 8.0 / 3**0.5 * (method.a @ method.b)[: e.shape[1]]
    if hasattr(method, "offset_codebook"):
        e = e + textbook_codebook(method.offset_codebook)[: e.shape[1]]
    if hasattr(method, "w1"):
        e = e + torch.relu(e @ method.w1 + method.b1) @ method.w2 + method.b2
    return torch.cat([textbook_rows(method).expand(e.shape[0], -1, -1), e], dim=1)


def textbook_rows(method: Any) -> Tensor:
    """Return the prompt, computed by its formula."""
    if hasattr(method, "columns"):
        return method.shared * (method.columns[0] @ method.rows[0])
    if hasattr(method, "prompt_codebook"):
        return textbook_codebook(method.prompt_codebook)
    if hasattr(method, "free_prompt"):
        return method.free_prompt
    if hasattr(method, "projection"):
        return method.low_dimensional @ method.projection * method.scale[None] + method.shift[None]
    if hasattr(method, "lstm"):
        first, second = method.mlp[0], method.mlp[2]
        return second(torch.relu(first(run_lstm(method.lstm, method.embedding))))
    if hasattr(method, "embedding"):
        first, second, third = method.mlp[0], method.mlp[2], method.mlp[4]
        return third(torch.relu(second(torch.relu(first(method.embedding)))))
    return method.prompt


def textbook_codebook(codebook: Any) -> Tensor:
    """Return rows whose parts are sums of weighted codewords, computed part by part."""
    parts = [codebook.weights[:, k] @ codebook.codewords[k] for k in range(codebook.codewords.shape[0])]
    return torch.cat(parts, dim=1)


def run_lstm(lstm: torch.nn.LSTM, states: Tensor) -> Tensor:
    """Run a bidirectional LSTM step by step."""
    for layer in range(lstm.num_layers):
        directions = []
        for suffix in ("", "_reverse"):
            weights = [getattr(lstm, f"{name}_l{layer}{suffix}") for name in ("weight_ih", "weight_hh")]
            biases = [getattr(lstm, f"{name}_l{layer}{suffix}") for name in ("bias_ih", "bias_hh")]
            hidden = cell = states.new_zeros(lstm.hidden_size)
            outputs = []
            for state in states.flip(0) if suffix else states:
                gates = weights[0] @ state + biases[0] + weights[1] @ hidden + biases[1]
                let_in, forget, candidate, let_out = gates.chunk(4)
                cell = torch.sigmoid(forget) * cell + torch.sigmoid(let_in) * torch.tanh(candidate)
                hidden = torch.sigmoid(let_out) * torch.tanh(cell)
                outputs.append(hidden)
            directions.append(torch.stack(outputs[::-1] if suffix else outputs))
        states = torch.cat(directions, dim=1)
    return states


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("method", PROMPTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_methods_match_the_textbook(family: str, method: str, padding: str) -> None:
    model, inputs = attached(family, method), models.batch(padding)
    rows = inputs["attention_mask"].bool()
    actual = loss_and_gradients(model, inputs, rows)
    parameters = get_method(model)
    plain = FAMILIES[family]().requires_grad_(False)
    if family == "encoder":  # the head was randomized too
        plain.classifier.load_state_dict(model.classifier.state_dict())
    embeds = textbook_prompt(plain, inputs["input_ids"], parameters)
    mask = torch.cat([torch.ones(3, 5, dtype=torch.long), inputs["attention_mask"]], dim=1)
    hidden = plain.base_model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state[:, 5:]
    logits = plain.classifier(plain.base_model.pooler(hidden)) if family == "encoder" else plain.lm_head(hidden)[rows]
    torch.testing.assert_close(actual["logits"], logits, rtol=1e-10, atol=1e-10)
    weights = torch.arange(logits.numel(), dtype=logits.dtype).cos().reshape(logits.shape)
    names, tensors = zip(*parameters.named_parameters(), strict=True)
    expected = torch.autograd.grad((logits * weights).sum(), tensors)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(actual[f"fastprefix.{name}"], gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_trainable_parameters(family: str, method: str) -> None:
    """Only the method and the new head are trained, in groups with the rates of each kind."""
    model = attached(family, method)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    head = {"classifier.weight", "classifier.bias"} if family == "encoder" else set()
    assert trainable == {f"fastprefix.{name}" for name, _ in get_method(model).named_parameters()} | head
    groups = fastprefix.parameter_groups(model, lr=1e-4, prompt_lr=0.3, gate_lr=1e-3)
    rates = {p: group["lr"] for group in groups for p in group["params"]}
    expected = dict.fromkeys(trainable, 1e-4)
    expected |= {name: 1e-3 for name in trainable if name.startswith("fastprefix.") and "gate" in name}
    offset = {"a", "b", "w1", "b1", "w2", "b2", "offset_codebook.weights", "offset_codebook.codewords"}
    if method in PROMPTS:
        names = {name for name, _ in get_method(model).named_parameters()} - offset
        expected |= {f"fastprefix.{name}": 0.3 for name in names}
    assert {name: rates[p] for name, p in model.named_parameters() if p in rates} == expected
    assert sum(len(group["params"]) for group in groups) == len(rates)


@pytest.mark.parametrize(
    ("config", "rates"),
    [
        (fastprefix.PromptTuningConfig(5), {"prompt": 0.3}),
        (fastprefix.DePTConfig(5, rank=3, max_length=32), {"prompt": 0.3, "a": 1e-3, "b": 1e-3}),
        (fastprefix.ADePTConfig(5, bottleneck_dim=3), {"prompt": 0.3, "w1": 1e-4, "b2": 1e-4}),
        (fastprefix.PrefixTuningConfig(5), {"prefix.keys.0": 5e-3, "prefix.values.1": 5e-3}),
        (fastprefix.CartridgeConfig(5, init="normal"), {"prefix.keys.0": 2e-2}),
        (fastprefix.APTConfig(5), {"prefix.keys.0": 5e-3, "gate_projections.0": 1e-3, "layer_gates.0": 1e-3}),
        (fastprefix.LlamaAdapterConfig(5), {"states.0": 5e-3, "gates.0": 5e-3}),
    ],
)
def test_usual_rates(config: Any, rates: dict[str, float]) -> None:
    model = fastprefix.attach(models.decoder(), config, check=False)
    parameters = dict(get_method(model).named_parameters())
    for options, expected in (({}, rates), ({"lr": 0.7}, dict.fromkeys(rates, 0.7))):
        groups = fastprefix.parameter_groups(model, **options)
        found = {p: group["lr"] for group in groups for p in group["params"]}
        assert {name: found[parameters[name]] for name in expected} == expected
        assert set(found) == {p for p in parameters.values() if p.requires_grad}


def test_parameters_are_counted() -> None:
    model = attached("encoder", "adept")
    count = fastprefix.count_parameters(model)
    adept, head = 5 * 32 + 2 * 32 * 3 + 3 + 32, 2 * 32 + 2
    assert count.groups == {"fastprefix": adept, "classifier": head}
    assert count.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad) == adept + head
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.share == count.trainable / count.total
    share = f"{100 * count.share:.4f}%"
    assert str(count) == f"453 of {count.total:,} parameters are trained ({share}): fastprefix 387, classifier 66"


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss(method: str) -> None:
    model = fastprefix.attach(models.decoder(), METHODS[method]()).train()
    inputs = models.batch("right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    rate = 0.1 if method.endswith("-own") else 0.02  # gates of an own softmax are closed at the start
    optimizer = torch.optim.Adam(fastprefix.parameter_groups(model, lr=rate))
    losses = []
    for _ in range(16):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("method", METHODS)
def test_cached_and_uncached_generation_agree(method: str) -> None:
    model, inputs = attached("decoder", method), models.batch("left")
    cached, uncached = (
        model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)
    beams = [
        model.generate(**inputs, max_new_tokens=5, num_beams=3, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*beams)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_detach_restores_bits_and_behavior(family: str, method: str) -> None:
    model, inputs = FAMILIES[family](), models.batch("right")
    model.requires_grad_(True).get_input_embeddings().weight.requires_grad_(False)
    names = [name for name, _ in model.named_modules()]
    state = {name: t.clone() for name, t in model.state_dict().items()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    logits, config = model(**inputs).logits, model.config
    for _ in range(2):  # and again
        assert fastprefix.attach(model, METHODS[method]()) is model
        models.randomize(model)
        assert not torch.equal(model(**inputs).logits, logits)
        assert fastprefix.detach(model) is model
        assert torch.equal(model(**inputs).logits, logits)
        assert model.config is config
        assert [name for name, _ in model.named_modules()] == names
        assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_whole_and_their_own(method: str, copied: Callable[[Any], Any]) -> None:
    model, inputs = attached("decoder", method), models.batch()
    logits = model(**inputs).logits  # leaves behind what lives during a run
    other = copied(model)
    assert torch.equal(other(**inputs).logits, logits)
    models.randomize(other, std=1.0)
    assert not torch.equal(other(**inputs).logits, logits)
    assert torch.equal(model(**inputs).logits, logits)
    fastprefix.detach(other)
    assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize("method", ["adept", "apt"])
def test_models_that_share_a_configuration_do_not_disturb_one_another(method: str) -> None:
    first = models.decoder()
    second = LlamaForCausalLM(first.config).double().eval()
    inputs = models.batch()
    plain = second(**inputs).logits
    fastprefix.attach(first, METHODS[method]())
    attached_logits = first(**inputs).logits
    assert torch.equal(second(**inputs).logits, plain)
    fastprefix.attach(second, METHODS[method]())
    fastprefix.detach(second)
    assert torch.equal(second(**inputs).logits, plain)
    assert torch.equal(first(**inputs).logits, attached_logits)


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("before", [True, False], ids=["before-attach", "after-attach"])
def test_gradient_checkpointing(method: str, reentrant: bool, before: bool) -> None:
    inputs = models.batch("right")
    rows = inputs["attention_mask"].bool()
    expected = loss_and_gradients(attached("decoder", method).train(), inputs, rows)
    model = models.decoder()
    options = {"use_reentrant": reentrant}
    if before:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    fastprefix.attach(model, METHODS[method]())
    if not before:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.disable_input_require_grads()  # which transformers, by version, enables or not
    models.randomize(model)
    assert_same(loss_and_gradients(model.train(), inputs, rows), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["prefix-mlp", "apt", "residual", "llama-adapter"])
def test_gradient_checkpointing_of_several_calls(method: str, reentrant: bool) -> None:
    """Two calls, from ids and from embeddings, are differentiated together, with an evaluation in between."""
    gradients = []
    for checkpointing in (False, True):
        model = attached("encoder", method).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        inputs, mask = models.batch("right"), models.batch("right")["attention_mask"]
        loss = model(**inputs).logits.square().sum()
        with torch.no_grad():
            model.eval()(**inputs)
        embeds = model.train().get_input_embeddings()(inputs["input_ids"].flip(1)).detach()
        loss = loss + model(inputs_embeds=embeds, attention_mask=mask).logits.pow(3).sum()
        loss.backward()
        assert not embeds.requires_grad
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert_same(gradients[1], gradients[0])


def test_reentrant_checkpointing_that_would_lose_gradients_is_refused() -> None:
    model = attached("decoder", "prefix").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    vars(model)["get_input_embeddings"] = torch.nn.Module  # a module that the model does not call
    with pytest.raises(RuntimeError, match="use_reentrant"):
        model(**models.batch())


def test_parameters_stay_float32_in_a_bfloat16_model() -> None:
    model = fastprefix.attach(models.decoder().bfloat16(), METHODS["apt"]())
    assert {p.dtype for p in get_method(model).parameters()} == {torch.float32}
    logits = model(**models.batch()).logits
    assert logits.dtype is torch.bfloat16
    logits.float().sum().backward()


@pytest.mark.parametrize("method", METHODS)
def test_inputs_embeds_say_the_same_as_ids(method: str) -> None:
    model, inputs = attached("decoder", method), models.batch("right")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    expected = model(**inputs).logits
    actual = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("method", METHODS)
def test_hidden_states_and_tuples_are_of_the_callers_tokens(method: str) -> None:
    model, inputs = attached("decoder", method), models.batch()
    output = model(**inputs, output_hidden_states=True)
    assert [state.shape for state in output.hidden_states] == [(3, 7, models.WIDTH)] * (models.LAYERS + 1)
    assert torch.equal(model(**inputs, return_dict=False)[0], output.logits)


def test_position_ids_of_the_caller_are_moved_up() -> None:
    model, inputs = attached("decoder", "prompt_tuning"), models.batch()
    positions = torch.arange(7)[None]
    assert torch.equal(model(**inputs, position_ids=positions).logits, model(**inputs).logits)
    assert not torch.equal(model(**inputs, position_ids=2 * positions).logits, model(**inputs).logits)


def test_one_row_masks_of_the_caller_are_no_causal_masks() -> None:
    """A user's mask [B, 1, 1, K] is a broadcast padding mask."""
    model, inputs = attached("encoder", "prefix"), models.batch("right")
    mask = inputs["attention_mask"].bool()
    actual = model(input_ids=inputs["input_ids"], attention_mask=mask[:, None, None, :]).logits
    torch.testing.assert_close(actual, model(**inputs).logits, rtol=1e-12, atol=1e-12)


def test_prompt_from_vocabulary_and_text() -> None:
    model = models.decoder()
    table = model.get_input_embeddings().weight.detach().clone()
    tokenizer = lambda text, **_: {"input_ids": [ord(c) % 100 for c in text]}  # noqa: E731
    config = fastprefix.PromptTuningConfig(5, init="text", init_text="abc")
    fastprefix.attach(model, config, tokenizer=tokenizer)
    assert torch.equal(get_method(model).prompt, table[[97, 98, 99, 97, 98]])


def test_prefix_from_text_is_what_the_model_computes() -> None:
    """A prefix from a text at shifted positions equals the text in front of the input."""
    model, inputs = models.decoder(), models.batch()
    ids = torch.tensor([[7, 8, 9]]).expand(3, -1)
    expected = model(input_ids=torch.cat([ids, inputs["input_ids"]], dim=1)).logits[:, 3:]
    config = fastprefix.PrefixTuningConfig(3, init="text", init_text="x", prefix_position="shift")
    fastprefix.attach(model, config, tokenizer=lambda text, **_: {"input_ids": [7, 8, 9]})
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", PREFIXES)
def test_what_a_layer_was_given_is_not_kept_alive(method: str) -> None:
    model = attached("decoder", method)
    model(**models.batch()).logits.sum().backward()
    bindings = [m._fastprefix_binding for m in model.modules() if hasattr(m, "_fastprefix_binding")]
    assert len(bindings) == models.LAYERS
    assert all(binding.hidden is None for binding in bindings)


@pytest.mark.parametrize("grad", [False, True])
def test_pooled_gates_belong_to_the_cache(grad: bool) -> None:
    """Other calls in between, in any mode, do not change them."""
    model = fastprefix.attach(models.decoder(), fastprefix.APTConfig(5, pooling="cls"))
    models.randomize(model)
    ids = models.batch()["input_ids"]
    with torch.set_grad_enabled(grad):
        expected = model(ids).logits[:, -2:]
        cache = model(ids[:, :-2], use_cache=True).past_key_values
        model(ids.flip(0), use_cache=True)
        actual = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in (5, 6)]
    torch.testing.assert_close(torch.cat(actual, dim=1), expected, rtol=1e-10, atol=1e-10)
    with fastprefix.disable_adapter(model):
        cache = model(ids[:, :-1], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="`past_key_values` must be a cache that was filled with this adapter"):
        model(ids[:, -1:], past_key_values=cache)


def test_pooled_gates_are_compiled_without_graph_breaks() -> None:
    model = fastprefix.attach(models.decoder(layers=1), fastprefix.APTConfig(5, pooling="cls"))
    models.randomize(model)
    ids = models.batch()["input_ids"]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=True).logits, model(ids).logits, rtol=1e-10, atol=1e-10)


def test_tokens_shifted_beyond_the_positions_are_refused() -> None:
    model = fastprefix.attach(models.encoder(), fastprefix.PrefixTuningConfig(5, prefix_position="shift"))
    inputs = {"input_ids": torch.ones(1, 59, dtype=torch.long), "position_ids": torch.arange(59)[None]}
    model(**inputs)
    inputs = {"input_ids": torch.ones(1, 60, dtype=torch.long), "position_ids": torch.arange(60)[None]}
    with pytest.raises(ValueError, match=r"at most 59 tokens, .* by 5 positions .* 64 positions, but has 60\."):
        model(**inputs)


@pytest.mark.parametrize("method", ["prefix", "adept", "textbook"])
def test_replicas_of_data_parallel_are_refused(method: str) -> None:
    configs = {**METHODS, "textbook": lambda: fastprefix.PromptTuningConfig(3, shared_prompt=False)}
    model, inputs = fastprefix.attach(models.decoder(), configs[method]()), models.batch()
    model.model._is_replica = True
    with pytest.raises(RuntimeError, match=r"nn\.DataParallel cannot run"):
        model(**inputs)


def test_positions_that_skip_padding_count_every_other_token() -> None:
    options = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = RobertaConfig(**options, vocab_size=100, max_position_embeddings=34)
    model = RobertaForSequenceClassification(config).eval()
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(8, prefix_position="shift"), check=False)
    ids = torch.cat([torch.zeros(1, 1), torch.full((1, 23), 5.0), torch.ones(1, 2)], dim=1).long()
    model(input_ids=ids)  # 24 tokens and padding
    ids[0, 24] = 5
    with pytest.raises(ValueError, match=r"`input_ids` must have at most 24 tokens, .* 32 positions, but has 25\."):
        model(input_ids=ids)


def test_adapters_are_not_attached_in_inference_mode() -> None:
    with torch.inference_mode(), pytest.raises(ValueError, match=r"inside torch\.inference_mode"):
        fastprefix.attach(models.decoder(), fastprefix.PrefixTuningConfig(2))


def test_other_parts_that_the_caller_trains_are_counted() -> None:
    model = fastprefix.attach(models.decoder(), fastprefix.PrefixTuningConfig(2))
    before = fastprefix.count_parameters(model).trainable
    model.model.norm.requires_grad_(True)
    count = fastprefix.count_parameters(model)
    assert count.groups["other parts"] == models.WIDTH
    assert count.trainable == before + models.WIDTH


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"input_ids": torch.zeros(1, 2)}, ValueError, "does not run on the given ones: "),
        (torch.zeros(1, 2), TypeError, "`example_inputs` must be a dictionary of keyword arguments, got Tensor"),
    ],
    ids=["wrong dtype", "no dictionary"],
)
def test_example_inputs_on_which_the_model_does_not_run(given: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        fastprefix.attach(models.decoder(), fastprefix.PrefixTuningConfig(2), example_inputs=given)


@pytest.mark.parametrize("kind", [RobertaForSequenceClassification, RobertaModel])
def test_prefixes_that_shift_positions_beside_padding_rows(kind: Any) -> None:
    """Padding keeps the row of its own in the table, also in the textbook."""
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = kind(RobertaConfig(**options, vocab_size=97, pad_token_id=1, max_position_embeddings=64)).eval()
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(4, prefix_position="shift"))


def test_direct_calls_of_an_encoder_with_reentrant_checkpointing() -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 97}
    model = T5ForConditionalGeneration(T5Config(**sizes))
    config = fastprefix.PrefixTuningConfig(4, reparameterization="mlp", hidden_dim=8)
    fastprefix.attach(model, config, check=False).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="`use_reentrant` must be False"):
        model.get_encoder()(input_ids=models.batch()["input_ids"] % 97)
