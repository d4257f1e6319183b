"""Choose the size of a method for a given number of trainable parameters."""

from torch import nn

from .base import check_positive


def read_embedding_width(model: nn.Module) -> int:
    """Return the width ``d`` of a model's input embeddings.

    Raises:
        TypeError: the object has no ``get_input_embeddings``.
        ValueError: the model has no table of input embeddings.
    """
    get_input_embeddings = getattr(model, "get_input_embeddings", None)
    if get_input_embeddings is None:
        raise TypeError(f"`model` must be a model with input embeddings, but is {type(model).__name__}")
    try:
        return int(get_input_embeddings().weight.shape[1])
    except (AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"`model` must have a table of input embeddings, but {type(model).__name__} has none"
        ) from error


def find_largest(name: str, budget: int, *, fixed: int, each: int) -> int:
    """Return the largest count with ``fixed + count * each <= budget``.

    Raises:
        TypeError: the budget is not a whole number.
        ValueError: not even a count of 1 fits.
    """
    check_positive(name, budget)
    count = (budget - fixed) // each
    if count < 1:
        raise ValueError(f"`{name}` must be at least {fixed + each} parameters here, got {budget}")
    return count
