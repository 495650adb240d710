# SPDX-License-Identifier: Apache-2.0
"""Interpolation of levels: scaled afterwards, the same codes in every backend, ties included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from qgraph.backends import integer, parity, reference
from qgraph.backends.onnx import lower
from qgraph.backends.onnx.export import export
from qgraph.backends.onnx.session import Session
from qgraph.backends.semantics import Role, analyze
from qgraph.formats import AffineEncoding, Encoding, IntGrid, LevelEncoding
from qgraph.graph.build import insert_call
from qgraph.graph.dialect import DEQUANTIZE, DEQUANTIZE_LEVELS, QUANTIZE, QUANTIZE_LEVELS
from qgraph.graph.trace import trace
from qgraph.passes.insert_quantizers import parameter_nodes


class Enlarged(nn.Module):
    """Twice the size in each direction, `corners` as asked."""

    def __init__(self, *, corners: bool) -> None:
        super().__init__()
        self.corners = corners

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, (16, 20), mode="bilinear", align_corners=self.corners)


def affine(scale: float) -> AffineEncoding:
    return AffineEncoding.per_tensor(scale, 100, IntGrid(8, signed=False))


def dual(scale: float) -> LevelEncoding:
    levels = torch.tensor([*range(-8, 8), *range(8, 128, 8)])
    return LevelEncoding.nearest("dual region", torch.tensor(scale), levels, storage_bits=5)


def around(encoding: Encoding, x: Tensor, *, corners: bool) -> GraphModule:
    """The same encoding in front of the interpolation and behind it."""
    module = trace(Enlarged(corners=corners).eval(), x)
    resize = next(n for n in module.graph.nodes if "upsample" in str(n.target))
    names = (
        (QUANTIZE, DEQUANTIZE) if isinstance(encoding, AffineEncoding)
        else (QUANTIZE_LEVELS, DEQUANTIZE_LEVELS)
    )  # fmt: skip
    output = next(n for n in module.graph.nodes if n.op == "output")
    for value, user in ((resize.args[0], resize), (resize, output)):
        parameters = parameter_nodes(module, value.name, encoding, before=user)
        codes = insert_call(module, names[0], value, *parameters, like=value, before=user)
        read = insert_call(module, names[1], codes, *parameters, like=value, before=user)
        user.replace_input_with(value, read)
    module.recompile()
    return module


@pytest.mark.parametrize("encoding", [affine(0.0173), dual(0.0173)], ids=["affine", "dual region"])
def test_every_backend_takes_the_same_decisions_on_ties(encoding: Encoding, tmp_path: Path) -> None:
    x = torch.randn(8, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    module = around(encoding, x, corners=False)
    assert Role.RESAMPLE in analyze(module).roles.values()
    assert torch.equal(reference.lower(module)(x), integer.lower(module)(x))
    export(module, tmp_path / "m.onnx")
    session = Session(tmp_path / "m.onnx", threads=1)
    report = parity.compare(module, ((x,), {}), session=session, lower_runtime=lower)
    assert [row.runtime_forced.mismatches for row in report.rows if row.runtime_forced] == [0, 0]


def test_sums_of_levels_are_exact_whatever_the_scale() -> None:
    x = torch.randn(8, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    encoding = affine(0.0173)
    levels = encoding.encode(x).double() - 100
    exact = F.interpolate(levels, (16, 20), mode="bilinear")
    assert torch.equal(exact * 16, (exact * 16).round()), "weights are quarters"
    codes = encoding.encode(exact.float() * encoding.scale)
    wanted = encoding.decode(codes)
    for lowered in (reference.lower, integer.lower):
        assert torch.equal(lowered(around(encoding, x, corners=False))(x), wanted)


def test_corners_are_interpolated_within_one_code(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 10, generator=torch.Generator().manual_seed(1))
    module = around(affine(0.02), x, corners=True)
    export(module, tmp_path / "m.onnx")
    got, wanted = Session(tmp_path / "m.onnx", threads=1)(x), reference.lower(module)(x)
    assert torch.equal(integer.lower(module)(x), wanted)
    torch.testing.assert_close(got, wanted, atol=0.0201, rtol=0)
