"""Test that ``attach`` notices arguments that models have renamed."""

import ast
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import BartModel, BertModel, GPT2Model, LlamaModel, MambaModel, T5Model
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils.deprecation import deprecate_kwarg

import fastprefix
from fastprefix.integrations.transformers.models import hooks

from .... import models

INTEGRATIONS = Path(fastprefix.__file__).parent / "integrations"
CONFIGS = [fastprefix.PrefixTuningConfig(2), fastprefix.PromptTuningConfig(2)]
METHODS = pytest.mark.parametrize("config", CONFIGS, ids=["prefix", "prompt"])


class Deprecated(LlamaModel):
    """A family that has renamed its positions and still translates the former name."""

    @deprecate_kwarg("position_ids", "99.0.0", new_name="positions")
    def forward(self, input_ids: Any = None, positions: Any = None, inputs_embeds: Any = None, **kwargs: Any):
        return super().forward(input_ids, position_ids=positions, inputs_embeds=inputs_embeds, **kwargs)


class OtherCache(LlamaModel):
    """A family with another name for its cache."""

    def forward(self, input_ids: Any = None, memory: Cache | None = None, inputs_embeds: Any = None, **kwargs: Any):
        return super().forward(input_ids, inputs_embeds=inputs_embeds, **kwargs)


def decoder_of(family: type[nn.Module]) -> Any:
    """Return the small decoder with a backbone of another family."""
    model: Any = models.decoder()
    model.model.__class__ = family
    return model


@METHODS
@pytest.mark.parametrize(
    ("family", "names"), [(Deprecated, "`position_ids` is called `positions` in Deprecated"), (OtherCache, "`memory`")]
)
def test_a_renamed_argument_is_an_error(config: Any, family: type[nn.Module], names: str) -> None:
    model = decoder_of(family)
    with pytest.raises(ValueError, match=names):
        fastprefix.attach(model, config)
    with pytest.raises(ValueError, match="attached"):
        fastprefix.detach(model)


@METHODS
@pytest.mark.parametrize(("names", "kind"), [("READ_ARGUMENTS", "argument"), ("READ_SETTINGS", "setting")])
def test_a_name_that_the_library_has_given_up_is_an_error(
    config: Any, names: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, names, getattr(hooks, names) | {"former_name"})
    with pytest.raises(ValueError, match=f"has no {kind} `former_name`"):
        fastprefix.attach(models.decoder(), config)


@pytest.mark.parametrize("family", [BartModel, BertModel, GPT2Model, LlamaModel, MambaModel, T5Model])
def test_families_that_lack_some_arguments_raise_no_alarm(family: type[nn.Module]) -> None:
    module = nn.Module()
    module.forward = family.forward.__get__(module)  # type: ignore[method-assign]
    assert set(hooks.check_parameter_names(module)) & hooks.READ_ARGUMENTS


def test_every_argument_that_is_read_is_declared() -> None:
    read = {name for path in INTEGRATIONS.rglob("*.py") for name in names_read(ast.parse(path.read_text("utf-8")))}
    assert {"attention_mask", "position_ids"} <= read
    assert read <= hooks.READ_ARGUMENTS


def names_read(tree: ast.AST) -> set[str]:
    """Return the names in ``arguments.get("...")`` and ``arguments["..."]``."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.Call(ast.Attribute(ast.Name("arguments"), "get" | "pop"), [ast.Constant(str(name)), *_]):
                names.add(name)
            case ast.Subscript(ast.Name("arguments"), ast.Constant(str(name))):
                names.add(name)
    return names


def test_caches_are_found_without_asking_for_former_names() -> None:
    """``transformers`` prints a warning if code reads an output by its name from before 5.24."""

    class Output(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            raise AssertionError(key)

    cache = DynamicCache()
    assert hooks.find_cache(Output(logits=None, cache=cache)) is cache
    with pytest.raises(TypeError, match="`past_key_values` must be a transformers Cache"):
        hooks.find_cache({"past_key_values": ()})
