# SPDX-License-Identifier: Apache-2.0
"""Four disjoint splits: which digits and which random streams belong to which.

Digits are divided per class by one fixed shuffle, so no handwritten sample is in two splits;
backgrounds are divided in `examples.zoo.backgrounds`.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "calibration", "development", "evaluation"]
SPLITS: tuple[Split, ...] = get_args(Split)

# Shares of each class's samples; about 180 samples per class exist.
_DIGIT_SHARES: dict[Split, float] = {
    "train": 0.55,
    "calibration": 0.10,
    "development": 0.15,
    "evaluation": 0.20,
}
_SHUFFLE_SEED = 20240229


@cache
def digit_images() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return scikit-learn's handwritten digits, images [1797, 8, 8] in [0, 1], and labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images / 16.0).astype(np.float32), digits.target.astype(np.int64)


@cache
def digit_indices(split: Split, label: int) -> NDArray[np.int64]:
    """Return the sample numbers of class `label` that belong to `split`, ascending."""
    _, labels = digit_images()
    members = np.flatnonzero(labels == label)
    members = np.random.default_rng([_SHUFFLE_SEED, label]).permutation(members)
    shares = np.cumsum([0.0, *(_DIGIT_SHARES[name] for name in SPLITS)])
    edges = np.round(shares * len(members)).astype(int)
    position = SPLITS.index(split)
    return np.sort(members[edges[position] : edges[position + 1]])


def sample_rng(seed: int, split: Split, index: int, stream: int = 0) -> np.random.Generator:
    """Return the generator of one sample; it depends on its arguments only, not on call order."""
    return np.random.default_rng([seed, SPLITS.index(split), index, stream])
