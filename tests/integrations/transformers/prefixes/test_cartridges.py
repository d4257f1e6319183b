"""Test long trained prefixes: their initial values, which parts are trained, and biases of keys."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Lfm2Config, Lfm2ForCausalLM, Qwen3Config, Qwen3ForCausalLM, StaticCache

import fastprefix
from fastprefix.integrations.transformers.attachment import get_attachment
from fastprefix.integrations.transformers.checking import conformance
from fastprefix.integrations.transformers.models import attention
from fastprefix.integrations.transformers.prefixes import initial

from .... import models
from ....float64 import Float64
from ....instruction_sets import needs_kernels
from ....ops.test_memory import added_peak

LENGTH, FROZEN = 6, 1
HEAD = models.WIDTH // models.HEADS
Pairs = list[tuple[Tensor, Tensor]]


class Words:
    """A tokenizer of numbers: "5 6 7" becomes the ids 5, 6 and 7. It adds the id 1 in front if that is requested."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [int(word) for word in text.split()]}


def text_of(count: int) -> tuple[str, list[int]]:
    ids = [3 + (7 * i) % (models.VOCABULARY - 3) for i in range(count)]
    return " ".join(map(str, ids)), ids


def prefixes(model: Any) -> Pairs:
    return [(key.detach(), value.detach()) for key, value in model.fastprefix.prefixes()]


def run_whole(model: Any, ids: list[int]) -> Pairs:
    """Return the keys and values in a model's cache after one call with some ids."""
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def make_cache(seed: int = 0, length: int = LENGTH, batch: int = 1) -> DynamicCache:
    generator = torch.Generator().manual_seed(seed)
    cache = DynamicCache()
    for layer in range(models.LAYERS):
        shape = (batch, models.KV_HEADS, length, HEAD)
        pair = [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2)]
        cache.update(*pair, layer)
    return cache


