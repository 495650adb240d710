# SPDX-License-Identifier: Apache-2.0
"""The latency model recovers a simulated machine, and prices each node by its work."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor
from torch.fx import Node

from qgraph.backends.onnx import latency
from qgraph.backends.onnx.latency import LatencyModel, Line, latency_model, multiplications
from tests.backends.exact import coded, decode, encode
from tests.backends.single_ops import SingleOp

aten = torch.ops.aten
PRODUCTS = ("gemm", "matmul", "conv", "depthwise")
OTHERS = {"softmax": "Softmax", "norm": "LayerNormalization", "gelu": "Gelu", "move": "Transpose",
          "add": "Add", "quantize": "QuantizeLinear", "dequantize": "DequantizeLinear"}  # fmt: skip
BORDERS = {"QuantizeLinear", "DequantizeLinear"}


def line_of(op: str, integer: bool) -> Line:
    """What the simulated machine takes: (fixed, per unit) in milliseconds."""
    number = 1 + sorted([*OTHERS.values(), "Gemm", "MatMul", "Conv", "ConvDepth"]).index(op)
    return Line(number * 0.01, number * (1e-6 if integer else 5e-6))


class Machine:
    """Stands for onnxruntime and the clock: a run lasts as long as its nodes' lines say."""

    def __init__(self) -> None:
        self.now = 0.0
        self.models: list[onnx.ModelProto] = []
        self.feeds: list[dict[str, np.ndarray]] = []
        self.threads: list[int] = []
        self.runs = 0

    def session(self, data: bytes, options: Any, **_: Any) -> Any:
        self.threads.append(options.intra_op_num_threads)
        model = onnx.load_from_string(data)
        self.models.append(model)
        inputs = [
            SimpleNamespace(
                name=v.name, shape=[d.dim_value for d in v.type.tensor_type.shape.dim],
                type="tensor(uint8)" if v.type.tensor_type.elem_type == onnx.TensorProto.UINT8
                else "tensor(float)",
            )
            for v in model.graph.input
        ]  # fmt: skip
        spent = self.milliseconds(onnx.shape_inference.infer_shapes(model).graph)
        self.runs = 0

        def run(_: Any, feed: dict[str, np.ndarray]) -> None:
            self.feeds.append(feed)
            self.runs += 1
            # the first run is slow, and every third is disturbed
            self.now += (spent * (50 if self.runs == 1 else 9 if self.runs % 3 == 0 else 1)) / 1e3

        return SimpleNamespace(get_inputs=lambda: inputs, run=run)

    def milliseconds(self, graph: onnx.GraphProto) -> float:
        shapes = {
            v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in (*graph.input, *graph.value_info, *graph.output)
        }
        shapes |= {t.name: list(t.dims) for t in graph.initializer}
        products = [n for n in graph.node if n.op_type in {"Gemm", "MatMul", "Conv"}]
        total = 0.0
        for node in products or graph.node:
            out = float(np.prod(shapes[node.output[0]]))
            if node.op_type == "Conv":
                weight = shapes[node.input[1]]
                assert shapes[node.output[0]] == shapes[node.input[0]]
                work, name = out * float(np.prod(weight[1:])), "Conv"
                name += "Depth" * (weight[1] == 1)
            elif products:
                work, name = out * shapes[node.input[0]][-1], node.op_type
            else:
                work, name = out, node.op_type
            integer = any(n.op_type == "DequantizeLinear" for n in graph.node) and bool(products)
            total += line_of(name, integer)(work)
        return total


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(onnxruntime, "InferenceSession", made.session)
    clock = SimpleNamespace(process_time=lambda: made.now, perf_counter=lambda: made.now)
    monkeypatch.setattr(latency, "time", clock)
    return made


