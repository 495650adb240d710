# SPDX-License-Identifier: Apache-2.0
"""Law: codes stay in range, values are levels, and inside the range the nearest one is taken."""

from __future__ import annotations

import torch
from torch import Tensor

from qgraph.formats import AffineEncoding, Encoding
from qgraph.formats.base import along


def assert_in_range(encoding: Encoding, x: Tensor) -> None:
    """Codes name levels of the table; decoded values are scale times such a level.

    Raises:
        AssertionError: says which of the two fails, and where.
    """
    codes = encoding.encode(x)
    assert codes.shape == x.shape, f"codes have shape {codes.shape}, the tensor {x.shape}"
    assert not codes.is_floating_point(), f"codes are {codes.dtype}, not integers"
    low, high = _code_range(encoding)
    outside = (codes < low) | (codes > high)
    if bool(outside.any()):
        worst = int(codes[outside][0])
        msg = f"{encoding.describe()}: code {worst} lies outside [{low}, {high}]"
        raise AssertionError(msg)
    levels = encoding.level(codes)
    table = encoding.table()
    if table.ndim == 1 or table.shape[0] == 1:
        known = torch.isin(levels, table.flatten())
    else:
        moved = levels.movedim(encoding.axis or 0, 0).flatten(1)
        known = torch.stack([torch.isin(a, b) for a, b in zip(moved, table, strict=True)])
    assert bool(known.all()), f"{encoding.describe()}: a code decodes to no level of the table"
    wanted = levels.float() * along(encoding.scale, encoding.axis, x.ndim)
    assert torch.equal(encoding.decode(codes), wanted), "decode is not scale * level"


def assert_nearest(encoding: Encoding, x: Tensor) -> None:
    """The quantized value is nearest to x among all levels, up to fp32 rounding.

    For encodings per tensor; values outside the range go to its end.

    Raises:
        AssertionError: with a value for which another level is nearer.
    """
    assert encoding.scale.ndim == 0, "assert_nearest takes encodings per tensor"
    values = encoding.table().flatten().double() * encoding.scale.double()
    wide = x.double().flatten()
    best = (wide[:, None] - values[None]).abs().amin(1)
    mine = (wide - encoding.fake(x).double().flatten()).abs()
    slack = 4e-7 * (wide.abs() + float(encoding.scale))
    worse = mine > best + slack
    if bool(worse.any()):
        at = int(worse.nonzero()[0])
        msg = f"{encoding.describe()}: {float(wide[at])!r} is {float(mine[at])!r} off, "
        raise AssertionError(f"{msg}a level lies {float(best[at])!r} away")


def _code_range(encoding: Encoding) -> tuple[int, int]:
    if isinstance(encoding, AffineEncoding):
        return encoding.qmin, encoding.qmax
    return 0, int(encoding.table().shape[-1]) - 1
