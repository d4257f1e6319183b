"""Distribute the heads of an adapter over the ranks of a tensor-parallel model.

Each rank of such a model has some heads of every attention layer. A parameter with one entry per head is a ``DTensor``
that is sharded by head, so that each rank has its own share of the parameter, its gradient and its optimizer state.
All other parameters (networks, gates of tokens, prompts, offsets) and their gradients are the same on all ranks. If
such a tensor is used with a rank's own heads, the gradients of all ranks are summed.

An adapter is created with the heads of the whole model, the same on all ranks, and then sharded. Saving gathers it, so
that files do not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from ....methods import AttentionShape, PrefixMethod
from ..models.attention import Prefix
from .partitioned import any_partitioned, copy_whole, is_partitioned

if TYPE_CHECKING:
    from ..models.discovery import Layer

_TP = "tp"
"""The name of the tensor-parallel dimension of a mesh in ``transformers``."""


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model's parameters are distributed over processes, for example by FSDP2."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def gather_full_tensor(tensor: Tensor) -> Tensor:
    """Return a full tensor, gathered from all processes if it is sharded or partitioned."""
    if isinstance(tensor, nn.Parameter) and is_partitioned(tensor):
        return copy_whole([tensor])[0]
    if not isinstance(tensor, DTensor):
        return tensor
    gathered: Tensor = tensor.full_tensor()
    return gathered


def is_tensor_parallel(model: nn.Module) -> bool:
    """Return whether the heads of a model are distributed over ranks."""
    return (getattr(model, "tp_size", None) or 1) > 1


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Refuse a sharded model for an operation that needs all heads and parameters in one process."""
    if is_tensor_parallel(model) or is_sharded(model):
        raise ValueError(f"`model` must not be sharded over processes to {what}.")