def test_measuring_recovers_the_lines_of_a_simulated_machine(machine: Machine) -> None:
    found = latency.measure()
    names = {"gemm": "Gemm", "matmul": "MatMul", "conv": "Conv", "depthwise": "ConvDepth"}
    wanted = {f"{k} {s}": line_of(v, s == "integer") for k, v in names.items()
              for s in ("integer", "float")}  # fmt: skip
    wanted |= {f"{k} float": line_of(v, False) for k, v in OTHERS.items()}
    assert found.keys() == wanted.keys()
    for name, line in wanted.items():
        assert found[name].per_unit == pytest.approx(line.per_unit, rel=1e-6), name
        assert found[name].fixed == pytest.approx(line.fixed, rel=1e-4), name


def test_what_is_timed_is_what_transformers_and_convolutional_networks_run(
    machine: Machine,
) -> None:
    latency.measure()
    attention, layers, wholes = set(), set(), set()
    for model in machine.models:
        ops = {n.op_type for n in model.graph.node}
        shapes = [
            tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in model.graph.input
        ]
        if "MatMul" in ops:
            (batch, rows, inner), (other, depth, columns) = shapes
            assert (other, depth) == (batch, inner)
            attention.add((batch, rows, inner, columns))
        elif "Conv" in ops:
            weights = [t.dims for t in model.graph.initializer if len(t.dims) == 4]
            for out, within, *kernel in weights:
                assert kernel == [3, 3]
                assert within in {1, out}
                assert out % 16 == shapes[0][2] % 4 == 0  # whole vectors
            assert shapes[0][2] == shapes[0][3]
            pads = {
                tuple(a.ints) for n in model.graph.node for a in n.attribute if a.name == "pads"
            }
            assert pads == {(1, 1, 1, 1)}
        elif "Gemm" in ops:
            (weight,) = {tuple(t.dims) for t in model.graph.initializer if len(t.dims) == 2}
            layers.add((*shapes[0], weight[1]))
            assert all(side % 16 == 0 for side in (*shapes[0], *weight))
        else:
            wholes.add(int(np.prod(shapes[0])))
            if ops & {"Softmax", "LayerNormalization", "Gelu"}:
                assert shapes[0][1] == 256
            else:
                assert shapes[0][2:] == (8, 8)
    # scores q @ k and the sums p @ v that follow come in pairs; batches are heads times images
    assert attention == {(b, t, n, d) for b, t, d, n in attention}
    assert all(batch % 12 == 0 for batch, *_ in attention)
    assert all(side % 32 == 0 or side == 14 * 14 + 1 for _, *sides in attention for side in sides)
    assert len(attention) == 5
    assert len(layers) == 4
    assert wholes == {2**12, 2**16, 2**19}


def test_inputs_are_noise_around_the_zero_point_in_the_type_of_the_model(machine: Machine) -> None:
    latency.measure()
    assert len(machine.models) * len(machine.feeds) > 0
    wanted = {
        tuple((v.name, v.type.tensor_type.elem_type) for v in model.graph.input)
        for model in machine.models
    }
    kinds = {
        np.dtype(np.uint8): onnx.TensorProto.UINT8,
        np.dtype(np.float32): onnx.TensorProto.FLOAT,
    }
    assert {tuple((k, kinds[v.dtype]) for k, v in f.items()) for f in machine.feeds} == wanted
    for feed in machine.feeds:
        for value in feed.values():
            middle, spread = (128, 30) if value.dtype == np.uint8 else (0, 1)
            assert abs(float(value.mean()) - middle) < 0.2 * spread
            assert float(value.std()) == pytest.approx(spread, rel=0.2)


def test_what_is_timed_is_valid_and_reads_all_that_it_holds(machine: Machine) -> None:
    latency.measure()
    assert set(machine.threads) == {1}
    for model in machine.models:
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        graph = model.graph
        assert {t.name for t in graph.initializer} <= {i for n in graph.node for i in n.input}
        made = {v.name for v in graph.input} | {t.name for t in graph.initializer}
        shapes = {t.name: list(t.dims) for t in graph.initializer}
        for node in graph.node:
            assert set(node.input) <= made
            made |= set(node.output)
            shapes |= {node.output[0]: shapes.get(node.input[0], [])}
            if node.op_type == "Conv":
                (groups,) = [a.i for a in node.attribute if a.name == "group"]
                out, within, *_ = shapes[node.input[1]]
                assert groups * within == out
    machine.threads.clear()
    latency.measure(3)
    assert set(machine.threads) == {3}


