# SPDX-License-Identifier: Apache-2.0
"""Rounding that can be learned: each weight picks one of the two levels around it.

One formula serves training, hardening and export: ``w^ = s * (low + h * gap)`` with h in [0, 1]
while training and in {0, 1} afterwards. Starting values are nudged so that hardening at once
gives the codes of round-to-nearest, ties included.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from qgraph.formats import AffineEncoding, Encoding
from qgraph.formats.affine import expand
from qgraph.formats.base import along

Method = Literal["adaround", "ste"]
STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1  # AdaRound, arXiv 2004.10568, equation 23
NUDGE = 1e-4


class Rounding:
    """The choice of one weight tensor between neighbouring levels.

    Attributes:
        variable: the trained tensor, shape of the weight; `adaround`: the logit V of the
            rectified sigmoid; `ste`: the soft choice itself, passed straight through.
        free: bool, whether the weight has a choice (it lies inside the range).
        frozen: bool, whether the choice is final; `choice` then holds it.
    """

    def __init__(self, weight: Tensor, encoding: Encoding, method: Method = "adaround") -> None:
        self.method = method
        self.encoding = encoding
        self.source = weight
        self.restart(encoding.encode(weight).to(torch.int32), weight)

    @torch.no_grad()
    def restart(self, codes: Tensor, toward: Tensor) -> None:
        """Start from other codes; the other level of each choice lies towards another weight."""
        low, high, self.low_code = neighbours(toward, self.encoding, codes)
        self.low, self.gap = low, high - low
        self.scale = scale_of(self.encoding, toward)
        self.free = self.gap > 0
        up = codes > self.low_code
        units = toward.to(torch.float32) / self.scale
        fraction = ((units - low) / self.gap.clamp_min(1)).clamp(0.0, 1.0)
        start = torch.where(up, fraction.clamp_min(0.5 + NUDGE), fraction.clamp_max(0.5 - NUDGE))
        self.choice = up.to(torch.float32)
        self.frozen = ~self.free
        if self.method == "adaround":
            start = torch.logit((start - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW))
        self.variable = start.requires_grad_()

    def share(self) -> Tensor:
        """h in [0, 1], differentiable; final choices are constants."""
        if self.method == "ste":
            through: Any = _StraightThrough.apply
            soft = through(self.variable)
        else:
            wide = torch.sigmoid(self.variable) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW
            soft = wide.clamp(0.0, 1.0)
        return torch.where(self.frozen, self.choice, soft)

    def soft(self, beta: float | None) -> tuple[Tensor, Tensor]:
        """The weight for the soft choices and, with `beta`, their `penalty`; differentiable."""
        if self.method == "ste":
            return self.weight(self.share()), self.low.new_zeros(())
        fused: Any = _SoftWeight.apply
        made: tuple[Tensor, Tensor] = fused(
            self.variable, self.low, self.gap, self.scale, self.frozen, self.choice, beta
        )
        return made

    @torch.no_grad()
    def hard(self) -> Tensor:
        """h in {0, 1}."""
        border = 0.5 if self.method == "ste" else 0.0
        picked = (self.variable >= border).to(torch.float32)
        return torch.where(self.frozen, self.choice, picked)

    def weight(self, share: Tensor) -> Tensor:
        """The weight for a choice, fp32."""
        return (self.low + share * self.gap) * self.scale

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Codes of the hard choice, in the dtype that the encoding stores."""
        step = (self.hard() * self.free).to(torch.int32)
        dtype = self.encoding.encode(torch.zeros_like(self.low[:1])).dtype
        return (self.low_code + step).to(dtype)

    @torch.no_grad()
    def freeze(self, fraction: float) -> None:
        """Make the most decided choices final, until `fraction` of all weights are."""
        share = self.share()
        certainty = torch.where(self.frozen, 2.0, (share - 0.5).abs())
        count = min(certainty.numel(), round(fraction * certainty.numel()))
        if count == 0:
            return
        border = certainty.flatten().kthvalue(certainty.numel() - count + 1).values
        chosen = certainty >= border
        self.choice = torch.where(chosen, self.hard(), self.choice)
        self.frozen = self.frozen | chosen

    @torch.no_grad()
    def undecided(self) -> float:
        """Share of weights whose h is neither 0 nor 1."""
        share = self.share()
        return float(((share > 0) & (share < 1)).float().mean())


def penalty(share: Tensor, beta: float) -> Tensor:
    """Sum of ``1 - |2h - 1|^beta``, which pulls h to 0 and 1 (AdaRound, equation 24)."""
    return (1 - (2 * share - 1).abs().pow(beta)).sum()


def scale_of(encoding: Encoding, weight: Tensor) -> Tensor:
    """The scale, broadcast against the weight."""
    if isinstance(encoding, AffineEncoding):
        return expand(encoding.scale, encoding.axis, encoding.block, weight.shape)
    return along(encoding.scale, encoding.axis, weight.ndim)