def agree_on_any(model: nn.Module, flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Return for each flag whether it is set on at least one rank of a model."""
    mesh = find_whole_mesh(model)
    if mesh is None or not flags:
        return list(flags)
    common = torch.tensor(flags, dtype=torch.int32, device=device)
    for dim in range(mesh.ndim):
        distributed.all_reduce(common, op=distributed.ReduceOp.MAX, group=mesh.get_group(dim))
    return [bool(flag) for flag in common.tolist()]


def find_tensor_parallel_mesh(model: Any) -> DeviceMesh | None:
    """Return the one-dimensional mesh of the ranks that share the heads of a model, or None if each rank has all heads.

    Raises:
        ValueError: if the model is marked as tensor-parallel, but its device mesh has no tensor-parallel dimension.
    """
    if not is_tensor_parallel(model):
        return None
    mesh: DeviceMesh | None = getattr(model, "_device_mesh", None)
    if mesh is not None and mesh.ndim == 1:
        return mesh
    if mesh is None or _TP not in (mesh.mesh_dim_names or ()):
        raise ValueError(
            f"`model` must have a device mesh with a dimension {_TP!r} for tp_size={model.tp_size}. Load it with "
            "from_pretrained(distributed_config=DistributedConfig(tp_size=...))."
        )
    return mesh[_TP]


@dataclass(frozen=True)
class HeadSplit:
    """The heads of an attention layer in the whole model, and which of them are distributed over the ranks."""

    shape: AttentionShape
    queries: bool
    keys: bool

    def splits(self, kind: str) -> bool:
        """Return whether the heads of a kind, "queries" or "keys", are distributed."""
        return self.queries if kind == "queries" else self.keys


class TensorParallelHeads:
    """The heads of attention layers that are distributed over the ranks of a mesh."""

    def __init__(self, mesh: DeviceMesh, splits: Sequence[HeadSplit]) -> None:
        self.mesh = mesh
        self.splits = tuple(splits)

    @staticmethod
    def find(model: nn.Module, layers: Sequence[Layer]) -> TensorParallelHeads | None:
        """Return the heads of a model's layers, or None if each rank has all heads."""
        mesh = find_tensor_parallel_mesh(model)
        if mesh is None:
            return None
        return TensorParallelHeads(mesh, [layer.split for layer in layers if layer.split is not None])

    # Tensors of a forward pass

    def take_prefixes(self, prefixes: Iterable[Prefix]) -> list[Prefix]:
        """Return the keys and values of all layers for this rank's heads."""
        return [
            (self.take_heads(key, split.keys), self.take_heads(value, split.keys))
            for split, (key, value) in zip(self.splits, prefixes, strict=False)
        ]

    def take_biases(self, biases: Iterable[Tensor | None]) -> list[Tensor | None]:
        """Return the key biases of all layers for this rank's heads."""
        pairs = zip(self.splits, biases, strict=False)
        return [None if bias is None else self.take_heads(bias, split.keys) for split, bias in pairs]

    def take_heads(self, tensor: Tensor, split: bool, dim: int = 0) -> Tensor:
        """Return the part of a tensor for this rank's heads.

        Args:
            tensor: a tensor of all heads with equal values and gradients on all ranks, or a sharded parameter.
            split: whether the heads are distributed. Otherwise each rank gets all heads.
            dim: the dimension of the heads.
        """
        if isinstance(tensor, DTensor):
            return tensor.to_local()
        if not split:
            return self.share(tensor)
        if not (torch.is_grad_enabled() and tensor.requires_grad):
            return tensor.chunk(self.mesh.size(), dim)[self.mesh.get_local_rank()]
        whole = DTensor.from_local(tensor, self.mesh, [Replicate()], run_check=False)
        return whole.redistribute(placements=[Shard(dim)]).to_local()

    def share(self, tensor: Tensor) -> Tensor:
        """Return a tensor that is equal on all ranks for use with each rank's heads. Its gradients are summed."""
        if not (torch.is_grad_enabled() and tensor.requires_grad):
            return tensor
        whole = DTensor.from_local(tensor, self.mesh, [Replicate()], run_check=False)
        return whole.to_local(grad_placements=[Partial()])

    def share_tokens(self, key: Tensor, value: Tensor, index: int) -> Prefix:
        """Return a layer's keys and values of the tokens for use with each rank's query heads.

        If all ranks have the same key heads, ``transformers`` treats each rank's gradient of them as complete.
        """
        split = self.splits[index]
        return (self.share(key), self.share(value)) if split.queries and not split.keys else (key, value)

    def take_gate(self, gate: Tensor, index: int) -> Tensor:
        """Return this rank's part of a prefix gate, ``[B, Hq, N, m]``, ``[B, Hkv, m]``, or broadcastable to them."""
        split = self.splits[index]
        dim, heads, splits = (1, split.shape.heads, split.queries)
        if gate.ndim != 4:
            dim, heads, splits = (gate.ndim - 2, split.shape.kv_heads, split.keys)
        if dim >= 0 and splits and gate.shape[dim] == heads > 1:
            return self.take_heads(gate, True, dim)
        return self.share(gate)

    # Parameters

    def distribute(self, method: PrefixMethod) -> None:
        """Replace each parameter with one entry per head by a sharded parameter with this rank's heads."""
        for name, kind in method.head_parameters().items():
            path, _, leaf = name.rpartition(".")
            module = method.get_submodule(path)
            parameter = module.get_parameter(leaf)
            if isinstance(parameter, DTensor) or not self.splits[int(leaf)].splits(kind):
                continue
            own = distribute_tensor(parameter.detach(), self.mesh, [Shard(0)], src_data_rank=None)
            own = DTensor.from_local(own.to_local().clone(), self.mesh, [Shard(0)], run_check=False)
            module.register_parameter(leaf, nn.Parameter(own, requires_grad=parameter.requires_grad))

    def spread_prefix(self, prefix: Prefix, index: int) -> Prefix:
        """Return the keys and values of this rank's heads as sharded tensors, if the key heads are distributed."""
        if not self.splits[index].keys:
            return prefix
        key, value = (DTensor.from_local(tensor, self.mesh, [Shard(0)], run_check=False) for tensor in prefix)
        return key, value

    def gather_entry(self, entry: tuple[Any, ...], index: int) -> tuple[Any, ...]:
        """Return a cache entry (keys, values, biases) with all heads of a layer, given all heads or this rank's heads.

        The tensors are ``[1, H, ...]`` or ``[H, ...]``.
        """
        split = self.splits[index]
        own = split.shape.kv_heads // self.mesh.size()
        key = entry[0]
        if not isinstance(key, Tensor) or not split.keys or key.ndim < 3 or key.shape[-3] != own:
            return entry
        batch = key.ndim == 4
        rows = (tensor if tensor is None else tensor[0] if batch else tensor for tensor in entry)
        return tuple(tensor if tensor is None else self.gather_heads(tensor, index) for tensor in rows)

    def gather_prefix(self, prefix: Prefix, index: int) -> Prefix:
        """Return a layer's keys and values of all heads, given those of this rank's heads."""
        return self.gather_heads(prefix[0], index), self.gather_heads(prefix[1], index)

    def gather_heads(self, tensor: Tensor, index: int) -> Tensor:
        """Return a tensor with one entry per key head of a layer, given this rank's entries."""
        if not self.splits[index].keys:
            return tensor
        whole: Tensor = DTensor.from_local(tensor.contiguous(), self.mesh, [Shard(0)], run_check=False).full_tensor()
        return whole


def find_splits(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Find which heads of a tensor-parallel model's layers are distributed: those whose values differ by rank."""
    mesh = find_tensor_parallel_mesh(model)
    if mesh is None:
        return
    tensors = [tensor for layer in layers for tensor in (layer.query, layer.key) if tensor is not None]
    differ = iter(_differ_by_rank(mesh, tensors))
    for layer in layers:
        queries, keys = next(differ), next(differ)
        shape = layer.shape
        heads = shape.heads * mesh.size() if queries else shape.heads
        kv_heads = shape.kv_heads * mesh.size() if keys else shape.kv_heads
        layer.split = HeadSplit(replace(shape, heads=heads, kv_heads=kv_heads), queries, keys)


def _differ_by_rank(mesh: DeviceMesh, tensors: Sequence[Tensor]) -> list[bool]:
    """Return for each tensor whether its values differ between the ranks."""
    sizes = [tensor.numel() for tensor in tensors]
    flat = torch.cat([tensor.detach().flatten().double() for tensor in tensors])
    of_ranks = [torch.empty_like(flat) for _ in range(mesh.size())]
    distributed.all_gather(of_ranks, flat, group=mesh.get_group())
    pieces = zip(*(each.split(sizes) for each in of_ranks), strict=True)
    return [any(not torch.equal(piece[0], other) for other in piece[1:]) for piece in pieces]


def make_alike(model: nn.Module, tensors: Iterable[Tensor]) -> None:
    """Copy randomly initialized tensors from the first rank of a sharded model to all other ranks."""
    given = list(tensors)  # iterated once per group
    mesh: DeviceMesh | None = find_whole_mesh(model)
    groups: list[Any] = [] if mesh is None else [mesh.get_group(dim) for dim in range(mesh.ndim)]
    if any_partitioned(model):
        groups = [None]
    with torch.no_grad():
        for group in groups:
            if distributed.get_world_size(group) > 1:
                for tensor in given:
                    distributed.broadcast(tensor, group=group, group_src=0)


def find_whole_mesh(model: Any) -> DeviceMesh | None:
    """Return the mesh of all ranks over which a model's parameters are distributed, or None."""
    mesh: DeviceMesh | None = getattr(model, "_device_mesh", None)
    if mesh is not None:
        return mesh
    meshes = [parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)]
    return max(meshes, key=lambda each: int(each.size()), default=None)


def write_whole(parameter: Tensor, tensor: Tensor) -> None:
    """Copy a full or equally sharded tensor into a parameter, of which this rank may have only a part."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(tensor)
        return
    own = parameter.to_local()
    own.copy_(tensor.to_local() if isinstance(tensor, DTensor) else take_own_part(parameter, tensor))


def take_own_part(parameter: DTensor, tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, given a sharded parameter of the same shape."""
    own, mesh = tensor, parameter.device_mesh
    sharded = [(dim, each) for dim, each in enumerate(parameter.placements) if not each.is_replicate()]
    # If two mesh dimensions shard one tensor dimension, the last one (the heads) was sharded first.
    for dim, placement in sorted(sharded, key=lambda pair: hasattr(pair[1], "split_factor")):
        place: Any = placement
        pieces = own.tensor_split(_find_bounds(own.shape[place.dim], mesh.size(dim)), place.dim)
        own = pieces[mesh.get_local_rank(dim)]
    return own


def _find_bounds(size: int, count: int) -> list[int]:
    """Return the ends of all pieces but the last, for a dimension that is sharded as by ``DTensor``."""
    each = -(-size // count)
    return [min(each * place, size) for place in range(1, count)]
