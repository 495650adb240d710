# SPDX-License-Identifier: Apache-2.0
"""Figures with bootstrap intervals: an array holds the figure first, then its resamples."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Drawn = NDArray[np.float64]


def recovered(plain: Drawn, base: Drawn, own: Drawn) -> Drawn:
    """Percent of the baseline's drop below `plain` that is recovered; NaN where it drops nothing.

    All three over the same resamples.
    """
    before = plain - base
    return np.asarray(100 * (1 - (plain - own) / np.where(before == 0, np.nan, before)))


def interval(values: Drawn, digits: int = 2, unit: str = "") -> str:
    """The figure with its 95 % interval."""
    low, high = np.nanquantile(values[1:], (0.025, 0.975))
    return f"{values[0]:.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]"