def assert_close(actual: Pairs, expected: Pairs) -> None:
    for mine, other in zip(actual, expected, strict=True):
        for a, e in zip(mine, other, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


# What a prefix starts from


def test_a_cartridge_starts_from_the_beginning_of_a_text_with_its_first_token_frozen() -> None:
    text, ids = text_of(10)
    model = fastprefix.attach(models.decoder(), fastprefix.CartridgeConfig(LENGTH, init_text=text), tokenizer=Words())
    config = get_attachment(model).config
    assert isinstance(config, fastprefix.CartridgeConfig)
    assert (config.init, config.num_frozen_tokens, config.prefix_position) == ("text", 1, "shift")
    assert_close(prefixes(model), run_whole(models.decoder(), [1, *ids][:LENGTH]))
    assert all(key.shape[1] == LENGTH - FROZEN for key in model.fastprefix.prefix.keys)


def test_the_text_of_a_cartridge_is_not_saved(tmp_path: Path) -> None:
    text, _ = text_of(10)
    model = fastprefix.attach(models.decoder(), fastprefix.CartridgeConfig(LENGTH, init_text=text), tokenizer=Words())
    fastprefix.save_adapter(model, tmp_path)
    assert not any(text.encode() in path.read_bytes() for path in tmp_path.iterdir())
    inputs = models.batch()
    assert torch.equal(fastprefix.load_adapter(models.decoder(), tmp_path)(**inputs).logits, model(**inputs).logits)


def test_a_text_must_be_long_enough_for_a_cartridge_and_no_path(tmp_path: Path) -> None:
    text, _ = text_of(LENGTH - 2)  # and a special token
    with pytest.raises(ValueError, match=f"`num_virtual_tokens` .* which is {LENGTH - 1}, but is {LENGTH}"):
        fastprefix.attach(models.decoder(), fastprefix.CartridgeConfig(LENGTH, init_text=text), tokenizer=Words())
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    for config in (fastprefix.PrefixTuningConfig, fastprefix.PromptTuningConfig):
        with pytest.raises(ValueError, match="`init_text` must be the text itself, but is the path of a file"):
            fastprefix.attach(models.decoder(), config(3, init="text", init_text=str(path)), tokenizer=Words())


@pytest.mark.parametrize("letter", ["\u6587", "\u0434", "\0"])
def test_a_text_that_cannot_be_a_path_is_a_text(letter: str) -> None:
    config = fastprefix.PromptTuningConfig(3, init="text", init_text=200 * letter)
    fastprefix.attach(models.decoder(), config, tokenizer=lambda *_, **__: {"input_ids": [1, 2, 3]}, check=False)


def test_private_texts_are_not_in_messages() -> None:
    with pytest.raises(ValueError, match=r"init='normal' with `init_text`$"):
        fastprefix.CartridgeConfig(3, init="normal", init_text="secret")
    config = fastprefix.CartridgeConfig(3, init_text=["secret"])
    with pytest.raises(TypeError, match="`init_text` must be the text as a string, got list"):
        fastprefix.attach(models.decoder(), config, tokenizer=Words())


def test_files_of_the_whole_model_do_not_contain_the_document() -> None:
    config = fastprefix.CartridgeConfig(3, init_text="1 2 3 4 5 6 7 8")
    model = fastprefix.attach(models.decoder(), config, tokenizer=Words())
    file = io.BytesIO()
    torch.save(model, file)
    assert b"1 2 3 4" not in file.getvalue()
    assert config.init_text == "1 2 3 4 5 6 7 8"


def test_a_text_and_a_tokenizer_of_another_kind_are_named() -> None:
    config = fastprefix.PromptTuningConfig(3, init="text", init_text="1 2 3")
    with pytest.raises(TypeError, match="`tokenizer` must be a tokenizer, got 'name'"):
        fastprefix.attach(models.decoder(), config, tokenizer="name")
    with pytest.raises(ValueError, match=r"which has 100 tokens, but it returns the id 100\."):
        fastprefix.attach(models.decoder(), config, tokenizer=lambda *_, **__: {"input_ids": [1, 100]})
    path: Any = Path("text.txt")
    with pytest.raises(TypeError, match="`init_text` must be the text as a string"):
        fastprefix.attach(models.decoder(), fastprefix.CartridgeConfig(3, init_text=path), tokenizer=Words())
    model = models.decoder()
    model.name_or_path = "a/folder/without/a/tokenizer"
    with pytest.raises(ValueError, match="`tokenizer` must be given with `init_text`, since none can be loaded"):
        fastprefix.attach(model, config)


def test_an_untrained_cartridge_is_its_text() -> None:
    text, ids = text_of(LENGTH)
    config = fastprefix.CartridgeConfig(LENGTH, init_text=text, add_special_tokens=False)
    model = fastprefix.attach(models.decoder(), config, tokenizer=Words())
    tokens = models.batch()["input_ids"][:1]
    with torch.no_grad():
        expected = models.decoder()(input_ids=torch.cat([torch.tensor([ids]), tokens], dim=1)).logits[:, LENGTH:]
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-10, atol=1e-10)


def test_chunks_are_spaced_evenly_over_the_text() -> None:
    text, ids = text_of(20)
    config = fastprefix.PrefixTuningConfig(8, init="chunks", init_text=text, chunk_tokens=3)
    model = fastprefix.attach(models.decoder(), config, tokenizer=Words())
    chosen = [*ids[:3], *ids[9:12], *ids[18:20]]
    assert_close(prefixes(model), run_whole(models.decoder(), chosen))


def test_chunks_of_a_short_text_are_the_text() -> None:
    text, ids = text_of(3)
    config = fastprefix.PrefixTuningConfig(5, init="chunks", init_text=text)
    model = fastprefix.attach(models.decoder(), config, tokenizer=Words())
    assert_close(prefixes(model), run_whole(models.decoder(), (ids * 2)[:5]))


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Run long texts four tokens at a time, and return the number of queries of every attention call."""
    queries: list[int] = []
    former = attention.run_attention

    def count(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        queries.append(query.shape[2])
        return former(module, query, *args, **kwargs)

    monkeypatch.setattr(initial, "run_attention", count)
    monkeypatch.setattr(initial, "PIECE", 4)
    return queries


@pytest.mark.parametrize("window", [None, 5])
def test_a_long_text_runs_in_pieces(pieces: list[int], window: int | None) -> None:
    model: Any = models.decoder()
    if window is not None:
        options: dict[str, Any] = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
        model = Qwen3ForCausalLM(Qwen3Config(**models.SIZES, head_dim=HEAD, **options)).double().eval()
    ids = torch.tensor(text_of(15)[1])
    with Float64():
        layers = initial.find_layers(model, ids[None])
        assert not pieces
        found = initial.compute_keys_values(model, ids, layers)
    assert set(pieces) == {4, 3}
    assert_close(found, [(layer.key[0], layer.value[0]) for layer in layers])


def test_an_encoder_runs_a_long_text_at_once(pieces: list[int]) -> None:
    text, ids = text_of(9)
    model = models.encoder()
    layers = initial.find_layers(model, torch.tensor([ids]))
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(9, init="text", init_text=text), tokenizer=Words())
    assert not pieces
    assert_close(prefixes(model), [(layer.key[0], layer.value[0]) for layer in layers])


@needs_kernels  # other backends need more memory
def test_a_long_document_needs_the_memory_of_its_cache() -> None:
    """For 4,096 tokens in float32, all logits or one layer's scores would be many times as large."""
    model: Any = models.decoder().float()
    ids = torch.arange(4096) % models.VOCABULARY
    layers = initial.find_layers(model)
    cache = 2 * models.LAYERS * models.KV_HEADS * HEAD * 4 * len(ids)
    results: list[Any] = []
    peak = added_peak(lambda: results.append(initial.compute_keys_values(model, ids, layers)))
    piece = 2 * initial.PIECE * len(ids) + 64 * initial.PIECE * models.WIDTH  # two masks, and the states of a piece
    assert sum(t.numel() * t.element_size() for pair in results[0] for t in pair) == cache
    assert peak < 2 * cache + piece


