# SPDX-License-Identifier: Apache-2.0
"""Per-channel clip search for weights: every channel tries every clip, in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from qgraph.calibration.affine import affine_parameters
from qgraph.calibration.clip_grid import TIE
from qgraph.calibration.output_ranges import clamped_
from qgraph.errors import ConfigError
from qgraph.formats.affine import AffineEncoding, IntGrid

CELLS = 1 << 18  # elements x candidates held at once; stays in a core's cache
FINE = 4
CLIP_BELOW = 8  # bits; from there on a clip wins nothing: benchmarks/search_effort.py


def _losses(
    rows: Tensor, fraction: Tensor, ends: tuple[Tensor, Tensor], grid: IntGrid, how: _How
) -> Tensor:
    """Loss [C, K] of clipping each row of [C, N] to `fraction` [C, K] of its own range."""
    low, high = (end[:, None] * fraction for end in ends)
    scale, zero_point = affine_parameters(low, high, grid.qmin, grid.qmax, symmetric=how.symmetric)
    s, z = scale[..., None], zero_point[..., None]
    error = (rows[:, None] / s).round_()
    low_code, high_code = (end.to(error) for end in (grid.qmin - z, grid.qmax - z))
    error = clamped_(error, low_code, high_code).mul_(s).sub_(rows[:, None])
    error = error.square_() if how.norm == 2.0 else error.abs_().pow_(how.norm)
    if how.importance is not None:
        return error @ how.importance
    return error.sum(-1)


class _How:
    """What counts as an error."""

    def __init__(self, *, symmetric: bool, norm: float, importance: Tensor | None) -> None:
        self.symmetric = symmetric
        self.norm = norm
        self.importance = importance


def _best(loss: Tensor, fraction: Tensor) -> Tensor:
    """Per channel the fraction [C] of smallest loss [C, K]; ties toward the largest."""
    least = loss.amin(1, keepdim=True)
    return torch.where(loss <= least * (1 + TIE), fraction, -1.0).amax(1)


def _search(rows: Tensor, ends: tuple[Tensor, Tensor], grid: IntGrid, how: _How) -> Tensor:
    """The best clip fraction [C] for rows [C, N]: a coarse grid, then around its best."""
    smallest = {2: 0.2, 3: 0.3, 4: 0.4, 5: 0.5, 6: 0.6}.get(grid.bits, 0.75)
    count = 17 if grid.bits <= 4 else 9 if grid.bits <= 6 else 6
    step = (1.0 - smallest) / (count - 1)
    fraction = torch.linspace(1.0, smallest, count, device=rows.device)
    fraction = fraction.expand(rows.shape[0], -1)
    coarse = _losses(rows, fraction, ends, grid, how)
    best = _best(coarse, fraction)
    # tried already: the best itself and its larger neighbour (below the last there was none)
    count = 2 * FINE if grid.bits <= 6 else FINE
    around = torch.linspace(-step, step, count + 1, device=rows.device)
    around = torch.cat([around[: count // 2], around[count // 2 + 1 : -1]])
    near = (best[:, None] + around).clamp(max=1.0)
    loss = torch.cat([_losses(rows, near, ends, grid, how), coarse.amin(1, keepdim=True)], dim=1)
    return _best(loss, torch.cat([near, best[:, None]], dim=1))


@torch.no_grad()
def weight_parameters(
    weight: Tensor,
    *,
    axis: int = 0,
    bits: int = 8,
    signed: bool = True,
    symmetric: bool = True,
    narrow: bool = True,
    norm: float = 2.0,
    second_moment: Tensor | None = None,
    clip: bool = True,
) -> tuple[Tensor, Tensor]:
    """Scale (fp32 [C]) and zero point (int32 [C]) per channel of a weight.

    Each channel is clipped to the fraction of its own range that minimises
    ``sum_j m_j |Q(w_j) - w_j|^norm``; of equally good ones the largest.

    Args:
        weight: any rank; `axis` is the output channel (0; 1 for transposed convolutions).
        bits, signed, narrow: the codes; narrow drops the lowest, which makes Q(-w) = -Q(w).
        second_moment: m, E[x_j^2] of the input that meets w_j; its numel is that of one channel
            of the weight, or that length divides it (then it is repeated inside, as the kernel
            positions of one input channel are).
        clip: whether to search; otherwise every channel keeps its whole range.

    Raises:
        ConfigError: a non-finite weight or second moment, or a length that does not fit.
    """
    grid = IntGrid(bits, signed, narrow)
    rows = weight.detach().movedim(axis, 0).flatten(1).float()
    low, high = rows.amin(1), rows.amax(1)
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        bad = int((~torch.isfinite(rows)).sum())
        msg = f"weight {list(weight.shape)} holds {bad} non-finite values"
        raise ConfigError(msg)
    importance = None if second_moment is None else _importance(second_moment, rows)
    how = _How(symmetric=symmetric, norm=norm, importance=importance)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if symmetric and signed:
        high = torch.maximum(high, -low)
        low = torch.zeros_like(low) if narrow else low
    if not clip:
        return affine_parameters(low, high, grid.qmin, grid.qmax, symmetric=symmetric)
    size = max(1, CELLS // max(1, rows.shape[1] * 9))
    parts = range(0, rows.shape[0], size)
    found = [
        _search(rows[p : p + size], (low[p : p + size], high[p : p + size]), grid, how)
        for p in parts
    ]
    fraction = torch.cat(found)
    return affine_parameters(
        low * fraction, high * fraction, grid.qmin, grid.qmax, symmetric=symmetric
    )


def _importance(second_moment: Tensor, rows: Tensor) -> Tensor:
    moment = second_moment.detach().flatten().to(rows)
    length = rows.shape[1]
    if not bool(torch.isfinite(moment).all()) or not moment.numel() or length % moment.numel():
        msg = f"second moment of {moment.numel()} values does not fit channels of {length} weights"
        raise ConfigError(msg)
    return moment.repeat_interleave(length // moment.numel())


def weight_encoding(
    weight: Tensor, bits: int, axis: int | None, *, norm: float = 2.0, clip: bool = True
) -> AffineEncoding:
    """The uniform format of a stored weight: symmetric, per channel of `axis` or (None) one scale.

    At 8 bits the lowest code is dropped, which makes Q(-w) = -Q(w); below, every code counts.
    `norm` and `clip` as in `weight_parameters`.
    """
    grid = IntGrid(bits, signed=True, narrow=bits >= 8)
    front = None if axis is None else axis % weight.ndim
    shaped = weight.reshape(1, -1) if front is None else weight
    scale, zero_point = weight_parameters(
        shaped, axis=front or 0, bits=bits, narrow=grid.narrow, norm=norm, clip=clip
    )
    if front is None:
        scale, zero_point = scale.squeeze(0), zero_point.squeeze(0)
    return AffineEncoding(
        scale=scale, zero_point=zero_point, qmin=grid.qmin, qmax=grid.qmax, axis=front
    )


def weight_scales(
    weight: Tensor,
    *,
    axis: int = 0,
    bits: int = 8,
    narrow: bool = True,
    norm: float = 2.0,
    second_moment: Tensor | None = None,
) -> Tensor:
    """Scales (fp32 [C]) of symmetric signed weights; see `weight_parameters`."""
    return weight_parameters(
        weight, axis=axis, bits=bits, narrow=narrow, norm=norm, second_moment=second_moment
    )[0]
