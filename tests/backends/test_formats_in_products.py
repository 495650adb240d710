# SPDX-License-Identifier: Apache-2.0
"""Products of every number format: integer equals reference, and reference equals fractions."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from qgraph.backends import integer, parity, reference
from qgraph.backends.products import BiasForm
from qgraph.backends.semantics import Role
from tests.backends.builders import models, quantize
from tests.backends.site_formats import CHOICES, dual_region, free_groups, tied_groups, wide

MODELS = models()
NAMES = [name for name, _, _ in MODELS]


@pytest.mark.parametrize("choose", CHOICES)
@pytest.mark.parametrize(("name", "model", "inputs"), MODELS, ids=NAMES)
def test_integer_and_reference_agree_for_every_format(name, model, inputs, choose):
    module = quantize(model, inputs, choose)
    assert parity.compare(module, (inputs, {})).mismatches == 0
    ours, theirs = integer.lower(module)(*inputs), reference.lower(module)(*inputs)
    for a, b in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("choose", CHOICES)
def test_linears_of_every_format_have_an_exact_product(choose):
    model, inputs = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(3, 16)
    lowered = reference.lower(quantize(model, (inputs,), choose))
    roles = [lowered.semantics.roles[n] for n in lowered.semantics.products]
    assert roles == [Role.PRODUCT, Role.PRODUCT]


def test_free_groups_share_out_the_channels():
    torch.manual_seed(1)
    module = quantize(nn.Linear(12, 5), (torch.randn(4, 12),), free_groups)
    (form,) = reference.lower(module).semantics.products.values()
    assert len(form.groups) > 1
    assert sorted(torch.cat(list(form.groups)).tolist()) == list(range(12))
    for members in form.groups:
        assert form.data.scale[members].unique().numel() == 1


def test_codes_of_a_bias_count_only_on_the_scale_of_the_accumulator():
    codes, scale = torch.tensor([3, 4], dtype=torch.int32), torch.tensor([0.5, 0.25])
    form = BiasForm(codes=codes, scale=scale)
    assert form.codes_on(scale) is codes
    assert form.codes_on(torch.tensor([0.5, 0.125])) is None
    assert form.codes_on(torch.tensor(0.5)) is None
    assert form.codes_on(torch.ones(3)) is None
    single = BiasForm(codes=codes, scale=torch.tensor(0.5))
    assert single.codes_on(torch.tensor([0.5, 0.5])) is codes
    assert BiasForm(codes=codes).codes_on(scale) is None


@pytest.mark.parametrize("choose", [tied_groups, dual_region, wide])
def test_accumulators_are_the_integers_that_int64_gives(choose):
    torch.manual_seed(1)
    model, x = nn.Linear(12, 5), torch.randn(4, 12)
    module = quantize(model, (x,), choose)
    semantics = reference.lower(module).semantics
    (form,) = semantics.products.values()
    codes = form.data.encoding.encode(x)
    data = form.data.of_codes(codes).to(torch.int64)
    if form.shift is not None:
        data = data << form.shift
    assert form.weight_levels is not None
    exact = data @ form.weight_levels.t().to(torch.int64)
    if form.bias_codes is not None:
        exact = exact + form.bias_codes
    assert int(exact.abs().max()) <= form.bound
    value = reference.lower(module)(x)
    expected = exact.to(torch.float32) * form.scale
    if form.bias_codes is None:
        expected = expected + model.bias.detach()
    assert torch.equal(value, expected)
    assert torch.equal(integer.lower(module)(x), expected)
