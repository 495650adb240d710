# SPDX-License-Identifier: Apache-2.0
"""Infrared small-target segmentation: generated scenes, two trained networks, and their metrics.

>>> from examples.zoo import sirst
>>> model = sirst.load_model("resunet")
>>> sirst.evaluate(model, "development", 8, 8)["iou"] > 0.3
True
"""

from __future__ import annotations

from examples.zoo.sirst.scenes import SIZE, SPLITS
from examples.zoo.sirst.scoring import MODELS, Evaluation, batches, build, evaluate, load_model

__all__ = ["MODELS", "SIZE", "SPLITS", "Evaluation", "batches", "build", "evaluate", "load_model"]
