"""Run PEFT's prompts on a decoder once for the whole batch. ``shared_prompt`` explains why this is exact."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ..transformers.models.attention import GivenPrefix, make_two_adapters_error
from ..transformers.models.discovery import Layer, ModuleCall, find_backbone, record_calls
from ..transformers.models.hooks import (
    Forward,
    Interception,
    asks_for,
    checkpoints_reentrantly,
    find_cache,
    name_arguments,
    read_parameter_names,
)
from ..transformers.models.positions import Positions
from ..transformers.models.switching import find_device, runs_with_adapter
from ..transformers.prefixes.prefix import PrefixCache
from ..transformers.prompts.shared_prompt import Randomness, add_reached_token, capturing, saves_time
from .mixing import PeftMixture
from .prefix import PeftCall, PromptLearning, SplitStates, repeat_before

_LOSS = "_loss_function"
"""The attribute of a ``transformers`` model that holds a custom loss function."""


class PromptAcceleration(PromptLearning):
    """The acceleration of prompts: PEFT puts a placeholder before every row, which the backbone replaces.

    PEFT calls ``get_prompt`` and then the model. ``get_prompt`` returns a placeholder without gradients, and the
    backbone removes it and runs the actual prompt once. The head also runs once on the prompt's states. The loss starts
    at the last prompt state, whose label is the first token.
    """

    def __init__(self, peft_model: Any, layers: list[Layer]) -> None:
        model = peft_model.base_model
        backbone = find_innermost_backbone(model)
        self.positions = Positions.find(backbone)
        head = model.get_output_embeddings()
        # The rest changes the model. Everything that runs the model or can raise an error comes before.
        super().__init__(peft_model, [layer.module for layer in layers], backbone)
        self.layers = layers
        self.layer_names = {module: name for name, module in self.modules.items()}
        self.randomness = Randomness(self.backbone)
        if type(head) is nn.Linear:
            self.handles.append(Interception(head, self.run_head, (model, self.backbone)))
        self.former_loss = vars(model).get(_LOSS)
        if getattr(model, "loss_function", None) is ForCausalLMLoss:
            setattr(model, _LOSS, self.compute_loss)

    def make_prompt(self, call: PeftCall, batch_size: int, task_ids: Tensor | None) -> Tensor:
        """Return a placeholder for the prompt in every row, or the prompts themselves if the rows' tasks differ."""
        get_prompt = self.replacement.call_former
        if task_ids is not None and not bool((task_ids == task_ids[:1]).all()):
            prompts: Tensor = get_prompt(batch_size, task_ids)
            return prompts
        prompt: Tensor = get_prompt(1, None if task_ids is None else task_ids[:1])
        call.prompt = prompt
        return prompt.detach().expand(batch_size, -1, -1)

    def make_mixture(self) -> PeftMixture:
        """Return the hooks of a batch with different prompts."""
        return PeftMixture(self.peft_model, self.layers, None)

    def remove(self) -> None:
        """Remove all hooks."""
        super().remove()
        attributes = vars(self.peft_model.base_model)
        if attributes.get(_LOSS) == self.compute_loss:
            del attributes[_LOSS]
            if self.former_loss is not None:
                attributes[_LOSS] = self.former_loss

    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the prompt once, then the tokens after it. The output has both, as PEFT's heads and labels expect."""
        arguments = name_arguments(self.names, args, kwargs)
        call = self.call_in_progress()
        if call is None or call.prompt is None:
            return super().run(forward, (), arguments)
        if runs_with_adapter(self.backbone):
            raise make_two_adapters_error()
        embeds = arguments["inputs_embeds"]
        prompt, call.prompt = call.prompt.to(embeds), None
        length = prompt.shape[1]
        alone = self._find_prompt_arguments(arguments, length)
        if alone is None:
            prompts = prompt.expand(embeds.shape[0], -1, -1)
            arguments["inputs_embeds"] = torch.cat([prompts, embeds[:, length:]], dim=1)
            return super().run(forward, (), arguments)
        self.implementation.check()
        reach = None
        if self.positions.by_length is not None:
            positions = self.positions.move_ids(arguments, 0)
            reach = positions[..., :1, :length], positions.amax()
        ran, cache = self._run_prompt(forward, prompt, alone, reach)
        rest = {name: value[..., length:] for name, value in _find_token_arguments(arguments, embeds).items()}
        arguments.update(rest, inputs_embeds=embeds[:, length:])
        arguments[self.cache_name] = cache
        output = super().run(forward, (), arguments)
        if not asks_for(arguments, self.backbone, "use_cache"):
            output = _drop_cache(output, cache)
        return self._restore(call, ran, output)

    def run_head(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the head on hidden states. The prompt's states, which are the same in every row, run once."""
        states = self._find_states()
        given = next(iter((*args, *kwargs.values())), None)
        if states is None or not isinstance(given, Tensor) or not states.is_whole(given):
            return forward(*args, **kwargs)
        return repeat_before(forward(states.prompt), forward(states.tokens))

    def compute_loss(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute a language model's loss from the last prompt position on, whose label is the first token.

        PEFT's labels of the prompt are all -100, so its other positions do not contribute.
        """
        states = self._find_states()
        whole = () if states is None else states.whole.shape[:2]
        options = kwargs.get("shift_labels"), kwargs.get("ignore_index")
        if states is not None and logits.shape[:2] == labels.shape == whole and options == (None, None):
            first = states.prompt.shape[1] - 1
            logits, labels = logits[:, first:].float().contiguous(), labels[:, first:]
        loss: Tensor = ForCausalLMLoss(logits, labels, *args, **kwargs)
        return loss

    def _find_states(self) -> SplitStates | None:
        """Return the backbone's output in the call in progress if the prompt ran once, or None."""
        call = self.call_in_progress()
        return None if call is None or torch.compiler.is_compiling() else call.states

    def _restore(self, call: PeftCall, ran: Any, output: Any) -> Any:
        """Put the prompt's hidden states before those of every row."""
        first = output[0] if isinstance(output, tuple) else output.last_hidden_state
        call.states = SplitStates(ran.last_hidden_state, first)
        if isinstance(output, tuple):
            return (call.states.whole, *output[1:])
        output.last_hidden_state = call.states.whole
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(map(repeat_before, ran.hidden_states, output.hidden_states))
        return output

    def _find_prompt_arguments(self, arguments: dict[str, Any], length: int) -> dict[str, Any] | None:
        """Return the arguments for running the prompt alone, or None if the prompt must run in every row."""
        cache, mask = find_cache(arguments), arguments.get("attention_mask")
        drops = self.randomness.acts()  # drawn separately in every row
        counted = getattr(self.backbone.config, "output_router_logits", False) or arguments.get("output_router_logits")
        plain = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
        trains = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        saved = (arguments["inputs_embeds"].shape[0] - 1) * length
        slower = trains and not saves_time(self.backbone, len(self.layers), saved)
        filled = cache is not None and cache.get_seq_length() > 0
        if not plain or slower or drops or counted or filled or checkpoints_reentrantly(self.backbone):
            return None
        alone: dict[str, Any] = {"output_hidden_states": arguments.get("output_hidden_states")}
        for name, value in _find_token_arguments(arguments, arguments["inputs_embeds"]).items():
            if name == "attention_mask":
                continue
            first = value[..., :1, :length]
            if value.shape[-2] > 1 and not torch.equal(value[..., :length], first.expand(*value.shape[:-1], -1)):
                return None
            alone[name] = first
        return alone

    def _run_prompt(
        self, forward: Forward, prompt: Tensor, alone: dict[str, Any], reach: tuple[Tensor, Tensor] | None
    ) -> tuple[Any, PrefixCache]:
        """Run the prompt ``[1, m, d]``, and return the model's output and a cache with all layers' keys and values.

        ``reach`` holds the prompt's positions and the last position of the call, if rotary frequencies depend on it.
        """
        length = prompt.shape[1]
        if reach is not None:
            longer = {name: _repeat_last(value) for name, value in alone.items()}
            prompt, longer["position_ids"] = add_reached_token(prompt, *reach)
            alone = longer
        with capturing(self.backbone, self.layers, None) as captured:
            ran = forward(inputs_embeds=prompt, use_cache=False, return_dict=True, **alone)
        ran.last_hidden_state = ran.last_hidden_state[:, :length]
        if getattr(ran, "hidden_states", None) is not None:
            ran.hidden_states = tuple(state[:, :length] for state in ran.hidden_states)
        prefixes = {}
        for layer in self.layers:
            key, value = (tensor[0, :, :length] for tensor in captured[layer.module])
            prefixes[self.layer_names[layer.module]] = GivenPrefix(key, value, window=layer.window)
        return ran, PrefixCache(len(self.layers), length, prefixes)


def _drop_cache(output: Any, cache: PrefixCache) -> Any:
    """Return the output of a backbone without the cache that held the prompt, which the caller has not asked for."""
    if isinstance(output, tuple):
        return tuple(value for value in output if value is not cache)
    output.past_key_values = None
    return output


def _repeat_last(value: Any) -> Any:
    """Return a tensor with a value per token with its last value repeated, or another argument unchanged."""
    return torch.cat([value, value[..., -1:]], dim=-1) if isinstance(value, Tensor) else value


def _find_token_arguments(arguments: dict[str, Any], embeds: Tensor) -> dict[str, Tensor]:
    """Return the arguments ``[..., B, m + N]`` with a number per token of the embeddings."""
    rows, tokens = embeds.shape[:2]
    return {
        name: value
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.ndim in (2, 3) and value is not embeds
        if value.shape[-1] == tokens and value.shape[-2] in (1, rows) and not value.is_floating_point()
    }


def find_innermost_backbone(model: PreTrainedModel) -> nn.Module:
    """Return the innermost module that a model calls with embeddings and an attention mask ``[B, N]``.

    Models of images and text compute multidimensional positions before they call it.
    """
    backbone = find_backbone(model)
    inside = [module for module in backbone.modules() if isinstance(module, PreTrainedModel) and module is not backbone]
    readers = [module for module in inside if "inputs_embeds" in read_parameter_names(module)]
    ids = torch.zeros(1, 2, dtype=torch.long, device=find_device(model))

    def find_innermost(calls: dict[nn.Module, ModuleCall]) -> nn.Module:
        innermost = backbone
        for module, call in calls.items():
            arguments = call.name_arguments(module)
            embeds, mask = arguments.get("inputs_embeds"), arguments.get("attention_mask")
            is_plain = isinstance(embeds, Tensor) and isinstance(mask, Tensor) and mask.shape == ids.shape
            if is_plain and module in set(innermost.modules()):
                innermost = module
        return innermost

    def is_enough(calls: dict[nn.Module, ModuleCall]) -> bool:
        innermost = find_innermost(calls)
        return not any(module in readers for module in innermost.modules() if module is not innermost)

    if not readers:
        return backbone
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
    inputs = {"inputs_embeds": embeds, "attention_mask": torch.ones_like(ids), "use_cache": False}
    calls, error = record_calls(backbone, readers, is_enough, **inputs)
    return backbone if error is not None else find_innermost(calls)
