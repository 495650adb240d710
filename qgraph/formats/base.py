# SPDX-License-Identifier: Apache-2.0
"""One idea for every number format: a scale times an integer level, picked by a code.

    x -> code          encode: nearest level, or the interval between decision thresholds
    code -> level      an integer
    x^ = scale * level decode

An `Encoding` holds the numbers of one quantizer. It knows nothing of graphs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from qgraph.errors import ConfigError

MIN_BITS, MAX_BITS = 2, 16


def check_bits(bits: int) -> int:
    """Return `bits` if it is a width that every backend takes, else raise `ConfigError`."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        msg = f"bits is {bits!r}; allowed: integers from {MIN_BITS} to {MAX_BITS}"
        raise ConfigError(msg)
    return bits


def check_scale(scale: Tensor) -> Tensor:
    """Return the scale as fp32; raise `ConfigError` unless it is finite and positive."""
    scale = scale.detach().to(torch.float32)
    if not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
        msg = f"scale must be finite and positive, got {scale.flatten()[:4].tolist()}"
        raise ConfigError(msg)
    return scale


def along(values: Tensor, axis: int | None, ndim: int) -> Tensor:
    """View a vector so that it broadcasts along `axis` of a tensor of rank `ndim`."""
    if axis is None or values.ndim == 0:
        return values
    shape = [1] * ndim
    shape[axis] = values.shape[0]
    return values.view(shape)


class Encoding(ABC):
    """The numbers of one quantizer; see the module docstring.

    Attributes:
        scale: fp32, shape [] (per tensor), [C] (per channel of `axis`) or blocked.
        axis: the channel axis of `scale`, or None.
    """

    scale: Tensor
    axis: int | None

    @property
    @abstractmethod
    def bits(self) -> int:
        """Storage bits of one code."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Codes of `x`: same shape, an integer dtype."""

    @abstractmethod
    def level(self, codes: Tensor) -> Tensor:
        """Integer levels (int32) that the codes stand for."""

    @abstractmethod
    def table(self) -> Tensor:
        """All levels, ascending: int32 [L], or [C, L] where they differ by channel."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Encoding:
        """The same numbers on another device."""

    @abstractmethod
    def describe(self) -> str:
        """A few words for reports, such as ``uint8 per tensor``."""

    def decode(self, codes: Tensor) -> Tensor:
        """fp32 values of the codes: ``scale * level(codes)``."""
        return self.level(codes).to(torch.float32) * along(self.scale, self.axis, codes.ndim)

    def fake(self, x: Tensor) -> Tensor:
        """``decode(encode(x))``."""
        return self.decode(self.encode(x))

    @property
    def granularity(self) -> str:
        """``per tensor`` or ``per channel``, for reports."""
        return "per tensor" if self.scale.ndim == 0 else "per channel"
