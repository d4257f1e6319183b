# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Products of tiles in Triton, with sums as exact as those of plain PyTorch."""

import triton
import triton.language as tl


@triton.jit
def add_exact_product(b_x, b_y, b_sum):
    """Add ``b_x @ b_y`` to a float32 sum.

    Products of float32 are summed on their own first. In one chain of additions over all blocks, the error would
    grow with the number of all their terms. The difference keeps Triton from making the sum the beginning of the
    chain, as it does with ``b_sum + tl.dot(b_x, b_y)``.
    """
    if b_x.dtype == tl.float32:
        return b_sum - tl.dot(-b_x, b_y, input_precision="ieee")
    else:
        return tl.dot(b_x, b_y, b_sum, input_precision="ieee")
