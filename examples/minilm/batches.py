# SPDX-License-Identifier: Apache-2.0
"""Batches of tokens that the demo, the tests and every benchmark share."""

from __future__ import annotations

from torch import Tensor

from examples.minilm.model import tokenize
from examples.minilm.sentences import sentences


def batches(
    split: str, num_batches: int, *, batch_size: int = 8, length: int = 64, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Token batches of a split: `input_ids` and `attention_mask`, int64 [B, length]."""
    texts = sentences(split, num_batches * batch_size, seed=seed)
    return [tokenize(texts[i : i + batch_size], length) for i in range(0, len(texts), batch_size)]


def calibration_batches(num_batches: int = 32, *, seed: int = 0) -> list[dict[str, Tensor]]:
    """32 batches of 8 x 64 tokens, the set that the published peer figures used."""
    return batches("calibration", num_batches, seed=seed)


def evaluation_batches(num_batches: int = 8) -> list[dict[str, Tensor]]:
    """Batches whose sentences no other split holds."""
    return batches("evaluation", num_batches)
