# SPDX-License-Identifier: Apache-2.0
"""Checking a rewrite: same function in float64, honest, idempotent, complete metadata."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves, tree_map_only

from qgraph.graph.build import insert_call
from qgraph.graph.canonicalize import canonicalize
from qgraph.graph.drop_noops import drop_asserts
from qgraph.graph.trace import trace
from qgraph.graph.verify import Sample, record_values
from tests.graph.sketch import Sketch, aten

Rewrite = Callable[[GraphModule], bool]
Draw = Callable[[Sketch], Node]


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every weight and statistic a value that a wrong rewrite would expose."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
                continue
            values = torch.randn(tensor.shape, generator=generator) * 0.4
            tensor.copy_(values.abs() + 0.3 if "var" in name else values)
    return model.eval()


def ops(module: GraphModule) -> Counter[str]:
    """How often each ATen op occurs, by name without overload."""
    nodes = (n for n in module.graph.nodes if n.op == "call_function")
    return Counter(getattr(n.target, "__name__", str(n.target)).split(".")[0] for n in nodes)


def at_batch(value: Any, batch: int | None) -> Any:
    """The inputs with another batch size."""

    def resized(tensor: Tensor) -> Tensor:
        if batch is None or not tensor.ndim:
            return tensor
        repeats = -(-batch // tensor.shape[0])
        return torch.cat([tensor.roll(i, -1) for i in range(repeats)])[:batch]

    return tree_map_only(Tensor, resized, value)


def assert_close(got: object, want: object, tolerance: float) -> None:
    """All tensor leaves agree within `tolerance` of the largest finite magnitude."""
    left, right = tree_leaves(got), tree_leaves(want)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        if isinstance(b, Tensor) and b.is_floating_point():
            assert a.shape == b.shape
            size = max(float(b[b.isfinite()].abs().max()), 1e-30) if b.numel() else 1.0
            torch.testing.assert_close(a / size, b / size, rtol=0, atol=tolerance, equal_nan=True)
        elif isinstance(b, Tensor):
            assert torch.equal(a, b)


def assert_rewrites(
    model: nn.Module, args: tuple[Any, ...], rewrite: Rewrite = canonicalize,
    *, changes: bool = True, batch: int | None = 3,
) -> GraphModule:  # fmt: skip
    """Trace, rewrite, and check the laws of a rewrite in float64; return the rewritten graph."""
    module = trace(model, *args)
    drop_asserts(module)  # they insist on float32
    module.recompile()
    module.double()
    names = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    inputs = [args, at_batch(args, batch)]
    inputs = [
        tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, item)
        for item in inputs
    ]
    wanted = [module(*item) for item in inputs]
    assert rewrite(module) is changes
    module.graph.lint()
    module.recompile()
    assert rewrite(module) is False
    for item, want in zip(inputs, wanted, strict=True):
        assert_close(module(*item), want, 1e-12)
    assert names == [node.name for node in module.graph.nodes if node.op == "placeholder"]
    assert all("val" in n.meta for n in module.graph.nodes if n.op == "call_function")
    return module


def rewritten(draw: Draw, rewrite: Rewrite, *, changes: bool) -> Counter[str]:
    """The ops of a drawn graph after a rewrite that keeps its function and metadata."""
    torch.manual_seed(0)
    s = Sketch()
    module = s.returns(draw(s))
    shapes = [tuple(n.meta["val"].shape) for n in module.graph.nodes if n.op == "placeholder"]
    inputs = [torch.randn(shape) for shape in shapes]
    before = module(*inputs)
    assert rewrite(module) is changes
    assert rewrite(module) is False
    module.graph.lint()
    module.recompile()
    assert_close(module(*inputs), before, 1e-5)
    values = record_values(module, Sample(tuple(inputs)))
    for node in module.graph.nodes:
        if node.op == "call_function" and node.name in values:
            assert tuple(node.meta["val"].shape) == tuple(values[node.name].shape), node
    return ops(module)


def node(module: GraphModule, name: str) -> Node:
    """The first one whose name begins so."""
    return next(n for n in module.graph.nodes if n.name.startswith(name))


def times(module: GraphModule, factor: float, *, after: str = "relu") -> None:
    """Multiply a value by a factor, for all that read it."""
    source = node(module, after)
    users = list(source.users)
    new = insert_call(module, aten.mul.Tensor, source, factor, like=source)
    for user in users:
        user.replace_input_with(source, new)
    module.recompile()
