# SPDX-License-Identifier: Apache-2.0
"""A graph module as JSON and tensors, and back.

fx turns graphs into Python source and runs it, so every name that reaches that source is checked
on reading: identifiers for inputs, dotted identifiers for tensors, schema names for keywords.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.fx.node import map_arg

from qgraph.artifact import structure
from qgraph.artifact.agreement import check_size, check_values, check_work
from qgraph.artifact.damage import as_damage, damaged
from qgraph.artifact.shapes import Shapes, Symbols
from qgraph.artifact.targets import check_call, name_of, resolve
from qgraph.artifact.values import decode, dtype_of, encode
from qgraph.errors import ExportError
from qgraph.graph.build import attribute, set_value
from qgraph.graph.provenance import FRAME, call_index, last_user_frame, module_path
from qgraph.graph.tensors import weight_keys
from qgraph.graph.trace_info import TraceInfo, set_trace_info, trace_info

MAX_NODES = 1_000_000
_IDENTIFIER = re.compile(r"(?!__)[A-Za-z_][A-Za-z0-9_]{0,255}")
_PATH = re.compile(r"(?!.*__class__|.*__dict__)[A-Za-z0-9_]{1,256}(\.[A-Za-z0-9_]{1,256}){0,63}")
_NODE_KEYS = frozenset({
    "name", "op", "target", "args", "kwargs", "value", "tensor", "module", "line", "custom",
})  # fmt: skip
_FRAME = re.compile(r"(.*?):(\d+), in (.*?): (.*)", re.DOTALL)


def encode_graph(module: GraphModule) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The graph as plain JSON values, and the tensors it reads by storage name.

    Raises:
        ExportError: the graph holds something that has no form.
    """
    symbols = Symbols()
    stored, names = _tensors(module)
    nodes = [_encode_node(module, node, names, symbols) for node in module.graph.nodes]
    info = trace_info(module)
    pytree_info = getattr(module.graph._codegen, "pytree_info", None)
    calling = None
    if pytree_info is not None:
        calling = {
            "arguments": list(pytree_info.orig_args),
            "inputs": structure.encode(pytree_info.in_spec),
            "outputs": structure.encode(pytree_info.out_spec),
        }
    data = {
        "nodes": nodes,
        "symbols": symbols.hints,
        "calling": calling,
        "strides": {name: order for name, (_, order) in stored.items() if order},
        "trace": {
            "dynamic_batch": info.dynamic_batch,
            "reason": info.reason,
            "input_names": list(info.input_names),
            "original_dtype": str(info.original_dtype).removeprefix("torch."),
        },
    }
    return data, {name: tensor for name, (tensor, _) in stored.items()}


def _tensors(
    module: GraphModule,
) -> tuple[dict[str, tuple[Tensor, list[int]]], dict[str, str]]:
    """Stored tensors with their order of strides, and the storage name of each target.

    A tensor of several names is stored under the first that the graph reads: the order in which
    a module came by its buffers is not in the file.
    """
    keys, stored, names = weight_keys(module), {}, {}
    first: dict[str, str] = {}
    for node in module.graph.nodes:
        if node.op != "get_attr":
            continue
        target = str(node.target)
        tensor = attribute(module, target)
        if not isinstance(tensor, Tensor) or not _PATH.fullmatch(target):
            msg = f"{node.name} reads {target!r}, which is no tensor that can be saved"
            raise ExportError(msg)
        names[target] = first.setdefault(keys.get(target, target), target)
        if names[target] not in stored:
            stored[names[target]] = _dense(tensor.detach())
    return {f"t.{name}": value for name, value in stored.items()}, names


