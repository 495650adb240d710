# SPDX-License-Identifier: Apache-2.0
"""More bits by rule: which operands get them, and that the report says so."""

from __future__ import annotations

import pytest
from torch import nn

from qgraph.errors import ConfigError
from qgraph.graph.ops import OpKind
from qgraph.graph.plan import Role
from qgraph.passes import RaisePrecision
from tests.passes.deciding import Decided, decided, seeded


def convolutions(*items: RaisePrecision) -> Decided:
    """Convolutions between two linears, at 4 bits, but for the ends."""
    model = nn.Sequential(
        nn.Linear(16, 16), nn.Conv1d(12, 8, 1), nn.ReLU(), nn.Conv1d(8, 8, 3),
        nn.Linear(14, 16), nn.ReLU(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 4),
    )  # fmt: skip
    return decided(seeded(model), *items, name="int4")


def bits(found: Decided, kind: OpKind, role: Role) -> set[int]:
    return {s.bits for s in found.context.plan if s.kind is kind and s.role is role}


def test_without_the_rule_convolutions_inside_have_the_bits_that_were_asked_for():
    assert bits(convolutions(), OpKind.CONV, Role.WEIGHT) == {4}


def test_only_the_weights_of_convolutions_get_more_bits_and_each_is_reported():
    found = convolutions(RaisePrecision(heads=False, roles=("weight",)))
    assert bits(found, OpKind.CONV, Role.WEIGHT) == {8}
    assert bits(found, OpKind.CONV, Role.ACTIVATION) == {4}
    assert 4 in bits(found, OpKind.LINEAR, Role.WEIGHT)
    lines = found.lines("raise-precision")
    assert lines == [("applied", "8 bits: conv layers (weight)")] * 2


def test_both_operands_are_the_default():
    found = convolutions(RaisePrecision(heads=False))
    assert bits(found, OpKind.CONV, Role.WEIGHT) == bits(found, OpKind.CONV, Role.ACTIVATION) == {8}
    assert found.lines("raise-precision") == [("applied", "8 bits: conv layers")] * 2


def test_an_unknown_role_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="weight"):
        RaisePrecision(roles=("weights",))
