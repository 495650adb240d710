# SPDX-License-Identifier: Apache-2.0
"""Paired bootstrap intervals of what a quantized segmentation model loses, and of what comes back.

Samples are drawn, the same for all models and calibration seeds; a sample's score is its mean over
the seeds. So an interval says what other images would change; the spread over seeds is apart.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.zoo.metrics import Interval

DRAWS = 2000
STEPS = 65535  # scores in [0, 1] are kept as 16-bit integers

Row = dict[str, Any]
Scores = NDArray[np.float64]


def packed(scores: Sequence[float]) -> str:
    """Scores in [0, 1] as text: 16-bit steps, base64."""
    steps = np.round(np.asarray(scores) * STEPS).astype("<u2")
    return base64.b64encode(steps.tobytes()).decode()


def unpacked(text: str) -> Scores:
    """Scores in percent [n] of a text that `packed` wrote."""
    return np.frombuffer(base64.b64decode(text), "<u2").astype(np.float64) * (100 / STEPS)


def of_seeds(rows: Sequence[Row], prompt: str) -> Scores:
    """Every sample's score in percent, averaged over the rows."""
    mean: Scores = np.mean([unpacked(row[f"{prompt}_samples"]) for row in rows], axis=0)
    return mean


def draws(values: Scores, *, seed: int = 0) -> Scores:
    """Means [DRAWS] of resampled values; equal seeds draw the same samples."""
    rng = np.random.default_rng(seed)
    means: Scores = np.concatenate([
        values[rng.integers(0, len(values), (100, len(values)))].mean(1)
        for _ in range(DRAWS // 100)
    ])  # fmt: skip
    return means


def interval(mean: float, drawn: Scores) -> Interval:
    """The percentile interval of drawn statistics."""
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Interval(float(mean), float(low), float(high))


def drop_interval(plain: Row, rows: Sequence[Row], prompt: str) -> Interval:
    """Points that the rows lose on average against the float model."""
    lost = of_seeds([plain], prompt) - of_seeds(rows, prompt)
    return interval(lost.mean(), draws(lost))


def recovered_interval(
    plain: Row, baseline: Sequence[Row], rows: Sequence[Row], prompt: str
) -> Interval | None:
    """Share of the baseline's loss that the rows win back; None if the baseline loses nothing.

    "Nothing": the interval of its loss holds zero, and the share would be a ratio of noise.
    """
    reference = of_seeds([plain], prompt)
    lost, kept = reference - of_seeds(baseline, prompt), reference - of_seeds(rows, prompt)
    drawn = draws(lost)
    if np.quantile(drawn, 0.025) <= 0.0:
        return None
    return interval(1.0 - kept.mean() / lost.mean(), 1.0 - draws(kept) / drawn)


def drop(plain: Row, rows: Sequence[Row], prompt: str) -> str:
    """The loss as text, with its interval and, over several seeds, the spread of the seeds."""
    found = drop_interval(plain, rows, prompt)
    text = f"{found.mean:5.2f} [{found.low:5.2f},{found.high:5.2f}]"
    if len(rows) > 1:
        each = [plain[f"{prompt}_miou"] - row[f"{prompt}_miou"] for row in rows]
        text += f" seeds {min(each):.2f}..{max(each):.2f}"
    return text


def recovered(plain: Row, baseline: Sequence[Row], rows: Sequence[Row], prompt: str) -> str:
    """The share won back as text."""
    found = recovered_interval(plain, baseline, rows, prompt)
    if found is None:
        return "n/a (nothing lost)"
    return f"{100 * found.mean:.0f}% [{100 * found.low:.0f},{100 * found.high:.0f}]"
