# SPDX-License-Identifier: Apache-2.0
"""From a quantized graph to the flat graph that is handed to the exporter.

Codes get the container in which onnxruntime computes fastest: activations uint8 (``code -
qmin``, the zero point moved alike, so every value stays the same), weights int8, biases int32.
Linears become Gemm on two-dimensional codes, quantized tables are gathered before they are
decoded, and the tensors that hold codes are marked with the name of their quantize node.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from qgraph.backends.onnx import ops
from qgraph.backends.onnx.by_channel import (
    dequantize_by_channel,
    fits_product,
    may_keep_axis,
    quantize_by_channel,
)
from qgraph.backends.onnx.levels import lower_level_nodes
from qgraph.backends.onnx.placement import place
from qgraph.errors import ExportError
from qgraph.formats import AffineEncoding
from qgraph.graph import dialect
from qgraph.graph.build import attribute, insert_buffer, insert_call, prune, set_value, shallow_copy

aten = torch.ops.aten
_NARROW = frozenset({torch.int8, torch.uint8, torch.int16, torch.uint16})


@dataclass(frozen=True, slots=True)
class Codes:
    """How a quantize node's codes are stored in the file: ``stored = code + shift``."""

    shift: int
    dtype: str


@dataclass
class Prepared:
    """The flat graph and what is to be remembered about it."""

    module: GraphModule
    codes: dict[str, Codes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def prepare(module: GraphModule, *, container: str) -> Prepared:
    """Lower a copy of the graph; the module given is not changed.

    Raises:
        ExportError: a quantizer that no ONNX opset can express.
    """
    prepared = Prepared(shallow_copy(module))
    clone = prepared.module
    clone.graph.eliminate_dead_code()
    _fold_constants(clone)
    _mark(prepared)
    place(clone)
    lower_level_nodes(clone)
    for node in list(clone.graph.nodes):
        if node.target is dialect.QUANTIZE:
            _lower_quantize(prepared, node)
    for node in list(clone.graph.nodes):
        if node.target is dialect.DEQUANTIZE:
            _lower_dequantize(prepared, node)
    for node in list(clone.graph.nodes):
        if node.target is aten.embedding.default:
            _lower_embedding(prepared, node, container)
    flattened: dict[Node, Node] = {}
    for node in list(clone.graph.nodes):
        if node.target is aten.linear.default:
            _lower_linear(prepared, node, flattened)
    clone.graph.eliminate_dead_code()
    _retype_codes(clone)
    _flatten_signature(clone)
    prune(clone)
    clone.graph.lint()
    clone.recompile()
    return prepared


def _fold_constants(module: GraphModule) -> None:
    """Codes of stored tensors, where no pass has packed them yet."""
    for node in list(module.graph.nodes):
        source = node.args[0] if dialect.is_quantize(node) else None
        if isinstance(source, Node) and source.op == "get_attr":
            codes = dialect.encoding_of(module, node).encode(attribute(module, str(source.target)))
            stored = insert_buffer(module, f"{source.target}_codes", codes, before=node)
            node.replace_all_uses_with(stored)
            module.graph.erase_node(node)


def _mark(prepared: Prepared) -> None:
    """Name the codes of every quantize node, and remember how the file will store them."""
    module = prepared.module
    for node in list(module.graph.nodes):
        if not dialect.is_quantize(node):
            continue
        encoding = dialect.encoding_of(module, node)
        if isinstance(encoding, AffineEncoding):
            shift, dtype = _container(encoding, node)
            prepared.codes[node.name] = Codes(shift, str(dtype).removeprefix("torch."))
        else:
            prepared.codes[node.name] = Codes(0, "int32")
        marked = insert_call(module, ops.MARK, node, node.name, like=node)
        node.replace_all_uses_with(marked, delete_user_cb=lambda user, m=marked: user is not m)


def _is_wide(encoding: AffineEncoding) -> bool:
    """Whether neither int16 nor uint16 holds the codes."""
    low, high = encoding.qmin, encoding.qmax
    return not (low >= -(2**15) and high < 2**15) and not (low >= 0 and high < 2**16)


def _container(encoding: AffineEncoding, node: Node) -> tuple[int, torch.dtype]:
    """Shift and dtype in which activation codes are stored."""
    if encoding.qmax - encoding.qmin <= 255:
        return max(-encoding.qmin, 0), torch.uint8
    if not _is_wide(encoding):
        return 0, torch.int16 if encoding.qmax < 2**15 else torch.uint16
    msg = f"{node.name}: no ONNX integer type holds codes {encoding.qmin}..{encoding.qmax}"
    raise ExportError(msg)


def _affine(module: GraphModule, node: Node) -> AffineEncoding:
    encoding = dialect.encoding_of(module, node)
    assert isinstance(encoding, AffineEncoding)
    return encoding


def _lower_quantize(prepared: Prepared, node: Node) -> None:
    module, encoding = prepared.module, _affine(prepared.module, node)
    if encoding.block is not None:
        msg = f"{node.name}: blocked activations have no ONNX form; use a scale per channel"
        raise ExportError(msg)
    shift, dtype = _container(encoding, node)
    low, high = encoding.qmin + shift, encoding.qmax + shift
    limits = torch.iinfo(dtype)
    # onnxruntime has no Clip for 16-bit integers
    needs_clip = limits.bits == 16 and (low, high) != (limits.min, limits.max)
    if needs_clip or (encoding.axis is not None and not may_keep_axis(node.args[0])):
        node.replace_all_uses_with(quantize_by_channel(module, node, encoding, shift, dtype))
        module.graph.erase_node(node)
        return

    def bound(value: int, limit: int, side: str) -> Node | None:
        if value == limit:
            return None
        return insert_buffer(
            module, f"{side}_{value}", torch.tensor(value, dtype=dtype), before=node
        )

    stored = (encoding.zero_point + shift).to(dtype)
    quantized = insert_call(
        module, ops.QUANTIZE, node.args[0], node.args[1],
        insert_buffer(module, f"{node.name}_zero", stored, before=node),
        bound(low, limits.min, "low"), bound(high, limits.max, "high"), encoding.axis,
        like=node, before=node,
    )  # fmt: skip
    node.replace_all_uses_with(quantized)
    module.graph.erase_node(node)


def _lower_dequantize(prepared: Prepared, node: Node) -> None:
    module, encoding = prepared.module, _affine(prepared.module, node)
    source, scale = node.args[0], node.args[1]
    assert isinstance(source, Node)
    is_stored, zeros = source.op == "get_attr", None
    if is_stored:
        source, zeros = _stored_codes(module, node, source, encoding)
    else:
        shift, dtype = _container(encoding, node)
        zeros = (encoding.zero_point + shift).to(dtype)
    if encoding.axis is not None and not (is_stored and fits_product(node, encoding)):
        zeros = torch.zeros(()) if zeros is None else zeros
        new = dequantize_by_channel(module, node, source, zeros, encoding)
    else:
        zero = None if zeros is None else insert_buffer(
            module, f"{node.name}_zero", zeros, before=node
        )  # fmt: skip
        new = insert_call(
            module, ops.DEQUANTIZE, source, scale, zero, encoding.axis, encoding.block,
            like=node, before=node,
        )  # fmt: skip
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)


