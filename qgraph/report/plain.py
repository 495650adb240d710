# SPDX-License-Identifier: Apache-2.0
"""Numbers that JSON lacks: infinities as text, nan as None; and back."""

from __future__ import annotations

import math


def plain(value: object) -> object:
    """The value with dictionaries, lists and JSON scalars only."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def number(value: object) -> float:
    """Read a number that `plain` wrote.

    Raises:
        TypeError, ValueError: it is none.
    """
    if value is None:
        return math.nan
    if isinstance(value, (int, float, str)):
        return float(value)
    msg = f"{value!r} is no number"
    raise TypeError(msg)
