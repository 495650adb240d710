# SPDX-License-Identifier: Apache-2.0
"""Compilers may see exactly rounded arithmetic, movement, and what is no float op; no more."""

from __future__ import annotations

import operator

import pytest
import torch

from qgraph.backends.elementary import is_elementary
from qgraph.backends.integer.opaque import opaque

aten = torch.ops.aten
EXACT = [
    aten.add.Tensor, aten.div.Scalar, aten.sqrt.default, aten.clamp.Tensor, aten.round.decimals,
    aten.max_pool2d.default, aten.where.self, aten.reshape.default, aten.permute.default,
    aten.split.Tensor, aten.chunk.default, aten.unbind.int, aten.slice.Tensor, aten.gt.Scalar,
]  # fmt: skip
ROUNDED = [
    aten.exp.default, aten.softmax.int, aten.layer_norm.default, aten.mean.dim, aten.sum.default,
    aten.tanh.default, aten.gelu.default, aten.linear.default, aten.conv2d.default,
    aten.pow.Tensor_Scalar, aten.sigmoid.default, aten.rsqrt.default, aten._softmax.default,
]  # fmt: skip


@torch.library.custom_op("qgraph_test_elementary::add", mutates_args=())
def _own(x: torch.Tensor) -> torch.Tensor:
    return x + 1


@pytest.mark.parametrize("target", [*EXACT, operator.getitem, max, "name", None, aten.add], ids=str)
def test_exact_ops_and_what_is_no_overload_are_elementary(target: object) -> None:
    assert is_elementary(target) is True


@pytest.mark.parametrize("target", ROUNDED, ids=str)
def test_ops_that_round_inside_are_not(target: object) -> None:
    assert is_elementary(target) is False


def test_ops_of_other_libraries_are_left_alone() -> None:
    target = torch.ops.qgraph_test_elementary.add.default
    assert is_elementary(target)
    assert opaque(target) is target


X = torch.linspace(-3, 3, 24).reshape(2, 3, 4)
RUN = [
    (aten.exp.default, ()), (aten.softmax.int, (1,)), (aten.mean.dim, ([0, 2], True)),
    (aten.pow.Tensor_Scalar, (2,)), (aten.pow.Tensor_Tensor, (torch.full((4,), 3.0),)),
    (aten._softmax.default, (-1, False)),
]  # fmt: skip


@pytest.mark.parametrize(("target", "rest"), RUN, ids=[str(t) for t, _ in RUN])
def test_hidden_ops_compute_what_they_hide(target, rest) -> None:
    hidden = opaque(target)
    assert hidden is not target
    assert hidden is opaque(target)
    assert hidden.namespace == "qgraph_eager"
    assert len(hidden._schema.arguments) == len(target._schema.arguments)
    assert torch.equal(hidden(X, *rest), target(X, *rest))
    fake = torch._subclasses.FakeTensorMode().from_tensor(X)
    if all(not isinstance(r, torch.Tensor) for r in rest):
        assert hidden(fake, *rest).shape == target(X, *rest).shape


@pytest.mark.parametrize("target", [aten.exp_.default, aten.sigmoid_.default, aten.exp.out])
def test_ops_that_write_into_their_arguments_are_not_hidden(target) -> None:
    assert opaque(target) is target


@pytest.mark.parametrize("target", EXACT, ids=str)
def test_elementary_ops_are_not_hidden(target) -> None:
    assert opaque(target) is target
