# SPDX-License-Identifier: Apache-2.0
"""A latency model: measured onnxruntime kernels predict a node's milliseconds on this machine.

A benchmark times each kernel on a handful of sizes and fits ``ms = a + b * work``, with work the
quantity that the kernel's time grows with (multiplications for products, elements for the
rest). The fit is cached per machine and onnxruntime version.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.fx import GraphModule, Node

from qgraph.atomic import write_file
from qgraph.backends.onnx.capabilities import OPSET_DEFAULT
from qgraph.backends.onnx.session import session_options
from qgraph.errors import ConfigError
from qgraph.graph import dialect
from qgraph.graph.ops import OpKind, kind, product

_REPEATS = 7
# (rows, contraction, columns) of a matrix product; (channels, side) of a 3x3 convolution.
_PRODUCT_SIZES = ((64, 64, 64), (256, 128, 128), (512, 384, 384), (784, 384, 1152))
# (batch, rows, contraction, columns) of attention products, both operands activations.
_MATMUL_SIZES = (
    (24, 32, 32, 32),
    (96, 64, 32, 64),
    (96, 64, 64, 32),
    (12, 197, 64, 197),
    (12, 197, 197, 64),
)
_CONV_SIZES = ((16, 28), (32, 56), (64, 28), (64, 56))
_ELEMENTS = (1 << 12, 1 << 16, 1 << 19)
_INTEGER_BITS = 8


@dataclass(frozen=True, slots=True)
class Line:
    """``milliseconds = fixed + per_unit * work``, both non-negative."""

    fixed: float
    per_unit: float

    def __call__(self, work: float) -> float:
        """Milliseconds for some work."""
        return self.fixed + self.per_unit * work

    @classmethod
    def fit(cls, points: Iterable[tuple[float, float]]) -> Line:
        """Least squares on relative errors, so that small sizes count as much as large ones."""
        work, spent = (np.array(v) for v in zip(*points, strict=True))
        weights = 1 / spent
        matrix = np.stack([weights, work * weights], 1)
        from scipy.optimize import nnls

        (fixed, per_unit), _ = nnls(matrix, spent * weights)
        return cls(float(fixed), float(per_unit))


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """Predicts milliseconds of a node by kind, work and whether it runs in integers.

    Attributes:
        lines: ``"<kernel> integer"`` or ``"<kernel> float"`` -> line.
        machine: what it was measured on.
    """

    lines: dict[str, Line]
    machine: str

    def product_ms(self, kernel: str, multiplications: float, *, bits: int | None) -> float:
        """Milliseconds of a ``gemm``, ``matmul``, ``conv`` or ``depthwise``.

        Args:
            kernel: one of those names.
            multiplications: of one call.
            bits: of its operands; above 8, or None, it runs in float.

        Raises:
            ConfigError: an unknown kernel.
        """
        integer = bits is not None and bits <= _INTEGER_BITS
        key = f"{kernel} {'integer' if integer else 'float'}"
        if key not in self.lines:
            msg = f"no line for {key!r}; known: {', '.join(sorted(self.lines))}"
            raise ConfigError(msg)
        return self.lines[key](multiplications)

    def predict(self, module: GraphModule) -> dict[str, float]:
        """Milliseconds per node of a (quantized or float) graph, symbolic sizes at their hints."""
        found = {}
        for node in module.graph.nodes:
            if node.op == "call_function":
                spent = self._node_ms(node)
                if spent is not None:
                    found[node.name] = spent
        return found

    def total(self, module: GraphModule) -> float:
        """Milliseconds of one run of the graph."""
        return sum(self.predict(module).values())

    def to_json(self) -> dict[str, Any]:
        """Plain data for the cache."""
        return {
            "machine": self.machine,
            "lines": {k: [v.fixed, v.per_unit] for k, v in self.lines.items()},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LatencyModel:
        """Read what `to_json` wrote."""
        lines = {str(k): Line(float(a), float(b)) for k, (a, b) in data["lines"].items()}
        return cls(lines, str(data["machine"]))

    def _node_ms(self, node: Node) -> float | None:
        what = product(node)
        if what is not None:
            integer = all(dialect.is_dequantize(node.args[p]) for p in (what.data, what.weight))
            name, work = multiplications(node)
            return self.product_ms(name, work, bits=8 if integer else None)
        if dialect.is_quantize(node) or dialect.is_dequantize(node):
            return self._border_ms(node)
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return None
        elements = _count(value.shape)
        return self.lines[f"{_ELEMENTWISE.get(kind(node), 'add')} float"](elements)

    def _border_ms(self, node: Node) -> float | None:
        """A quantizer behind a product, a decoder before one, and stored codes cost nothing."""
        source = node.args[0]
        assert isinstance(source, Node)
        if source.op == "get_attr":
            return None
        neighbours = [source] if dialect.is_quantize(node) else list(node.users)
        if all(product(n) is not None or kind(n) is OpKind.MOVE for n in neighbours):
            return None
        name = "quantize" if dialect.is_quantize(node) else "dequantize"
        return self.lines[f"{name} float"](_count(node.meta["val"].shape))


_ELEMENTWISE = {
    OpKind.SOFTMAX: "softmax", OpKind.NORM: "norm", OpKind.ELEMENTWISE: "gelu",
    OpKind.MOVE: "move", OpKind.CAT: "move", OpKind.EMBEDDING: "move",
}  # fmt: skip


def price_of_products() -> Callable[[Node, int], float]:
    """(product, bits) -> predicted milliseconds of one run on this machine; measures if needed."""
    model = latency_model()

    def price(node: Node, bits: int) -> float:
        name, work = multiplications(node)
        return model.product_ms(name, work, bits=bits)

    return price


def multiplications(node: Node) -> tuple[str, float]:
    """Kernel name and multiplications of a product node."""
    what = product(node)
    assert what is not None
    data, weight = node.args[what.data], node.args[what.weight]
    assert isinstance(data, Node)
    assert isinstance(weight, Node)
    out, factor = node.meta["val"].shape, weight.meta["val"].shape
    if kind(node) is OpKind.LINEAR:
        return "gemm", _count(out) * _size(factor[-1])
    if kind(node) is OpKind.MATMUL:
        return "matmul", _count(out) * _size(data.meta["val"].shape[-1])
    taps = _count(factor[2:])
    if kind(node) is OpKind.CONV_TRANSPOSE:
        return "conv", _count(data.meta["val"].shape) * _size(factor[1]) * taps
    name = "depthwise" if _size(factor[1]) == 1 and _size(factor[0]) > 1 else "conv"
    return name, _count(out) * _size(factor[1]) * taps


def _size(value: Any) -> int:
    if isinstance(value, int):
        return value
    hint = value.node.hint
    return int(hint) if hint is not None else 1


def _count(shape: Iterable[Any]) -> float:
    total = 1.0
    for size in shape:
        total *= _size(size)
    return total


def latency_model(
    *, cache_dir: str | os.PathLike[str] | None = None, threads: int = 1, refresh: bool = False
) -> LatencyModel:
    """The model of this machine, from the cache or measured now (some seconds).

    Args:
        cache_dir: default ``$XDG_CACHE_HOME/qgraph`` or ``~/.cache/qgraph``.
        threads: threads per session.
        refresh: measure again.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    home = Path(base) if base else Path.home() / ".cache"
    folder = Path(cache_dir) if cache_dir is not None else home / "qgraph"
    machine = f"{platform.node()} {_processor()} onnxruntime {onnxruntime.__version__} {threads}"
    path = folder / f"latency-{hashlib.sha256(machine.encode()).hexdigest()[:12]}.json"
    if path.exists() and not refresh:
        try:
            return LatencyModel.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError):
            pass  # a damaged cache is measured anew
    model = LatencyModel(measure(threads), machine)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(path, [json.dumps(model.to_json()).encode()])
    return model


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")