def _stored_codes(
    module: GraphModule, node: Node, source: Node, encoding: AffineEncoding
) -> tuple[Node, Tensor | None]:
    """Codes and zero points of a stored tensor, in int8 where they fit, else 16 bits or int32."""
    codes = attribute(module, str(source.target))
    if _is_wide(encoding):
        if not encoding.is_symmetric:
            msg = f"{node.name}: int32 codes must have zero point 0"
            raise ExportError(msg)
        return source, None
    low, high = encoding.qmin, encoding.qmax
    if high - low <= 255:  # codes move no further than they must
        shift, dtype = max(-128 - low, 0) + min(127 - high, 0), torch.int8
    else:
        shift, dtype = _container(encoding, node)
    if shift or codes.dtype != dtype:
        moved = (codes.to(torch.int32) + shift).to(dtype)
        source = insert_buffer(module, f"{source.target}_stored", moved, before=node)
    return source, (encoding.zero_point + shift).to(dtype)


def _lower_embedding(prepared: Prepared, node: Node, container: str) -> None:
    """Gather codes, then decode: the table stays int8 in memory (and packed 4-bit if native)."""
    module, table, index = prepared.module, node.args[0], node.args[1]
    if not isinstance(table, Node) or table.target is not ops.DEQUANTIZE:
        return
    codes, scale, zero, axis, block = (*table.args, None, None, None)[:5]
    assert isinstance(codes, Node)
    assert isinstance(scale, Node)
    if block is not None:
        msg = f"{node.name}: a blocked table cannot be gathered; use a scale per column or row"
        raise ExportError(msg)
    rank = node.meta["val"].ndim
    values = attribute(module, str(codes.target))
    packed = container == "native" and _is_nibbles(values)
    if packed:
        codes = insert_buffer(module, f"{codes.target}_nibbles", pack_nibbles(values), before=node)
    rows = insert_call(module, aten.embedding.default, codes, index, like=node, before=node)
    if packed:
        rows = insert_call(module, ops.UNPACK_NIBBLES, rows, -8, like=node, before=node)
    if axis in {0, -2}:
        new = _scaled_rows(module, node, rows, (scale, zero, index))
    else:
        place = None if axis is None else rank - 1
        new = insert_call(
            module, ops.DEQUANTIZE, rows, scale, zero, place, None, like=node, before=node
        )
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)


def _scaled_rows(module: GraphModule, node: Node, rows: Node, parts: tuple[Any, ...]) -> Node:
    """Decode with a scale per row of the table: gather the scales as well."""
    scale, zero, index = parts
    if zero is not None and bool(attribute(module, str(zero.target)).any()):
        msg = f"{node.name}: a table with a scale per row needs zero point 0"
        raise ExportError(msg)
    column = attribute(module, str(scale.target)).unsqueeze(-1)
    scales = insert_buffer(module, f"{node.name}_scales", column, before=node)
    gathered = insert_call(module, aten.embedding.default, scales, index, like=node, before=node)
    wide = insert_call(
        module, aten._to_copy.default, rows, like=node, before=node, dtype=torch.float32
    )
    return insert_call(module, aten.mul.Tensor, wide, gathered, like=node, before=node)


