"""Draw dropout from counter-based random numbers. The forward pass stores a seed, and the backward pass draws again.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The key is the
seed, and the counter is the element's position. A decision therefore depends only on the seed and the position, not on
tiles, threads or devices, and every backend drops the same elements.
"""

import math

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """Draw a seed, int64 ``[1]``, from the device's generator, without synchronizing with the device."""
    return torch.randint(0, 2**62, (1,), device=device, dtype=torch.int64)


def _multiply(a: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the high and low words of a 32 x 32 bit product. int64 wraps around, so the low 64 bits are correct."""
    product = a * factor
    return (product >> 32) & _WORD, product & _WORD


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four random words for a counter of four words that broadcast together.

    Each word is in the low half of an int64.
    """
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def find_threshold(p: float) -> int:
    """Return the threshold below which a random word drops its element."""
    return round(p * 2**32)


def draw_factor(seed: Tensor, p: float, shape: torch.Size, planes: Tensor | None = None) -> Tensor:
    """Draw the dropout factors in float64: ``1 / (1 - p)`` for kept elements and 0 for dropped ones.

    The first word for the counter (column, row, plane, 0) decides. Columns are along the last dimension of ``shape``,
    rows are along the dimension before it, and planes number all leading dimensions together. ``planes`` gives the
    numbers of the planes. By default they are 0, 1, 2 and so on.
    """
    *outer, rows, columns = shape
    row, column = (torch.arange(size, device=seed.device) for size in (rows, columns))
    plane = _number_planes(shape, seed.device) if planes is None else planes.reshape(*outer, 1, 1)
    words = philox(seed, column, row[:, None], plane, torch.zeros_like(seed))
    return _compare_words(words[0], p)


def draw_pair_factor(seed: Tensor, p: float, shape: torch.Size, tokens: bool, first_plane: int = 0) -> Tensor:
    """Draw the dropout factors of attention probabilities in float64, as :func:`draw_factor` does.

    Rows are queries. Columns are the keys of the tokens, or of the prefix if ``tokens`` is False. The four words of a
    counter decide for two rows and two columns that are 8 apart. The counter is (column, row, plane, ``tokens``), with
    bit 3 (value 8) of column and row cleared. Those two bits select the word. Planes are numbered from ``first_plane``.
    """
    *_, rows, columns = shape
    row, column = (_list_without_bit_3(size, seed.device) for size in (rows, columns))
    plane = _number_planes(shape, seed.device) + first_plane
    words = philox(seed, column, row[:, None], plane, torch.full_like(seed, int(tokens)))
    blocks = torch.stack(words, -1).unflatten(-1, (2, 2)).unflatten(-3, (-1, 8)).unflatten(-5, (-1, 8))
    whole = blocks.movedim((-2, -1), (-5, -2))  # [..., 16 rows, bit 3, 8, 16 columns, bit 3, 8]
    return _compare_words(whole.flatten(-6, -4).flatten(-3)[..., :rows, :columns], p)


def _list_without_bit_3(size: int, device: torch.device) -> Tensor:
    """List the numbers below ``size``, rounded up to a multiple of 16, whose bit 3 (value 8) is not set."""
    return (torch.arange(0, size, 16, device=device)[:, None] + torch.arange(8, device=device)).flatten()


def _number_planes(shape: torch.Size, device: torch.device) -> Tensor:
    return torch.arange(math.prod(shape[:-2]), device=device).reshape(*shape[:-2], 1, 1)


def _compare_words(word: Tensor, p: float) -> Tensor:
    return (word >= find_threshold(p)).to(torch.float64) * (0.0 if p == 1.0 else 1.0 / (1.0 - p))