@pytest.mark.parametrize("form", ["cache", "pairs", "without batch"])
def test_a_prefix_starts_from_a_cache(form: str) -> None:
    cache = make_cache()
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    given: Any = {"cache": cache, "pairs": pairs, "without batch": [(k[0], v[0]) for k, v in pairs]}[form]
    config = fastprefix.PrefixTuningConfig(LENGTH, init="cache", prefix_position="shift")
    model = fastprefix.attach(models.decoder(), config, past_key_values=given)
    assert_close(prefixes(model), [(key[0], value[0]) for key, value in pairs])
    tokens = models.batch()["input_ids"][:1]
    with torch.no_grad():
        expected = models.decoder()(input_ids=tokens, past_key_values=make_cache()).logits
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-10, atol=1e-10)


def attend_with_biases(biases: list[Tensor], shift: int) -> Tensor:
    """Return a model's logits with a cache whose keys have biases, by an explicit mask for every layer."""
    model, tokens = models.decoder(), models.batch()["input_ids"][:1]
    count = tokens.shape[1]
    mask = torch.full((count, count), -torch.inf, dtype=torch.float64).triu(1)
    handles = []
    for layer, bias in zip(model.model.layers, biases, strict=True):
        columns = bias.repeat_interleave(models.HEADS // models.KV_HEADS, 0)[:, None].expand(-1, count, -1)
        full = torch.cat([columns, mask.expand(models.HEADS, -1, -1)], dim=2)[None]

        def put(module: Any, args: Any, kwargs: Any, full: Tensor = full) -> Any:
            return args, {**kwargs, "attention_mask": full}

        handles.append(layer.self_attn.register_forward_pre_hook(put, with_kwargs=True))
    positions = shift + torch.arange(count)[None]
    model.set_attn_implementation("eager")
    with torch.no_grad(), Float64():  # the softmax is in float32 otherwise
        return model(input_ids=tokens, past_key_values=make_cache(), position_ids=positions).logits


@pytest.mark.parametrize("order", ["key, bias, value", "key, value, bias"])
def test_a_compacted_cache_is_loaded_served_and_trained(order: str, tmp_path: Path) -> None:
    """Attention Matching: keys have biases, and tokens follow at the positions after the original cache."""
    shift = 20
    biases = [torch.randn(models.KV_HEADS, LENGTH, dtype=torch.float64) for _ in range(models.LAYERS)]
    biases[0][1, 2] = -torch.inf
    stored = [(layer.keys, layer.values) for layer in make_cache().layers]
    swapped = order == "key, bias, value"
    given = [(k, b[None], v) if swapped else (k, v, b[None]) for (k, v), b in zip(stored, biases, strict=True)]
    config = fastprefix.PrefixTuningConfig(
        LENGTH, init="cache", prefix_position="shift", position_shift=shift, key_bias=True
    )
    model = fastprefix.attach(models.decoder(), config, past_key_values=given)
    tokens = models.batch()["input_ids"][:1]
    with Float64():
        logits = model(input_ids=tokens).logits
    torch.testing.assert_close(logits.detach(), attend_with_biases(biases, shift), rtol=1e-10, atol=1e-10)

    optimizer = torch.optim.AdamW(fastprefix.parameter_groups(model, lr=1e-2, weight_decay=0.1))
    logits.square().mean().backward()
    gradients = [bias.grad for bias in model.fastprefix.key_biases]
    assert all(grad is not None and bool(torch.isfinite(grad).all()) and bool(grad.any()) for grad in gradients)
    optimizer.step()
    coupled = torch.optim.SGD(fastprefix.parameter_groups(model, lr=1e-5, weight_decay=0.1))  # multiplies -inf
    coupled.step()
    assert float(model.fastprefix.key_biases[0][1, 2]) == -torch.inf
    assert not torch.equal(model.fastprefix.key_biases[0], biases[0])

    expected = model(input_ids=tokens).logits
    fastprefix.save_adapter(model, tmp_path)
    loaded = fastprefix.load_adapter(models.decoder(), tmp_path)
    assert torch.equal(loaded(input_ids=tokens).logits, expected)
    fastprefix.merge(loaded)
    torch.testing.assert_close(loaded(input_ids=tokens).logits, expected)
    for write in (fastprefix.export_cache, lambda each: fastprefix.save_adapter(each, tmp_path, format="peft")):
        with pytest.raises(ValueError, match="`key_bias` must be False"):
            write(model)


def test_shorter_layers_are_padded_with_hidden_keys() -> None:
    """Attention Matching gives each layer its own number of keys."""
    first, second = make_cache(length=LENGTH).layers[0], make_cache(length=LENGTH - 2).layers[1]
    given = [(first.keys, first.values), (second.keys, second.values)]
    config = fastprefix.PrefixTuningConfig(LENGTH, init="cache", key_bias=True)
    model = fastprefix.attach(models.decoder(), config, past_key_values=given)
    hidden = [bias.detach() == -torch.inf for bias in model.fastprefix.key_biases]
    assert [int(each.sum()) for each in hidden] == [0, 2 * models.KV_HEADS]
    model(input_ids=models.batch()["input_ids"]).logits.sum().backward()
    assert not model.fastprefix.prefix.keys[1].grad[:, -2:].any()
    with pytest.raises(ValueError, match="`num_virtual_tokens` must be the length of the cache"):
        fastprefix.attach(models.decoder(), replace(config, key_bias=False), past_key_values=given)


def fill_static_cache(filled: int, allocated: int) -> StaticCache:
    cache = StaticCache(models.decoder().config, max_cache_len=allocated)
    for index, layer in enumerate(make_cache(length=filled).layers):
        cache.update(layer.keys, layer.values, index)
    return cache


def test_a_static_cache_has_only_the_rows_that_are_filled() -> None:
    config = fastprefix.PrefixTuningConfig(LENGTH, init="cache")
    model = fastprefix.attach(models.decoder(), config, past_key_values=fill_static_cache(LENGTH, LENGTH + 3))
    expected = [(layer.keys[0], layer.values[0]) for layer in make_cache(length=LENGTH).layers]
    assert_close(prefixes(model), expected)
    with pytest.raises(ValueError, match=rf"must be the length of the cache, which is {LENGTH - 2} in layer 0"):
        fastprefix.attach(models.decoder(), config, past_key_values=fill_static_cache(LENGTH - 2, LENGTH))


def test_a_position_shift_is_no_cache_of_another_model(tmp_path: Path) -> None:
    config = fastprefix.PrefixTuningConfig(LENGTH, prefix_position="shift", position_shift=9)
    model = fastprefix.attach(models.decoder(), config)
    for write in (fastprefix.export_cache, lambda each: fastprefix.save_adapter(each, tmp_path, format="peft")):
        with pytest.raises(ValueError, match="`position_shift` must be None"):
            write(model)


WRONG: dict[str, tuple[dict[str, Any], Any, type[Exception], str]] = {
    "none": ({"init": "cache"}, None, ValueError, "`past_key_values` must be a key/value cache"),
    "not asked for": ({}, make_cache(), ValueError, "`past_key_values` must be None"),
    "a number": ({"init": "cache"}, 5, TypeError, "`past_key_values` must be a transformers Cache"),
    "numbers": ({"init": "cache"}, [(1, 2)], TypeError, "`past_key_values` must be a transformers Cache"),
    "empty": ({"init": "cache"}, DynamicCache(), ValueError, "`past_key_values` must have an entry"),
    "too long": ({"init": "cache"}, make_cache(length=LENGTH + 1), ValueError, "`num_virtual_tokens` must be"),
    "too short": ({"init": "cache"}, make_cache(length=LENGTH - 1), ValueError, "`num_virtual_tokens` must be"),
    "two rows": ({"init": "cache"}, make_cache(batch=2), ValueError, "`past_key_values` must have keys"),
    "three keys": (
        {"init": "cache", "key_bias": True},
        [(torch.zeros(2, LENGTH, HEAD),) * 3] * 2,
        ValueError,
        "`past_key_values` must have keys and values of the same rank",
    ),
    "biases": (
        {"init": "cache"},
        [(*[torch.zeros(2, LENGTH, HEAD)] * 2, torch.ones(2, LENGTH))] * 2,
        ValueError,
        "`key_bias` must be True",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_caches_are_refused(case: str) -> None:
    options, cache, error, message = WRONG[case]
    model = models.decoder()
    with pytest.raises(error, match=message):
        fastprefix.attach(model, fastprefix.PrefixTuningConfig(LENGTH, **options), past_key_values=cache)
    assert not hasattr(model, "fastprefix")


def test_a_position_shift_with_windows_is_refused() -> None:
    options: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    model = Qwen3ForCausalLM(Qwen3Config(**models.SIZES, head_dim=HEAD, **options))
    config = fastprefix.PrefixTuningConfig(LENGTH, prefix_position="shift", position_shift=9)
    with pytest.raises(ValueError, match="`position_shift` must be None for a model with sliding windows"):
        fastprefix.attach(model, config)


# Files of the Cartridges authors


def write_cartridge(path: Path, frozen: int = 2, fixed: str = "frozen", **changes: Any) -> Pairs:
    """Write a file like the authors' code, and return the keys and values of each layer."""
    pairs = [(layer.keys, layer.values) for layer in make_cache().layers]
    lists: dict[str, Any] = {}
    for which, tensors in zip(("keys", "values"), zip(*pairs, strict=True), strict=True):
        trained = [torch.nn.Parameter(tensor[:, :, frozen:].contiguous()) for tensor in tensors]
        kept = [torch.nn.Parameter(tensor[:, :, :frozen].contiguous(), False) for tensor in tensors if frozen]
        lists[f"trainable_{which}"] = torch.nn.ParameterList(trained)
        lists[f"{fixed}_{which}"] = torch.nn.ParameterList(kept)
    torch.save({**lists, **changes}, path)
    return [(key[0], value[0]) for key, value in pairs]


@pytest.mark.parametrize("fixed", ["frozen", "fixed"])
@pytest.mark.parametrize("frozen", [0, 1, 3])
@pytest.mark.parametrize("place", ["cache_last.pt", "kv_cache.torch", "cache-step64.pt"])
def test_cartridges_of_the_authors(tmp_path: Path, place: str, frozen: int, fixed: str) -> None:
    expected = write_cartridge(tmp_path / place, frozen, fixed)
    model = fastprefix.load_adapter(models.decoder(), tmp_path / place if "step" in place else tmp_path)
    assert_close(prefixes(model), expected)
    config = get_attachment(model).config
    assert isinstance(config, fastprefix.PrefixTuningConfig)
    assert (config.num_virtual_tokens, config.num_frozen_tokens) == (LENGTH, frozen)
    tokens = models.batch()["input_ids"][:1]
    logits = model(input_ids=tokens).logits
    with torch.no_grad():
        torch.testing.assert_close(logits, models.decoder()(input_ids=tokens, past_key_values=make_cache()).logits)
    logits.sum().backward()
    trained = {p.shape[1] for p in model.parameters() if p.grad is not None}
    assert trained == {LENGTH - frozen}
    fastprefix.save_adapter(model, tmp_path / "ours")
    assert_close(prefixes(fastprefix.load_adapter(models.decoder(), tmp_path / "ours")), expected)


class Harm:
    def __reduce__(self) -> Any:
        return (open, ("/dev/null",))


SPOILT: dict[str, tuple[dict[str, Any], str]] = {
    "code": ({"more": Harm()}, "cannot be read"),
    "no lists": ({"trainable_keys": None}, "must contain the parameter lists"),
    "layers": ({"trainable_values": torch.nn.ParameterList([torch.zeros(1, 2, 4, HEAD)])}, "must have 2 layers"),
    "heads": ({"frozen_keys": torch.nn.ParameterList([torch.zeros(1, 4, 2, HEAD)] * 2)}, "must have \\[1, 2, tokens"),
    "length": (
        {"frozen_values": torch.nn.ParameterList([torch.zeros(1, 2, 3, HEAD)] * 2)},
        "the same number",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_cartridges_are_refused(tmp_path: Path, case: str) -> None:
    changes, message = SPOILT[case]
    write_cartridge(tmp_path / "cache_last.pt", **changes)
    model = models.decoder()
    with pytest.raises(ValueError, match=message):
        fastprefix.load_adapter(model, tmp_path)
    assert not hasattr(model, "fastprefix")


# What is trained


@pytest.mark.sampled(every=5)
@pytest.mark.parametrize("config", [fastprefix.PrefixTuningConfig, fastprefix.APTConfig])
@pytest.mark.parametrize("train", ["values", "keys"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_only_keys_or_values_are_trained(config: Any, train: str, reentrant: bool | None) -> None:
    model = fastprefix.attach(models.decoder(), config(LENGTH, num_frozen_tokens=FROZEN, train=train)).train()
    both = fastprefix.attach(models.decoder(), config(LENGTH, num_frozen_tokens=FROZEN)).train()
    both.fastprefix.set_prefixes(prefixes(model))
    half = models.LAYERS * models.KV_HEADS * (LENGTH - FROZEN) * HEAD
    counts = [fastprefix.count_parameters(each) for each in (both, model)]
    assert counts[0].trainable - counts[1].trainable == half
    assert counts[0].total == counts[1].total
    for each in (model, both):
        if reentrant is not None:
            each.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        each(**models.batch("left")).logits.square().sum().backward()
    other = "keys" if train == "values" else "values"
    assert all(parameter.grad is None for parameter in getattr(model.fastprefix.prefix, other))
    pairs = zip(*(getattr(each.fastprefix.prefix, train) for each in (model, both)), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    groups = fastprefix.parameter_groups(model, lr=1.0)
    assert all(parameter.requires_grad for group in groups for parameter in group["params"])


@pytest.mark.parametrize("train", ["values", "keys"])
def test_the_operator_computes_no_gradient_of_what_is_not_trained(train: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, bool, int]] = []
    former = attention.prefix_attention

    def watch(query: Tensor, key: Tensor, value: Tensor, pk: Tensor, pv: Tensor, **options: Any) -> Tensor:
        asked.append((pk.requires_grad, pv.requires_grad, options["frozen_prefix"]))
        return former(query, key, value, pk, pv, **options)

    config = fastprefix.PrefixTuningConfig(LENGTH, num_frozen_tokens=2, train=train)  # type: ignore[arg-type]
    model = fastprefix.attach(models.decoder(), config)
    monkeypatch.setattr(attention, "prefix_attention", watch)
    model(**models.batch())
    assert asked == [(train == "keys", train == "values", 2)] * models.LAYERS


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_options_are_saved_and_loaded(tmp_path: Path, whole: bool, merged: bool) -> None:
    options: dict[str, Any] = {"train": "values", "key_bias": True, "num_frozen_tokens": FROZEN}
    model = fastprefix.attach(models.decoder(), fastprefix.PrefixTuningConfig(LENGTH, **options))
    models.randomize(model)
    expected = model(**models.batch()).logits
    if merged:
        fastprefix.merge(model)
    if merged or not whole:
        fastprefix.save_adapter(model, tmp_path)
    else:
        model.save_pretrained(tmp_path)
    loaded = fastprefix.load_adapter(models.decoder(), tmp_path)
    assert torch.equal(loaded(**models.batch()).logits, expected)
    trained = {name.split(".")[-2] for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {"values", "key_biases"}


@pytest.mark.parametrize(
    "options",
    [
        {"key_bias": True},
        {"key_bias": True, "prefix_position": "shift", "position_shift": 40, "num_frozen_tokens": 5},
        {"train": "values", "prefix_position": "shift"},
        {"train": "keys", "num_frozen_tokens": 4, "key_bias": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("config", [fastprefix.PrefixTuningConfig, fastprefix.APTConfig])
def test_the_textbook_agrees(config: Any, options: dict[str, Any]) -> None:
    report = conformance.check(
        models.decoder(), config(10, **options), lambda m, c: fastprefix.attach(m, c, check=False)
    )
    assert report.agrees, str(report)
    assert sum(finding.verdict == "ok" for finding in report.findings) > 15


def test_biases_of_an_encoder_agree() -> None:
    config = fastprefix.PrefixTuningConfig(5, key_bias=True)
    report = conformance.check(models.encoder(), config, lambda m, c: fastprefix.attach(m, c, check=False))
    assert report.agrees, str(report)


@pytest.mark.parametrize("kind", [None, "mlp"])
def test_biases_start_at_0(kind: Any) -> None:
    model = fastprefix.attach(
        models.decoder(), fastprefix.PrefixTuningConfig(LENGTH, key_bias=True, reparameterization=kind, hidden_dim=4)
    )
    biases = list(model.fastprefix.key_biases)
    assert [bias.shape for bias in biases] == [(models.KV_HEADS, LENGTH)] * models.LAYERS
    assert not any(bias.any() for bias in biases)
    models.randomize(model)
    expected = model(**models.batch()).logits
    torch.testing.assert_close(fastprefix.merge(model)(**models.batch()).logits, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"train": "nothing"}, ValueError, "`train` must be one of"),
        ({"train": "values", "reparameterization": "mlp"}, ValueError, "`reparameterization` must be None"),
        ({"init": "cache", "reparameterization": "mlp"}, ValueError, "`reparameterization` must be None"),
        ({"init": "chunks"}, ValueError, "`init_text` must be given"),
        ({"init": "cache", "init_text": "a"}, ValueError, "`init_text` must be given"),
        ({"init": "chunks", "init_text": "a", "chunk_tokens": 0}, ValueError, "`chunk_tokens` must be"),
        ({"key_bias": "yes"}, ValueError, "`key_bias` must be one of"),
        ({"position_shift": 5}, ValueError, "`position_shift` must be None"),
        ({"position_shift": 0, "prefix_position": "shift"}, ValueError, "`position_shift` must be a whole number"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastprefix.PrefixTuningConfig(LENGTH, **options)


def test_a_cartridge_requires_a_text() -> None:
    with pytest.raises(ValueError, match="`init_text` must be given"):
        fastprefix.CartridgeConfig(LENGTH)


def test_a_cache_that_dropped_tokens_is_refused() -> None:
    model = Qwen3ForCausalLM(
        Qwen3Config(**models.SIZES, head_dim=HEAD, use_sliding_window=True, sliding_window=5, max_window_layers=0)
    ).eval()
    ids = torch.tensor([text_of(LENGTH + 4)[1]])
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        whole = DynamicCache()
        model(input_ids=ids, past_key_values=whole)
    config = fastprefix.CartridgeConfig(ids.shape[1], init="cache", key_bias=True)
    with pytest.raises(ValueError, match=rf"layer 0 holds \d of {ids.shape[1]}\. .*DynamicCache\(\)"):
        fastprefix.attach(model, config, past_key_values=cache)
    fastprefix.attach(model, replace(config, key_bias=False), past_key_values=whole)


def test_a_long_text_of_a_hybrid_model_runs_at_once(pieces: list[int]) -> None:
    sizes = {**models.SIZES, "layer_types": ["conv", "full_attention"], "block_ff_dim": 64}
    model = Lfm2ForCausalLM(Lfm2Config(**sizes)).double().eval()
    ids = torch.tensor(text_of(9)[1])
    layers = initial.find_layers(model, ids[None])
    found = initial.compute_keys_values(model, ids, layers)
    assert not pieces
    assert_close(found, [(layer.key[0], layer.value[0]) for layer in layers])


def test_a_cartridge_without_frozen_tokens_may_say_so(tmp_path: Path) -> None:
    empty = torch.nn.ParameterList([torch.empty(1, models.KV_HEADS, 0, HEAD)] * models.LAYERS)
    expected = write_cartridge(tmp_path / "cache_last.pt", 0, frozen_keys=empty, frozen_values=empty)
    assert_close(prefixes(fastprefix.load_adapter(models.decoder(), tmp_path)), expected)
    write_cartridge(tmp_path / "cache_last.pt", 1)
    both = torch.load(tmp_path / "cache_last.pt", weights_only=False)
    torch.save(
        {**both, "fixed_keys": both["frozen_keys"], "fixed_values": both["frozen_values"]}, tmp_path / "cache_last.pt"
    )
    with pytest.raises(ValueError, match="must have frozen or fixed tokens, but has both"):
        fastprefix.load_adapter(models.decoder(), tmp_path)
