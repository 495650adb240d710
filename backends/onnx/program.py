# SPDX-License-Identifier: Apache-2.0
"""A flat graph as the ExportedProgram that torch.onnx.export takes, without tracing it again.

The graph is already functional, shaped and made of ATen ops, so the exporter's own capture and
its decomposition of everything (three traces, nine tenths of the time) have nothing to find.
The few ops without a translation are decomposed one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from qgraph.errors import ExportError
from qgraph.graph.build import attribute
from qgraph.graph.provenance import module_path

aten = torch.ops.aten
Table = dict[Any, Callable[..., Any]]


class FlatProgram(ExportedProgram):
    """An exported program whose graph needs no retracing."""

    def run_decompositions(
        self, decomp_table: Table | None = None, decompose_custom_triton_ops: bool = False
    ) -> ExportedProgram:
        """Decompose only what has no translation, in place."""
        del decompose_custom_triton_ops
        table: Table = decomp_table or {}
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node.target in table:
                _expand(self.graph, node, table[node.target])
        self.graph.lint()
        return self


def flat_program(module: GraphModule) -> FlatProgram:
    """Lift buffers to inputs and describe the signature; `module`'s graph is taken over.

    Args:
        module: positional tensor inputs, one flat tuple of tensors as output, shapes in
            ``meta["val"]`` of every node.
    """
    graph = module.graph
    users = [n for n in graph.nodes if n.op == "placeholder"]
    specs, state = _lift(module)
    specs += [InputSpec(InputKind.USER_INPUT, TensorArgument(u.name), None) for u in users]
    results = next(n for n in reversed(graph.nodes) if n.op == "output").args[0]
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(r.name), None) for r in results]
    call = ModuleCallSignature(
        inputs=[TensorArgument(u.name) for u in users],
        outputs=[TensorArgument(r.name) for r in results],
        in_spec=pytree.tree_structure((tuple(users), {})),
        out_spec=pytree.tree_structure(tuple(results)),
    )
    return FlatProgram(
        root=torch.nn.Module(), graph=graph,
        graph_signature=ExportGraphSignature(specs, outputs), state_dict=state,
        range_constraints={}, module_call_graph=[ModuleCallEntry("", call)],
    )  # fmt: skip


def _lift(module: GraphModule) -> tuple[list[InputSpec], dict[str, Any]]:
    """Turn every buffer that is read into an input in front of all nodes."""
    graph: Graph = module.graph
    first = next(n for n in graph.nodes if n.op != "get_attr")
    lifted: dict[str, Node] = {}
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        target = str(node.target)
        if target not in lifted:
            with graph.inserting_before(first):
                lifted[target] = graph.placeholder(f"b_{target.replace('.', '_')}")
            lifted[target].meta["val"] = node.meta["val"]
        node.replace_all_uses_with(lifted[target])
        graph.erase_node(node)
    specs = [
        InputSpec(InputKind.BUFFER, TensorArgument(value.name), target, persistent=True)
        for target, value in lifted.items()
    ]
    return specs, {target: attribute(module, target) for target in lifted}


def _expand(graph: Graph, node: Node, decomposition: Callable[..., Any]) -> None:
    """Replace one node by the nodes of its decomposition."""
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    inputs = [leaf for leaf in leaves if isinstance(leaf, Node)]

    def call(*values: Any) -> Any:
        given = iter(values)
        flat = [next(given) if isinstance(leaf, Node) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(flat, spec)
        return decomposition(*args, **kwargs)

    try:
        traced = make_fx(torch.func.functionalize(call))(*(i.meta["val"] for i in inputs))
    except Exception as error:
        msg = f"{node.name} in {module_path(node) or 'the model'}: no ONNX form of {node.target}"
        raise ExportError(msg) from error
    _forget_strides(traced.graph)
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    mapped = dict(zip(placeholders, inputs, strict=True))
    with graph.inserting_before(node):
        result = graph.graph_copy(traced.graph, mapped)
    assert isinstance(result, Node)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    result.name = node.name  # the signature refers to results by name


def _forget_strides(graph: Graph) -> None:
    """Drop restriding of equal shapes: ONNX tensors have no strides."""
    for node in list(graph.nodes):
        if node.target in {aten.as_strided_.default, aten.as_strided.default}:
            source = node.all_input_nodes[0]
            if tuple(node.meta["val"].shape) == tuple(source.meta["val"].shape):
                node.replace_all_uses_with(source)
                graph.erase_node(node)
