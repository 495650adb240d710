# SPDX-License-Identifier: Apache-2.0
"""Digit classification on photographic backgrounds with a ViT and a Swin-like model."""

from examples.zoo.vit.data import batches as batches
from examples.zoo.vit.evaluate import evaluate as evaluate
from examples.zoo.vit.weights import load_model as load_model
