"""Choose the tile sizes of the kernels.

They are chosen so that no kernel spills on any compute capability, unless ``spills`` gives a reason. Compute capability
9.0 has larger tiles, because its matrix instructions read shared memory and leave registers to the accumulators.
"""

from typing import NamedTuple


class EmbeddingTile(NamedTuple):
    """The sizes of a kernel's tiles, and its warps and pipeline stages."""

    BT: int  # tokens
    BD: int  # columns of the model width
    RP: int  # hidden units; unused by kernels without them
    warps: int
    stages: int = 3
    spills: str | None = None  # the reason why register spills are accepted, if they are
    resident: int = 2  # programs per multiprocessor into which sums over tokens are split


_SLIGHT = "Triton 3.7 spills 8 bytes (not measured)"
_SUMS = "on some devices, Triton 3.7 spills 8 bytes (not measured)"


def _padded(r: int) -> int:
    """Return the next power of two that matrix instructions support."""
    return max(16, 1 << (r - 1).bit_length())


def copy(d: int, element_size: int) -> EmbeddingTile:
    """Return the tile of the forward pass of PT, with four loads of 16 bytes per thread."""
    BD = min(1024 // element_size, max(64, 1 << (d - 1).bit_length()))
    return EmbeddingTile(8192 // element_size // BD, BD, 16, 4)


def forward(r: int, element_size: int, architecture: str) -> EmbeddingTile:
    """Return the tile of the forward pass of ADePT, in which a program holds all hidden units."""
    RP = _padded(r)
    if element_size == 4:
        return (
            EmbeddingTile(16, 32, RP, 4)
            if RP <= 32
            else EmbeddingTile(16, 32, RP, 8)
            if RP <= 128
            else EmbeddingTile(16, 16, RP, 8)
        )
    if RP <= 32:
        return EmbeddingTile(64, 256, RP, 8) if architecture == "sm_90" else EmbeddingTile(32, 128, RP, 8, 4)
    return (
        EmbeddingTile(32, 64, RP, 8)
        if RP <= 64
        else EmbeddingTile(16, 64, RP, 4)
        if RP <= 128
        else EmbeddingTile(16, 32, RP, 8, 2)
    )


def low_rank(r: int, element_size: int) -> EmbeddingTile:
    """Return the tile of the forward pass of DePT and ACCEPT, which sums over the rank in parts."""
    RP = min(64, _padded(r))
    if element_size == 4:
        return EmbeddingTile(16, 64, RP, 4, 2) if RP == 16 else EmbeddingTile(16, 32, RP, 4, 2 if RP == 32 else 3)
    return EmbeddingTile(16, 256, RP, 4)


def hidden(r: int, element_size: int, architecture: str) -> EmbeddingTile:
    """Return the tile of the backward kernel for z and dh, which has a program per part of the hidden units."""
    RP = min(64, _padded(r))
    if element_size == 4:
        return EmbeddingTile(16, 32, RP, 8 if RP == 64 else 4)
    if architecture == "sm_90":
        return EmbeddingTile(64, 128 if RP <= 32 else 64, RP, 4)
    return EmbeddingTile(32, 64, RP, 8 if RP == 64 else 4)


def weights(r: int, element_size: int, architecture: str, bank: bool) -> EmbeddingTile:
    """Return the tile of the backward kernel that sums over tokens.

    With a bank, a loop over the rows encloses the loop over the tokens, and a third pipeline stage would spill.
    """
    RP, stages = min(64, _padded(r)), 2 if bank else 3
    if element_size == 4:
        spills = _SLIGHT if architecture in ("sm_86", "sm_120") and RP == 64 else None
        return EmbeddingTile(16, 32, RP, 8 if bank and RP == 32 else 4, stages, spills)
    if architecture == "sm_90" and RP <= 32:
        return EmbeddingTile(32, 128, RP, 4, stages, resident=3)
    spills = _SLIGHT if architecture == "sm_120" and bank and RP == 64 else None
    return EmbeddingTile(32, 64, RP, 8 if RP == 64 or (bank and RP == 16) else 4, stages, spills, resident=3)


def sums(r: int) -> EmbeddingTile:
    """Return the tile of the backward kernel that sums parts. BT is the number of partial sums of an element."""
    return EmbeddingTile(16, 128, max(32, min(128, _padded(r))), 4, spills=_SUMS)


def spans() -> EmbeddingTile:
    """Return the tile of the backward kernel that sums over the rows with copies of a vector."""
    return EmbeddingTile(32, 64, 0, 4)