def measure(threads: int = 1) -> dict[str, Line]:
    """Time every kernel of the model on this machine."""
    lines: dict[str, Line] = {}
    for integer in (True, False):
        suffix = "integer" if integer else "float"
        for name, sizes in (
            ("gemm", _PRODUCT_SIZES), ("matmul", _MATMUL_SIZES), ("conv", _CONV_SIZES),
            ("depthwise", _CONV_SIZES),
        ):  # fmt: skip
            points = [_time_product(name, size, integer, threads) for size in sizes]
            lines[f"{name} {suffix}"] = Line.fit(points)
    for name in ("softmax", "norm", "gelu", "move", "add", "quantize", "dequantize"):
        points = [(n, _time(_pointwise(name, n), threads)) for n in _ELEMENTS]
        lines[f"{name} float"] = Line.fit(points)
    return lines


def _time_product(
    name: str, size: tuple[int, ...], integer: bool, threads: int
) -> tuple[float, float]:
    """(multiplications, milliseconds) of one product.

    Convolutions are timed in a chain, less a chain of one: onnxruntime changes the layout once
    at either end, which a whole model pays once as well.
    """
    if name == "matmul":
        batch, rows, inner, columns = size
        model = _attention_product((batch, rows, inner), (batch, inner, columns), integer)
        return float(np.prod(size)), _time(model, threads)
    if name == "gemm":
        rows, inner, columns = size
        model = _chain(name, [rows, inner], [inner, columns], integer, 1)
        return float(np.prod(size)), _time(model, threads)
    channels, side = size
    weight = [channels, 1 if name == "depthwise" else channels, 3, 3]
    shape, work = [1, channels, side, side], float(np.prod(weight) * side * side)
    one, four = (_time(_chain(name, shape, weight, integer, n), threads) for n in (1, 4))
    return work, max(four - one, one / 10) / 3


