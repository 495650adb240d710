# SPDX-License-Identifier: Apache-2.0
"""The integer backend equals the reference, code for code, on graphs of every kind of product."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import Graph
from torch.utils._pytree import tree_leaves

from qgraph.backends import integer, parity, reference
from qgraph.backends.integer.reuse import _same_shape
from qgraph.backends.semantics import Role, analyze
from qgraph.errors import ConfigError, VerificationError
from tests.backends.builders import minmax, models, quantize, signed

MODELS = models()
NAMES = [name for name, _, _ in MODELS]


@pytest.mark.parametrize("choose", [minmax, signed])
@pytest.mark.parametrize(("name", "model", "inputs"), MODELS, ids=NAMES)
def test_integer_and_reference_agree_on_every_code_and_output(name, model, inputs, choose):
    module = quantize(model, inputs, choose)
    report = parity.compare(module, (inputs, {}))
    assert report.mismatches == 0
    assert report.codes > 500
    assert max(row.saturated for row in report.rows) > 0.001
    ours, theirs = integer.lower(module)(*inputs), reference.lower(module)(*inputs)
    for a, b in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("name", "model", "inputs"), MODELS, ids=NAMES)
def test_unpacked_and_unhoisted_graphs_give_the_same_outputs(name, model, inputs):
    packed = integer.lower(quantize(model, inputs))(*inputs)
    plain = integer.lower(quantize(model, inputs, pack=False, hoist=False))(*inputs)
    for a, b in zip(tree_leaves(packed), tree_leaves(plain), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("name", "model", "inputs"), MODELS, ids=NAMES)
def test_lowered_models_keep_the_output_structure_and_stay_near_float(name, model, inputs):
    lowered = integer.lower(quantize(model, inputs, signed))
    with torch.no_grad():
        expected = model(*inputs)
    got = lowered(*inputs)
    assert type(got) is type(expected), name
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        assert float((a - b).norm() / b.norm()) < 0.1


def test_codes_do_not_depend_on_the_batch_or_on_threads():
    _, model, inputs = MODELS[0]
    lowered = integer.lower(quantize(model, inputs))
    big = torch.cat([inputs[0]] * 16)
    many = lowered(big)["mask"]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again = lowered(big)["mask"]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(many, again)
    for i in range(2):
        assert torch.equal(lowered(inputs[0][i : i + 1])["mask"], many[i : i + 1])


def test_a_report_names_the_first_node_that_differs():
    _, model, inputs = MODELS[1]
    module = quantize(model, inputs)
    good = parity.compare(module, (inputs, {})).rows
    wrong = [
        parity.ParityRow(
            node=r.node, module_path=r.module_path, source=r.source, codes=r.codes,
            saturated=r.saturated, free=r.free,
            forced=parity.Difference(3, 2) if r is good[2] else r.forced,
        )
        for r in good
    ]  # fmt: skip
    report = parity.ParityReport(tuple(wrong))
    with pytest.raises(VerificationError, match=f"differs from reference at {good[2].node}"):
        report.check()
    assert report.first_difference is wrong[2]
    assert all(len(line) <= 100 for line in str(report).splitlines())
    assert '"mismatches": 3' in report.to_json()


def test_an_unknown_mode_is_refused():
    module = quantize(nn.Linear(4, 4), (torch.randn(2, 4),))
    with pytest.raises(ConfigError, match="unknown mode 'onnx'"):
        integer.lower(module, mode="onnx")  # type: ignore[arg-type]


def test_a_rectifier_clips_the_accumulator_of_the_product_before_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    found = analyze(quantize(model, (torch.randn(3, 4),), hoist=False))
    (relu,) = (n for n, role in found.roles.items() if role is Role.CLAMP)
    assert found.products[found.sources[relu]].bias is None


def test_a_buffer_is_only_taken_over_by_a_value_of_its_shape_and_dtype() -> None:
    graph = Graph()
    values = [torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 3).int()]
    first, *others = (graph.placeholder(f"x{at}") for at in range(len(values)))
    for node, value in zip((first, *others), values, strict=True):
        node.meta["val"] = value
    assert [_same_shape(node, first) for node in others] == [True, False, False]
