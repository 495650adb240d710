# SPDX-License-Identifier: Apache-2.0
"""Random networks in every format on onnxruntime, op by op on the reference's codes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from torch.fx import GraphModule

from qgraph.backends import onnx, parity
from qgraph.formats import AffineEncoding
from qgraph.graph import dialect
from tests.backends.builders import quantize
from tests.backends.random_models import mixed_formats, random_case

# An fp32 result carries about 2^-24 of itself as error: next to 2^16 codes, that is a code off in
# a few of a thousand. onnxruntime has no 16-bit kernels; it computes those ops in fp32.
WIDE_RATE = 0.01


@dataclass
class Gaps:
    """Codes compared, codes that differ, largest difference."""

    codes: int = 0
    wrong: int = 0
    worst: int = 0

    def add(self, row: parity.ParityRow) -> None:
        gap = row.runtime_forced
        if gap is not None:
            self.codes += row.codes
            self.wrong += gap.mismatches
            self.worst = max(self.worst, gap.worst)


def gaps(seeds: range) -> tuple[Gaps, Gaps]:
    """onnxruntime on the reference's codes: quantizers of up to 8 bits, and wider ones."""
    narrow, wide = Gaps(), Gaps()
    for seed in seeds:
        model, inputs = random_case(seed)
        module = quantize(model, inputs, mixed_formats(seed))
        report = parity.compare(module, (inputs, {}), lower_runtime=onnx.lower)
        assert report.mismatches == 0, f"seed {seed}\n{report}"
        for row in report.rows:
            (wide if is_wide(module, row.node) else narrow).add(row)
    return narrow, wide


def is_wide(module: GraphModule, name: str) -> bool:
    """Whether the quantizer has more codes than a byte."""
    node = next(n for n in module.graph.nodes if n.name == name)
    encoding = dialect.encoding_of(module, node)
    return isinstance(encoding, AffineEncoding) and encoding.qmax - encoding.qmin > 255


def test_onnxruntime_takes_the_references_codes_on_a_few_random_networks():
    narrow, wide = gaps(range(4))
    assert narrow.codes > 5_000
    assert narrow.wrong == 0
    assert wide.worst <= 1


@pytest.mark.slow
def test_onnxruntime_takes_the_references_codes_on_three_hundred_random_networks(capsys):
    narrow, wide = gaps(range(4, 304))
    with capsys.disabled():
        print(f"\nonnxruntime against the reference: {narrow} up to 8 bits, {wide} at 16")
    assert max(narrow.worst, wide.worst) <= parity.RUNTIME_CODES
    assert narrow.wrong <= narrow.codes * parity.RUNTIME_RATE
    assert wide.wrong <= wide.codes * WIDE_RATE
