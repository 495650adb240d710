# SPDX-License-Identifier: Apache-2.0
"""Widths of tables: 8 bits by default, a scale per row below that, at whatever the user asks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qgraph
from qgraph.errors import ConfigError
from qgraph.formats import AffineEncoding
from qgraph.graph.dialect import encoding_of, is_dequantize
from qgraph.report import sqnr


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.out = nn.Linear(16, 3)
        with torch.no_grad():  # rows of very different size: one scale per column wastes codes
            self.table.weight *= torch.logspace(-1.5, 1.5, 50)[:, None]

    def forward(self, tokens):
        return self.table(tokens)


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    return Tagger().eval(), [torch.randint(0, 50, (4, 9)) for _ in range(2)]


def table_encoding(quantized) -> AffineEncoding:
    module = quantized.graph_module
    gather = next(n for n in module.graph.nodes if n.target is torch.ops.aten.embedding.default)
    decoded = gather.args[0]
    assert is_dequantize(decoded)
    encoding = encoding_of(module, decoded)
    assert isinstance(encoding, AffineEncoding)
    return encoding


@pytest.mark.parametrize(("bits", "axis"), [(None, 1), (8, 1), (4, 0), (2, 0)])
def test_tables_take_the_width_asked_for_and_every_backend_reads_them(case, bits, axis):
    model, batches = case
    chosen = qgraph.pipeline("w4a8", **({} if bits is None else {"embedding_bits": bits}))
    quantized = qgraph.compile(model, batches, pipeline=chosen)
    encoding = table_encoding(quantized)
    assert encoding.qmax.bit_length() == (bits or 8) - 1
    assert encoding.axis in {axis, axis - 2}
    wanted = quantized.lower("reference")(batches[0])
    for backend in ("integer", "onnx"):
        assert torch.equal(quantized.lower(backend)(batches[0]), wanted)


def test_a_scale_per_row_keeps_small_rows_at_four_bits(case):
    model, batches = case
    quantized = qgraph.compile(model, batches, pipeline=qgraph.pipeline("w4a8", embedding_bits=4))
    small = torch.arange(9)[None]
    with torch.no_grad():
        assert sqnr(model(small), quantized(small)) > 18


def test_a_table_of_one_bit_is_refused():
    with pytest.raises(ConfigError, match="bits"):
        qgraph.pipeline("w4a8", embedding_bits=1)
