# SPDX-License-Identifier: Apache-2.0
"""Corrections behind rounding: they start at nothing, and what is written is what was learned."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

import qgraph
from qgraph.calibration.corrections import Corrections, learn_corrections, write_corrections
from qgraph.calibration.student import without_quantizers
from qgraph.errors import PassError
from qgraph.graph.build import attribute, shallow_copy
from tests.passes.detectors import detector, images


@cache
def rounded() -> GraphModule:
    """A detector whose weights are codes, with its biases still in float."""
    chosen = qgraph.pipeline("det_w4a8").without("quantize-biases")
    return qgraph.compile(detector(), images(16), chosen, progress=False).graph_module


def learning() -> tuple[GraphModule, Corrections]:
    graph = shallow_copy(rounded())
    return graph, learn_corrections(graph, (images(8)[0],))


def outputs(graph: GraphModule) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tuple(graph(images(8, seed=3)[0]))


def test_nothing_learned_changes_no_bit() -> None:
    graph, made = learning()
    plain = shallow_copy(rounded())
    write_corrections(plain, made)
    plain.recompile()
    for a, b, c in zip(outputs(rounded()), outputs(graph), outputs(plain), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_what_is_written_is_what_was_learned() -> None:
    graph, made = learning()
    biases, scales = made.variables()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for change in (*biases, *scales):
            change.copy_(torch.randn(change.shape, generator=generator) / 8)
    changed = shallow_copy(rounded())
    write_corrections(changed, made)
    changed.recompile()
    for before, learned, written in zip(
        outputs(rounded()), outputs(graph), outputs(changed), strict=True
    ):
        assert float((learned - before).abs().max()) > 0.02
        torch.testing.assert_close(learned, written, rtol=1e-4, atol=1e-4)


def test_what_all_levels_read_has_one_correction() -> None:
    graph, made = learning()
    biases, scales = made.variables()
    assert len(made.shifts) == 11  # four products of the head at two levels, three before it
    assert len(biases) == 7
    assert len(scales) == len(made.stretches) == 5  # the last layers are not quantized
    for node in rounded().graph.nodes:
        if node.name in made.shifts:
            assert (
                made.shifts[node.name].change.shape
                == attribute(graph, str(node.args[2].target)).shape
            )


def test_the_float_network_cannot_be_had_from_codes() -> None:
    with pytest.raises(PassError, match="rounded already"):
        without_quantizers(shallow_copy(rounded()), by="tune-ranges")
