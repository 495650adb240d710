# SPDX-License-Identifier: Apache-2.0
"""A few cases of `make fuzz` on every run, and those that once failed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import strategies as st

import qgraph
from qgraph.testing import Case, ConvBlock, ConvNet, Stack, TwoTower
from qgraph.testing.image_blocks import IMAGE_BLOCKS
from qgraph.testing.token_blocks import TOKEN_BLOCKS
from tests.validation.cases import Subject, check, check_case, drawn, kinds_of

ONCE_FAILED = {
    "convolutions with narrow ends": (
        Case(
            ConvNet(4, (
                ConvBlock(dilation=2, stride=2, bias=False, activation="relu6", join="mul"),
                ConvBlock(kernel=1, dilation=2, bias=False, activation="silu", join="cat"),
                ConvBlock(3, -1, 2, 2, bias=False, norm=True, activation="tanh", join="cat"),
            )),
            seed=61,
        ),
        "sirst_w8a7", {"ends_bits": 4, "scope": "stored"},
    ),
    "two towers with ends of 2 bits": (
        Case(TwoTower("modulation", 17), seed=28), "sirst_w7a8",
        {"ends_bits": 2, "scope": "stored"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("number", [100, 101])
def test_everything_holds(number):
    outcome = check(number)
    assert not outcome.failure, outcome


@pytest.mark.parametrize("name", ONCE_FAILED)
def test_what_once_failed_holds(name):
    case, pipeline, options = ONCE_FAILED[name]
    model = case.model()
    found = Subject(case, model, qgraph.trace(model, *case.inputs()))
    chosen = qgraph.pipeline(pipeline)
    planned = dataclasses.replace(chosen["plan-sites"], **options)
    assert check_case(found, chosen.replace("plan-sites", planned), with_onnx=False)


def test_a_number_always_draws_the_same_and_different_numbers_differ():
    strategy = st.lists(st.integers(), min_size=3)
    assert drawn(strategy, 4) == drawn(strategy, 4)
    assert len({tuple(drawn(strategy, n)) for n in range(8)}) > 5


def test_a_stack_is_of_the_kinds_of_its_blocks():
    assert kinds_of(Case(Stack(("Dense",), ("Mixer",)))) == ("Stack Dense", "Stack Mixer")
    assert kinds_of(Case(TwoTower())) == ("TwoTower fusion=attention",)


@pytest.mark.parametrize("name", [*IMAGE_BLOCKS, *TOKEN_BLOCKS])
def test_every_block_keeps_the_shape_it_is_given(name):
    torch.manual_seed(0)
    if name in IMAGE_BLOCKS:
        x = torch.randn(2, 8, 8, 8)
        assert IMAGE_BLOCKS[name]().eval()(x).shape == x.shape
    else:
        x = torch.randn(2, 16, 8)
        assert TOKEN_BLOCKS[name]().eval()(x).shape == x.shape


def test_misspelt_blocks_are_refused_with_the_nearest_name():
    with pytest.raises(qgraph.ConfigError, match="did you mean 'Dense'"):
        Stack(("Dence",)).build()
