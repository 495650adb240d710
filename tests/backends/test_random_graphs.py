# SPDX-License-Identifier: Apache-2.0
"""Random networks in random formats: integer equals reference in both modes."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves

from qgraph.backends import integer, parity, reference
from tests.backends.builders import quantize
from tests.backends.random_models import random_case, random_formats


def check(seed: int) -> parity.ParityReport:
    """Both modes on one random network; the report of the onnxruntime mode."""
    model, inputs = random_case(seed)
    module = quantize(model, inputs, random_formats(seed))
    assert parity.compare(module, (inputs, {}), mode="fixed_point").mismatches == 0, seed
    report = parity.compare(module, (inputs, {}))
    assert report.mismatches == 0, f"seed {seed}\n{report}"
    lowered = integer.lower(module)
    for a, b in zip(
        tree_leaves(lowered(*inputs)), tree_leaves(reference.lower(module)(*inputs)), strict=True
    ):
        assert torch.equal(a, b), seed
    return report


@pytest.mark.parametrize("seed", [*range(6), 15, 38])  # the last two once failed
def test_random_networks_agree_code_for_code(seed):
    check(seed)


@pytest.mark.slow
def test_two_hundred_random_networks_agree_and_a_fifth_of_their_layers_saturate():
    reports = [check(seed) for seed in range(6, 206)]
    rows = [row for report in reports for row in report.rows]
    assert sum(row.saturated > 0.001 for row in rows) >= 0.2 * len(rows)


@pytest.mark.slow
def test_compiled_codes_equal_eager_codes():
    model, inputs = random_case(3)
    module = quantize(model, inputs, random_formats(3))
    compiled = integer.lower(module, compile=True)
    for a, b in zip(
        tree_leaves(compiled(*inputs)), tree_leaves(integer.lower(module)(*inputs)), strict=True
    ):
        assert torch.equal(a, b)
