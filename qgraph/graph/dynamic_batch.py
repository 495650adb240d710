# SPDX-License-Identifier: Apache-2.0
"""Which dimensions of the sample are the batch, and whether export kept them symbolic.

A size of 1 would silently specialise, so a sample of batch 1 is doubled before it is exported.
"""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils._pytree import tree_leaves, tree_map_only

_STATIC = (None, Dim.STATIC)


@dataclass(frozen=True, slots=True)
class Sample:
    """Inputs of an export and the dimensions that are to stay symbolic.

    Attributes:
        args, kwargs: the inputs, doubled where a marked dimension had size 1.
        shapes: what torch.export takes as `dynamic_shapes`; None for a static export.
        marked: per tensor leaf of (args, kwargs), in order, the marked dimensions.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: Any
    marked: tuple[tuple[int, ...], ...]


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The most frequent leading size of the tensor inputs, the earlier one on a tie."""
    sizes = [t.shape[0] for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim]
    return statistics.mode(sizes) if sizes else None


def default_sample(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sample:
    """Mark dimension 0 of every tensor that shares the batch size."""
    batch = batch_size(args, kwargs)

    def grown(tensor: Tensor) -> Tensor:
        # a fresh tensor per leaf: the collection below tells inputs apart by identity
        if not tensor.ndim or tensor.shape[0] != batch or batch != 1:
            return tensor.view_as(tensor)
        return torch.cat([tensor, tensor])

    new_args, new_kwargs = tree_map_only(Tensor, grown, (args, kwargs))
    collection = ShapesCollection()
    marked = []
    for old, new in zip(
        tree_leaves((args, kwargs)), tree_leaves((new_args, new_kwargs)), strict=True
    ):
        if isinstance(old, Tensor):
            shares = bool(old.ndim) and old.shape[0] == batch
            marked.append((0,) if shares else ())
            if shares:
                collection[new] = {0: Dim.AUTO}
    shapes = collection.dynamic_shapes(model, new_args, new_kwargs)
    return Sample(new_args, new_kwargs, shapes, tuple(marked))


def explicit_sample(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any
) -> Sample:
    """Take the caller's `dynamic_shapes`; double what is marked and has size 1."""
    if hasattr(shapes, "dynamic_shapes"):
        shapes = shapes.dynamic_shapes(model, args, kwargs)
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    if isinstance(shapes, Mapping):
        pairs = [(value, shapes.get(name)) for name, value in bound.items()]
    else:
        pairs = list(zip(bound.values(), tuple(shapes), strict=False))
    dims: dict[int, tuple[int, ...]] = {}
    for value, spec in pairs:
        _collect(value, spec, dims)

    def grown(tensor: Tensor) -> Tensor:
        for dim in dims.get(id(tensor), ()):
            if dim < tensor.ndim and tensor.shape[dim] == 1:
                tensor = torch.cat([tensor, tensor], dim)
        return tensor

    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    marked = tuple(dims.get(id(leaf), ()) for leaf in leaves)
    new_args, new_kwargs = tree_map_only(Tensor, grown, (args, kwargs))
    return Sample(new_args, new_kwargs, shapes, marked)


def _collect(value: Any, spec: Any, dims: dict[int, tuple[int, ...]]) -> None:
    if spec is None:
        return
    if isinstance(value, Tensor):
        items = spec.items() if isinstance(spec, Mapping) else enumerate(spec)
        dims[id(value)] = tuple(
            int(d) for d, s in items if s not in _STATIC and not isinstance(s, int)
        )
    elif isinstance(value, Mapping):
        for name, item in value.items():
            _collect(item, spec.get(name) if isinstance(spec, Mapping) else None, dims)
    elif isinstance(value, (list, tuple)):
        for item, part in zip(value, spec, strict=False):
            _collect(item, part, dims)


def specialised(program: ExportedProgram, sample: Sample) -> list[str]:
    """Marked dimensions that export fixed after all, as 'name dimension d = size'."""
    kinds = torch.export.graph_signature.InputKind
    inputs = [
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind is kinds.USER_INPUT
    ]
    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    tensors = [(name, values[name]) for name in inputs if isinstance(values.get(name), Tensor)]
    return [
        f"{name} dimension {dim} = {value.shape[dim]}"
        for (name, value), dims in zip(tensors, sample.marked, strict=False)
        for dim in dims
        if is_concrete_int(value.shape[dim])
    ]


def has_symbolic_outputs(program: ExportedProgram) -> bool:
    """Whether the shape of every output tensor depends on a symbolic size."""
    output = next(node for node in program.graph.nodes if node.op == "output")
    values = [node.meta.get("val") for node in output.all_input_nodes]
    shapes = [value.shape for value in values if isinstance(value, Tensor)]
    return all(any(not is_concrete_int(size) for size in shape) for shape in shapes)
