# SPDX-License-Identifier: Apache-2.0
"""The affine format: levels are ``qmin - z ... qmax - z``, derived, never stored.

Encoding is ``clamp(round(x / s) + z)`` in fp32, half to even, by division: what the ONNX
standard says, and what reciprocals or rounding after the zero point depart from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qgraph.errors import ConfigError
from qgraph.formats.base import Encoding, along, check_bits, check_scale


@dataclass(frozen=True, slots=True)
class IntGrid:
    """The integers that codes of an affine format may take.

    >>> IntGrid(4, signed=True).qmin, IntGrid(4, signed=True).qmax
    (-8, 7)
    >>> IntGrid(4, signed=True, narrow=True).qmin
    -7
    """

    bits: int
    signed: bool
    narrow: bool = False

    def __post_init__(self) -> None:
        check_bits(self.bits)

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return int(self.narrow) - (1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.bits - int(self.signed))) - 1


def code_dtype(qmin: int, qmax: int) -> torch.dtype:
    """The smallest integer dtype that holds codes from `qmin` to `qmax`."""
    if qmin >= -128 and qmax <= 127:
        return torch.int8
    if qmin >= 0 and qmax <= 255:
        return torch.uint8
    return torch.int16 if qmin >= -(2**15) and qmax < 2**15 else torch.int32


def expand(values: Tensor, axis: int | None, block: int | None, shape: torch.Size) -> Tensor:
    """Broadcast scales or zero points (scalar, per axis, or blocked) against `shape`."""
    if block is None:
        return along(values, axis, len(shape))
    if axis is None:
        msg = f"block={block} needs an axis"
        raise ConfigError(msg)
    repeated = values.repeat_interleave(block, dim=axis)
    return repeated.narrow(axis, 0, shape[axis])


def affine_encode(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int,
    axis: int | None = None, block: int | None = None,
) -> Tensor:  # fmt: skip
    """Codes ``clamp(round(x / s) + z, qmin, qmax)``, computed in fp32."""
    s = expand(scale, axis, block, x.shape)
    z = expand(zero_point, axis, block, x.shape)
    codes = (x.to(torch.float32) / s).round_()
    if qmax >= 2**24:  # the limits themselves would be rounded in fp32
        codes = codes.to(torch.float64)
    return codes.add_(z).clamp_(qmin, qmax).to(code_dtype(qmin, qmax))


def affine_decode(
    codes: Tensor, scale: Tensor, zero_point: Tensor,
    axis: int | None = None, block: int | None = None,
) -> Tensor:  # fmt: skip
    """Values ``(code - z) * s`` in fp32."""
    s = expand(scale, axis, block, codes.shape)
    z = expand(zero_point, axis, block, codes.shape)
    return (codes.to(torch.int32) - z).to(torch.float32) * s


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class AffineEncoding(Encoding):
    """Scale and zero point of an affine quantizer.

    Attributes:
        scale: fp32 [] | [C] | blocked (rank of x, `axis` divided by `block`).
        zero_point: int32, shape of `scale`; inside [qmin, qmax].
        qmin, qmax: the code range.
        axis: channel axis, or None per tensor.
        block: length of a block along `axis`, or None.

    Raises:
        ConfigError: on a scale that is not finite and positive, a zero point outside the
            code range, or an empty code range.

    >>> e = AffineEncoding.per_tensor(0.5, 3, IntGrid(4, signed=False))
    >>> e.fake(torch.tensor([-9.0, 0.0, 0.3, 9.0])).tolist()
    [-1.5, 0.0, 0.5, 6.0]
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    axis: int | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", check_scale(self.scale))
        object.__setattr__(self, "zero_point", self.zero_point.detach().to(torch.int32))
        if self.qmin >= self.qmax:
            msg = f"empty code range [{self.qmin}, {self.qmax}]"
            raise ConfigError(msg)
        if self.scale.shape != self.zero_point.shape:
            shapes = list(self.scale.shape), list(self.zero_point.shape)
            msg = f"scale has shape {shapes[0]}, zero point {shapes[1]}"
            raise ConfigError(msg)
        low, high = int(self.zero_point.min()), int(self.zero_point.max())
        if low < self.qmin or high > self.qmax:
            msg = f"zero point {low}..{high} lies outside the codes [{self.qmin}, {self.qmax}]"
            raise ConfigError(msg)

    @classmethod
    def per_tensor(cls, scale: float, zero_point: int, grid: IntGrid) -> AffineEncoding:
        """One scale and zero point for a whole tensor."""
        return cls(
            scale=torch.tensor(scale), zero_point=torch.tensor(zero_point),
            qmin=grid.qmin, qmax=grid.qmax,
        )  # fmt: skip

    @classmethod
    def symmetric(cls, scale: Tensor, grid: IntGrid, axis: int | None) -> AffineEncoding:
        """Zero point 0, one scale per channel of `axis` (or one for all)."""
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return cls(scale=scale, zero_point=zero, qmin=grid.qmin, qmax=grid.qmax, axis=axis)

    @property
    def bits(self) -> int:  # noqa: D102
        return (self.qmax - self.qmin).bit_length()

    @property
    def is_symmetric(self) -> bool:
        """Whether every zero point is 0."""
        return not bool(self.zero_point.any())

    def encode(self, x: Tensor) -> Tensor:  # noqa: D102
        return affine_encode(
            x, self.scale, self.zero_point, self.qmin, self.qmax, self.axis, self.block
        )

    def level(self, codes: Tensor) -> Tensor:  # noqa: D102
        z = expand(self.zero_point, self.axis, self.block, codes.shape)
        return codes.to(torch.int32) - z

    def decode(self, codes: Tensor) -> Tensor:  # noqa: D102
        return affine_decode(codes, self.scale, self.zero_point, self.axis, self.block)

    def table(self) -> Tensor:  # noqa: D102
        codes = torch.arange(self.qmin, self.qmax + 1, dtype=torch.int32)
        return codes.to(self.zero_point.device) - self.zero_point.unsqueeze(-1)

    def to(self, device: torch.device | str) -> AffineEncoding:  # noqa: D102
        return AffineEncoding(
            scale=self.scale.to(device), zero_point=self.zero_point.to(device),
            qmin=self.qmin, qmax=self.qmax, axis=self.axis, block=self.block,
        )  # fmt: skip

    def describe(self) -> str:  # noqa: D102
        name = f"{'int' if self.qmin < 0 else 'uint'}{self.bits}"
        grain = f"per block of {self.block}" if self.block else self.granularity
        return f"{name} {grain}"
