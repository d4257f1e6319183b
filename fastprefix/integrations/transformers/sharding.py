"""Models that are spread over processes."""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are spread over processes, as by FSDP2."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, gathered from all processes."""
    if not isinstance(tensor, DTensor):
        return tensor
    gathered: Tensor = tensor.full_tensor()
    return gathered


def check_whole(model: nn.Module) -> None:
    """Refuse to change what a model trains once it is spread: its processes would not exchange those gradients.

    Raises:
        ValueError: it is sharded, or has a tensor-parallel plan.
    """
    name, size = type(model).__name__, getattr(model, "tp_size", None) or 1
    if size > 1:
        raise ValueError(f"model takes one without a tensor-parallel plan, got {name} with tp_size={size}")
    if is_sharded(model):
        raise ValueError(
            f"model takes one that is not sharded, got {name} with sharded parameters: attach, switch and detach "
            "before fully_shard"
        )
