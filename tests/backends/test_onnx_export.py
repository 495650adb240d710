# SPDX-License-Identifier: Apache-2.0
"""Files mean what the graph means, carry the model's signature, and run in integer kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from qgraph.backends.onnx.export import export
from qgraph.backends.onnx.finish import narrowest
from qgraph.backends.onnx.kernels import optimized
from qgraph.backends.onnx.session import Session
from qgraph.errors import ExportError, InputError
from qgraph.graph.trace import trace
from tests.backends.onnx_models import Attention, ConvNet, Embedded, Mlp, Unet, quantized


def codes_of(module: GraphModule, leaves: list[Tensor]) -> dict[str, np.ndarray]:
    """Codes of every activation quantizer, by the dialect's own ops."""
    found: dict[str, np.ndarray] = {}

    class Recorder(Interpreter):
        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            if n.op == "call_function" and str(n.target).startswith("qgraph.quantize"):
                found[n.name] = value.numpy().astype(np.int32)
            return value

    with torch.no_grad():
        Recorder(module).run(*leaves)
    return found


CASES: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "mlp": (Mlp, (8, 16)),
    "attention": (Attention, (4, 6, 16)),
    "convnet": (ConvNet, (4, 3, 8, 8)),
    "unet": (Unet, (4, 1, 8, 8)),
}


