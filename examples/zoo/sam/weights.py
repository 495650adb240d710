# SPDX-License-Identifier: Apache-2.0
"""Load the trained promptable-segmentation model."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from examples.zoo.sam.model import PromptableSegmentation

WEIGHTS = Path(__file__).parent / "weights.safetensors"


def load_model() -> PromptableSegmentation:
    """Return the trained model in eval mode."""
    model = PromptableSegmentation()
    model.load_state_dict(load_file(WEIGHTS))
    return model.requires_grad_(False).eval()
