# SPDX-License-Identifier: Apache-2.0
"""From the first batch to example inputs for tracing, and to a small sample for replays."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from qgraph.errors import CalibrationError
from qgraph.graph.verify import Sample

Call = tuple[tuple[Any, ...], dict[str, Any]]


def example_of(
    model: nn.Module | ExportedProgram, batch: Any, transform: Callable[[Any], Any] | None
) -> Call:
    """The call of the *untraced* model that a batch stands for.

    Raises:
        CalibrationError: the batch's type is none of those that loaders may yield.
    """
    if isinstance(model, ExportedProgram):
        return (), {}
    batch = batch if transform is None else transform(batch)
    if isinstance(batch, Tensor):
        return (batch,), {}
    names = _parameters(model)
    if isinstance(batch, Mapping):
        return (), {k: v for k, v in batch.items() if names is None or k in names}
    if isinstance(batch, (tuple, list)):
        return _from_sequence(batch, names)
    msg = (
        f"a batch of type {type(batch).__qualname__} cannot be model inputs; yield a tensor, a "
        "tuple, a mapping or (inputs, label), or give transform="
    )
    raise CalibrationError(msg)


def _from_sequence(batch: Any, names: dict[str, bool] | None) -> Call:
    if len(batch) == 2 and isinstance(batch[0], (tuple, list)) and isinstance(batch[1], dict):
        return tuple(batch[0]), dict(batch[1])
    if len(batch) == 2 and isinstance(batch[0], Mapping):  # (inputs, label)
        return (), {k: v for k, v in batch[0].items() if names is None or k in names}
    required = None if names is None else sum(names.values())
    if len(batch) == 2 and required == 1 and isinstance(batch[0], Tensor):  # (input, label)
        return (batch[0],), {}
    return tuple(batch), {}


def _parameters(model: nn.Module) -> dict[str, bool] | None:
    """Names of forward's arguments -> required; None when forward takes any keyword."""
    found = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in found) and not any(
        p.kind is p.POSITIONAL_OR_KEYWORD for p in found
    ):
        return None
    return {
        p.name: p.default is p.empty
        for p in found
        if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}
    }


def small_sample(
    module: GraphModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    dynamic: bool,
    size: int = 2,
) -> Sample:
    """The example cut to a few samples where the batch is dynamic, on the module's device."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    nodes = [n for n in module.graph.nodes if n.op == "placeholder"]
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    cut = []
    for leaf, node in zip(leaves, nodes, strict=True):
        if isinstance(leaf, Tensor):
            fake = node.meta.get("val")
            is_batch = dynamic and leaf.ndim > 0 and not isinstance(fake.shape[0], int)
            kept = leaf[:size] if is_batch else leaf
            cut.append(kept.detach().clone().to(device))
        else:
            cut.append(leaf)
    new_args, new_kwargs = pytree.tree_unflatten(cut, spec)
    return Sample(new_args, new_kwargs)
