# SPDX-License-Identifier: Apache-2.0
"""Adding a call to a graph must not fix a size that was free: graphs share their sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

import qgraph
from qgraph.graph.build import insert_call
from qgraph.validation import file_bytes


class Resized(nn.Module):
    """By a factor that is not the ratio of the sizes."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.interpolate(self.conv(x).relu(), scale_factor=1.5, mode=self.mode)
        return self.conv(y)


def is_resize(node: Node) -> bool:
    return "upsample" in str(node.target)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_a_resize_that_is_added_leaves_the_batch_free(mode: str) -> None:
    module = qgraph.trace(Resized(mode).eval(), torch.zeros(2, 2, 5, 4))
    (resize,) = filter(is_resize, module.graph.nodes)
    added = insert_call(module, resize.target, *resize.args, like=resize)
    batch, *sizes = added.meta["val"].shape
    assert isinstance(batch, torch.SymInt)
    assert batch.node.expr.is_Symbol
    assert sizes == [2, 7, 6]


def test_export_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    data = [torch.randn(2, 2, 5, 4) for _ in range(2)]
    quantized = qgraph.compile(Resized("bilinear").eval(), data, "sirst_w8a8", progress=False)
    before = file_bytes(quantized)
    quantized.lower("onnx")
    assert file_bytes(quantized) == before
