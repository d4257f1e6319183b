"""Run adapters on models that FSDP2 shards, attached before or after ``fully_shard``.

An adapter that is attached before is sharded with the model's root. An adapter that is attached after becomes a
separate FSDP module. Nothing calls its ``forward``, so it is gathered around the forward pass of the model instead,
like a root. Its gradients are reduced at the end of the backward pass.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, OffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.tensor import DTensor, Shard

from .partitioned import gather_with

_RUN = "run_gathered"
"""The method of a sharded adapter that runs a function while the adapter is gathered."""
_TP = "tp"


def is_fully_sharded(model: nn.Module) -> bool:
    """Return whether FSDP2 shards a model or a part of it."""
    return _can_be_sharded() and any(isinstance(module, FSDPModule) for module in model.modules())


def _can_be_sharded() -> bool:
    """Return whether a process group exists, without which FSDP2 shards nothing. Every call of a model checks this."""
    return distributed.is_available() and distributed.is_initialized()


def reshard(model: nn.Module) -> None:
    """Free the parameters that FSDP2 has gathered, so that the modules of a model have their shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def recover(model: nn.Module) -> None:
    """Reset FSDP2 after a forward pass that raised an error, if PyTorch supports it (2.13 and later)."""
    if isinstance(model, FSDPModule) and hasattr(model, "reset_iter_state"):
        model.reset_iter_state()


def open_root(model: nn.Module) -> None:
    """Gather the parameters of a model's root, so that a part of the model can be called. ``reshard`` undoes it."""
    if not isinstance(model, FSDPModule):
        return
    _register(model)
    getattr(model, _RUN)(lambda: None)  # the first module to run becomes FSDP2's root, and a part must not
    model.unshard()


def shard_like(model: nn.Module, method: nn.Module) -> None:
    """Shard an adapter that was attached to a model of FSDP2, over the same ranks as the model."""
    if not isinstance(model, FSDPModule) or isinstance(method, FSDPModule) or not list(method.parameters()):
        return
    if any(map(_is_sharded, method.parameters())):
        return
    mesh = find_mesh(model)
    size = mesh.size(mesh.ndim - 1)

    def choose_dimension(parameter: nn.Parameter) -> Shard | None:
        """Shard along tokens rather than heads, since there may be fewer heads than ranks."""
        even = parameter.ndim > 1 and parameter.shape[1] % size == 0
        return Shard(1) if even else None

    fully_shard(
        method,
        mesh=mesh,
        reshard_after_forward=False,
        shard_placement_fn=choose_dimension,
        offload_policy=_find_offload_policy(model),
    )


def _find_offload_policy(model: nn.Module) -> OffloadPolicy:
    """Return the policy by which FSDP2 offloads the shards of a model."""
    states: list[Any] = [each._get_fsdp_state() for each in model.modules() if isinstance(each, FSDPModule)]
    policies = (group.offload_policy for state in states for group in _list_groups(state))
    return next(policies, OffloadPolicy())


def _list_groups(state: Any) -> list[Any]:
    """Return the groups of parameters of a module that FSDP2 gathers. PyTorch 2.11 has one group or none."""
    groups = getattr(state, "_fsdp_param_groups", None)
    return [each for each in [state._fsdp_param_group] if each is not None] if groups is None else list(groups)


@contextmanager
def gathering_around(model: nn.Module, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Gather the modules around and inside some modules of a model in this context, so that these can run directly.

    Adapters that are attached but not in use are allowed too.
    """
    given = list(modules)
    gathered = {each: None for module in given for each in _find_around(model, module)}
    if given:
        open_root(model)
    for each in gathered:
        each.unshard()
    try:
        yield
    finally:
        if given and isinstance(model, FSDPModule):
            model.reshard()
        for each in gathered:
            each.reshard()


@contextmanager
def outside_forward(model: nn.Module) -> Iterator[None]:
    """Let FSDP2 treat calls of a model's parts in this context as if no forward pass of the model were in progress."""
    if not isinstance(model, FSDPModule):
        yield
        return
    state: Any = model._get_fsdp_state()
    groups, training = state._fsdp_param_groups, state._training_state
    if training is TrainingState.IDLE:
        yield
        return
    of_groups, root = [group._training_state for group in groups], state._state_ctx.iter_forward_root
    state._training_state, state._state_ctx.iter_forward_root = TrainingState.IDLE, None
    for group in groups:
        group._training_state = TrainingState.IDLE
    try:
        yield
    finally:
        model.unshard()
        state._training_state, state._state_ctx.iter_forward_root = training, root
        for group, of_group in zip(groups, of_groups, strict=True):
            group._training_state = of_group


def _find_around(model: nn.Module, module: nn.Module) -> list[FSDPModule]:
    """Return the FSDP2 modules, in the model or not, that contain a module's parameters or are inside the module."""
    if not _can_be_sharded():
        return []
    inside = set(module.modules())
    known = dict.fromkeys((*model.modules(), *module.modules()))
    return [each for each in known if isinstance(each, FSDPModule) and not inside.isdisjoint(each.modules())]


def _is_sharded(parameter: Tensor) -> bool:
    """Return whether a parameter is sharded by more than tensor parallelism."""
    return isinstance(parameter, DTensor) and (parameter.device_mesh.mesh_dim_names or ()) != (_TP,)


def find_mesh(model: nn.Module) -> DeviceMesh:
    """Return the mesh over which FSDP2 shards a model, without the dimension of tensor parallelism."""
    meshes = [parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)]
    plain = next((mesh for mesh in meshes if _TP not in (mesh.mesh_dim_names or ())), None)
    if plain is not None:
        return plain
    names = meshes[0].mesh_dim_names or ()
    return meshes[0][tuple(name for name in names if name != _TP)]


def run_gathered(module: nn.Module, method: nn.Module, call: Callable[[], Any]) -> Any:
    """Run the forward of a module while its sharded adapter is gathered. The adapter's gradients are reduced.

    A composed adapter consists of several adapters that are sharded separately.
    """
    gather_with(module, method)
    for each in method.modules():
        if isinstance(each, FSDPModule):
            _register(each)
            call = functools.partial(getattr(each, _RUN), call)
    return call()


def _register(module: Any) -> None:
    if _RUN not in vars(module):
        vars(module)[_RUN] = types.MethodType(_run, module)
        register_fsdp_forward_method(module, _RUN)


def _run(module: nn.Module, call: Callable[[], Any]) -> Any:
    return call()


class Gatherer:
    """Have FSDP2 gather the modules around an attention module for the backward pass of its keys and values.

    FSDP2 gathers a module for the backward pass of its outputs. The keys and values of a prompt are not among the
    outputs of a layer.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone if torch.is_grad_enabled() and is_fully_sharded(backbone) else None

    def watch(self, attention: nn.Module, tensors: Iterable[Tensor]) -> None:
        """Gather the modules around and inside an attention module before the backward pass of its tensors."""
        if self.backbone is None:
            return
        for module in _find_around(self.backbone, attention):
            state: Any = module._get_fsdp_state()
            for tensor in tensors:
                if tensor.requires_grad:
                    tensor.register_hook(state._pre_backward)