@pytest.mark.parametrize("name", CASES)
def test_codes_on_onnxruntime_are_those_of_the_graph(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build, shape = CASES[name]
    args = (torch.randn(shape),)
    module = quantized(build(), args)
    export(module, tmp_path / "m.onnx")
    session = Session(tmp_path / "m.onnx", threads=1)
    expected, got = codes_of(module, list(args)), session.codes(*args)
    assert expected.keys() == got.keys()
    for node, codes in expected.items():
        assert codes.shape == got[node].shape
        assert np.abs(codes - got[node]).max() <= 1
        assert (codes != got[node]).mean() <= 1e-3
    reference, result = module(*args), session(*args)
    assert pytree.tree_structure(reference) == pytree.tree_structure(result)
    for a, b in zip(pytree.tree_leaves(reference), pytree.tree_leaves(result), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_names_structure_and_dynamic_batch_are_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids, mask = torch.randint(0, 50, (4, 6)), torch.ones(4, 6)
    module = quantized(Embedded(), (ids,), kwargs={"mask": mask})
    info = export(module, tmp_path / "m.onnx")
    session = Session(tmp_path / "m.onnx", threads=1)
    assert info.inputs == ("input_ids", "mask")
    for batch in (1, 3, 9):
        ids, mask = torch.randint(0, 50, (batch, 6)), torch.ones(batch, 6)
        tokens, pooled = session(ids, mask=mask)
        assert tokens.shape == (batch, 6, 16)
        torch.testing.assert_close(pooled, module(ids, mask=mask)[1], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(session(input_ids=ids, mask=mask)[0], tokens)
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.parametrize("container", ["int8", "native"])
def test_no_float_copy_of_a_quantized_weight_is_left(container: str, tmp_path: Path) -> None:
    module = quantized(
        Embedded(), (torch.randint(0, 50, (4, 6)),), kwargs={"mask": torch.ones(4, 6)}
    )
    export(module, tmp_path / "m.onnx", container=container)
    for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            assert np.prod(tensor.dims) <= 64, tensor.name


def test_heavy_ops_run_in_integer_kernels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    export(quantized(Attention(), (torch.randn(4, 6, 16),)), tmp_path / "m.onnx")
    kinds = [n.op_type for n in optimized(tmp_path / "m.onnx").graph.node]
    assert kinds.count("QGemm") == 6
    assert {"MatMulIntegerToFloat", "QLinearMatMul"} <= set(kinds)
    assert not {"Gemm", "MatMul"} & set(kinds)


def test_transposed_convolutions_run_as_integer_convolutions(tmp_path: Path) -> None:
    class Up(nn.Module):
        def __init__(self, kernel: int, padding: int, extra: int) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(
                4, 3, kernel, stride=2, padding=padding, output_padding=extra
            )
            self.last = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.up(x))
            return y

    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 5)
    for number, (kernel, padding, extra) in enumerate([(2, 0, 0), (4, 1, 0), (3, 1, 1)]):
        module = quantized(Up(kernel, padding, extra), (x,))
        path = tmp_path / f"{number}.onnx"
        export(module, path)
        kinds = {n.op_type for n in optimized(path).graph.node}
        session = Session(path, threads=1)
        torch.testing.assert_close(session(x), module(x), atol=1e-4, rtol=1e-4)
        if extra == 0:
            assert "ConvTranspose" not in kinds
            assert "QLinearConv" in kinds


@pytest.mark.parametrize("kernel", [(1, 1), (4, 2)])
def test_patches_read_in_float_are_an_integer_product(
    kernel: tuple[int, int], tmp_path: Path
) -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 5, kernel, stride=kernel)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.embed(x).flatten(2).transpose(1, 2)
            return nn.functional.layer_norm(tokens, (5,))

    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 6)
    module = quantized(Patches(), (x,))
    export(module, tmp_path / "m.onnx")
    kinds = {n.op_type for n in optimized(tmp_path / "m.onnx").graph.node}
    assert "QGemm" in kinds
    assert not {"Conv", "QLinearConv"} & kinds
    session = Session(tmp_path / "m.onnx", threads=1)
    torch.testing.assert_close(session(x), module(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
def test_every_width_keeps_its_codes_in_both_containers(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(bits)
    x = torch.randn(16, 16)
    module = quantized(Mlp(), (x,), f"int{bits}", ends_bits=bits)
    expected = codes_of(module, [x])
    for container in ("int8", "native"):
        path = tmp_path / f"{container}.onnx"
        export(module, path, container=container)
        got = Session(path, threads=1).codes(x)
        assert all((expected[n] == got[n]).all() for n in expected)
        assert max(int(c.max()) for c in got.values()) < 2**bits
        kinds = {n.op_type for n in optimized(path).graph.node}
        assert "QGemm" in kinds
        assert "Gemm" not in kinds


def test_native_container_packs_weights_and_keeps_integer_kernels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 256)
    module = quantized(Mlp(256), (x,), "int2", ends_bits=2)
    sizes = {}
    for container, opset in (("int8", 21), ("native", 21), ("native", 25)):
        path = tmp_path / "m.onnx"
        sizes[container, opset] = export(module, path, container=container, opset=opset).size
        kinds = {n.op_type for n in optimized(path).graph.node}
        assert "QGemm" in kinds
        model = onnx.load(path)
        assert model.ir_version == (13 if opset == 25 else 10)  # the first that knows INT2
        large = [t for t in model.graph.initializer if np.prod(t.dims) > 256]
        held = {("int8", 21): "INT8", ("native", 21): "INT4", ("native", 25): "INT2"}
        assert large
        assert {onnx.TensorProto.DataType.Name(t.data_type) for t in large} == {
            held[container, opset]
        }
        torch.testing.assert_close(Session(path, threads=1)(x), module(x), atol=1e-5, rtol=1e-5)
    assert sizes["native", 25] < sizes["native", 21] < sizes["int8", 21]


def test_codes_are_packed_in_the_narrowest_type_that_holds_both_ends() -> None:
    held = {(-2, 1): "INT2", (-3, 1): "INT4", (-2, 2): "INT4", (-8, 7): "INT4", (-9, 7): None,
            (-8, 8): None}  # fmt: skip
    for ends, name in held.items():
        codes = np.array(ends, dtype=np.int8)
        for opset in (21, 25):
            found = narrowest(codes, opset)
            wanted = "INT4" if name == "INT2" and opset == 21 else name
            assert (found.name if found is not None else None) == wanted
    assert narrowest(np.array([0, 1], dtype=np.int32), 25) is None


def test_attributes_that_say_what_is_meant_anyway_are_left_out(tmp_path: Path) -> None:
    export(quantized(Mlp(), (torch.randn(8, 16),)), tmp_path / "m.onnx")
    nodes = onnx.load(tmp_path / "m.onnx").graph.node
    spoken = {
        (node.op_type, a.name, onnx.helper.get_attribute_value(a))
        for node in nodes for a in node.attribute
        if node.op_type in {"QuantizeLinear", "DequantizeLinear", "Cast"}
    }  # fmt: skip
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in nodes}
    defaults = {("block_size", 0), ("output_dtype", 0), ("saturate", 1)}
    assert not defaults & {(name, value) for _, name, value in spoken}


def test_wrong_inputs_and_options_are_refused_with_a_reason(tmp_path: Path) -> None:
    module = quantized(Mlp(), (torch.randn(8, 16),))
    export(module, tmp_path / "m.onnx")
    session = Session(tmp_path / "m.onnx", threads=1)
    with pytest.raises(InputError, match="shape"):
        session(torch.randn(8, 17))
    with pytest.raises(InputError, match="missing"):
        session()
    with pytest.raises(InputError, match="dtype"):
        session(torch.zeros(8, 16, dtype=torch.int64))
    with pytest.raises(InputError, match="unknown"):
        session(torch.randn(8, 16), y=1)
    with pytest.raises(ExportError, match="opset"):
        export(module, tmp_path / "m.onnx", opset=17)
    with pytest.raises(ExportError, match="input_names"):
        export(module, tmp_path / "m.onnx", input_names=["a", "b"])


def test_external_data_and_given_names_work(tmp_path: Path) -> None:
    x = torch.randn(8, 16)
    module = quantized(Mlp(), (x,))
    info = export(
        module, tmp_path / "m.onnx", external_data=True, input_names=["pixels"], output_names=["y"]
    )
    (data,) = tmp_path.glob("m.onnx.*.data")
    assert info.size == data.stat().st_size + (tmp_path / "m.onnx").stat().st_size
    assert (info.inputs, info.outputs) == (("pixels",), ("y",))
    torch.testing.assert_close(Session(tmp_path / "m.onnx")(x), module(x))
    assert Session(tmp_path / "m.onnx").codes(x).keys() == codes_of(module, [x]).keys()


class Untranslated(nn.Module):
    """Ops that ONNX knows only by their decompositions, one with a symbolic size."""

    def forward(self, x):
        pooled = nn.functional.adaptive_avg_pool1d(x, 1)
        mask = (x > 0) & (x < 1)
        return 1 - pooled, torch.where(mask, x, x.roll(1, -1)), torch.rsub(x, 2.0)


def test_ops_without_a_translation_are_decomposed_one_by_one(tmp_path):
    x = torch.randn(3, 4, 6)
    module = trace(Untranslated().eval(), x)
    export(module, tmp_path / "m.onnx")
    for size in (3, 5):
        x = torch.randn(size, 4, 6)
        for ours, theirs in zip(Session(tmp_path / "m.onnx")(x), module(x), strict=True):
            torch.testing.assert_close(ours, theirs)
