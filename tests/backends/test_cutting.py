# SPDX-License-Identifier: Apache-2.0
"""A graph cut at its quantizers gives each op the codes it is told to."""

from __future__ import annotations

import pytest
import torch

from qgraph.backends import onnx, parity, reference
from qgraph.backends.cutting import CutGraph
from qgraph.errors import VerificationError
from tests.backends.builders import minmax, models, quantize
from tests.backends.site_formats import CHOICES

MODELS = models()
NAMES = [name for name, _, _ in MODELS]


@pytest.mark.parametrize("choose", [minmax, CHOICES[0]])
@pytest.mark.parametrize(("name", "model", "inputs"), MODELS, ids=NAMES)
def test_fed_with_its_own_codes_a_cut_graph_repeats_them(name, model, inputs, choose):
    cut = CutGraph(quantize(model, inputs, choose))
    fed, expected = cut.feed(inputs, {})
    found: dict[str, torch.Tensor] = {}
    reference.lower(cut.module).run(tuple(fed), {}, lambda n, c: found.setdefault(n.name, c))
    assert cut.names, name
    for quantizer in cut.names:
        assert torch.equal(found[quantizer], expected[quantizer]), (name, quantizer)


def test_an_op_reads_what_it_was_fed_not_what_was_computed_before_it():
    _, model, inputs = MODELS[1]
    cut = CutGraph(quantize(model, inputs))
    fed, expected = cut.feed(inputs, {})
    first = len(fed) - len(cut.names)
    changed = [*fed[:first], torch.zeros_like(fed[first]), *fed[first + 1 :]]
    found: dict[str, torch.Tensor] = {}
    reference.lower(cut.module).run(tuple(changed), {}, lambda n, c: found.setdefault(n.name, c))
    differing = [n for n in cut.names if not torch.equal(found[n], expected[n])]
    assert cut.names[0] not in differing
    assert 0 < len(differing) <= 2


@pytest.mark.parametrize(("name", "model", "inputs"), MODELS, ids=NAMES)
def test_onnxruntime_given_the_same_codes_differs_by_at_most_one(name, model, inputs):
    report = parity.compare(quantize(model, inputs), (inputs, {}), lower_runtime=onnx.lower)
    gaps = [row.runtime_forced for row in report.rows if row.runtime_forced is not None]
    assert len(gaps) >= 3, name
    assert report.check() is report
    assert "onnxruntime, each op on the same codes" in str(report)


def test_a_runtime_that_is_two_codes_off_is_refused():
    _, model, inputs = MODELS[2]

    class Wrong:
        def __init__(self, module):
            self.model = reference.lower(module)

        def codes(self, *args):
            found: dict[str, torch.Tensor] = {}
            self.model.run(args, {}, lambda n, c: found.setdefault(n.name, c.to(torch.int32)))
            return {name: codes + 2 for name, codes in found.items()}

    report = parity.compare(quantize(model, inputs), (inputs, {}), lower_runtime=Wrong)
    with pytest.raises(VerificationError, match="onnxruntime differs from reference"):
        report.check()
