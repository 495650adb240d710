# SPDX-License-Identifier: Apache-2.0
"""Detection: an image in, boxes of digits and shapes out; two one-stage detectors."""

from examples.zoo.det.boxes import detections as detections
from examples.zoo.det.data import batches as batches
from examples.zoo.det.evaluate import evaluate as evaluate
from examples.zoo.det.weights import load_model as load_model
