# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Multiply tiles in Triton with sums that are as accurate as PyTorch's."""

import triton
import triton.language as tl


@triton.jit
def add_exact_product(b_x, b_y, b_sum):
    """Add ``b_x @ b_y`` [rows, columns] to a float32 sum of the same shape.

    For float32, each block's product is summed separately and then added. A single chain of additions over all blocks
    would have an error that grows with the total number of terms. Triton turns ``b_sum + tl.dot(b_x, b_y)`` into such
    a chain, so the code subtracts ``tl.dot(-b_x, b_y)`` instead.
    """
    if b_x.dtype == tl.float32:
        return b_sum - tl.dot(-b_x, b_y, input_precision="ieee")
    else:
        return tl.dot(b_x, b_y, b_sum, input_precision="ieee")
