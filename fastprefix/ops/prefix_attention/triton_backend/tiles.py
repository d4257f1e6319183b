"""Choose tile sizes by architecture, kernel, head dimension and dtype. Nothing is tuned at run time.

Tiles without a ``spills`` reason do not spill with Triton 3.7, and on compute capability 9.0 neither with 3.6.
Compilers allocate registers differently: on other capabilities, which were not measured, Triton 3.6, 3.8 and 3.9 spill
up to 24 bytes for some calls with many options.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class AttentionTile(NamedTuple):
    """The block sizes of a kernel, and its warps and pipeline stages."""

    BM: int  # queries
    BN: int  # token keys
    BP: int  # prefix keys
    warps: int
    stages: int
    spills: str | None = None  # the reason why register spills are accepted, if they are


HALF, SINGLE = "half", "single"  # float16 and bfloat16; float32

_WIDE = "with more than 128 columns, two accumulators are in registers (not measured)"
_NARROW = "some versions of Triton spill 8 bytes for heads of 16 columns (not measured)"
_NARROW_PREFIX = "Triton 3.7 spills 16 bytes for heads of 16 columns (not measured)"
_PADDED = "some versions of Triton spill up to 16 bytes if every load masks columns (not measured)"
_WINDOW = "a window with gates spills 8 bytes (not measured)"
_EVERY = "with every option at once, some versions of Triton spill 8 bytes (not measured)"
_FLOAT = "float32 products run without matrix units (not measured)"

# kernel -> (largest head dimension, dtype) -> tile. Heads of 65 to 127 columns have separate tiles (127), because every
# load of their padded rows masks columns. A block has 163 KB of shared memory on sm_80, 99 KB on sm_86.
_SM80: dict[str, dict[tuple[int, str], AttentionTile]] = {
    "forward": {
        (16, HALF): AttentionTile(128, 64, 64, 4, 2),
        (64, HALF): AttentionTile(128, 64, 64, 8, 2),
        (127, HALF): AttentionTile(64, 32, 32, 4, 2),
        (128, HALF): AttentionTile(128, 64, 64, 8, 2),
        (256, HALF): AttentionTile(64, 32, 32, 8, 2, _WIDE),
        (64, SINGLE): AttentionTile(64, 32, 32, 4, 2, _FLOAT),
        (128, SINGLE): AttentionTile(32, 32, 32, 4, 2, _FLOAT),
        (256, SINGLE): AttentionTile(32, 16, 16, 4, 1, _FLOAT),
    },
    "decode": {
        (16, HALF): AttentionTile(16, 64, 64, 4, 2, _NARROW),
        (64, HALF): AttentionTile(16, 64, 64, 4, 2),
        (128, HALF): AttentionTile(16, 64, 64, 4, 3),
        (256, HALF): AttentionTile(16, 32, 32, 4, 2, _WIDE),
        (64, SINGLE): AttentionTile(16, 32, 32, 4, 2, _FLOAT),
        (128, SINGLE): AttentionTile(16, 32, 32, 4, 2, _FLOAT),
        (256, SINGLE): AttentionTile(16, 16, 16, 4, 1, _FLOAT),
    },
    "delta": {
        (64, HALF): AttentionTile(64, 64, 64, 4, 2),
        (128, HALF): AttentionTile(64, 32, 32, 4, 2),
        (256, HALF): AttentionTile(32, 32, 32, 4, 1, _WIDE),
        (64, SINGLE): AttentionTile(32, 32, 32, 4, 2, _FLOAT),
        (128, SINGLE): AttentionTile(32, 32, 32, 4, 1, _FLOAT),
        (256, SINGLE): AttentionTile(16, 16, 16, 4, 1, _FLOAT),
    },
    "dq": {
        (16, HALF): AttentionTile(64, 64, 64, 4, 2),
        (64, HALF): AttentionTile(128, 64, 64, 8, 2),
        (128, HALF): AttentionTile(64, 64, 64, 8, 2),
        (256, HALF): AttentionTile(64, 32, 32, 8, 1, _WIDE),
        (64, SINGLE): AttentionTile(32, 32, 32, 4, 1, _FLOAT),
        (128, SINGLE): AttentionTile(32, 32, 32, 8, 1, _FLOAT),
        (256, SINGLE): AttentionTile(16, 16, 16, 8, 1, _FLOAT),
    },
    "dkv": {
        (64, HALF): AttentionTile(32, 64, 64, 4, 2),
        (128, HALF): AttentionTile(64, 64, 64, 8, 2),
        (256, HALF): AttentionTile(32, 64, 64, 8, 1, _WIDE),
        (64, SINGLE): AttentionTile(32, 32, 32, 4, 1, _FLOAT),
        (128, SINGLE): AttentionTile(32, 32, 32, 8, 1, _FLOAT),
        (256, SINGLE): AttentionTile(16, 16, 16, 8, 1, _FLOAT),
    },
    "dprefix": {
        (64, HALF): AttentionTile(32, 64, 64, 4, 2),
        (128, HALF): AttentionTile(64, 64, 64, 8, 2),
        (256, HALF): AttentionTile(32, 64, 64, 8, 1, _WIDE),
        (64, SINGLE): AttentionTile(32, 32, 32, 4, 1, _FLOAT),
        (128, SINGLE): AttentionTile(32, 32, 32, 8, 1, _FLOAT),
        (256, SINGLE): AttentionTile(16, 16, 16, 8, 1, _FLOAT),
    },
}
_SM86: dict[str, dict[tuple[int, str], AttentionTile]] = {
    **_SM80,
    "decode": {
        **_SM80["decode"],
        (64, HALF): AttentionTile(16, 64, 64, 4, 3),
        (128, HALF): AttentionTile(16, 32, 32, 4, 3),
    },
    "delta": {**_SM80["delta"], (128, HALF): AttentionTile(64, 32, 32, 4, 1)},
    "dq": {**_SM80["dq"], (127, HALF): AttentionTile(64, 64, 32, 8, 2)},
    "dkv": {**_SM80["dkv"], (256, HALF): AttentionTile(32, 32, 32, 8, 1, _WIDE)},
    "dprefix": {
        **_SM80["dprefix"],
        (16, HALF): AttentionTile(32, 64, 64, 4, 1),
        (256, HALF): AttentionTile(32, 32, 32, 8, 1, _WIDE),
    },
}
_SM90: dict[str, dict[tuple[int, str], AttentionTile]] = {  # 64 and 128 columns: measured (not decode, delta)
    "forward": {
        **_SM80["forward"],
        (64, HALF): AttentionTile(64, 64, 64, 4, 3),
        (127, HALF): AttentionTile(128, 64, 64, 8, 2),
        (128, HALF): AttentionTile(64, 64, 64, 4, 3),
        (256, HALF): AttentionTile(64, 64, 32, 8, 2, _WIDE),
    },
    "extend": {
        **_SM80["forward"],
        (64, HALF): AttentionTile(64, 64, 32, 4, 3),
        (127, HALF): AttentionTile(128, 64, 64, 8, 2),
        (128, HALF): AttentionTile(128, 64, 32, 8, 3),
    },
    "decode": {
        **_SM80["decode"],
        (64, HALF): AttentionTile(16, 64, 32, 4, 2),
        (127, HALF): AttentionTile(16, 64, 64, 4, 2),
        (128, HALF): AttentionTile(16, 64, 32, 4, 2),
    },
    "delta": _SM80["delta"],
    "dq": {
        **_SM80["dq"],
        (64, HALF): AttentionTile(64, 64, 64, 4, 3),
        (127, HALF): AttentionTile(128, 64, 64, 8, 2),
        (128, HALF): AttentionTile(128, 64, 64, 8, 3),
    },
    "dq of prefix": {
        **_SM80["dq"],
        (64, HALF): AttentionTile(64, 64, 32, 4, 3),
        (128, HALF): AttentionTile(64, 64, 32, 4, 2),
    },
    "dkv": {
        **_SM80["dkv"],
        (64, HALF): AttentionTile(64, 64, 64, 4, 3),
        (127, HALF): AttentionTile(32, 128, 64, 8, 2),
        (128, HALF): AttentionTile(32, 128, 64, 8, 3),
    },
    "dprefix": {
        **_SM80["dprefix"],
        (64, HALF): AttentionTile(64, 64, 64, 4, 3),
        (127, HALF): AttentionTile(32, 64, 64, 4, 2),
        (128, HALF): AttentionTile(32, 64, 64, 4, 3),
    },
}

# Entries that replace the ones above for calls that need more registers. "pairwise" calls read an operand for each pair
# of query and key (a gate, a bias or a mask). "capped" calls have a soft cap. "separate" calls have two softmaxes.
# "dropout" calls have dropout, and "dropout of pairs" calls also read an operand for each pair. Each of these, and
# "plain", may have entries for "keyed" calls, which have a bias of prefix keys or spans. A kernel without an entry uses
# its tile above.
_DECODE_DROPOUT = {
    (16, HALF): AttentionTile(16, 32, 32, 4, 2, _NARROW),
    (64, HALF): AttentionTile(16, 32, 32, 4, 3),
    (128, HALF): AttentionTile(16, 32, 32, 4, 2),
}
_SMALLEST: dict[str, dict[tuple[int, str], AttentionTile]] = {
    "forward": {
        (64, HALF): AttentionTile(64, 32, 32, 8, 1),
        (127, HALF): AttentionTile(32, 32, 16, 4, 1, _EVERY),
        (128, HALF): AttentionTile(64, 32, 32, 8, 1),
    },
    "dq": {(64, HALF): AttentionTile(64, 32, 32, 8, 1), (128, HALF): AttentionTile(32, 32, 32, 4, 1)},
    "dkv": {
        (16, HALF): AttentionTile(16, 32, 32, 4, 1),
        (64, HALF): AttentionTile(32, 32, 32, 4, 1),
        (127, HALF): AttentionTile(16, 32, 32, 8, 1, _PADDED),
        (128, HALF): AttentionTile(32, 32, 32, 4, 1),
    },
    "dprefix": {(64, HALF): AttentionTile(32, 32, 32, 8, 1), (128, HALF): AttentionTile(32, 32, 32, 8, 1)},
    "decode": _DECODE_DROPOUT,
}
_DROPOUT: dict[str, dict[tuple[int, str], AttentionTile]] = {
    "forward": {(64, HALF): AttentionTile(128, 64, 64, 8, 2), (128, HALF): AttentionTile(64, 64, 32, 8, 2)},
    "dq": {(64, HALF): AttentionTile(64, 32, 32, 8, 1), (128, HALF): AttentionTile(64, 64, 64, 8, 2)},
    "dkv": {(64, HALF): AttentionTile(32, 64, 64, 4, 2), (128, HALF): AttentionTile(64, 64, 64, 8, 2)},
    "dprefix": {(64, HALF): AttentionTile(32, 64, 64, 8, 1), (128, HALF): AttentionTile(32, 64, 64, 8, 2)},
    "decode": _DECODE_DROPOUT,
}
_KEYED: dict[str, dict[str, dict[tuple[int, str], AttentionTile]]] = {
    "plain, keyed": {
        "dq": {(64, HALF): AttentionTile(128, 64, 32, 8, 2)},
        "dprefix": {(64, HALF): AttentionTile(32, 64, 64, 4, 2), (128, HALF): AttentionTile(32, 64, 64, 8, 1)},
    },
    "separate, keyed": {
        "dprefix": {(64, HALF): AttentionTile(32, 64, 64, 4, 2), (128, HALF): AttentionTile(32, 64, 64, 8, 1)}
    },
    "dropout of pairs, keyed": {"dprefix": {(128, HALF): AttentionTile(32, 32, 16, 8, 1, _EVERY)}},
}
_SM80_VARIANTS: dict[str, dict[str, dict[tuple[int, str], AttentionTile]]] = {
    "pairwise": {
        "forward": {(64, HALF): AttentionTile(64, 64, 64, 4, 2), (128, HALF): AttentionTile(64, 64, 32, 8, 2)},
        "dq": {(64, HALF): AttentionTile(64, 64, 32, 8, 2), (128, HALF): AttentionTile(64, 32, 32, 8, 2)},
        "dkv": {(64, HALF): AttentionTile(32, 64, 64, 8, 1), (128, HALF): AttentionTile(32, 64, 64, 8, 1)},
        "dprefix": {(64, HALF): AttentionTile(32, 64, 64, 8, 1), (128, HALF): AttentionTile(32, 64, 64, 8, 1)},
    },
    "capped": {
        "forward": {(128, HALF): AttentionTile(128, 32, 64, 8, 2)},
        "dprefix": {(64, HALF): AttentionTile(32, 64, 64, 8, 1)},
    },
    "pairwise, keyed": {"dprefix": {(128, HALF): AttentionTile(32, 64, 32, 8, 1)}},
    "dropout": _DROPOUT,
    "dropout of pairs": {
        **_SMALLEST,
        "forward": {**_SMALLEST["forward"], (128, HALF): AttentionTile(32, 32, 32, 4, 2)},
    },
    **_KEYED,
}
_SM86_VARIANTS: dict[str, dict[str, dict[tuple[int, str], AttentionTile]]] = {
    **_SM80_VARIANTS,
    "dropout of pairs": {
        **_SM80_VARIANTS["dropout of pairs"],
        "dkv": {**_SMALLEST["dkv"], (64, HALF): AttentionTile(32, 32, 32, 8, 1)},
        "dprefix": {**_SMALLEST["dprefix"], (64, HALF): AttentionTile(32, 32, 32, 4, 1)},
    },
    "plain, keyed": {
        **_KEYED["plain, keyed"],
        "decode": {(64, HALF): AttentionTile(16, 64, 32, 4, 3), (128, HALF): AttentionTile(16, 32, 32, 8, 2)},
    },
}
_SM90_VARIANTS: dict[str, dict[str, dict[tuple[int, str], AttentionTile]]] = {
    "pairwise": {
        "forward": {(64, HALF): AttentionTile(64, 64, 64, 4, 2), (128, HALF): AttentionTile(128, 64, 64, 8, 2)},
        "dq": {(64, HALF): AttentionTile(64, 64, 32, 4, 2), (128, HALF): AttentionTile(64, 64, 32, 8, 2)},
        "dprefix": {(64, HALF): AttentionTile(64, 64, 64, 4, 2), (128, HALF): AttentionTile(32, 64, 64, 8, 2)},
    },
    "capped": {
        "forward": {(128, HALF): AttentionTile(128, 64, 64, 8, 3)},
        "dq": {(64, HALF): AttentionTile(128, 64, 64, 8, 2), (128, HALF): AttentionTile(128, 64, 64, 8, 2)},
        "dkv": {(64, HALF): AttentionTile(64, 128, 64, 8, 2)},
    },
    "separate": {
        "forward": {(64, HALF): AttentionTile(128, 64, 64, 8, 3)},
        "dprefix": {(64, HALF): AttentionTile(64, 64, 64, 4, 2), (128, HALF): AttentionTile(32, 128, 128, 8, 2)},
    },
    "dropout": {
        "forward": {(64, HALF): AttentionTile(64, 64, 64, 4, 2), (128, HALF): AttentionTile(128, 64, 64, 8, 2)},
        "dq": {(64, HALF): AttentionTile(64, 64, 32, 4, 1), (128, HALF): AttentionTile(64, 32, 32, 4, 1)},
        "dkv": {(64, HALF): AttentionTile(32, 128, 64, 8, 2), (128, HALF): AttentionTile(32, 128, 64, 8, 2)},
        "dprefix": {(64, HALF): AttentionTile(32, 64, 64, 4, 2), (128, HALF): AttentionTile(64, 32, 32, 8, 1)},
        "decode": _DECODE_DROPOUT,
    },
    "dropout of pairs": {
        **_SMALLEST,
        "dq": {
            (16, HALF): AttentionTile(64, 32, 32, 8, 1),
            (64, HALF): AttentionTile(32, 32, 32, 4, 1),
            (128, HALF): AttentionTile(32, 32, 32, 4, 1),
        },
    },
    "plain, keyed": {
        "decode": {(64, HALF): AttentionTile(16, 64, 32, 4, 2), (128, HALF): AttentionTile(16, 64, 64, 4, 2)},
        "dprefix": {(64, HALF): AttentionTile(64, 64, 64, 8, 2), (128, HALF): AttentionTile(32, 64, 64, 8, 2)},
    },
    "pairwise, keyed": {"dprefix": {(64, HALF): AttentionTile(64, 64, 64, 8, 2)}},
    "separate, keyed": {"dprefix": {(64, HALF): AttentionTile(64, 64, 64, 8, 2)}},
    "dropout of pairs, keyed": _KEYED["dropout of pairs, keyed"],
}

# Compute capability 10 accumulates products in tensor memory and copies them to registers, so its tiles need more warps
# than those of 9.0. Compute capability 12 has as much shared memory as 8.6.
_SM100_DECODE_DROPOUT = {**_DECODE_DROPOUT, (64, HALF): AttentionTile(16, 32, 32, 4, 2)}
_SM100: dict[str, dict[tuple[int, str], AttentionTile]] = {
    "forward": {
        **_SM80["forward"],
        (16, HALF): AttentionTile(128, 64, 64, 8, 2),
        (127, HALF): AttentionTile(128, 64, 64, 8, 2),
        (256, HALF): AttentionTile(64, 64, 32, 8, 2, _WIDE),
    },
    "decode": {**_SM90["decode"], (128, HALF): AttentionTile(16, 32, 32, 4, 2)},
    "delta": {**_SM80["delta"], (128, HALF): AttentionTile(64, 32, 32, 8, 2)},
    "dq": {**_SM80["dq"], (128, HALF): AttentionTile(128, 64, 64, 8, 2)},
    "dkv": {
        **_SM80["dkv"],
        (64, HALF): AttentionTile(64, 128, 64, 8, 2),
        (128, HALF): AttentionTile(32, 128, 64, 8, 2),
    },
    "dprefix": {
        **_SM80["dprefix"],
        (64, HALF): AttentionTile(64, 64, 64, 4, 2),
        (128, HALF): AttentionTile(32, 64, 64, 4, 2),
    },
}
_SM100_VARIANTS: dict[str, dict[str, dict[tuple[int, str], AttentionTile]]] = {
    **_SM90_VARIANTS,
    "pairwise": {
        **_SM90_VARIANTS["pairwise"],
        "forward": {(64, HALF): AttentionTile(64, 64, 64, 4, 2), (128, HALF): AttentionTile(64, 64, 32, 8, 2)},
    },
    "capped": {
        **_SM90_VARIANTS["capped"],
        "forward": {(128, HALF): AttentionTile(64, 64, 32, 8, 2)},
    },
    "dropout": {
        **_SM90_VARIANTS["dropout"],
        "forward": {(64, HALF): AttentionTile(64, 64, 64, 8, 2), (128, HALF): AttentionTile(64, 64, 32, 8, 2)},
        "decode": _SM100_DECODE_DROPOUT,
    },
    "dropout of pairs": {**_SM90_VARIANTS["dropout of pairs"], "decode": _SM100_DECODE_DROPOUT},
    "plain, keyed": {
        **_SM90_VARIANTS["plain, keyed"],
        "decode": {(128, HALF): AttentionTile(16, 32, 32, 4, 2)},
        "dq": {(64, HALF): AttentionTile(64, 64, 32, 4, 2), (128, HALF): AttentionTile(64, 64, 32, 8, 2)},
    },
    "pairwise, keyed": {
        "dprefix": {
            **_SM90_VARIANTS["pairwise, keyed"]["dprefix"],
            (128, HALF): AttentionTile(32, 64, 64, 8, 1),
        }
    },
    "separate, keyed": {
        "dprefix": {
            **_SM90_VARIANTS["separate, keyed"]["dprefix"],
            (128, HALF): AttentionTile(32, 64, 64, 8, 2),
        }
    },
}
_SM120: dict[str, dict[tuple[int, str], AttentionTile]] = {
    **_SM86,
    "forward": {**_SM86["forward"], (128, HALF): AttentionTile(128, 64, 32, 8, 2, _WINDOW)},
    "decode": {
        **_SM86["decode"],
        (64, HALF): AttentionTile(16, 64, 32, 4, 2),
        (128, HALF): AttentionTile(16, 32, 32, 4, 2),
    },
    "dq of prefix": {**_SM86["dq"], (16, HALF): AttentionTile(64, 64, 64, 4, 2, _NARROW_PREFIX)},
}
_SM120_VARIANTS: dict[str, dict[str, dict[tuple[int, str], AttentionTile]]] = {
    **_SM86_VARIANTS,
    "capped": {**_SM86_VARIANTS["capped"], "decode": {(128, HALF): AttentionTile(16, 32, 32, 4, 3)}},
}

_INTERPRETER = {
    kernel: {(256, HALF): AttentionTile(32, 32, 32, 1, 1), (256, SINGLE): AttentionTile(32, 32, 32, 1, 1)}
    for kernel in _SM80
}

ARCHITECTURES: dict[str, dict[str, dict[tuple[int, str], AttentionTile]]] = {
    "sm_80": _SM80,
    "sm_86": _SM86,
    "sm_90": _SM90,
    "sm_100": _SM100,
    "sm_120": _SM120,
    "interpreter": _INTERPRETER,
}
VARIANTS = {
    "sm_80": _SM80_VARIANTS,
    "sm_86": _SM86_VARIANTS,
    "sm_90": _SM90_VARIANTS,
    "sm_100": _SM100_VARIANTS,
    "sm_120": _SM120_VARIANTS,
}
_STAND_INS = {"extend": "forward", "dq of prefix": "dq", "dgate": "dq", "sum": "dprefix"}
"""Kernels that use the tile of another kernel if they have no entry."""
WIDEST = 256
"""The largest head dimension that has a tile."""


def find_tile(
    architecture: str, kernel: str, width: int, dtype: torch.dtype, variants: Sequence[str] = ()
) -> AttentionTile:
    """Return the tile of a kernel for the head dimension ``width``.

    The tile is from the first of ``variants`` that has one, or from the table of the architecture.
    """
    kind = SINGLE if dtype is torch.float32 else HALF
    special, table = VARIANTS.get(architecture, {}), ARCHITECTURES[architecture]
    names = (kernel, _STAND_INS.get(kernel, kernel))
    tables = (source.get(name, {}) for source in (*(special.get(of, {}) for of in variants), table) for name in names)
    return next(rows[key] for rows in tables for key in sorted(rows) if key[1] == kind and width <= key[0])