def _chain(
    name: str, shape: list[int], weight: list[int], integer: bool, length: int
) -> onnx.ModelProto:
    """Products one behind the other; codes go in and out, so that only the kernel is timed."""
    rng = np.random.default_rng(0)
    op = "Gemm" if name == "gemm" else "Conv"
    given: dict[str, Any] = {}
    if op == "Conv":
        given = {"pads": [1, 1, 1, 1], "group": weight[0] if weight[1] == 1 else 1}
    stored: dict[str, Any] = {}
    nodes: list[onnx.NodeProto] = []
    axis = 0 if op == "Conv" else 1
    if integer:
        stored = {"s": np.float32(0.02), "z": np.uint8(128)}
        stored |= {"ws": np.full(weight[axis], 0.01, np.float32)}
        stored |= {"wz": np.zeros(weight[axis], np.int8)}
    value = "x"
    for step in range(length):
        if not integer:
            stored[f"w{step}"] = rng.standard_normal(weight).astype(np.float32)
            nodes.append(helper.make_node(op, [value, f"w{step}"], [f"y{step}"], **given))
            value = f"y{step}"
            continue
        stored[f"w{step}"] = rng.integers(-127, 128, weight).astype(np.int8)
        nodes += [
            helper.make_node("DequantizeLinear", [value, "s", "z"], [f"d{step}"]),
            helper.make_node("DequantizeLinear", [f"w{step}", "ws", "wz"], [f"v{step}"], axis=axis),
            helper.make_node(op, [f"d{step}", f"v{step}"], [f"p{step}"], **given),
            helper.make_node("QuantizeLinear", [f"p{step}", "s", "z"], [f"y{step}"]),
        ]
        value = f"y{step}"
    code = TensorProto.UINT8 if integer else TensorProto.FLOAT
    return _model(nodes, shape, stored, (code, code), value)


def _attention_product(
    first: tuple[int, ...], second: tuple[int, ...], integer: bool
) -> onnx.ModelProto:
    """A batched MatMul of two inputs (the second one the model's second input)."""
    stored = {"s": np.float32(0.02), "z": np.uint8(128)} if integer else {}
    nodes = [helper.make_node("MatMul", ["dx", "db"] if integer else ["x", "b"], ["y"])]
    if integer:
        for name in ("x", "b"):
            nodes.insert(0, helper.make_node("DequantizeLinear", [name, "s", "z"], [f"d{name}"]))
    code = TensorProto.UINT8 if integer else TensorProto.FLOAT
    model = _model(nodes, list(first), stored, (code, TensorProto.FLOAT))
    model.graph.input.append(helper.make_tensor_value_info("b", code, list(second)))
    return model


def _pointwise(name: str, elements: int) -> onnx.ModelProto:
    shape = [1, elements // 64, 8, 8]
    stored: dict[str, Any] = {}
    node = {
        "softmax": lambda: helper.make_node("Softmax", ["x"], ["y"], axis=-1),
        "norm": lambda: helper.make_node("LayerNormalization", ["x", "g"], ["y"], axis=-1),
        "gelu": lambda: helper.make_node("Gelu", ["x"], ["y"]),
        "move": lambda: helper.make_node("Transpose", ["x"], ["y"], perm=[0, 2, 3, 1]),
        "add": lambda: helper.make_node("Add", ["x", "x"], ["y"]),
        "quantize": lambda: helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"]),
        "dequantize": lambda: helper.make_node("DequantizeLinear", ["x", "s", "z"], ["y"]),
    }[name]()
    if name in {"softmax", "norm", "gelu"}:  # rows as long as those of transformers
        shape = [max(elements // 256, 1), 256]
    if name == "norm":
        stored["g"] = np.ones(256, np.float32)
    if name in {"quantize", "dequantize"}:
        stored |= {"s": np.float32(0.02), "z": np.uint8(128)}
    kinds = {"quantize": (1, 2), "dequantize": (2, 1)}.get(name, (1, 1))
    return _model([node], shape, stored, kinds)


def _model(
    nodes: list[onnx.NodeProto], shape: list[int], stored: dict[str, Any],
    kinds: tuple[int, int] = (TensorProto.FLOAT, TensorProto.FLOAT), output: str = "y",
) -> onnx.ModelProto:  # fmt: skip
    graph = helper.make_graph(
        nodes, "kernel", [helper.make_tensor_value_info("x", kinds[0], shape)],
        [helper.make_tensor_value_info(output, kinds[1], None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in stored.items()],
    )  # fmt: skip
    opset = [helper.make_opsetid("", OPSET_DEFAULT)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10)


def _time(model: onnx.ModelProto, threads: int) -> float:
    """Median milliseconds of one run: CPU time on one thread, else wall time."""
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), session_options(threads=threads),
        providers=["CPUExecutionProvider"],
    )  # fmt: skip
    rng = np.random.default_rng(0)
    feed = {}
    for value in session.get_inputs():
        array = rng.standard_normal(value.shape).astype(np.float32)
        feed[value.name] = (array * 30 + 128).astype(np.uint8) if "uint8" in value.type else array
    clock = time.process_time if threads == 1 else time.perf_counter
    session.run(None, feed)
    spent = []
    for _ in range(_REPEATS):
        start = clock()
        session.run(None, feed)
        spent.append(clock() - start)
    return max(float(np.median(spent) * 1e3), 1e-4)
