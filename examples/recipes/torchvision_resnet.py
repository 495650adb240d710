# SPDX-License-Identifier: Apache-2.0
"""ResNet-18 of torchvision, where that is installed."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models import resnet18

from examples.recipes.recipe import Recipe, pixels


def tiny() -> nn.Module:
    """Random weights, ten classes."""
    return resnet18(num_classes=10)  # type: ignore[no-any-return]


def load(path: str) -> nn.Module:
    """A state dict saved by torchvision."""
    model = resnet18()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model  # type: ignore[no-any-return]


def batch(model: nn.Module, count: int, seed: int) -> torch.Tensor:
    """Images; 224 pixels suit trained weights better."""
    del model
    return pixels(count, 64, seed)


RECIPE = Recipe(tiny, load, batch, "int8")