def test_lines_fit_relative_errors_and_are_never_negative() -> None:
    points = [(1.0, 2.0), (10.0, 11.0), (1e4, 2e4)]
    line = Line.fit(points)
    errors = [abs(line(w) - t) / t for w, t in points]
    for fixed, slope in ((1.01, 1.0), (0.99, 1.0), (1.0, 1.01), (1.0, 0.99)):
        other = Line(line.fixed * fixed, line.per_unit * slope)
        worse = [abs(other(w) - t) / t for w, t in points]
        assert sum(e * e for e in worse) >= sum(e * e for e in errors)
    assert Line.fit([(1.0, 1.0), (100.0, 250.0)]).fixed >= 0


def test_a_cache_is_kept_by_machine_and_measured_anew_on_demand(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def measure(threads: int) -> dict[str, Line]:
        calls.append(threads)
        return {"add float": Line(1, 2)}

    monkeypatch.setattr(latency, "measure", measure)
    first = latency_model(cache_dir=tmp_path)
    assert latency_model(cache_dir=tmp_path) == first
    assert calls == [1]
    latency_model(cache_dir=tmp_path, threads=2)
    latency_model(cache_dir=tmp_path, refresh=True)
    assert calls == [1, 2, 1]
    assert len(list(tmp_path.iterdir())) == 2
    (path,) = [p for p in tmp_path.iterdir() if json.loads(p.read_text())["machine"][-1] == "1"]
    assert len(path.stem) == len("latency-") + 12
    for damaged in ("{", "[]", '{"machine": "x"}', '{"machine": "x", "lines": 3}'):
        path.write_text(damaged if damaged != '{"machine": "x", "lines": 3}' else '{"lines": {}}')
        assert latency_model(cache_dir=tmp_path) == first
    for base in ("here", None):
        if base is None:
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
            monkeypatch.setattr(Path, "home", lambda: tmp_path)
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / base))
        latency_model()
    assert list((tmp_path / "here" / "qgraph").iterdir())
    assert list((tmp_path / ".cache" / "qgraph").iterdir())


class Odd:
    """A symbolic size whose hint is given."""

    def __init__(self, hint: int | None) -> None:
        self.node = SimpleNamespace(hint=hint)


def test_work_is_counted_in_multiplications() -> None:
    def work(
        op: Any, data: tuple[int, ...], weight: tuple[int, ...], *rest: Any
    ) -> tuple[str, float]:
        b = SingleOp()
        x, w = b.placeholder("x", torch.zeros(data)), b.placeholder("w", torch.zeros(weight))
        return multiplications(b.call(op, x, w, *([None, *rest] if rest else [])))

    assert work(aten.linear.default, (2, 3, 5), (7, 5)) == ("gemm", 2 * 3 * 5 * 7)
    assert work(aten.matmul.default, (2, 3, 5), (2, 5, 4)) == ("matmul", 2 * 3 * 5 * 4)
    out = 2 * 6 * 4 * 5
    conv = work(aten.conv2d.default, (2, 4, 9, 6), (6, 4, 3, 2), [2, 1])
    assert conv == ("conv", out * 4 * 3 * 2)
    assert work(aten.conv2d.default, (2, 4, 9, 6), (6, 2, 3, 2), [2, 1], [0, 0], [1, 1], 2) == (
        "conv", out * 2 * 3 * 2,
    )  # fmt: skip
    deep = work(aten.conv2d.default, (2, 4, 9, 6), (4, 1, 3, 2), [2, 1], [0, 0], [1, 1], 4)
    assert deep == ("depthwise", 2 * 4 * 4 * 5 * 3 * 2)
    assert work(aten.conv2d.default, (2, 1, 9, 6), (1, 1, 3, 2), [2, 1])[0] == "conv"
    assert work(aten.conv2d.default, (2, 1, 9, 6), (2, 1, 3, 2), [2, 1])[0] == "depthwise"
    back = work(aten.conv_transpose2d.input, (2, 4, 3, 5), (4, 6, 3, 2), [2, 1])
    assert back == ("conv", 2 * 4 * 3 * 5 * 6 * 3 * 2)
    for hint, size in ((7, 7), (None, 1), (3, 3)):
        assert latency._count([2, Odd(hint)]) == 2 * size


