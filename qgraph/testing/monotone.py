# SPDX-License-Identifier: Apache-2.0
"""Law: a larger value never gets a smaller code."""

from __future__ import annotations

from torch import Tensor

from qgraph.testing.quantizing import Quantizer, channel_axis, describe, fake


def assert_monotone(quantizer: Quantizer, x: Tensor) -> None:
    """``x <= y`` implies ``Q(x) <= Q(y)``, along every axis but the channel axis.

    Raises:
        AssertionError: with the first pair that changes order.
    """
    kept = channel_axis(quantizer, x.ndim)
    for axis in range(x.ndim):
        if axis == kept:
            continue
        ordered = x.sort(dim=axis).values
        steps = fake(quantizer, ordered).diff(dim=axis)
        if bool((steps < 0).any()):
            at = int((steps.movedim(axis, -1).reshape(-1) < 0).nonzero()[0])
            rows = ordered.movedim(axis, -1).reshape(-1, x.shape[axis])
            row, column = divmod(at, x.shape[axis] - 1)
            low, high = rows[row, column], rows[row, column + 1]
            msg = f"{describe(quantizer)} is not monotone: {float(low)!r} <= {float(high)!r}, "
            raise AssertionError(f"{msg}but their quantized values fall")
