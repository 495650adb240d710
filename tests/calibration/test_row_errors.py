# SPDX-License-Identifier: Apache-2.0
"""Sampled rows: the same outputs as the product itself, and errors without bias."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qgraph
from qgraph.calibration.row_errors import (
    data_encoding,
    fake,
    grouped,
    has_rows,
    sample_rows,
    whole_sample,
)
from qgraph.graph.ops import product


def product_node(layer: nn.Module, x: torch.Tensor):
    graph = qgraph.trace(layer.eval(), x).graph
    return next(n for n in graph.nodes if product(n) is not None)


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.sampled_from([0, 1, 2]),
    st.sampled_from([1, 2, 4]), st.sampled_from([1, 3]),
)  # fmt: skip
def test_rows_of_a_convolution_are_its_outputs(stride, dilation, padding, groups, side):
    torch.manual_seed(0)
    layer = nn.Conv2d(
        4, 8, side, stride=stride, dilation=dilation, padding=padding, groups=groups, bias=False
    )
    x = torch.randn(2, 4, 9, 10)
    node = product_node(layer, x)
    assert has_rows(node)
    weight = layer.weight.detach()
    y = layer(x).detach()
    # the importance is the squared gradient over count * p: with y as gradient it tells the row
    rows = sample_rows(node, x, weight, y, count=40, seed=1)
    out = rows.output(rows.data, rows.weight)
    flat = y.movedim(1, -1).reshape(-1, 8)
    distance = (out[:, None] - flat[None]).abs().amax(-1)
    chosen = distance.argmin(1)
    assert distance.amin(1).max() < 1e-5
    energy = flat.square().sum(1)
    p = 0.5 / len(flat) + 0.5 * energy[chosen] / energy.sum()
    torch.testing.assert_close(
        rows.importance, flat[chosen].square() / (40 * p[:, None]), rtol=2e-3, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_sampled_errors_have_the_whole_error_as_their_mean(kind):
    torch.manual_seed(0)
    layer: nn.Conv2d | nn.Linear = nn.Linear(6, 5)
    x = torch.randn(4, 9, 6)
    if kind == "conv":
        layer, x = nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, 8, 8)
    node = product_node(layer, x)
    gradient = torch.zeros_like(layer(x)).detach()
    gradient.view(-1)[3::97] = 5.0  # almost all of it in a few places, as with tiny targets
    gradient += 0.01
    encoding = data_encoding(float(x.min()), float(x.max()), 3, 1.0)
    changed = (layer(fake(encoding, x)) - layer(x)).detach()
    whole = float((gradient**2 * changed**2).sum())
    weight = layer.weight.detach()
    coarse = (weight * 4).round() / 4
    with torch.no_grad():
        kept = layer.weight.clone()
        exact = layer(x)
        layer.weight.copy_(coarse)
        whole_weight = float((gradient**2 * (layer(x) - exact) ** 2).sum())
        layer.weight.copy_(kept)
    data_errors, weight_errors = [], []
    for seed in range(60):
        rows = sample_rows(node, x, weight, gradient, count=64, seed=seed)
        data_errors.append(float(rows.data_errors([encoding])[0]))
        weight_errors.append(float(rows.weight_errors([grouped(coarse, 1)])[0]))
    assert sum(data_errors) / 60 == pytest.approx(whole, rel=0.1)
    assert sum(weight_errors) / 60 == pytest.approx(whole_weight, rel=0.1)


def test_the_fallback_scales_one_sample_up_to_the_batch():
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(3, 4, 2, stride=2)
    x = torch.randn(1, 3, 5, 5).repeat(3, 1, 1, 1)
    node = product_node(layer, x)
    assert not has_rows(node)
    weight = layer.weight.detach()
    gradient = torch.ones(3, 4, 10, 10)
    found = whole_sample(node, x, weight, gradient, seed=0, is_constant=True)
    coarse = (weight * 4).round() / 4
    change = nn.functional.conv_transpose2d(x, coarse - weight, stride=2)
    expected = float(change.square().sum())
    assert float(found.errors([(found.data, coarse)])[0]) == pytest.approx(expected, rel=1e-4)


def test_encoding_a_value_by_floats_equals_encoding_it_by_codes():
    x = torch.linspace(-2, 3, 101)
    for bits in (2, 3, 8):
        encoding = data_encoding(-1.5, 2.5, bits, 0.7)
        torch.testing.assert_close(fake(encoding, x), encoding.fake(x), rtol=0, atol=1e-6)
