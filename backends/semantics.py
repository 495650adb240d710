# SPDX-License-Identifier: Apache-2.0
"""What each node of a quantized graph computes, decided once for all backends.

Values are read lazily, in levels: dequantize is no arithmetic but a way to read codes; movement
keeps it; a product of two such values is a pending integer accumulator; a quantize node behind
it requantizes. Whoever needs floats materialises them.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.backends.arithmetic import Function
from qgraph.backends.levels import Levels, is_blocked, is_per_tensor, moved_axis, same_encoding
from qgraph.backends.products import BiasForm, ProductForm, operands, product_form
from qgraph.formats import AffineEncoding, Encoding
from qgraph.graph.build import attribute
from qgraph.graph.dialect import encoding_of, is_dequantize, is_quantize
from qgraph.graph.ops import (
    ELEMENTWISE,
    MOVES,
    SPLITS,
    OpKind,
    argument,
    constants,
    kind,
    product,
)

aten = torch.ops.aten
# Functions of at most this many codes become tables.
TABLE_CODES = 2**16
_SCALAR_FUNCTIONS = frozenset({
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.pow.Tensor_Scalar,
    aten.add.Scalar, aten.sub.Scalar, aten.mul.Scalar, aten.div.Scalar, aten.rsub.Scalar,
})  # fmt: skip
_SHAPE_QUERIES = frozenset({
    aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default, aten.size.default,
})  # fmt: skip


# Interpolation is linear: on levels its sums are exact wherever the weights are dyadic, so that no
# runtime's order of summation shows.
RESAMPLES = frozenset({aten.upsample_bilinear2d.vec, aten.upsample_bilinear2d.default})


class Role(StrEnum):
    """What a node does with values in levels."""

    FLOAT = "float"  # an ordinary op on ordinary tensors
    QUANTIZE = "quantize"  # makes codes
    READ = "read"  # dequantize: hands codes on
    MOVE = "move"  # moves codes or accumulators
    PRODUCT = "product"  # makes an accumulator
    CLAMP = "clamp"  # bounds put on a pending accumulator
    RESAMPLE = "resample"  # interpolates levels; the scale comes afterwards
    TABLE = "table"  # one function of a chain evaluated on the table of values
    SHAPE = "shape"  # asks for sizes only


@dataclass
class Semantics:
    """The decisions for one graph.

    Attributes:
        module: the graph.
        roles: of every node.
        levels: how the codes that a node hands on are read.
        products: exact forms of products.
        clamps: bounds that a CLAMP node adds.
        sources: of a node with a pending accumulator: the product it stems from.
        functions: of a TABLE node: the chain up to it.
        encodings: of quantize nodes.
        reasons: why a product or function stayed in float.
        fixed: nodes that depend on no input.
        images: values that come from 2-D convolutions by ops that keep their axes.
    """

    module: GraphModule
    roles: dict[Node, Role] = field(default_factory=dict)
    levels: dict[Node, Levels] = field(default_factory=dict)
    products: dict[Node, ProductForm] = field(default_factory=dict)
    clamps: dict[Node, tuple[float, float]] = field(default_factory=dict)
    sources: dict[Node, Node] = field(default_factory=dict)
    functions: dict[Node, tuple[Function, ...]] = field(default_factory=dict)
    encodings: dict[Node, Encoding] = field(default_factory=dict)
    reasons: dict[Node, str] = field(default_factory=dict)
    fixed: set[Node] = field(default_factory=set)
    images: set[Node] = field(default_factory=set)
    _constants: dict[Node, Any] = field(default_factory=dict)

    def layout(self, node: Node) -> torch.memory_format | None:
        """The canonical layout of a value that a float op reads, None where it has no choice.

        Images are channels last, as integer convolutions leave them; other values of four or more
        axes are contiguous.
        """
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 4:
            return None
        return torch.channels_last if node in self.images else torch.contiguous_format

    def constant(self, node: Node) -> Any:
        """Value of a node that depends on no input; codes, where it is in levels."""
        if node not in self._constants:
            if node.op == "get_attr":
                value: Any = attribute(self.module, str(node.target))
            elif self.roles.get(node) is Role.READ:
                value = self.constant(node.args[0])  # type: ignore[arg-type]
            else:
                keep = self.roles.get(node) in {Role.MOVE, Role.QUANTIZE, Role.SHAPE}
                load = self.constant if keep else self.constant_value
                args = torch.fx.map_arg(node.args, load)
                value = node.target(*args, **torch.fx.map_arg(node.kwargs, load))  # type: ignore[operator]
            self._constants[node] = value
        return self._constants[node]

    def constant_value(self, node: Node) -> Any:
        """The same, codes in levels turned into floats."""
        value = self.constant(node)
        return self.levels[node].values(value) if node in self.levels else value


def analyze(module: GraphModule) -> Semantics:
    """Decide the role of every node of a quantized graph."""
    nodes = list(module.graph.nodes)
    found = Semantics(module, fixed=constants(nodes))
    with torch.no_grad():
        for node in nodes:
            found.roles[node] = _role(found, node)
            if _is_image(found, node):
                found.images.add(node)
    return found


_KEEP_AXES = frozenset({
    OpKind.ADD, OpKind.MUL, OpKind.CAT, OpKind.ELEMENTWISE, OpKind.MAX_POOL, OpKind.POOL,
    OpKind.RESIZE,
})  # fmt: skip


def _is_image(found: Semantics, node: Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.ndim != 4:
        return False
    if kind(node) in {OpKind.CONV, OpKind.CONV_TRANSPOSE}:
        return True
    keeps = kind(node) in _KEEP_AXES or is_quantize(node) or is_dequantize(node)
    return keeps and any(item in found.images for item in node.all_input_nodes)


def _role(found: Semantics, node: Node) -> Role:
    if node.op != "call_function":
        return Role.FLOAT
    if is_quantize(node):
        found.encodings[node] = encoding_of(found.module, node)
        return Role.QUANTIZE
    if is_dequantize(node):
        return _read(found, node)
    if node.target in _SHAPE_QUERIES:
        return Role.SHAPE
    if node.target in MOVES or node.target in SPLITS or _is_move_item(found, node):
        return _move(found, node)
    if node.target is aten.cat.default:
        return _cat(found, node)
    if product(node) is not None:
        return _product(found, node)
    source = node.args[0] if node.args else None
    return _behind(found, node, source) if isinstance(source, Node) else Role.FLOAT


def _behind(found: Semantics, node: Node, source: Node) -> Role:
    """Role of an op that may take levels, or an accumulator, as its first argument."""
    if resamples_levels(found.module, node):
        return Role.RESAMPLE
    if source in found.sources and (bounds := clamp_bounds(node)) is not None:
        found.clamps[node], found.sources[node] = bounds, found.sources[source]
        return Role.CLAMP
    return Role.TABLE if _table(found, node, source) else Role.FLOAT


def _is_move_item(found: Semantics, node: Node) -> bool:
    source = node.args[0] if node.args else None
    return node.target is operator.getitem and found.roles.get(source) is Role.MOVE  # type: ignore[arg-type]


def _read(found: Semantics, node: Node) -> Role:
    encoding = encoding_of(found.module, node)
    if is_blocked(encoding):
        return Role.FLOAT
    found.levels[node] = Levels.of(encoding, node.meta["val"].ndim)
    return Role.READ


def _move(found: Semantics, node: Node) -> Role:
    source: Any = node.args[0]
    if source in found.sources:
        found.sources[node] = found.sources[source]
        return Role.MOVE
    if source in found.functions:
        found.functions[node] = found.functions[source]
        found.levels[node] = found.levels[source]
        return Role.MOVE
    if source not in found.levels:
        return Role.FLOAT
    levels = found.levels[source]
    if node.target is operator.getitem:
        followed, axis = True, levels.axis
    else:
        followed, axis = moved_axis(node, levels.axis)
    if not followed:
        return Role.FLOAT
    found.levels[node] = Levels(levels.encoding, axis)
    return Role.MOVE


def resamples_levels(module: GraphModule, node: Node) -> bool:
    """Whether a node interpolates values that one scale serves: levels then, scaled afterwards."""
    source: Any = node.args[0] if node.target in RESAMPLES else None
    return source is not None and is_dequantize(source) and is_per_tensor(
        encoding_of(module, source)
    )  # fmt: skip


def _cat(found: Semantics, node: Node) -> Role:
    """Neither accumulators, which have no levels, nor what a table gives can come to a join."""
    parts: Any = node.args[0]
    levels = [found.levels.get(p) for p in parts]
    first = levels[0]
    if first is None:
        return Role.FLOAT
    for item in levels:
        if item is None or item.axis is not None:
            return Role.FLOAT
        if not same_encoding(item.encoding, first.encoding):
            return Role.FLOAT
    found.levels[node] = first
    return Role.MOVE


def _product(found: Semantics, node: Node) -> Role:
    data, weight, bias = operands(node)
    read = [n for n in (data, weight) if n in found.levels and n not in found.functions]
    if len(read) < len({data, weight}):
        kinds = [n.name for n in (data, weight) if n not in read]
        found.reasons[node] = f"operand {' and '.join(kinds)} not quantized"
        return Role.FLOAT
    codes = found.constant(weight) if weight in found.fixed else None
    form = product_form(node, found.levels[data], found.levels[weight], codes, _bias(found, bias))
    if isinstance(form, str):
        found.reasons[node] = form
        return Role.FLOAT
    found.products[node] = form
    if form.groups or form.bias is not None:
        # Several accumulators, or a float bias: the value is a float from here on.
        return Role.PRODUCT
    found.sources[node] = node
    return Role.PRODUCT


def _bias(found: Semantics, bias: Node | None) -> BiasForm:
    if bias is None or bias not in found.levels or bias not in found.fixed:
        return BiasForm(bias)
    levels = found.levels[bias]
    encoding = levels.encoding
    if not isinstance(encoding, AffineEncoding) or bool(encoding.zero_point.any()):
        return BiasForm(bias)
    return BiasForm(bias, found.constant(bias), levels.scale)


def clamp_bounds(node: Node) -> tuple[float, float] | None:
    """Bounds of a node that only clamps."""
    infinity = float("inf")
    match node.target:
        case aten.relu.default:
            return 0.0, infinity
        case aten.relu6.default:
            return 0.0, 6.0
        case aten.hardtanh.default | aten.clamp.default:
            low, high = argument(node, 1), argument(node, 2)
        case aten.clamp_min.default:
            low, high = argument(node, 1), None
        case aten.clamp_max.default:
            low, high = None, argument(node, 1)
        case _:
            return None
    if isinstance(low, Node) or isinstance(high, Node):
        return None
    return (
        -infinity if low is None else float(low),  # type: ignore[arg-type]
        infinity if high is None else float(high),  # type: ignore[arg-type]
    )


def is_function(node: Node) -> bool:
    """Whether the node is a function of one element of its first argument alone."""
    others = [*node.args[1:], *node.kwargs.values()]
    if any(isinstance(item, (Node, list, tuple)) for item in others):
        return False
    return node.target in ELEMENTWISE or node.target in _SCALAR_FUNCTIONS


def _table(found: Semantics, node: Node, source: Node) -> bool:
    """Whether the node becomes part of a table; if so, record the chain."""
    levels = found.levels.get(source)
    if levels is None or levels.axis is not None or not is_function(node):
        return False
    low, high = levels.codes()
    if high - low >= TABLE_CODES or not _ends_in_quantizers(found.module, node):
        return False
    chain = found.functions.get(source, ())
    found.functions[node] = (*chain, (node.target, node.args[1:], node.kwargs))  # type: ignore[arg-type]
    found.levels[node] = levels
    return True


def _ends_in_quantizers(module: GraphModule, node: Node) -> bool:
    """Whether all values of a chain of functions and moves end in per-tensor quantizers."""
    if not node.users:
        return False
    return all(_leads_to_quantizers(module, node, user) for user in node.users)


def _leads_to_quantizers(module: GraphModule, node: Node, user: Node) -> bool:
    if user.target in _SHAPE_QUERIES:
        return True
    if user.op != "call_function" or user.args[0] is not node:
        return False
    if is_quantize(user):
        return is_per_tensor(encoding_of(module, user))
    if user.target not in MOVES and not is_function(user):
        return False
    return _ends_in_quantizers(module, user)
