"""How large a method can be within a number of trainable parameters."""

from torch import nn


def embedding_width(model: nn.Module) -> int:
    """``d`` of a model with input embeddings."""
    get_input_embeddings = getattr(model, "get_input_embeddings", None)
    if get_input_embeddings is None:
        raise TypeError(f"model takes a model with input embeddings, got {type(model).__name__}")
    return int(get_input_embeddings().weight.shape[1])


def largest_within(name: str, budget: int, *, fixed: int, each: int) -> int:
    """Return the largest count with ``fixed + count * each <= budget``.

    Raises:
        ValueError: not even a count of 1 fits.
    """
    count = (budget - fixed) // each
    if count < 1:
        raise ValueError(f"{name} takes at least {fixed + each} parameters here, got {budget}")
    return count
