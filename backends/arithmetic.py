# SPDX-License-Identifier: Apache-2.0
"""The arithmetic that all backends share; docs/integer_semantics.md states the formulae.

Whatever decides a code is defined here once: requantization, materialisation, tables. Backends
differ only in how they obtain the (exact) accumulator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qgraph.formats import AffineEncoding, Encoding, code_dtype
from qgraph.formats.base import along


@dataclass(frozen=True, slots=True)
class Clamp:
    """Bounds, in real numbers, that folded activations put on a pending accumulator."""

    low: float = float("-inf")
    high: float = float("inf")

    def then(self, low: float, high: float) -> Clamp:
        """The bounds after one more clamp."""
        return Clamp(min(max(self.low, low), high), max(min(self.high, high), low))

    @property
    def is_open(self) -> bool:
        """Whether nothing is clamped."""
        return self == Clamp()


def multiplier(scale: Tensor, target: AffineEncoding, ndim: int) -> Tensor:
    """``(s_x * s_w) / s_y`` in fp32, left to right as onnxruntime computes it.

    Args:
        scale: fp32 ``s_x * s_w``, broadcastable against the accumulator.
        target: encoding of the result.
        ndim: rank of the accumulator.
    """
    return scale / along(target.scale, target.axis, ndim)


def code_limits(clamp: Clamp, target: AffineEncoding, ndim: int) -> tuple[Tensor, Tensor]:
    """Codes that a clamped value may take: the encodings of the bounds (int32)."""
    limits = []
    for bound, edge in ((clamp.low, target.qmin), (clamp.high, target.qmax)):
        zero = target.zero_point.to(torch.int64)
        code = torch.round(torch.full_like(target.scale, bound) / target.scale)
        code = code.clamp(-(2.0**40), 2.0**40).to(torch.int64) + zero
        code = code.clamp(target.qmin, target.qmax)
        code = torch.full_like(code, edge) if abs(bound) == float("inf") else code
        limits.append(along(code.to(torch.int32), target.axis, ndim))
    return limits[0], limits[1]


def requantize(
    accumulator: Tensor, scale: Tensor, target: AffineEncoding, clamp: Clamp | None = None
) -> Tensor:
    """``clamp(round_half_even(float32(acc) * float32((s_x s_w) / s_y)) + z)``.

    Args:
        accumulator: exact integers in any dtype.
        scale: fp32 ``s_x * s_w``, broadcastable.
        target: encoding of the result.
        clamp: bounds of activations folded into the clamp.
    """
    ndim = accumulator.ndim
    low, high = code_limits(clamp or Clamp(), target, ndim)
    zero = along(target.zero_point, target.axis, ndim)
    codes = accumulator.to(torch.float32) * multiplier(scale, target, ndim)
    codes = codes.round_().add_(zero)
    return codes.clamp_(low, high).to(code_dtype(target.qmin, target.qmax))


def materialize(accumulator: Tensor, scale: Tensor, clamp: Clamp | None = None) -> Tensor:
    """``float32(acc) * (s_x s_w)``, clamped where an activation is pending."""
    values = accumulator.to(torch.float32) * scale
    return values if clamp is None or clamp.is_open else values.clamp_(clamp.low, clamp.high)


OPEN = Clamp()

Function = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def value_table(values: Tensor, functions: Sequence[Function]) -> Tensor:
    """A chain of elementwise functions, evaluated once on all values a code can have.

    Args:
        values: fp32 [L], in the order of the codes.
        functions: (op, arguments behind the tensor, keyword arguments), in order.
    """
    for function, args, kwargs in functions:
        values = function(values, *args, **kwargs)
    return values


def code_table(values: Tensor, functions: Sequence[Function], target: Encoding) -> Tensor:
    """The same, encoded: codes [L] of the next quantizer."""
    return target.encode(value_table(values, functions))


def combine_partials(partials: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    """``sum_g float32(acc_g) * (s_g s_w)`` in fp32, group by group in order."""
    total = materialize(partials[0], scales[0])
    for accumulator, scale in zip(partials[1:], scales[1:], strict=True):
        total = total + materialize(accumulator, scale)
    return total
