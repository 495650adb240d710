# SPDX-License-Identifier: Apache-2.0
"""Attention probabilities whose numbers differ by head: every backend takes the same decisions."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from qgraph.backends import integer, onnx, parity, reference
from qgraph.formats import AffineEncoding
from qgraph.graph.dialect import encoding_of, is_quantize
from qgraph.passes import (
    ChooseRanges,
    ChooseWeightScales,
    HoistQuantizers,
    InsertQuantizers,
    PackWeights,
    QuantizeBiases,
    SearchSoftmaxBase,
)
from qgraph.testing.attention_kinds import Separate
from tests.passes.attention_pipelines import batches, run


def sharp_and_flat() -> nn.Module:
    """The second head looks at one key, the first at all."""
    torch.manual_seed(0)
    model = Separate()
    with torch.no_grad():
        model.q.weight[4:] *= 12.0
        model.q.weight[:4] *= 0.1
    return model


def by_head(family: str, bits: int) -> GraphModule:
    search = SearchSoftmaxBase(formats=(family,), per_head=True)
    module, _ = run(
        sharp_and_flat(), search, ChooseRanges(), ChooseWeightScales(), InsertQuantizers(),
        HoistQuantizers(), QuantizeBiases(), PackWeights(), bits=bits,
    )  # fmt: skip
    encodings = [encoding_of(module, n) for n in module.graph.nodes if is_quantize(n)]
    (found,) = [e for e in encodings if e.axis == 1]
    assert found.scale.shape == (2,)
    assert isinstance(found, AffineEncoding) == (family == "uniform")
    return module


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("family", ["uniform", "power_of_two", "dual_region"])
def test_reference_integer_and_onnxruntime_agree_on_every_code(family: str, bits: int) -> None:
    module, given = by_head(family, bits), batches(1, seed=3)[0]
    report = parity.compare(module, (given, {}), lower_runtime=onnx.lower).check()
    assert report.codes > 0
    wrong = [row for row in report.rows if row.runtime_forced and row.runtime_forced.mismatches]
    assert not wrong
    assert torch.equal(integer.lower(module)(*given), reference.lower(module)(*given))


@pytest.mark.parametrize("family", ["uniform", "power_of_two", "dual_region"])
def test_fixed_point_arithmetic_stays_near_the_reference(family: str) -> None:
    module, given = by_head(family, 6), batches(1, seed=3)[0]
    exact, ours = reference.lower(module)(*given), integer.lower(module, mode="fixed_point")(*given)
    assert float((exact - ours).abs().max()) <= 0.02 * float(exact.abs().max())
