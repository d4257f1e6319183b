"""Test a store of adapters that are selected by name: nothing is lost, freed space is reused, and its limit holds."""

import contextlib
import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

import fastprefix
from fastprefix.integrations.transformers.mixed_batches import span_store
from fastprefix.integrations.transformers.mixed_batches.span_store import SLACK, KeyedPrefix, SpanStore

from .... import models
from .test_mixed_batches import BASE, SHIFT, attach_all, make_state

KINDS: dict[str, Callable[[], Any]] = {
    "prefix": lambda: fastprefix.PrefixTuningConfig(4, **SHIFT),
    "biases": lambda: fastprefix.PrefixTuningConfig(9, key_bias=True, num_frozen_tokens=2, **SHIFT),
    "residual": lambda: fastprefix.ResidualPrefixConfig(3, bottleneck_dim=4, hidden_dim=8, **SHIFT),
    "apt": lambda: fastprefix.APTConfig(5, **SHIFT),
    "prompt": lambda: fastprefix.PromptTuningConfig(6),
    "dept": lambda: fastprefix.DePTConfig(3, rank=2, max_length=30),
    "adept": lambda: fastprefix.ADePTConfig(5, bottleneck_dim=3),
    "accept": lambda: fastprefix.ACCEPTConfig(4, prompt_block=8, prompt_codewords=2, offset_block=8, max_length=30),
}
OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
IDS = torch.tensor([[5, 17, 80, 41, 9]])


