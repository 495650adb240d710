# SPDX-License-Identifier: Apache-2.0
"""What the laws of quantizers take: an encoding, or any function from a tensor to a tensor."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from qgraph.formats import Encoding

Quantizer = Encoding | Callable[[Tensor], Tensor]


def fake(quantizer: Quantizer, x: Tensor) -> Tensor:
    """Quantized and decoded again."""
    return quantizer.fake(x) if isinstance(quantizer, Encoding) else quantizer(x)


def describe(quantizer: Quantizer) -> str:
    """A name for messages."""
    if isinstance(quantizer, Encoding):
        return quantizer.describe()
    return getattr(quantizer, "__name__", repr(quantizer))


def channel_axis(quantizer: Quantizer, ndim: int) -> int | None:
    """The axis along which the quantizer differs, counted from the front."""
    axis = quantizer.axis if isinstance(quantizer, Encoding) else None
    return None if axis is None else axis % ndim
