# SPDX-License-Identifier: Apache-2.0
"""The real MiniLM-L6 sentence encoder and real sentences, for the demo, tests and benchmarks."""

from examples.minilm.batches import batches, calibration_batches, evaluation_batches
from examples.minilm.model import load_model, tokenize
from examples.minilm.sentences import sentences

__all__ = [
    "batches",
    "calibration_batches",
    "evaluation_batches",
    "load_model",
    "sentences",
    "tokenize",
]