def model() -> LatencyModel:
    """A line of its own for each kernel: the fixed part says which."""
    names = [f"{n} {k}" for n in PRODUCTS for k in ("integer", "float")]
    names += [f"{n} float" for n in OTHERS]
    return LatencyModel({n: Line(2.0**k, 2.0**-30) for k, n in enumerate(names)}, "simulated")


def kernels_of(found: dict[str, float]) -> dict[str, tuple[str, float]]:
    """node -> (kernel, work), read from predicted times."""
    lines = model().lines
    result = {}
    for node, spent in found.items():
        name = next(n for n, line in reversed(lines.items()) if spent >= line.fixed)
        result[node] = name, (spent - lines[name].fixed) * 2.0**30
    return result


def test_each_node_is_priced_by_its_kernel_and_size() -> None:
    b = SingleOp()
    grid = coded(0, 255, 3)
    x = b.placeholder("x", torch.zeros(2, 3, 8))
    w = b.buffer("w", torch.zeros(5, 8, dtype=torch.int8))
    plain = b.buffer("v", torch.zeros(4, 5))
    first = decode(b, encode(b, x, "x", grid), "x", grid)
    linear = b.call(aten.linear.default, first, decode(b, w, "w", coded(-128, 127)))
    requantized = decode(b, encode(b, linear, "y", grid), "y", grid)
    other = b.call(aten.linear.default, requantized, plain)
    half = b.call(aten.matmul.default, requantized, b.buffer("u", torch.zeros(5, 6)))
    soft = b.call(aten.softmax.int, other, -1)
    norm = b.call(aten.layer_norm.default, half, [6])
    gelu = b.call(aten.gelu.default, norm)
    moved = b.call(aten.permute.default, gelu, [1, 0, 2])
    joined = b.call(aten.cat.default, [soft, soft], 1)
    summed = b.call(aten.mul.Tensor, gelu, gelu)
    mask = b.call(aten.gt.Scalar, summed, 0.0)
    again = decode(b, encode(b, soft, "z", grid), "z", grid)
    root = b.call(aten.exp.default, again)
    nodes: list[Node] = [linear, other, half, soft, norm, gelu, moved, joined, summed, mask, root]
    b.graph.output(tuple(nodes))
    module = b.module
    found = kernels_of(model().predict(module))
    wanted = {
        linear: ("gemm integer", 240), other: ("gemm float", 120), half: ("matmul float", 180),
        soft: ("softmax float", 24), norm: ("norm float", 36), gelu: ("gelu float", 36),
        moved: ("move float", 36), joined: ("move float", 48), summed: ("add float", 36),
        root: ("gelu float", 24),
    }  # fmt: skip
    for node, (kernel, work) in wanted.items():
        assert found[node.name] == (kernel, work), node
    borders = {n: v for n, v in found.items() if "quantize" in n}
    assert sorted(borders.values()) == [
        ("dequantize float", 24), ("quantize float", 24), ("quantize float", 48),
    ]  # fmt: skip
    assert mask.name not in found
    assert model().total(module) == pytest.approx(sum(model().predict(module).values()))


@pytest.mark.parametrize(
    ("bits", "kind"), [(8, "integer"), (9, "float"), (1, "integer"), (None, "float")]
)
def test_products_of_up_to_eight_bits_are_integer_products(bits: int | None, kind: str) -> None:
    given: Tensor | LatencyModel = model()
    assert isinstance(given, LatencyModel)
    for name in PRODUCTS:
        assert given.product_ms(name, 10, bits=bits) == given.lines[f"{name} {kind}"](10)
