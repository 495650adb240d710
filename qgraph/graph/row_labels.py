# SPDX-License-Identifier: Apache-2.0
"""Where rows of weights travel: data movement replayed on integer labels.

The outputs of chosen linears and convolutions are replaced by labels, one per row of their
stored weights, at the concrete sizes the graph was traced with. Movement is replayed on them with
torch's own kernels; every other op either keeps labels (odd functions, factors), ends them (even
functions, products of two labelled values over the channel), asks rows to agree (sums), or pins
them. What is computed is which *signs* of rows leave the function of the graph as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from qgraph.graph.build import attribute
from qgraph.graph.edges import Edge
from qgraph.graph.ops import MOVES, SPLITS, OpKind, constants, kind, product
from qgraph.graph.row_classes import RowClasses, compact, compact_pair
from qgraph.graph.tensors import weight_keys
from qgraph.graph.verify import where

aten = torch.ops.aten
Labels = Tensor | tuple[Tensor, ...]

_ODD = frozenset({
    aten.neg.default, aten._to_copy.default, aten.to.dtype, aten.tanh.default, aten.erf.default,
    aten.sin.default, aten.asinh.default, aten.atan.default, aten.sign.default,
    aten.mul.Scalar, aten.div.Scalar, aten.rms_norm.default,
})  # fmt: skip
_EVEN = frozenset({
    aten.abs.default, aten.square.default, aten.linalg_vector_norm.default, aten.cos.default,
})  # fmt: skip
_SILENT = frozenset({
    operator.getitem, aten._to_copy.default, aten.to.dtype, aten.sym_size.int,
})  # fmt: skip
_SCALES = frozenset({
    aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar,
})  # fmt: skip
_STACKS = frozenset({aten.cat.default, aten.stack.default})
_WORDS = {
    OpKind.NORM: "LayerNorm mixes the channels",
    OpKind.ELEMENTWISE: "a function that is not odd",
    OpKind.SOFTMAX: "softmax of the value itself",
}


@dataclass(frozen=True, slots=True)
class Compensation:
    """A stored table that meets labelled channels and must be rewritten along with their rows.

    Attributes:
        edge: where the table is read.
        axis: its channel axis.
        labels: row label per table element, broadcastable to the table.
    """

    edge: Edge
    axis: int
    labels: Tensor


@dataclass
class RowLabels:
    """Result of a replay.

    Attributes:
        classes: which rows must agree or stay.
        offsets: canonical weight name -> label before its first row.
        sources: labelled linears and convolutions, in graph order.
        values: compact labels of operands of products: size 1 along axes where they are constant.
        compensations: stored tables to rewrite along.
        events: nodes that do more than move or scale labelled values, and the labels they see.
    """

    module: GraphModule
    classes: RowClasses
    offsets: dict[str, int]
    sources: list[Node]
    values: dict[Node, Tensor] = field(default_factory=dict)
    compensations: list[Compensation] = field(default_factory=list)
    events: list[tuple[Node, Tensor]] = field(default_factory=list)

    def rows_of(self, source: Node) -> Tensor:
        """Labels of the rows of a labelled linear's weight, int64 [C_out]."""
        key = self.keys[str(_weight(source).target)]
        rows = _weight(source).meta["val"].shape[0]
        return torch.arange(rows, dtype=torch.int64) + (self.offsets[key] + 1)

    def __post_init__(self) -> None:
        self.keys = weight_keys(self.module)


