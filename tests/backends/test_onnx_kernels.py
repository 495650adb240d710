# SPDX-License-Identifier: Apache-2.0
"""Integer kernels obey the contract; the kernel table and the latency model tell the truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qgraph.backends.onnx import explain, lower
from qgraph.backends.onnx.capabilities import CAPABILITIES, INTEGER_KERNELS
from qgraph.backends.onnx.export import export
from qgraph.backends.onnx.kernels import kernels, optimized, shares
from qgraph.backends.onnx.latency import LatencyModel, Line, latency_model, multiplications
from qgraph.backends.onnx.session import Session
from qgraph.errors import ArtifactError, ConfigError
from qgraph.formats import AffineEncoding
from qgraph.graph.canonicalize import canonicalize
from qgraph.graph.dialect import encoding_of, is_quantize
from qgraph.graph.ops import product
from qgraph.graph.trace import trace
from tests.backends.onnx_models import Attention, Mlp, Unet, quantized


class TwoConvs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 7, 3, padding=1), nn.Conv2d(7, 4, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.relu(self.a(x)))
        return y


def affine(module: GraphModule, node: object) -> AffineEncoding:
    assert isinstance(node, Node)
    found = encoding_of(module, node)
    assert isinstance(found, AffineEncoding)
    return found


def contract(module: GraphModule, node: Node, data_codes: np.ndarray, after: Node) -> np.ndarray:
    """``clamp(round_half_even(float32(acc) * float32((sx * sw) / sy)) + zero point)``."""
    what = product(node)
    assert what is not None
    data, weight, bias = (node.args[i] for i in (what.data, what.weight, 2))
    x, w, y = affine(module, data), affine(module, weight), affine(module, after)

    def stored(value: object) -> Tensor:
        assert isinstance(value, Node)
        source = value.args[0]
        assert isinstance(source, Node)
        tensor: Tensor = getattr(module, str(source.target))
        return tensor

    levels = torch.from_numpy(data_codes).to(torch.float64) - int(x.zero_point)
    rest = node.args[3:]
    exact = node.target(
        levels, stored(weight).to(torch.float64), stored(bias).to(torch.float64), *rest
    )  # type: ignore[operator]
    factor = (x.scale * w.scale) / y.scale
    shape = [1, -1] + [1] * (exact.ndim - 2)
    product_ = exact.to(torch.int32).to(torch.float32) * factor.view(shape)
    codes = torch.round(product_) + int(y.zero_point)
    return codes.clamp(y.qmin, y.qmax).to(torch.int32).numpy()


@pytest.mark.parametrize(
    ("build", "shape"), [(Mlp, (64, 16)), (TwoConvs, (4, 3, 16, 16))], ids=["gemm", "conv"]
)
def test_integer_kernels_equal_the_contract(
    build: type[nn.Module], shape: tuple[int, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    module = quantized(build(), (x,))
    export(module, tmp_path / "m.onnx")
    session = Session(tmp_path / "m.onnx", threads=1)
    nodes = list(module.graph.nodes)
    quantizers = [n for n in nodes if is_quantize(n)]
    first = next(n for n in nodes if product(n) is not None)
    total = 0
    for seed in range(20):
        torch.manual_seed(seed)
        codes = session.codes(torch.randn(shape) * 2)
        expected = contract(module, first, codes[quantizers[0].name], quantizers[1])
        assert (expected == codes[quantizers[1].name]).all()
        total += expected.size
    assert total > 20_000


def test_the_table_names_kernels_shares_and_cures(tmp_path: Path) -> None:
    x = torch.randn(4, 6, 16)
    found = explain(quantized(Attention(), (x,)), sample=((x,), {}), threads=1)
    kinds = {row.op: row.kind for row in found.rows}
    assert kinds["QGemm"] == "integer"
    assert kinds["Softmax"] == "float"
    assert kinds["QuantizeLinear"] == "border"
    assert sum(row.share for row in found.rows) == pytest.approx(1, abs=0.02)
    island = next(row for row in found.rows if row.op == "Softmax")
    assert "logits" in island.cure
    assert "QGemm" in str(found)
    assert shares(found)["islands"]
    assert not found.warnings


def test_a_clip_of_codes_counts_as_integer() -> None:
    module = quantized(Mlp(), (torch.randn(8, 16),), "int4", ends_bits=4)
    kinds = {row.op: row.kind for row in explain(module, threads=1).rows}
    assert kinds["Clip"] == "integer"
    assert "float" not in kinds.values()


def conv_file(path: Path, *, clip: bool, weight_bits: int = 8) -> Path:
    """A quantized convolution in front of a quantizer, with a float Clip between or without."""
    stored = {
        "s": np.float32(0.1), "z": np.uint8(0), "ws": np.full(4, 0.1, np.float32),
        "low": np.float32(0), "high": np.float32(6),
    }  # fmt: skip
    weight = np.ones((4, 3, 3, 3), np.int8)
    kind = TensorProto.INT8 if weight_bits == 8 else TensorProto.INT2
    tensors = [numpy_helper.from_array(v, k) for k, v in stored.items()]
    tensors.append(helper.make_tensor("w", kind, weight.shape, weight.flatten().tolist()))
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["qx"], name="q0"),
        helper.make_node("DequantizeLinear", ["qx", "s", "z"], ["dx"], name="d0"),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["dw"], axis=0, name="d1"),
        helper.make_node("Conv", ["dx", "dw"], ["c"], name="conv"),
        helper.make_node("Clip", ["c", "low", "high"], ["a"], name="clip"),
        helper.make_node("QuantizeLinear", ["a" if clip else "c", "s", "z"], ["q"], name="q1"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], name="d2"),
    ]
    graph = helper.make_graph(
        [n for n in nodes if clip or n.op_type != "Clip"], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], tensors,
    )  # fmt: skip
    opset = [helper.make_opsetid("", 21 if weight_bits == 8 else 25)]
    version = 10 if weight_bits == 8 else 13
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=version), path)
    return path


def test_a_float_clip_before_a_quantizer_is_warned_about(tmp_path: Path) -> None:
    plain = kernels(conv_file(tmp_path / "plain.onnx", clip=False), runs=1)
    assert not plain.warnings
    assert "QLinearConv" in {row.op for row in plain.rows}
    clipped = kernels(conv_file(tmp_path / "clip.onnx", clip=True), runs=1)
    assert "QLinearConv" not in {row.op for row in clipped.rows}
    assert any("float Clip" in w for w in clipped.warnings)


def test_two_bit_weights_that_no_session_loads_are_explained(tmp_path: Path) -> None:
    path = conv_file(tmp_path / "two.onnx", clip=False, weight_bits=2)
    with pytest.raises(ArtifactError, match="disable_quant_qdq"):
        kernels(path, runs=1)


def test_weight_only_products_are_warned_about(tmp_path: Path) -> None:
    weight = np.ones((64, 32), np.int8)
    stored = {"w": weight, "s": np.full(32, 0.1, np.float32), "z": np.zeros(32, np.int8)}
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], axis=1),
            helper.make_node("MatMul", ["x", "d"], ["y"]),
        ],
        "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 32])],
        [numpy_helper.from_array(v, k) for k, v in stored.items()],
    )  # fmt: skip
    opset = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "m.onnx")
    found = kernels(tmp_path / "m.onnx", runs=1)
    assert any("accuracy_level" in w for w in found.warnings)


def test_capabilities_hold_on_the_installed_runtime(tmp_path: Path) -> None:
    export(quantized(Unet(), (torch.randn(4, 1, 8, 8),)), tmp_path / "m.onnx")
    found = {n.op_type for n in optimized(tmp_path / "m.onnx").graph.node}
    assert CAPABILITIES["Conv"].fused in found
    assert CAPABILITIES["Gemm"].open in found
    assert {c.fused for c in CAPABILITIES.values() if c.fused} & INTEGER_KERNELS
    assert not {"Conv", "FusedConv", "ConvTranspose", "Gemm"} & found


def test_lowering_in_memory_runs_like_the_file(tmp_path: Path) -> None:
    x = torch.randn(8, 16)
    module = quantized(Mlp(), (x,))
    torch.testing.assert_close(lower(module)(x), module(x), atol=1e-5, rtol=1e-5)


def test_lines_fit_points_on_a_line() -> None:
    line = Line.fit([(work, 0.5 + 2 * work) for work in (1.0, 10.0, 1000.0)])
    assert line(50) == pytest.approx(100.5, rel=1e-4)
    assert Line.fit([(1.0, 5.0), (2.0, 4.0), (3.0, 3.0)]).per_unit == 0


def test_latency_is_cached_and_tells_integer_from_float(tmp_path: Path) -> None:
    names = ("gemm", "matmul", "conv", "depthwise")
    lines = {f"{n} integer": Line(0.0, 1e-6) for n in names}
    lines |= {f"{n} float": Line(0.0, 4e-6) for n in names}
    others = ("softmax", "norm", "gelu", "move", "add", "quantize", "dequantize")
    lines |= {f"{n} float": Line(0.0, 0.0) for n in others}
    model = LatencyModel(lines, "test")
    assert LatencyModel.from_json(model.to_json()) == model
    module = quantized(Mlp(), (torch.randn(8, 16),))
    products = [n for n in module.graph.nodes if product(n) is not None]
    work = sum(multiplications(n)[1] for n in products)
    assert model.total(module) == pytest.approx(work * 1e-6)
    assert model.product_ms("conv", 1e6, bits=16) == 4 * model.product_ms("conv", 1e6, bits=4)
    with pytest.raises(ConfigError, match="no line"):
        model.product_ms("fft", 1, bits=8)


def test_measuring_this_machine_finds_integer_products_and_writes_a_cache(tmp_path: Path) -> None:
    model = latency_model(cache_dir=tmp_path)
    assert len(list(tmp_path.glob("latency-*.json"))) == 1
    assert latency_model(cache_dir=tmp_path) == model
    next(tmp_path.glob("*.json")).write_text("damaged", encoding="utf-8")
    assert latency_model(cache_dir=tmp_path).lines.keys() == model.lines.keys()


def test_only_a_convolution_with_one_channel_a_group_is_priced_as_depthwise() -> None:
    layers = (nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, (1, 3)))
    found = []
    for layer in layers:
        module = trace(layer.eval(), torch.zeros(2, 4, 5, 5))
        canonicalize(module)
        (node,) = (n for n in module.graph.nodes if "conv" in str(n.target))
        found.append(multiplications(node)[0])
    assert found == ["depthwise", "conv", "conv"]
