# SPDX-License-Identifier: Apache-2.0
"""Promptable segmentation: an image and a point or a box in, mask candidates and their IoU out."""

from examples.zoo.sam.data import batches as batches
from examples.zoo.sam.evaluate import evaluate as evaluate
from examples.zoo.sam.weights import load_model as load_model