def concrete(size: Any) -> int:
    """A size as an int: symbolic ones at the value they had when the graph was traced."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def label_rows(module: GraphModule, sources: Iterable[Node]) -> RowLabels:
    """Replay the graph on labels of all rows of the weights that `sources` read.

    All calls that read one of these weights are sources, so a module called twice, or tied
    weights, count as the same rows everywhere.
    """
    keys = weight_keys(module)
    nodes = list(module.graph.nodes)
    offsets: dict[str, int] = {}
    total = 0
    for node in sources:
        key = keys[str(_weight(node).target)]
        if key not in offsets:
            offsets[key] = total
            total += int(_weight(node).meta["val"].shape[0])
    chosen = [n for n in nodes if is_source(n) and keys[str(_weight(n).target)] in offsets]
    found = RowLabels(module, RowClasses(total), offsets, chosen)
    _Replay(module, found, nodes).run()
    return found


def is_source(node: Node) -> bool:
    """Whether the node is a linear or convolution with a stored weight."""
    if kind(node) not in {OpKind.LINEAR, OpKind.CONV}:
        return False
    weight = node.args[1]
    return isinstance(weight, Node) and weight.op == "get_attr"


def _weight(source: Node) -> Node:
    weight = source.args[1]
    assert isinstance(weight, Node)
    return weight


class _Replay:
    """One pass over the graph; labels are dropped after their last use."""

    def __init__(self, module: GraphModule, found: RowLabels, nodes: list[Node]) -> None:
        self.module, self.found, self.nodes = module, found, nodes
        self.classes = found.classes
        self.sources = set(found.sources)
        self.fixed = constants(nodes)
        self.labels: dict[Node, Labels] = {}

    def run(self) -> None:
        last: dict[Node, Node] = {i: n for n in self.nodes for i in n.all_input_nodes}
        for node in self.nodes:
            labelled = [i for i in node.all_input_nodes if i in self.labels]
            result: Labels | None = None
            if labelled:
                result = self._step(node, labelled)
            if node in self.sources:
                result = self._seed(node)
            if result is not None:
                self.labels[node] = result
            for item in labelled:
                if last[item] is node:
                    del self.labels[item]

    def _seed(self, node: Node) -> Tensor:
        shape = [concrete(s) for s in node.meta["val"].shape]
        axis = len(shape) - 1 if kind(node) is OpKind.LINEAR else 1
        view = [1] * len(shape)
        view[axis] = -1
        rows = self.found.rows_of(node).to(torch.int32).view(view)
        return rows.expand(shape)

    def _why(self, node: Node, text: str) -> str:
        return f"{text} ({where(node)})"

    def _pin(self, node: Node, labelled: list[Node], text: str) -> Labels | None:
        """Pin all labels that come in; hand them on where the shape allows it."""
        for item in labelled:
            for each in _flat(self.labels[item]):
                self.classes.pin_all(compact(each), self._why(node, text))
        first, value = self.labels[labelled[0]], node.meta.get("val")
        same = isinstance(first, Tensor) and isinstance(value, Tensor)
        if same and [concrete(s) for s in value.shape] == list(first.shape):  # type: ignore[union-attr]
            return first
        return None

    def _step(self, node: Node, labelled: list[Node]) -> Labels | None:
        self._note(node, labelled)
        if node.op == "output":
            return self._pin(node, labelled, "returned by the model")
        target = node.target
        if target is operator.getitem:
            return self.labels[labelled[0]][node.args[1]]  # type: ignore[index]
        if target in MOVES or target in SPLITS or target in _STACKS:
            return self._move(node, labelled)
        if target in _ODD and labelled == [node.args[0]]:
            return self.labels[labelled[0]]
        if target in _EVEN:
            return None
        handler = _HANDLERS.get(target)
        if handler is not None:
            return handler(self, node, labelled)
        if product(node) is not None:
            return self._product(node, labelled)
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(node.meta.get("val"))):
            return None  # sizes
        return self._pin(node, labelled, _WORDS.get(kind(node), f"meets {_name(node)}"))

    def _note(self, node: Node, labelled: list[Node]) -> None:
        """Remember what else than movement and plain scaling happens to rows."""
        if node.target in _SILENT or node.target in MOVES or node.target in SPLITS:
            return
        if node.target in _SCALES and not isinstance(node.args[1], Node):
            return
        seen = [torch.unique(compact(each)) for i in labelled for each in _flat(self.labels[i])]
        self.found.events.append((node, torch.unique(torch.cat(seen))))

    def _concrete_value(self, node: Node) -> Any:
        if node in self.labels:
            return self.labels[node]
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, int)):
            return concrete(value)
        if isinstance(value, Tensor):
            if node.op == "get_attr" and not value.is_floating_point():
                return attribute(self.module, str(node.target))
            if value.is_floating_point():  # a value without rows, moved along with labelled ones
                return torch.zeros([concrete(s) for s in value.shape], dtype=torch.int32)
        raise _NotReplayableError

    def _move(self, node: Node, labelled: list[Node]) -> Labels | None:
        try:
            args: Any = map_arg(node.args, self._concrete_value)
            kwargs: Any = map_arg(node.kwargs, self._concrete_value)
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        except (_NotReplayableError, RuntimeError, IndexError):
            return self._pin(node, labelled, "moved by indices that depend on the input")
        return tuple(result) if isinstance(result, list) else result

    def _pair(self, node: Node) -> list[Tensor]:
        """Labels of the two operands of an elementwise op, broadcast; 0 where there are none."""
        shape = [concrete(s) for s in node.meta["val"].shape]
        pair = []
        for operand in node.args:
            labels = self.labels.get(operand) if isinstance(operand, Node) else None
            pair.append(
                labels.expand(shape)
                if isinstance(labels, Tensor)
                else torch.zeros((), dtype=torch.int32).expand(shape)
            )
        return pair

    def sum(self, node: Node, labelled: list[Node]) -> Labels | None:
        """A sum keeps labels where both operands have rows that agree."""
        first, second = self._pair(node)
        for operand in labelled:
            self.found.values[operand] = compact(_tensor(self.labels[operand]))
        if len({*labelled}) == 1 and node.args[0] is not node.args[1]:
            text = f"a value of fixed sign is added by {_name(node)}"
            self._pin(node, labelled, text)
            return first if node.args[0] in self.labels else second
        together = compact_pair(first, second)
        self.classes.unite_all(*together, self._why(node, "added to a value of fixed sign"))
        return first

    def factor(self, node: Node, labelled: list[Node]) -> Labels | None:
        """A factor without rows keeps labels; the square of a value ends them."""
        first, second = self._pair(node)
        if node.target is aten.div.Tensor and node.args[1] in self.labels:
            return self._pin(node, labelled, "divides another value")
        if len({*labelled}) == 1 and node.args[0] is not node.args[1]:
            return first if node.args[0] in self.labels else second
        together = compact_pair(first, second)
        self.classes.unite_all(*together, self._why(node, "multiplied with a value of fixed sign"))
        return None

    def power(self, node: Node, labelled: list[Node]) -> Labels | None:
        """Even powers end labels, odd ones keep them."""
        exponent = node.args[1]
        if isinstance(exponent, (int, float)) and float(exponent).is_integer() and exponent > 0:
            return None if int(exponent) % 2 == 0 else self.labels[labelled[0]]
        return self._pin(node, labelled, "a power that is neither odd nor even")

    def fill(self, node: Node, labelled: list[Node]) -> Labels | None:
        """Filling with zero keeps signs free, any other number does not."""
        if labelled == [node.args[0]] and node.args[2] == 0:
            return self.labels[labelled[0]]
        return self._pin(node, labelled, "filled with a number of fixed sign")

    def pair_up(self, node: Node, labelled: list[Node]) -> Labels | None:
        """Real and imaginary part must agree."""
        labels = self.labels[labelled[0]]
        assert isinstance(labels, Tensor)
        return self.classes.unite_along(labels, -1, self._why(node, "a complex pair")).squeeze(-1)

    def take_apart(self, node: Node, labelled: list[Node]) -> Labels | None:
        """Both parts of a complex number carry its label."""
        del node
        labels = self.labels[labelled[0]]
        assert isinstance(labels, Tensor)
        return labels.unsqueeze(-1).expand(*labels.shape, 2)

    def _product(self, node: Node, labelled: list[Node]) -> Labels | None:
        what = product(node)
        assert what is not None
        if kind(node) is OpKind.LINEAR and labelled == [node.args[0]]:
            return self._linear(node, labelled)
        if kind(node) is not OpKind.MATMUL:
            return self._pin(node, labelled, f"read by {_name(node)}")
        left, right = node.args
        for operand in labelled:
            self.found.values[operand] = compact(_tensor(self.labels[operand]))
        if len({*labelled}) == 2 or left is right:
            reason = self._why(node, "meets a value of fixed sign in a product")
            rows = self.classes.unite_along(self.found.values[left], -2, reason)  # type: ignore[index]
            columns = self.classes.unite_along(self.found.values[right], -1, reason)  # type: ignore[index]
            self.classes.unite_all(rows.squeeze(-2), columns.squeeze(-1), reason)
            return None
        table = right if labelled[0] is left else left
        if isinstance(table, Node) and table.op == "get_attr":
            self._table(node, labelled[0], table)
            return None
        self._pin(node, labelled, "in a product with other activations")
        return None

    def _table(self, node: Node, operand: Node, table: Node) -> None:
        """A stored table over channels, such as relative positions, can be rewritten along."""
        reason = self._why(node, "meets a shared table")
        labels = self.found.values[operand]
        on_right = node.args[1] is table
        labels = self.classes.unite_along(labels, -2 if on_right else -1, reason)
        labels = labels.transpose(-2, -1)  # as the table: [..., D, 1] or [..., 1, D]
        shape = [1] * (labels.ndim - table.meta["val"].ndim) + list(table.meta["val"].shape)
        labels = labels.view(*[1] * (len(shape) - labels.ndim), *labels.shape)
        for axis in range(labels.ndim - 2):
            if shape[axis] == 1:
                labels = self.classes.unite_along(labels, axis, reason)
        labels = labels.reshape(labels.shape[labels.ndim - table.meta["val"].ndim :])
        axis = -2 if on_right else -1
        edge = Edge(node, (1 if on_right else 0,))
        self.found.compensations.append(Compensation(edge, axis, labels.contiguous()))

    def _linear(self, node: Node, labelled: list[Node]) -> Labels | None:
        """Another linear reads the value: its columns can be rewritten along."""
        if not is_source(node):
            return self._pin(node, labelled, f"read by {_name(node)}")
        labels = compact(_tensor(self.labels[labelled[0]]))
        self.found.values[labelled[0]] = labels
        reason = self._why(node, "meets shared columns of a linear")
        for axis in range(labels.ndim - 1):
            labels = self.classes.unite_along(labels, axis, reason)
        edge = Edge(node, (1,))
        self.found.compensations.append(Compensation(edge, -1, labels.reshape(1, -1)))
        return None


class _NotReplayableError(Exception):
    """An argument of a movement has no value that is known before the model runs."""


Handler = Callable[[_Replay, Node, list[Node]], Labels | None]
_HANDLERS: dict[object, Handler] = {
    aten.add.Tensor: _Replay.sum,
    aten.sub.Tensor: _Replay.sum,
    aten.mul.Tensor: _Replay.factor,
    aten.div.Tensor: _Replay.factor,
    aten.pow.Tensor_Scalar: _Replay.power,
    aten.masked_fill.Scalar: _Replay.fill,
    aten.view_as_complex.default: _Replay.pair_up,
    aten.view_as_real.default: _Replay.take_apart,
}


def _flat(labels: Labels) -> tuple[Tensor, ...]:
    return labels if isinstance(labels, tuple) else (labels,)


def _tensor(labels: Labels) -> Tensor:
    assert isinstance(labels, Tensor)
    return labels


def _name(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]
