# SPDX-License-Identifier: Apache-2.0
"""The measure of every benefit test: how much smaller a squared error became."""

from __future__ import annotations

import math

_TINY = 1e-300


def decibels(before: float, after: float) -> float:
    """dB by which the squared error `after` lies below `before`; finite for errors of zero."""
    return 10.0 * math.log10(max(before, _TINY) / max(after, _TINY))
