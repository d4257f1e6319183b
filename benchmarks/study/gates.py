"""The gates of a method as they stand, for the plots that the papers draw of them."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastprefix.methods import PrefixMethod

from ..tasks import Batch


@torch.no_grad()
def read(model: PreTrainedModel, batch: Batch) -> list[list[float]] | None:
    """Of every layer, for every prefix token: the mean over the batch. None: the method has no gates."""
    method = getattr(model, "fastprefix", None)
    if not isinstance(method, PrefixMethod):
        return None
    attended = batch["attention_mask"].bool()
    hidden: tuple[Tensor, ...] | list[None] = [None] * len(method.shapes)
    if method.needs_hidden():
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        hidden = model(**inputs, output_hidden_states=True).hidden_states
    gates = [method.prefix_gate(layer, hidden[layer], attended) for layer in range(len(method.shapes))]
    means = [_mean(gate, attended, method.config.num_virtual_tokens) for gate in gates if gate is not None]
    return means or None


def _mean(gate: Tensor, attended: Tensor, tokens: int) -> list[float]:
    """Over all that a gate ``[..., m]`` distinguishes beside the prefix tokens, padding left out."""
    if gate.ndim == 4:  # one for each query
        gate = gate[:, 0][attended]
    means: list[float] = gate.expand(*gate.shape[:-1], tokens).reshape(-1, tokens).mean(dim=0).tolist()
    return means
