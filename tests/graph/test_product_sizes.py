# SPDX-License-Identifier: Apache-2.0
"""Counts of products against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from examples.zoo.sirst.models import ResUNet
from qgraph.graph.product_sizes import ProductSize, product_sizes
from qgraph.graph.trace import trace


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (
            nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
            (2, 4, 8, 8),
            ProductSize(parameters=108, channels=6, biases=6, macs=96 * 18, inputs=256, outputs=96),
        ),
        (
            nn.ConvTranspose2d(4, 3, 2, stride=2, bias=False),
            (2, 4, 5, 5),
            ProductSize(
                parameters=48, channels=3, biases=0, macs=100 * 12, inputs=100, outputs=300
            ),
        ),
        (
            nn.Linear(5, 7),
            (2, 3, 5),
            ProductSize(parameters=35, channels=7, biases=7, macs=105, inputs=15, outputs=21),
        ),
    ],
)
def test_a_layer_is_counted_for_one_sample(layer, shape, expected):
    module = trace(nn.Sequential(layer).eval(), torch.rand(shape))
    assert list(product_sizes(module).values()) == [expected]


def test_a_product_of_activations_has_no_parameters_and_reads_both():
    class Scores(nn.Module):
        def forward(self, x: Tensor, y: Tensor):
            return x @ y.transpose(1, 2)

    module = trace(Scores().eval(), torch.rand(2, 3, 5), torch.rand(2, 4, 5))
    (size,) = product_sizes(module).values()
    assert size == ProductSize(
        parameters=0, channels=0, biases=0, macs=60, inputs=15 + 20, outputs=12
    )


def test_counts_scale_with_the_image_and_not_with_the_batch():
    model = ResUNet((2, 3, 4)).eval()
    small, again, large = (
        product_sizes(trace(model, torch.rand(batch, 1, side, side)))
        for batch, side in ((2, 16), (3, 16), (2, 32))
    )
    assert small == again
    for name, size in small.items():
        assert large[name].macs == 4 * size.macs
        assert large[name].outputs == 4 * size.outputs
        assert large[name].parameters == size.parameters
    weights = sum(size.parameters for size in small.values())
    assert weights == sum(
        p.numel() for n, p in model.named_parameters() if p.dim() == 4 and "bn" not in n
    )
