# SPDX-License-Identifier: Apache-2.0
"""Finishing passes on the ONNX IR: resolve marks, fold constants, pack weights, tidy up."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules import common as rules

from qgraph.backends.onnx.capabilities import OPSET_INT2, WIDEN_AT_LOAD
from qgraph.backends.onnx.ops import MARK_DOMAIN

# Folding these would leave a float copy of quantized tensors in the file.
_KEPT = frozenset({"DequantizeLinear", "QuantizeLinear"})
_DEFAULTS = {"block_size": 0, "output_dtype": 0, "saturate": 1}
# Packing a handful of codes costs more in nodes than it saves.
_WORTH_PACKING = 256
CODES = "/codes"
# The exporter's own optimizer without its patterns of several outputs, which are searched in
# quadratic time and are not found here.
_RULES = (
    rules.materialize_reshape_shape_rule, rules.reshape_reshape_rule,
    rules.transpose_transpose_rule, rules.no_op_transpose_rule, rules.cast_cast_rule,
    rules.no_op_cast_rule, rules.unsqueeze_unsqueeze_rule, rules.squeeze_reshape_1d_rule,
    rules.flatten_to_reshape_rule, rules.no_op_expand_rule, rules.collapse_slice_rule,
    rules.mul_by_1_rule, rules.add_0_rule, rules.sub_0_rule, rules.div_by_1_rule,
)  # fmt: skip
_TIDYING = (
    common.CommonSubexpressionEliminationPass,
    common.OutputFixPass, common.NameFixPass, common.IdentityEliminationPass,
    common.DeduplicateInitializersPass, common.RemoveUnusedNodesPass,
)  # fmt: skip


def resolve_marks(model: ir.Model) -> dict[str, str]:
    """Remove the Mark nodes; returns quantize node -> value, which takes the node's name."""
    names: dict[str, str] = {}
    for node in list(model.graph):
        if node.domain != MARK_DOMAIN:
            continue
        codes, marked = node.inputs[0], node.outputs[0]
        assert codes is not None
        name = node.attributes["name"].as_string()
        if codes.name not in names.values():
            codes.name = f"{name}{CODES}"
        names[name] = str(codes.name)
        marked.replace_all_uses_with(codes)
        model.graph.remove(node, safe=True)
    model.opset_imports.pop(MARK_DOMAIN, None)
    return names


def finish(model: ir.Model, *, native: bool, opset: int) -> None:
    """Fold what is constant and small, share equal initializers, pack, set versions.

    Args:
        model: changed in place.
        native: store weights of 4 bits and fewer in INT4 (INT2 from opset 25).
        opset: the default-domain opset to declare.
    """
    with _held(model):
        common.InlinePass()(model)
        for _ in range(2):
            optimizer.fold_constants(
                model, should_fold=lambda node: False if node.op_type in _KEPT else None
            )
            rewriter.RewritePass(_RULES)(model)
            common.RemoveUnusedNodesPass()(model)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        for item in _TIDYING:
            item()(model)
    _drop_defaults(model)
    _keep_norms_apart(model)
    if native:
        _pack(model, opset)
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.doc_string = None
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.functions.clear()
    model.opset_imports.clear()
    model.opset_imports[""] = opset
    model.ir_version = 10 if opset < OPSET_INT2 else 13
    model.producer_name, model.producer_version = "qgraph", ""


@contextlib.contextmanager
def _held(model: ir.Model) -> Iterator[None]:
    """Keep every value that holds codes, by making it an output for a while.

    A rewrite may bypass one; it stays in the file for comparisons, and onnxruntime drops it.
    """
    outputs = model.graph.outputs
    count, present = len(outputs), {v.name for v in outputs}
    values = [v for node in model.graph for v in node.outputs]
    outputs.extend(v for v in values if str(v.name).endswith(CODES) and v.name not in present)
    yield
    del outputs[count:]


def _drop_defaults(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type in _KEPT or node.op_type == "Cast":
            for name, default in _DEFAULTS.items():
                if name in node.attributes and node.attributes[name].value == default:
                    node.attributes.pop(name)


def _keep_norms_apart(model: ir.Model) -> None:
    """Write the sum in front of a LayerNorm as Sum, which onnxruntime does not fuse with it.

    Its SkipLayerNormalization takes some six times as long as the two kernels it replaces.
    """
    for node in model.graph:
        uses = list(node.outputs[0].uses()) if node.op_type == "Add" else []
        if uses and all(use.node.op_type == "LayerNormalization" for use in uses):
            node.op_type = "Sum"


def _pack(model: ir.Model, opset: int) -> None:
    """Store narrow int8 codes in 4 or 2 bits, widened to INT8 by a Cast that folds at load."""
    graph = model.graph
    for value in list(graph.initializers.values()):
        users = [use.node for use in value.uses()]
        if not users or any(node.op_type != "DequantizeLinear" for node in users):
            continue
        if any(node.inputs[0] is not value for node in users) or value.const_value is None:
            continue
        codes = value.const_value.numpy()
        dtype = narrowest(codes, opset)
        if dtype is None or codes.size < _WORTH_PACKING:
            continue
        packed = ir.Value(
            name=f"{value.name}/packed", shape=value.shape, type=ir.TensorType(dtype),
            const_value=ir.Tensor(codes.astype(dtype.numpy()), name=f"{value.name}/packed"),
        )  # fmt: skip
        graph.register_initializer(packed)
        widen = ir.node(WIDEN_AT_LOAD, [packed], attributes={"to": int(ir.DataType.INT8)})
        widen.outputs[0].name = f"{value.name}/wide"
        widen.outputs[0].type, widen.outputs[0].shape = value.type, value.shape
        value.replace_all_uses_with(widen.outputs[0])
        graph.insert_before(graph[0], widen)
        graph.initializers.pop(str(value.name))


def narrowest(codes: np.ndarray, opset: int) -> ir.DataType | None:
    """The narrowest signed ONNX type below 8 bits that holds the codes, or None."""
    if codes.dtype != np.int8:
        return None
    low, high = int(codes.min()), int(codes.max())
    if low >= -2 and high <= 1 and opset >= OPSET_INT2 and hasattr(ml_dtypes, "int2"):
        return ir.DataType.INT2
    return ir.DataType.INT4 if low >= -8 and high <= 7 else None


def rename_dims(model: ir.Model, names: dict[str, str]) -> None:
    """Rename symbolic sizes in every shape, inside expressions too."""
    if not names:
        return
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")

    def renamed(value: ir.Value) -> None:
        if value.shape is not None:
            value.shape = ir.Shape([
                pattern.sub(lambda m: names[m.group(1)], str(d.value))
                if isinstance(d, ir.SymbolicDim) and d.value is not None else d
                for d in value.shape
            ])  # fmt: skip

    for value in model.graph.inputs:
        renamed(value)
    for node in model.graph:
        for value in node.outputs:
            renamed(value)
