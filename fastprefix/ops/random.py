"""Dropout from counter-based random numbers: the forward pass stores a seed, and the backward pass draws again.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The key is the seed, the
counter is the element's own position, and the first of the four words decides. So a decision depends on the position
alone, not on tiles, threads or devices, and every backend drops the same elements.
"""

import math

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """Draw a seed, int64 ``[1]``, from the device's own generator, without synchronising with it."""
    return torch.randint(0, 2**62, (1,), device=device, dtype=torch.int64)


def _multiply(a: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 x 32 bit product; int64 wraps around, so the low 64 bits are right."""
    product = a * factor
    return (product >> 32) & _WORD, product & _WORD


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words, each in the low half of an int64, for a counter of four words that broadcast together."""
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def threshold(p: float) -> int:
    """An element is dropped where its random word lies below this."""
    return round(p * 2**32)


def keep_factor(seed: Tensor, p: float, column: Tensor, row: Tensor, plane: Tensor) -> Tensor:
    """What dropout multiplies by: ``1 / (1 - p)`` where an element is kept, 0 where it is dropped.

    ``column``, ``row`` and ``plane`` are integer tensors that broadcast to the elements' shape. float64.
    """
    word = philox(seed, column, row, plane, torch.zeros_like(plane))[0]
    scale = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
    return (word >= threshold(p)).to(torch.float64) * scale


def keep_factor_at(seed: Tensor, p: float, shape: torch.Size, first_column: int = 0) -> Tensor:
    """:func:`keep_factor` for a whole tensor: columns along the last dimension, rows along the one before it, planes
    along all the others together.
    """
    *planes, rows, columns = shape
    column = torch.arange(first_column, first_column + columns, device=seed.device)
    row = torch.arange(rows, device=seed.device)[:, None]
    plane = torch.arange(math.prod(planes), device=seed.device).reshape(*planes, 1, 1)
    return keep_factor(seed, p, column, row, plane)
