# SPDX-License-Identifier: Apache-2.0
"""What a plan costs is what the rewritten graph costs, whatever bits each unit got."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qgraph
from qgraph.graph.bit_units import carriers, find_units, stored_bytes
from qgraph.graph.encoder_decoder import find_structure
from qgraph.graph.storage import stored_tensors
from qgraph.pipeline import Fact, Pass, Promise
from qgraph.report.accounting import Convention
from qgraph.report.graph_view import cost_of
from tests.small_unet import images, tiny_unet

MODEL, DATA = tiny_unet(), images(1, 2)
bits = st.integers(2, 8)


@dataclass(frozen=True)
class SetBits(Pass):
    """Give units the widths of a test, and note what the plan says that they cost."""

    name: ClassVar[str] = "set-bits"
    promise: ClassVar[Promise] = Promise.IDENTICAL
    requires: ClassVar[frozenset[str]] = frozenset({Fact.PLANNED})

    widths: tuple[tuple[int, int], ...] = ()

    def run(self, module, context):
        units = find_units(module, context.plan, find_structure(module), (2, 2)).units
        for unit, pair in zip(units, self.widths, strict=False):
            unit.assign(pair)
        for sites, readers in carriers(context.plan, units).values():
            for site in sites:
                site.bits = max(u.activations[0].bits for u in readers)
        size = sum(
            sum(s.parameters for s in unit.sizes) * unit.weights[0].bits / 8 for unit in units
        )
        operations = sum(
            unit.macs * unit.weights[0].bits * unit.activations[0].bits for unit in units
        )
        context.record(
            self.name, "network", "applied", "counted", size=size, bops=operations,
            activations=stored_bytes(module, context.plan),
        )  # fmt: skip
        return False


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(bits, bits), min_size=6, max_size=6))
def test_the_plan_and_the_rewritten_graph_cost_the_same(widths):
    chosen = qgraph.pipeline("sirst_w2a2").replace("assign-bits", SetBits(tuple(widths)))
    report = qgraph.compile(MODEL, DATA, chosen, verify=False).report
    told = next(d.numbers for d in report.decisions if d.by == "set-bits")
    assert report.cost is not None
    assert report.cost.activation_bytes == told["activations"]
    assert report.cost.weight_bytes == told["size"]
    assert report.cost.bit_operations == told["bops"]


def test_uniform_eight_bits_cost_a_quarter_and_a_sixteenth_and_float_costs_one():
    cost = qgraph.compile(MODEL, DATA, "sirst_int8", verify=False).report.cost
    assert cost is not None
    assert cost.weight_ratio == 4.0
    assert cost.bit_operations_ratio == 16.0
    assert cost.compute_ratio("w*a/64") == 1.0
    assert cost.compute_ratio(Convention.WORDS_128) == 2.0
    whole = cost_of(qgraph.trace(MODEL, DATA[0]))
    assert whole.weight_ratio == whole.bit_operations_ratio == whole.activation_ratio == 1.0
    assert whole.compute_ratio("w*a/64") == whole.compute_ratio("w*a/128") == 1.0
    with pytest.raises(qgraph.ConfigError, match="unknown convention"):
        cost.compute_ratio("words")


def test_what_one_function_reads_and_what_is_joined_is_not_stored():
    module = qgraph.trace(MODEL, DATA[0])
    stored = {item.node.name: item for item in stored_tensors(module, lambda _: None)}
    readers = {name.split("_")[0] for name in stored}
    assert "cat" not in readers
    assert "conv2d" not in stored  # its ReLU alone reads it
    assert "conv2d_1" in stored  # a residual add reads it
    assert all(item.bits is None for item in stored.values())


def test_a_skip_is_alive_until_the_decoder_has_read_it():
    module = qgraph.trace(MODEL, DATA[0])
    order = [node.name for node in module.graph.nodes]
    stored = {item.node.name: item for item in stored_tensors(module, lambda _: None)}
    skip = next(n for n in module.graph.nodes if n.name == "max_pool2d").args[0]
    assert order[stored[skip.name].last_read] in {"conv2d_4", "conv2d_5"}
