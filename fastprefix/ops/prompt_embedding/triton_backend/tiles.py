"""The tiles of the kernels, as data. None has been measured on a device yet: they are chosen so that every kernel
compiles without spills, on compute capability 8.0, 8.6 and 9.0.
"""

from typing import NamedTuple


class EmbeddingTile(NamedTuple):
    """Tokens, columns of the model width, hidden units (0: none); warps and pipeline stages."""

    BT: int
    BD: int
    RP: int
    warps: int
    stages: int = 3
    spills: str | None = None  # why a spill is accepted, where one is


def _padded(r: int) -> int:
    """Return the next power of two that matrix instructions support."""
    return max(16, 1 << (r - 1).bit_length())


def forward(r: int, element_size: int) -> EmbeddingTile:
    """ADePT: a program needs all hidden units at once."""
    RP = _padded(r)
    if element_size == 4:
        return (
            EmbeddingTile(16, 32, RP, 4)
            if RP <= 32
            else EmbeddingTile(16, 32, RP, 8)
            if RP <= 128
            else EmbeddingTile(16, 16, RP, 8)
        )
    return (
        EmbeddingTile(32, 64, RP, 4)
        if RP <= 64
        else EmbeddingTile(16, 64, RP, 4)
        if RP <= 128
        else EmbeddingTile(16, 32, RP, 8, 2)
    )


def low_rank(r: int, element_size: int) -> EmbeddingTile:
    """DePT: the rank is summed over part by part."""
    RP = min(64, _padded(r))
    if element_size == 4:
        return EmbeddingTile(16, 64, RP, 4, 2) if RP == 16 else EmbeddingTile(16, 32, RP, 4, 2 if RP == 32 else 3)
    return EmbeddingTile(32, 64, RP, 4)


def hidden(r: int, element_size: int) -> EmbeddingTile:
    """Backward, z and dh: a program for each part of the hidden units."""
    RP = min(64, _padded(r))
    return EmbeddingTile(16, 32, RP, 4) if element_size == 4 else EmbeddingTile(32, 64, RP, 4)


def weights(r: int, element_size: int, bank: bool) -> EmbeddingTile:
    """Backward, sums over tokens: in blocks of as many tokens as in ``hidden``.

    With a bank, a loop over the rows of the batch is around that over the tokens, and a third stage would spill.
    """
    RP, stages = min(64, _padded(r)), 2 if bank else 3
    if element_size == 4:
        return EmbeddingTile(16, 32, RP, 4, stages)
    return EmbeddingTile(32, 64, RP, 8 if RP == 64 else 4, stages)


def spans() -> EmbeddingTile:
    """Backward, sums over the rows of the batch that have copies of a row."""
    return EmbeddingTile(32, 64, 0, 4)
