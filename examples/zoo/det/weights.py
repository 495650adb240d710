# SPDX-License-Identifier: Apache-2.0
"""Load the trained detectors."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from safetensors.torch import load_file

from examples.zoo.det.model import FCOS, Detector, RetinaNet

Kind = Literal["retinanet", "fcos"]
MODELS: dict[Kind, type[Detector]] = {"retinanet": RetinaNet, "fcos": FCOS}
WEIGHTS = Path(__file__).parent / "weights"


def load_model(kind: Kind = "retinanet", weights: Path | None = None) -> Detector:
    """Return a trained detector in eval mode."""
    model = MODELS[kind]()
    model.load_state_dict(load_file(weights or WEIGHTS / f"{kind}.safetensors"))
    return model.requires_grad_(False).eval()
