# SPDX-License-Identifier: Apache-2.0
"""Load the trained referring-segmentation model."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from examples.zoo.ris.model import ReferringSegmentation
from examples.zoo.ris.text import load_text_encoder

WEIGHTS = Path(__file__).parent / "weights.safetensors"


def load_model(weights: Path = WEIGHTS) -> ReferringSegmentation:
    """Return the model in eval mode: text encoder from its package, the rest from `weights`."""
    model = ReferringSegmentation(load_text_encoder())
    model.segmenter.load_state_dict(load_file(weights))
    return model.requires_grad_(False).eval()
