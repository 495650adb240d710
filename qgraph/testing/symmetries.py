# SPDX-License-Identifier: Apache-2.0
"""Laws: order does not matter to a quantizer, and signs fold through a symmetric one."""

from __future__ import annotations

import torch
from torch import Tensor

from qgraph.testing.quantizing import Quantizer, channel_axis, describe, fake


def assert_permutation_invariant(
    quantizer: Quantizer, x: Tensor, *, axis: int = -1, seed: int = 0
) -> None:
    """``Q(x[p]) = Q(x)[p]`` for a permutation along an axis, bit for bit.

    For an encoding the axis must not be its channel axis. For a function that chooses its own
    parameters from x (such as a weight quantizer) this says that it treats all positions alike.

    Raises:
        AssertionError: with how many elements differ.
    """
    at = axis % x.ndim
    if at == channel_axis(quantizer, x.ndim):
        msg = f"axis {axis} is the channel axis of {describe(quantizer)}; permute another one"
        raise AssertionError(msg)
    order = torch.randperm(x.shape[at], generator=torch.Generator().manual_seed(seed))
    direct, moved = fake(quantizer, x).index_select(at, order), x.index_select(at, order)
    other = fake(quantizer, moved.contiguous())
    wrong = int((direct != other).sum())
    assert not wrong, f"{describe(quantizer)}: {wrong} of {x.numel()} values depend on the order"


def assert_sign_fold_invariant(quantizer: Quantizer, x: Tensor, *, axis: int = 0) -> None:
    """``Q(-w) = -Q(w)`` for any choice of channels whose sign changes, bit for bit.

    This is what lets signs of weight rows be folded after quantization; it needs as many codes
    below zero as above.

    Raises:
        AssertionError: with the first value that breaks it.
    """
    at = axis % x.ndim
    shape = [1] * x.ndim
    shape[at] = x.shape[at]
    signs = torch.where(torch.arange(x.shape[at]) % 2 == 0, -1.0, 1.0).view(shape)
    direct, other = fake(quantizer, x) * signs, fake(quantizer, x * signs)
    if not torch.equal(direct, other):
        first = int((direct != other).flatten().nonzero()[0])
        value = float((x * signs).flatten()[first])
        got = float(other.flatten()[first])
        msg = f"{describe(quantizer)}: Q({value!r}) is {got!r}, not the negative of Q({-value!r})"
        raise AssertionError(msg)
