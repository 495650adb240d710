# SPDX-License-Identifier: Apache-2.0
"""Load the trained classifiers."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from examples.zoo.vit.model import BUILDERS, Kind

FOLDER = Path(__file__).parent


def weights_path(kind: Kind) -> Path:
    """Return where the weights of a model are kept."""
    return FOLDER / f"{kind}.safetensors"


def load_model(kind: Kind = "vit") -> nn.Module:
    """Return a trained classifier in eval mode."""
    model = BUILDERS[kind]()
    model.load_state_dict(load_file(weights_path(kind)))
    return model.requires_grad_(False).eval()
