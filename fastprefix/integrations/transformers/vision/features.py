"""Compute options of SHIP from training images: the layers that get new rows, and the prototypes of features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ....methods.base import check_positive
from ..attachment import use_adapter
from ..models.switching import evaluating, find_device
from .visual_prompt import PIXELS, VisionStack, find_vision_stack, get_state


def find_entered_layers(model: PreTrainedModel, images: Iterable[Any], *, alpha: float = 0.95) -> list[int]:
    """Choose the layers of a vision transformer that get new rows, by the similarity of their features.

    ``A[l, l']`` is the mean cosine similarity between the outputs of layers l and l' for the same token, over all
    tokens and images. Layer 0 is always chosen. After a chosen layer, the next later layer with ``A < alpha`` is chosen
    (SHIP, arXiv 2412.16956; the order of this search is our reading of the paper).

    Args:
        model: a vision transformer, or a model that contains one. An adapter on it is disabled during the computation.
        images: batches of images, for example from a data loader. Each batch is ``pixel_values`` ``[B, C, H, W]``, a
            mapping with that key, or a sequence with ``pixel_values`` as its first element.
        alpha: the threshold, from 0.93 to 0.98 in the paper. A larger value chooses more layers.

    Returns:
        The indices of the chosen layers, for ``SHIPConfig(layers=...)``.

    Raises:
        TypeError: if a batch has no pixels.
        ValueError: if ``images`` is empty, ``alpha`` is out of range, or the model has no stack of layers over images.
    """
    if not -1.0 <= alpha <= 1.0:
        raise ValueError(f"`alpha` must be between -1 and 1, got {alpha!r}.")
    total, count = torch.zeros(()), 0
    for states in _run_layers(model, images):
        features = F.normalize(torch.stack(states).flatten(1, 2).double(), dim=-1)  # [L, B * N, d]
        total = total + torch.einsum("lnd,knd->lk", features, features).cpu()
        count += features.shape[1]
    similarity = total / count
    entered = [0]
    for layer in range(1, len(similarity)):
        if similarity[entered[-1], layer] < alpha:
            entered.append(layer)
    return entered


def compute_bank(
    model: PreTrainedModel,
    images: Iterable[Any],
    *,
    count: int = 200,
    steps: int = 20,
    most: int = 20_000,
    seed: int = 0,
) -> Tensor:
    """Compute prototypes of image features with k-means, for ``SHIPConfig(bank=...)``.

    The features are the outputs of the last layer for the patches, without an adapter.

    Args:
        model: as for ``find_entered_layers``.
        images: as for ``find_entered_layers``.
        count: the number of prototypes, 200 in the paper.
        steps: the number of k-means iterations.
        most: the maximum number of features to cluster. They are drawn at random from all features.
        seed: the seed for drawing the features and the initial prototypes.

    Returns:
        The cluster means ``[count, d]`` in float32 on the CPU.

    Raises:
        TypeError: if a batch has no pixels.
        ValueError: if there are fewer features than prototypes, or the model has no stack of layers over an image.
    """
    check_positive("count", count)
    check_positive("most", most)
    if count > most:
        raise ValueError(f"`count` must be at most `most`, which is {most}, got {count}.")
    generator = torch.Generator().manual_seed(seed)
    with use_adapter(model, None):
        leading = find_vision_stack(model).leading
    patches = (states[-1][:, leading:].flatten(0, 1).float().cpu() for states in _run_layers(model, images))
    features = _draw(patches, most, generator)
    if len(features) < count:
        raise ValueError(f"`count` must be at most {len(features)}, the number of patches of all images, got {count}.")
    bank = features[:count].clone()
    for _ in range(steps):
        nearest = torch.cdist(features, bank).argmin(1)
        sums = torch.zeros_like(bank).index_add_(0, nearest, features)
        sizes = torch.bincount(nearest, minlength=count)[:, None]
        bank = torch.where(sizes > 0, sums / sizes.clamp(min=1), bank)
    return bank


def _draw(parts: Iterable[Tensor], most: int, generator: torch.Generator) -> Tensor:
    """Draw up to ``most`` rows from all parts ``[N, d]`` in random order, without holding more than these and a part.

    Each row gets a random number, and the rows with the smallest numbers are kept.
    """
    rows, numbers = torch.empty(0), torch.empty(0, dtype=torch.float64)
    for part in parts:
        fresh = torch.rand(len(part), generator=generator, dtype=torch.float64)
        numbers, order = torch.cat([numbers, fresh]).sort()
        numbers, order = numbers[:most], order[:most]
        rows = torch.cat([rows.reshape(-1, part.shape[1]), part])[order]
    return rows


def _run_layers(model: PreTrainedModel, images: Iterable[Any]) -> Iterator[list[Tensor]]:
    """Yield the output ``[B, N, d]`` of each layer for each batch, without an adapter."""
    with use_adapter(model, None):
        stack = find_vision_stack(model)
        found = False
        for batch in images:
            found = True
            yield _run_batch(stack, _find_pixels(batch).to(find_device(stack.part), stack.part.dtype))
    if not found:
        raise ValueError("`images` must contain at least one batch, but is empty.")


def _run_batch(stack: VisionStack, pixels: Tensor) -> list[Tensor]:
    states: list[Tensor] = []
    handles = [block.register_forward_hook(lambda *call: states.append(get_state(call[2]))) for block in stack.blocks]
    try:
        with evaluating(stack.part), torch.no_grad():
            stack.part(**{PIXELS: pixels})
    finally:
        for handle in handles:
            handle.remove()
    return states


def _find_pixels(batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        batch = batch.get(PIXELS)
    elif isinstance(batch, list | tuple):
        batch = batch[0] if batch else None
    if not isinstance(batch, Tensor) or not batch.is_floating_point() or batch.ndim != 4:
        actual = f"{batch.dtype} {list(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
        raise TypeError(f"`images` must contain batches of floating-point {PIXELS} [B, C, H, W], but one is {actual}.")
    return batch
