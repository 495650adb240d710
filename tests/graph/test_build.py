# SPDX-License-Identifier: Apache-2.0
"""What is written down about an inserted node is what running it gives."""

import itertools
from functools import partial

import pytest
import torch
from torch import nn

import qgraph
from qgraph.graph.build import insert_buffer, insert_call
from qgraph.graph.dialect import DEQUANTIZE, QUANTIZE
from qgraph.graph.verify import Sample, record_values

VIEWS = {
    **{
        str(p): partial(torch.permute, dims=p)
        for p in itertools.permutations(range(4))
        if p[0] == 0
    },
    "the batch in the middle": lambda x: x.transpose(0, 1),
    "a gap": lambda x: x[..., 1:],
    "a gap between samples": lambda x: x[:, 1:],
    "a gap in the middle": lambda x: x[:, :, 1:].transpose(1, 2),
    "a repeated axis": lambda x: x[:, :1].expand(-1, 4, -1, -1),
    "as many as the memory of a sample, but half of them repeated": lambda x: (
        x[..., :3].unsqueeze(3).expand(-1, -1, -1, 2, -1)
    ),
    "rows alone": lambda x: x.flatten(1),
}


class Viewed(nn.Module):
    """A view of the input, and something behind it."""

    def __init__(self, view) -> None:
        super().__init__()
        self.view = view

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.view(x) * 1.0


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_sizes_strides_and_dtypes_of_an_inserted_pair_are_those_of_the_run(view):
    x = torch.randn(3, 4, 5, 6)
    module = qgraph.trace(Viewed(view).eval(), x)
    after = next(n for n in module.graph.nodes if n.target is torch.ops.aten.mul.Tensor)
    tensors = (torch.tensor(0.1), torch.tensor(3, dtype=torch.int32))
    parameters = [insert_buffer(module, "q", t, before=after) for t in tensors]
    source = after.args[0]
    for op in (QUANTIZE, DEQUANTIZE):
        source = insert_call(module, op, source, *parameters, 0, 255, like=after, before=after)
        noted, ran = source.meta["val"], record_values(module, Sample((x,)))[source.name]
        assert (noted.dtype, noted.device) == (ran.dtype, ran.device)
        pairs = [*zip(noted.shape, ran.shape, strict=True)]
        pairs += zip(noted.stride(), ran.stride(), strict=True)
        known = [(a, b) for a, b in pairs if isinstance(a, int)]
        assert known
        assert all(a == b for a, b in known), pairs