def _is_nibbles(codes: Tensor) -> bool:
    inside = int(codes.min()) >= -8 and int(codes.max()) <= 7
    return inside and codes.dtype is torch.int8 and codes.shape[-1] % 2 == 0


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack codes in -8..7 two to a byte along the last axis, the first in the low nibble."""
    nibbles = (codes.to(torch.int16) + 8).to(torch.uint8).unflatten(-1, (-1, 2))
    packed: Tensor = nibbles[..., 0] | (nibbles[..., 1] << 4)
    return packed


def _lower_linear(prepared: Prepared, node: Node, flattened: dict[Node, Node]) -> None:
    """``linear(dq, dq, dq bias)`` to Gemm on two-dimensional codes, its quantizer right behind.

    onnxruntime has one integer kernel with an int32 bias for that (QGemm), with and without an
    output quantizer; MatMul with a bias beside it stays float.
    """
    module = prepared.module
    data, weight, bias = (*node.args, None)[:3]
    if not (_decoded(data) and _decoded(weight)):
        return
    assert isinstance(data, Node)
    assert isinstance(weight, Node)
    if data.args[3] is not None or weight.args[4] is not None:
        return
    flat = flattened.get(data) or flattened.setdefault(data, _flat(module, data, node))
    fused = bias if _decoded(bias) else None
    product = insert_call(module, ops.GEMM, flat, weight, fused, like=node, before=node)
    consumers = list(node.users)
    if bias is not None and fused is None:
        product = insert_call(module, aten.add.Tensor, product, bias, like=node, before=node)
    if data.meta["val"].ndim == 2:
        node.replace_all_uses_with(product)
    elif all(user.target is ops.QUANTIZE for user in consumers):
        for user in consumers:
            _quantize_flat(module, user, product, node)
    else:
        node.replace_all_uses_with(_unflat(module, product, node, node))
    module.graph.erase_node(node)


def _decoded(node: object) -> bool:
    return isinstance(node, Node) and node.target is ops.DEQUANTIZE


def _flat(module: GraphModule, data: Node, node: Node) -> Node:
    """The data operand with its leading axes merged; codes move, then they are decoded."""
    value = data.meta["val"]
    if value.ndim == 2:
        return data
    codes, *parameters = data.args
    with_rows = insert_call(
        module, aten.reshape.default, codes, [-1, value.shape[-1]], like=data, before=node
    )
    return insert_call(module, ops.DEQUANTIZE, with_rows, *parameters, like=data, before=node)


def _unflat(module: GraphModule, flat: Node, node: Node, before: Node) -> Node:
    """Give `flat` the leading axes of `node` back."""
    value = node.meta["val"]
    symbolic = [i for i, s in enumerate(value.shape) if not isinstance(s, int)]
    source = node.args[0]
    shape: list[Any] = [int(s) if isinstance(s, int) else -1 for s in value.shape]
    for axis in symbolic[1:]:
        shape[axis] = insert_call(module, aten.sym_size.int, source, axis, like=node, before=before)
    return insert_call(module, aten.reshape.default, flat, shape, like=node, before=before)


def _quantize_flat(module: GraphModule, user: Node, product: Node, node: Node) -> None:
    """Quantize the two-dimensional product and give its codes the shape back."""
    codes = insert_call(module, ops.QUANTIZE, product, *user.args[1:], like=user, before=user)
    user.replace_all_uses_with(_unflat(module, codes, node, user))
    module.graph.erase_node(user)


def _retype_codes(module: GraphModule) -> None:
    """Correct the dtypes of moved codes: their container is another one than in the graph."""
    holders: set[Node] = set()  # nodes that hold codes
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        if not holders.isdisjoint(node.all_input_nodes):
            set_value(module, node)
        narrow = node.meta["val"].dtype in _NARROW
        if narrow and node.op == "call_function":
            holders.add(node)


def _flatten_signature(module: GraphModule) -> None:
    """Positional tensor inputs, a flat tuple of distinct tensor outputs."""
    graph = module.graph
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    given = output.args[0]
    results = given if isinstance(given, (tuple, list)) else (given,)
    tensors = list(dict.fromkeys(r for r in results if isinstance(r, Node)))
    for position, result in enumerate(tensors):
        if result.op in {"placeholder", "get_attr"}:
            tensors[position] = insert_call(
                module, aten.clone.default, result, like=result, before=output
            )
    output.args = (tuple(tensors),)
    for node in list(graph.nodes):
        if node.op == "placeholder" and not isinstance(node.meta.get("val"), Tensor):
            if node.users:
                msg = f"input {node.name!r} is not a tensor, but the graph computes with it"
                raise ExportError(msg)
            graph.erase_node(node)
    graph._codegen = torch.fx.graph.CodeGen()
    assert isinstance(graph, Graph)