class Files:
    """Saved adapters of each kind, and the results of a model with each of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logits: dict[str, Tensor] = {}
        self.generated: dict[str, Tensor] = {}
        model = attach_all(models.decoder(), KINDS)
        for kind in KINDS:
            fastprefix.set_adapter(model, kind)
            fastprefix.save_adapter(model, folder / kind)
            self._keep(model, kind)
        self._keep(fastprefix.detach(model), BASE)

    @torch.no_grad()
    def _keep(self, model: Any, kind: str) -> None:
        self.logits[kind] = model(input_ids=IDS).logits[0]
        self.generated[kind] = model.generate(input_ids=IDS, **OPTIONS)[0]

    def check(self, model: Any, names: list[str], kinds: dict[str, str], generates: bool = False) -> None:
        """Check that each row of a batch equals the result of its kind of adapter."""
        ids = IDS.expand(len(names), -1)
        if generates:
            generated = model.generate(input_ids=ids, adapter_names=names, **OPTIONS)
            assert all(
                torch.equal(row, self.generated[kinds[name]]) for row, name in zip(generated, names, strict=True)
            )
            return
        logits = model(input_ids=ids, adapter_names=names).logits
        for row, name in zip(logits, names, strict=True):
            torch.testing.assert_close(row, self.logits[kinds[name]], rtol=1e-10, atol=1e-10)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("adapters"))


@pytest.mark.parametrize("attached", [False, True])
def test_every_kind_is_served(files: Files, attached: bool) -> None:
    model = models.decoder()
    if attached:
        attach_all(model, {"own": KINDS["prefix"]})
    store = fastprefix.AdapterStore(model)
    for kind in KINDS:
        store.load(kind, files.folder / kind)
    assert store.names == list(KINDS)
    kinds = {kind: kind for kind in (*KINDS, BASE)}
    files.check(model, [*KINDS, BASE, "prompt"], kinds)
    files.check(model, [*KINDS, BASE], kinds, generates=True)
    if attached:
        kinds["own"] = "prefix"
        files.check(model, ["own", "adept"], kinds)
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=IDS).logits[0], files.logits["prefix"])
        fastprefix.detach(model, "own")
        files.check(model, ["adept", BASE], kinds)
    fastprefix.detach(model)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits[0], files.logits[BASE])
    with pytest.raises(ValueError, match="detached"):
        store.load("prefix", files.folder / "prefix")


def test_a_thousand_random_operations_lose_nothing(files: Files) -> None:
    model, chance = models.decoder(), random.Random(0)
    store = fastprefix.AdapterStore(model)
    states = {kind: fastprefix.read_prefix(model, files.folder / kind) for kind in ("prefix", "biases")}
    live = {BASE: BASE}
    names = [f"user {i}" for i in range(12)]
    for turn in range(1000):
        name = chance.choice(names)
        match chance.choice(["load", "load", "swap", "drop", "rename", "run", "generate", "compact"]):
            case "load":
                # most of them from memory: files are slower
                live[name] = chance.choice(list(states) if turn % 10 else list(KINDS))
                store.load(name, states.get(live[name], files.folder / live[name]))
            case "swap" if name in live:
                live[name] = chance.choice(list(states))
                store.load(name, states[live[name]])
            case "drop" if name in live:
                store.drop(name)
                del live[name]
            case "rename" if name in live and (free := next((n for n in names if n not in live), None)):
                store.rename(name, free)
                live[free] = live.pop(name)
            case "compact" if turn % 3 == 0:
                store.compact()
                assert store.nbytes == store.routing.store.tokens * store.nbytes // max(store.routing.store.capacity, 1)
            case "run":
                with torch.set_grad_enabled(turn % 2 == 0):
                    files.check(model, chance.choices(list(live), k=chance.randrange(1, 6)), live)
            case "generate" if turn % 4 == 0:
                files.check(model, chance.choices(list(live), k=3), live, generates=True)
        assert set(store) == live.keys() - {BASE}


def make_prefix(length: int, value: float) -> dict[int, KeyedPrefix]:
    key = torch.full((2, length, 4), value)
    return {0: KeyedPrefix(key, key + 0.5), 1: KeyedPrefix(key + 1, key + 2)}


def test_room_is_used_again_and_growth_has_little_slack() -> None:
    store, chance = SpanStore(), random.Random(1)
    kept: dict[int, tuple[int, float]] = {}
    for turn in range(400):
        if kept and chance.random() < 0.45:
            store.drop(key := chance.choice(list(kept)))
            del kept[key]
        else:
            kept[turn] = chance.randrange(1, 50), float(turn)
            store.write(turn, make_prefix(*kept[turn]), torch.float32)
        ends = [0]
        for span in sorted(store.spans.values()):
            assert span.start >= ends[-1], "spans must not overlap"
            ends.append(span.start + span.length)
        assert ends[-1] <= store.capacity
        for key, (length, value) in kept.items():
            for index, layer in store.read(key).items():
                expected = make_prefix(length, value)[index]
                assert torch.equal(layer.key, expected.key)
                assert torch.equal(layer.value, expected.value)
    most = max(store.tokens, 1)
    assert store.capacity <= (1 + SLACK) * max(most, store.capacity / (1 + SLACK)) + 1
    store.compact()
    assert store.capacity == store.tokens


def test_a_thousand_prefixes_take_their_own_size_and_five_percent() -> None:
    store, chance = SpanStore(), random.Random(2)
    own = 0
    for key in range(1000):
        length = int(10 * 819.2 ** chance.random())
        store.write(key, make_prefix(length, 1.0), torch.float32)
        own += length * 2 * 2 * 2 * 4 * 4
    assert own <= store.nbytes <= 1.05 * own


def test_loading_leaves_other_adapters_where_they_are(files: Files) -> None:
    model = models.decoder()
    store = fastprefix.AdapterStore(model, tokens=100)
    store.load("a", files.folder / "prefix")
    place = store.routing.store.layers[0].key.data_ptr()
    for turn in range(20):
        store.load("b", make_state(model, 1 + turn % 30, **SHIFT))
    assert store.routing.store.layers[0].key.data_ptr() == place
    assert store.tokens == 4 + 20


def test_the_store_follows_the_model(files: Files) -> None:
    model = models.decoder()
    store = fastprefix.AdapterStore(model)
    store.load("prefix", files.folder / "prefix")
    files.check(model, ["prefix", BASE], {"prefix": "prefix", BASE: BASE})
    size = store.nbytes
    model.to(torch.bfloat16)
    with torch.no_grad():
        logits = model(input_ids=IDS, adapter_names=["prefix"]).logits[0]
    assert logits.dtype is torch.bfloat16
    assert float((logits - files.logits["prefix"]).abs().mean()) < 0.1 * float(files.logits["prefix"].abs().mean())
    assert store.nbytes == size // 4
    store.load("biases", files.folder / "biases")
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=IDS, adapter_names=["biases"]).logits).all()


class TestResidentAdapters:
    """Adapters are loaded when a batch needs them, and the least recently used ones are removed."""

    def test_least_recently_used_ones_go(self, files: Files) -> None:
        model = attach_all(models.decoder(), {"own": KINDS["prefix"]})
        read: list[str] = []

        def find(name: str) -> Path:
            read.append(name)
            return files.folder / name

        store = fastprefix.AdapterStore(model)
        resident = fastprefix.ResidentAdapters(store, find, tokens=20)
        kinds = {**{kind: kind for kind in (*KINDS, BASE)}, "own": "prefix"}
        for names, expected in (
            (["prefix", "biases", BASE], ["prefix", "biases"]),  # 13 tokens
            (["prompt", "prefix", "own"], ["prefix", "biases", "prompt"]),  # 19
            (["residual", "prompt"], ["prefix", "prompt", "residual"]),  # biases go
            (["adept"], ["prefix", "prompt", "residual", "adept"]),
            (["biases", "adept"], ["residual", "adept", "biases"]),
        ):
            resident.fetch(names)
            assert sorted(store) == sorted(expected)
            assert store.tokens <= 20
            files.check(model, names, kinds)
        assert read == ["prefix", "biases", "prompt", "residual", "adept", "biases"]

    def test_a_batch_that_is_too_large_is_refused(self, files: Files) -> None:
        store = fastprefix.AdapterStore(models.decoder())
        resident = fastprefix.ResidentAdapters(store, {n: files.folder / n for n in KINDS}, tokens=10)
        with pytest.raises(ValueError, match="`names`"):
            resident.fetch(["prefix", "biases"])
        resident.fetch(["biases"])
        assert store.names == ["biases"]
        store.rename("biases", "kept")
        with pytest.raises(ValueError, match=r"`fetch`.*'kept'"):
            resident.fetch(["prefix"])


class TestCaches:
    """A cache is continued with the adapter that filled it, also if that adapter was dropped in between."""

    @torch.no_grad()
    def test_stored_adapters(self, files: Files) -> None:
        model, ids = models.decoder(), torch.randint(3, 100, (1, 6))
        store = fastprefix.AdapterStore(model)
        store.load("a", files.folder / "prefix")
        whole = model(input_ids=ids, adapter_names=["a"]).logits
        cache = model(input_ids=ids[:, :4], adapter_names=["a"]).past_key_values
        store.drop("a")
        with pytest.raises(ValueError, match="'a'"):
            model(input_ids=ids[:, 4:], past_key_values=cache)
        store.load("a", files.folder / "biases")
        with pytest.raises(ValueError, match="`past_key_values`"):
            model(input_ids=ids[:, 4:], past_key_values=cache)
        store.load("a", files.folder / "prefix")
        rest = model(input_ids=ids[:, 4:], past_key_values=cache).logits
        torch.testing.assert_close(rest, whole[:, 4:], rtol=1e-10, atol=1e-10)

    @torch.no_grad()
    def test_attached_adapters(self) -> None:
        model, ids = attach_all(models.decoder(), {"a": KINDS["prefix"]}), torch.randint(3, 100, (1, 6))
        cache = model(input_ids=ids[:, :4], adapter_names=["a"]).past_key_values
        model(input_ids=ids[:, 4:5], past_key_values=cache)
        fastprefix.detach(model, "a")
        attach_all(model, {"a": KINDS["prefix"]})
        with pytest.raises(ValueError, match="`past_key_values`"):
            model(input_ids=ids[:, 5:], past_key_values=cache)


class TestErrors:
    """Every misuse is refused with the name of the argument, and the store does not change."""

    def test_names(self, files: Files) -> None:
        model = attach_all(models.decoder(), {"own": KINDS["prefix"]})
        store = fastprefix.AdapterStore(model)
        store.load("a", files.folder / "prefix")
        with pytest.raises(ValueError, match="'own'"):
            store.load("own", files.folder / "prefix")
        with pytest.raises(ValueError, match="`name`"):
            store.load(BASE, files.folder / "prefix")
        with pytest.raises(TypeError, match="`name`"):
            store.load(3, files.folder / "prefix")  # type: ignore[arg-type]
        for wrong in (lambda: store.drop("b"), lambda: store.rename("b", "c"), lambda: store.rename("a", "own")):
            with pytest.raises(ValueError, match="name"):
                wrong()
        with pytest.raises(ValueError, match="`name`"):
            fastprefix.attach(model, fastprefix.PrefixTuningConfig(3), name="a")
        assert store.names == ["a"]

    def test_sources(self, files: Files, tmp_path: Path) -> None:
        model = models.decoder()
        store = fastprefix.AdapterStore(model)
        with pytest.raises(FileNotFoundError, match="`directory`"):
            store.load("a", tmp_path / "nothing")
        with pytest.raises(ValueError, match="`source`"):
            store.load("a", fastprefix.PrefixState(make_state(model, 3).pairs[:1]))
        other = attach_all(models.decoder(layers=3), {"x": KINDS["prefix"]})
        fastprefix.save_adapter(other, tmp_path / "other")
        with pytest.raises(ValueError, match="does not fit"):
            store.load("a", tmp_path / "other")
        every = fastprefix.attach(models.decoder(), fastprefix.PromptTuningConfig(3, shared_prompt=False), check=False)
        fastprefix.save_adapter(every, tmp_path / "every")
        with pytest.raises(ValueError, match="every row"):
            store.load("a", tmp_path / "every")
        assert len(store) == 0
        files.check(model, [BASE, BASE], {BASE: BASE})

    def test_models(self) -> None:
        with pytest.raises(TypeError, match="`model`"):
            fastprefix.AdapterStore(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="`tokens`"):
            fastprefix.AdapterStore(models.decoder(), tokens=-1)


def fill_store() -> SpanStore:
    """Return a store with the prefixes "a" and "b" of three tokens in two layers, after "a" was dropped."""
    store = SpanStore()
    for key, value in (("a", 1.0), ("b", 2.0)):
        prefix = KeyedPrefix(torch.full((1, 3, 2), value), torch.full((1, 3, 2), value))
        store.write(key, {0: prefix, 1: prefix}, torch.float32)
    store.drop("a")
    return store


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("tokens", [50, 4])
def test_a_store_that_cannot_grow_keeps_its_prefixes(number: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store, zeros = fill_store(), torch.zeros(1, tokens, 2)
    with monkeypatch.context() as patch:
        models.fail_once(patch, span_store, "_make_room", number)
        with contextlib.suppress(models.InjectedError):
            store.write("c", {0: KeyedPrefix(zeros, zeros), 1: KeyedPrefix(zeros, zeros)}, torch.float32)
    for _ in range(2):
        for layer in store.read("b").values():
            assert (layer.key == 2.0).all()
            assert (layer.value == 2.0).all()
        store.write("d", {i: KeyedPrefix(zeros, zeros) for i in (0, 1)}, torch.float32)


def test_a_prefix_that_is_replaced_in_vain_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    store, zeros = fill_store(), torch.zeros(1, 50, 2)
    models.fail_once(monkeypatch, span_store, "_make_room", 2)
    with pytest.raises(models.InjectedError):
        store.write("b", {i: KeyedPrefix(zeros, zeros) for i in (0, 1)}, torch.float32)
    assert store.tokens == 3
    assert all((layer.key == 2.0).all() for layer in store.read("b").values())


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_calls_after_one_in_inference_mode(kind: str) -> None:
    configs = {"prefix": fastprefix.PrefixTuningConfig(4), "prompt": fastprefix.PromptTuningConfig(4)}
    model = fastprefix.attach(models.decoder(), configs[kind], name="a", check=False)
    models.randomize(model)
    inputs, names = models.batch(), ["a", "__base__", "a"]
    with torch.no_grad():
        expected = copy.deepcopy(model)(**inputs, adapter_names=names).logits
    with torch.inference_mode():
        torch.testing.assert_close(model(**inputs, adapter_names=names).logits, expected)
    models.randomize(model, 0.1)
    with torch.no_grad():
        changed = copy.deepcopy(model)(**inputs, adapter_names=names).logits
        torch.testing.assert_close(model(**inputs, adapter_names=names).logits, changed)


def test_prefixes_that_are_loaded_in_inference_mode_can_be_replaced(tmp_path: Path) -> None:
    model = models.decoder()
    fastprefix.save_adapter(fastprefix.attach(model, fastprefix.PrefixTuningConfig(4)), tmp_path)
    fastprefix.detach(model)
    store = fastprefix.AdapterStore(model, tokens=10)
    with torch.inference_mode():
        store.load("a", tmp_path)
    store.load("b", tmp_path)
    assert (store.names, store.tokens) == (["a", "b"], 8)


def test_the_store_is_not_rounded_to_a_former_dtype() -> None:
    model = fastprefix.attach(models.decoder().to(torch.bfloat16), fastprefix.PromptTuningConfig(4), check=False)
    inputs, names = models.batch(), ["default"] * 3
    with torch.no_grad():
        model(**inputs, adapter_names=names)
        model.float()
        actual = model(**inputs, adapter_names=names).logits
        torch.testing.assert_close(actual, model(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_attached_adapters_do_not_count_for_the_resident_ones(tmp_path: Path) -> None:
    model = fastprefix.attach(models.decoder(), fastprefix.PrefixTuningConfig(20), name="attached", check=False)
    fastprefix.save_adapter(model, tmp_path)
    store = fastprefix.AdapterStore(model)
    resident = fastprefix.ResidentAdapters(store, {"user": tmp_path}, tokens=30)
    for _ in range(2):
        resident.fetch(["attached", "user"])
        with torch.no_grad():
            model(**models.batch(), adapter_names=["attached", "user", "__base__"])
        store.drop("user")


def test_the_store_refuses_what_attach_refuses(tmp_path: Path) -> None:
    config = fastprefix.CartridgeConfig(3, init="normal", position_shift=9)
    whole, windowed = (
        MistralForCausalLM(MistralConfig(**models.SIZES, head_dim=8, sliding_window=window)) for window in (None, 4)
    )
    fastprefix.save_adapter(fastprefix.attach(whole, config, check=False), tmp_path)
    store = fastprefix.AdapterStore(windowed)
    with pytest.raises(ValueError, match="`position_shift` must be None for a model with sliding windows"):
        store.load("a", tmp_path)


def test_caches_know_llama_adapters(tmp_path: Path) -> None:
    model = models.decoder()
    for name in ("first", "second"):
        fastprefix.attach(model, fastprefix.LlamaAdapterConfig(3), name=name, check=False)
        models.randomize(model, 0.1 if name == "first" else 0.3)
        fastprefix.save_adapter(model, tmp_path / name)
    fastprefix.detach(model)
    store = fastprefix.AdapterStore(model)
    store.load("x", tmp_path / "first")
    ids = models.batch()["input_ids"]
    with torch.no_grad():
        cache = model(ids, adapter_names=["x"] * 3, use_cache=True).past_key_values
        store.load("x", tmp_path / "first")
        model(ids[:, :1], past_key_values=cache)
        store.load("x", tmp_path / "second")
        with pytest.raises(ValueError, match="'x' is another adapter now"):
            model(ids[:, :1], past_key_values=cache)