def _dense(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """The tensor contiguous, dimensions sorted by stride: kernels may round by memory layout."""
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    if tensor.is_contiguous() or not tensor.permute(order).is_contiguous():
        return tensor.contiguous(), []
    return tensor.permute(order), order


def _encode_node(
    module: GraphModule, node: Node, names: dict[str, str], symbols: Symbols
) -> dict[str, Any]:
    target = str(node.target)
    if node.op == "call_function":
        target = name_of(node.target)
    elif node.op not in {"placeholder", "get_attr", "output"}:
        msg = f"{node.name} is a {node.op}; only traced graphs can be saved"
        raise ExportError(msg)
    data: dict[str, Any] = {"name": node.name, "op": node.op, "target": target}
    if node.op == "get_attr":
        data["tensor"] = names[target]
    else:
        data["args"] = [encode(a) for a in node.args]
        data["kwargs"] = {k: encode(v) for k, v in node.kwargs.items()}
        data["value"] = symbols.value(node.meta.get("val"))
    if module_path(node):
        data["module"] = [module_path(node), call_index(node)]
    line = last_user_frame(node.meta.get("stack_trace") or "")
    if line:
        data["line"] = line
    custom = node.meta.get("custom", {}).get("qgraph")
    if custom:
        data["custom"] = custom
    return data


def decode_graph(
    data: dict[str, Any], tensors: dict[str, Tensor], device: torch.device
) -> GraphModule:
    """Build the graph module that `encode_graph` took apart.

    Raises:
        ArtifactError: the data is malformed, or asks for what saved graphs may not do.
    """
    kinds = (
        KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError, RecursionError,
        SyntaxError, AssertionError,
    )  # fmt: skip
    with as_damage("the graph is malformed", *kinds):
        builder = _Builder(data, tensors, device)
        if len(data["nodes"]) > MAX_NODES:
            raise damaged(f"{len(data['nodes'])} nodes; refused above {MAX_NODES}")
        for item in data["nodes"]:
            builder.add(item)
        return builder.finish(data)


class _Builder:
    def __init__(
        self, data: dict[str, Any], tensors: dict[str, Tensor], device: torch.device
    ) -> None:
        self.device, self.root, self.graph = device, nn.Module(), Graph()
        self.nodes: dict[str, Node] = {}
        self.undeclared: list[Node] = []
        self.shapes = Shapes(data["symbols"], device)
        orders = data["strides"]
        if orders.keys() - tensors.keys():
            raise damaged(f"orders of strides for unknown tensors {sorted(orders)[:3]}")
        self.tensors = {
            name.removeprefix("t."): _strided(tensor, orders.get(name)).to(device)
            for name, tensor in tensors.items()
        }

    def add(self, item: dict[str, Any]) -> None:
        if item.keys() - _NODE_KEYS:
            raise damaged(f"a node has the unknown entries {sorted(item.keys() - _NODE_KEYS)[:3]}")
        name, op, target = item["name"], item["op"], item["target"]
        if not isinstance(name, str) or not _IDENTIFIER.fullmatch(name) or name in self.nodes:
            raise damaged(f"node name {str(name)[:80]!r} is no identifier, or occurs twice")
        make: dict[str, Callable[[str, Any, dict[str, Any]], Node]] = {
            "placeholder": self._placeholder, "get_attr": self._get_attr,
            "call_function": self._call, "output": self._output,
        }  # fmt: skip
        if op not in make or (self.nodes and list(self.nodes.values())[-1].op == "output"):
            raise damaged(f"node {name!r} of kind {str(op)[:80]!r} may not stand there")
        node = make[op](name, target, item)
        if node.name != name:
            raise damaged(f"node name {name!r} is reserved")
        self.nodes[name] = node
        _decode_origin(node, item)

    def _arguments(self, item: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args = tuple(decode(a, self.nodes, self.device) for a in item["args"])
        return args, {k: decode(v, self.nodes, self.device) for k, v in item["kwargs"].items()}

    def _placeholder(self, name: str, target: Any, item: dict[str, Any]) -> Node:
        if not _IDENTIFIER.fullmatch(target) or keyword.iskeyword(target) or target == "self":
            raise damaged(f"input name {str(target)[:80]!r} is no identifier")
        args, kwargs = self._arguments(item)
        if (
            kwargs
            or len(args) > 1
            or not all(isinstance(a, (int, float, type(None))) for a in args)
        ):
            raise damaged(f"input {target!r} has the default {str(args)[:80]}")
        node = self.graph.create_node("placeholder", target, args, {}, name=name)
        self._value(node, item)
        return node

    def _get_attr(self, name: str, target: Any, item: dict[str, Any]) -> Node:
        if not _PATH.fullmatch(target):
            raise damaged(f"tensor name {str(target)[:80]!r} is not a path of identifiers")
        self._register(target, self.tensors[item["tensor"]])
        node = self.graph.create_node("get_attr", target, (), {}, name=name)
        tensor = self.tensors[item["tensor"]]
        with self.shapes.mode:
            node.meta["val"] = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        return node

    def _register(self, target: str, tensor: Tensor) -> None:
        owner, path = self.root, target.split(".")
        for part in path[:-1]:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]  # type: ignore[assignment]
        if path[-1] not in owner._buffers:
            owner.register_buffer(path[-1], tensor)
        elif owner._buffers[path[-1]] is not tensor:
            raise damaged(f"tensor name {target!r} stands for two tensors")

    def _call(self, name: str, target: Any, item: dict[str, Any]) -> Node:
        function = resolve(target)
        args, kwargs = self._arguments(item)
        check_call(function, args, kwargs)
        node = self.graph.create_node("call_function", function, args, kwargs, name=name)
        self._value(node, item)
        return node

    def _output(self, name: str, target: Any, item: dict[str, Any]) -> Node:
        args, kwargs = self._arguments(item)
        if len(args) != 1 or kwargs or target != "output":
            raise damaged("the output node does not have one value")
        return self.graph.create_node("output", "output", args, {}, name=name)

    def _value(self, node: Node, item: dict[str, Any]) -> None:
        if item["value"] is not None:
            node.meta["val"] = self.shapes.value(item["value"])
        elif node.op == "call_function":
            self.undeclared.append(node)

    def finish(self, data: dict[str, Any]) -> GraphModule:
        if not self.nodes or list(self.nodes.values())[-1].op != "output":
            raise damaged("the graph has no output")
        if data["calling"] is not None:
            self.graph.set_codegen(_PyTreeCodeGen(_calling(data["calling"], self.graph)))
        module = GraphModule(self.root, self.graph)
        module.eval()
        for node in self.undeclared:
            args = map_arg(node.args, lambda item: item.meta.get("val"))
            check_work(cast("Callable[..., Any]", node.target), cast("tuple[Any, ...]", args))
            set_value(module, node)
            check_size(node.meta["val"])
        check_values(module)
        set_trace_info(module, _trace_info(data["trace"]))
        module.graph.lint()
        return module


def _strided(tensor: Tensor, order: Any) -> Tensor:
    if order is None:
        return tensor
    if not isinstance(order, list) or sorted(order) != list(range(tensor.ndim)):
        raise damaged(f"order of strides {str(order)[:80]} does not fit {tensor.ndim} dimensions")
    return tensor.permute([order.index(d) for d in range(tensor.ndim)])


def _decode_origin(node: Node, item: dict[str, Any]) -> None:
    if "module" in item:
        path, call = str(item["module"][0]), int(item["module"][1])
        node.meta["nn_module_stack"] = {f"{path}@{call}" if call else path: (path, "")}
    match = _FRAME.fullmatch(item["line"]) if isinstance(item.get("line"), str) else None
    if match:
        file, line, function, code = (part.replace('"', "'") for part in match.groups())
        frame = f'File "{file}", line {line}, in {function}\n    {match[4]}'
        node.meta["stack_trace"] = frame if FRAME.search(frame) and code else ""
    if isinstance(item.get("custom"), dict):
        node.meta["custom"] = {"qgraph": item["custom"]}


def _calling(data: dict[str, Any], graph: Graph) -> _PyTreeInfo:
    arguments = list(data["arguments"])
    for name in arguments:
        plain = name.removeprefix("*").removeprefix("*")
        if not _IDENTIFIER.fullmatch(plain) or keyword.iskeyword(plain):
            raise damaged(f"argument name {str(name)[:80]!r} is no identifier")
    inputs, outputs = structure.decode(data["inputs"]), structure.decode(data["outputs"])
    count = sum(node.op == "placeholder" for node in graph.nodes)
    if inputs.num_leaves != count or inputs.num_children != 2:
        raise damaged(f"{inputs.num_leaves} inputs are declared, the graph has {count}")
    positional = inputs.children()[0].num_children
    if not any(name.startswith("*") for name in arguments) and positional > len(arguments):
        raise damaged(f"{positional} inputs are given by place, {len(arguments)} have names")
    (results,) = next(reversed(graph.nodes)).args
    found = len(results) if isinstance(results, (list, tuple)) else 1
    if outputs.num_leaves != found:
        raise damaged(f"{outputs.num_leaves} outputs are declared, the graph has {found}")
    return _PyTreeInfo(arguments, inputs, outputs)


def _trace_info(data: dict[str, Any]) -> TraceInfo:
    dynamic, reason, names = data["dynamic_batch"], data["reason"], data["input_names"]
    texts = isinstance(names, list) and all(isinstance(text, str) for text in [reason, *names])
    if not isinstance(dynamic, bool) or not texts:
        raise damaged("dynamic_batch is no truth value, or reason and input_names are no text")
    return TraceInfo(dynamic, reason, tuple(names), dtype_of(data["original_dtype"]))
