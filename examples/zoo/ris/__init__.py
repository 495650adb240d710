# SPDX-License-Identifier: Apache-2.0
"""Referring segmentation: a sentence and an image in, the mask of the one object it means out."""

from examples.zoo.ris.data import batches as batches
from examples.zoo.ris.evaluate import evaluate as evaluate
from examples.zoo.ris.weights import load_model as load_model
