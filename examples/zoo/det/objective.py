# SPDX-License-Identifier: Apache-2.0
"""The objective that the zoo's detectors are quantized with."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from examples.zoo.det.boxes import anchor_boxes, decode_deltas, decode_distances
from examples.zoo.det.data import IMAGE_SIZE
from qgraph import FilteredGlobalLoss


def predictions(outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Raw outputs of either detector as (class logits, boxes divided by the image size)."""
    logits, values = outputs[0], outputs[1]
    if len(outputs) == 2:
        return logits, decode_deltas(values, anchor_boxes()) / IMAGE_SIZE
    return logits, decode_distances(values) / IMAGE_SIZE


# Chosen on the development split. What quantization costs these detectors is the last tenth of
# overlap of the boxes that count, not classes: errors weigh by box size and by score.
CHOSEN = {"theta_c": 2e-4, "theta_i": 0.1, "lam": 100.0, "distance": "overlap", "confidence": 2.0}


def objective(**options: Any) -> FilteredGlobalLoss:
    """The filtered global loss on the zoo's outputs; `options` replace what is `CHOSEN`."""
    return FilteredGlobalLoss(predictions, **{**CHOSEN, **options})