def neighbours(weight: Tensor, encoding: Encoding, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The level of `codes` and the next one towards `weight`: both as levels (fp32), the lower
    first, and the lower one's code (int32).

    Where `weight` lies on or beyond the last level in its direction both are that level.
    """
    units = weight.to(torch.float32) / scale_of(encoding, weight)
    if isinstance(encoding, AffineEncoding):
        zero = expand(encoding.zero_point, encoding.axis, encoding.block, weight.shape)
        bottom, top = encoding.qmin - zero, encoding.qmax - zero
        floor = torch.where(units >= codes - zero, codes - zero, codes - zero - 1).float()
        low = torch.maximum(torch.minimum(floor, top), bottom)
        high = torch.maximum(torch.minimum(floor + 1, top), bottom)
        return low, high, (low + zero).to(torch.int32)
    here = encoding.level(codes).to(torch.float32)
    last = encoding.table().shape[-1] - 1
    lower = torch.where(here > units, (codes - 1).clamp_min(0), codes)
    upper = (lower + 1).clamp_max(last)
    low, high = (encoding.level(c).to(torch.float32) for c in (lower, upper))
    outside = (units <= low) & (lower == codes) | (here == units)
    return low, torch.where(outside, low, high), lower


class _StraightThrough(torch.autograd.Function):
    """Rounds to 0 or 1; the gradient passes as if it had not."""

    @staticmethod
    def forward(ctx: Any, soft: Tensor) -> Tensor:
        del ctx
        return (soft >= 0.5).to(soft.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        del ctx
        return grads[0]


class _SoftWeight(torch.autograd.Function):
    """Rectified sigmoid, weight and penalty with their gradients, in few passes."""

    @staticmethod
    def forward(
        ctx: Any, variable: Tensor, low: Tensor, gap: Tensor, scale: Tensor, frozen: Tensor,
        choice: Tensor, beta: float | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        slope = torch.sigmoid(variable)
        wide = (slope * (STRETCH_HIGH - STRETCH_LOW)).add_(STRETCH_LOW)
        # A weight on a level starts at exactly 0 or 1 and may leave it: only beyond is clipped.
        moves = (wide >= 0).logical_and_(wide <= 1).logical_and_(frozen.logical_not())
        share = torch.where(frozen, choice, wide.clamp_(0.0, 1.0))
        slope.addcmul_(slope, slope, value=-1).mul_(moves)  # the sigmoid's derivative
        ctx.save_for_backward(share, slope, gap, scale)
        ctx.beta = beta
        weight = torch.addcmul(low, share, gap).mul_(scale)
        return weight, low.new_zeros(()) if beta is None else penalty(share, beta)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        share, slope, gap, scale = ctx.saved_tensors
        moved = (grads[0] * gap).mul_(scale)
        if ctx.beta is not None:
            side = (share * 2).sub_(1)
            steep = side.abs().pow_(ctx.beta - 1).mul_(side.sign_())
            moved.addcmul_(steep, grads[1] * (-2 * ctx.beta))
        moved.mul_(slope).mul_(STRETCH_HIGH - STRETCH_LOW)
        return moved, None, None, None, None, None, None


class FakeAffine(torch.autograd.Function):
    """Quantize and dequantize in one step, with gradients for the value and the logarithm of s.

    ``d x^ / d s`` is LSQ's (arXiv 1902.08153, equation 3). `keep` marks elements that stay float
    (QDrop, arXiv 2203.05740).
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, x: Tensor, log_step: Tensor, scale: Tensor, zero: float, limits: tuple[int, int],
        keep: Tensor | None,
    ) -> Tensor:  # fmt: skip
        step = scale * torch.exp(log_step)
        units = x / step
        level = torch.round(units).clamp_(limits[0] - zero, limits[1] - zero)
        ctx.save_for_backward(units, level, step, keep)
        ctx.limits = limits[0] - zero, limits[1] - zero
        out = level * step
        return out if keep is None else select(keep, x, out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # noqa: D102
        units, level, step, keep = ctx.saved_tensors
        (grad,) = grads
        low, high = ctx.limits
        inside = (units >= low - 0.5) & (units <= high + 0.5)
        passing = grad * (inside if keep is None else inside | keep)
        slope = None
        if ctx.needs_input_grad[1]:
            moved = level - units.mul_(inside)
            if keep is not None:
                moved.mul_(keep.logical_not())
            factor = 1.0 / max(1.0, (grad.numel() * (high - low)) ** 0.5)
            slope = torch.dot(grad.flatten(), moved.flatten()) * step * factor
        return passing, slope, None, None, None, None


class FakeFixed(torch.autograd.Function):
    """Any encoding, parameters fixed, gradient straight through inside its range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, encoding: Encoding, keep: Tensor | None) -> Tensor:  # noqa: D102
        table = encoding.table()
        step = along(encoding.scale, encoding.axis, x.ndim)
        if table.ndim == 1 and not (isinstance(encoding, AffineEncoding) and encoding.block):
            inside = (x >= step * table[0]) & (x <= step * table[-1])
        else:
            inside = torch.ones_like(x, dtype=torch.bool)
        ctx.save_for_backward(inside if keep is None else inside | keep)
        out = encoding.fake(x)
        return out if keep is None else select(keep, x, out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # noqa: D102
        (passing,) = ctx.saved_tensors
        return grads[0] * passing, None, None


def select(keep: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """``torch.where`` for random masks, bit for bit; fp32 tensors by their bits.

    A choice per element is a branch that a random mask defeats; three integer operations go through
    in whole vectors. Infinities stay what they are, which a blend would not do.
    """
    if first.dtype != torch.float32 or second.dtype != torch.float32:
        return torch.where(keep, first, second)
    mask = keep.to(torch.int32).neg_()
    a, b = first.contiguous().view(torch.int32), second.contiguous().view(torch.int32)
    return (a ^ b).bitwise_and_(mask).bitwise_xor_(b).view(torch.float32)


def coins(shape: torch.Size, generator: torch.Generator, chance: float = 0.5) -> Tensor:
    """Booleans that are true with a chance in steps of 1/256: eight from one random number."""
    count = shape.numel()
    words = torch.empty(-(-count // 8), dtype=torch.int64)
    words.random_(-(2**63), None, generator=generator)
    return (words.view(torch.uint8)[:count] < round(chance * 256)).view(shape)
