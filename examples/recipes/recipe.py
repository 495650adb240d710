# SPDX-License-Identifier: Apache-2.0
"""What a recipe is: how to make the model small, how to load it, what it eats, which pipeline."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import qgraph

Batch = Any
RECIPES = (
    "bert", "clipseg", "detr", "sam", "segformer", "swin", "yolos", "timm_vit",
    "torchvision_resnet",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How to quantize one kind of model.

    Attributes:
        tiny: the model with a small configuration and random weights.
        load: the model with weights from a folder (or a name that is cached locally).
        batch: inputs for a model, from (model, number of samples, seed).
        pipeline: the one that suits it.
        ignore: what stays in float, and the comment in the recipe says why.
        options: others of `qgraph.compile`.
    """

    tiny: Callable[[], nn.Module]
    load: Callable[[str], nn.Module]
    batch: Callable[[nn.Module, int, int], Batch]
    pipeline: str
    ignore: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()


def named(name: str) -> Recipe:
    """The recipe of that name; ImportError if the package of its models is missing."""
    found: Recipe = importlib.import_module(f"examples.recipes.{name}").RECIPE
    return found


def quantize(
    recipe: Recipe, model: nn.Module, batches: Iterable[Batch] | None = None, **options: Any
) -> qgraph.QuantizedModel:
    """Compile as the recipe says; random inputs stand in where no batches are given."""
    data = [recipe.batch(model, 2, seed) for seed in range(2)] if batches is None else batches
    given = {"pipeline": recipe.pipeline, "ignore": recipe.ignore, **dict(recipe.options)}
    return qgraph.compile(model, data, **(given | options))


def pixels(count: int, side: int, seed: int) -> torch.Tensor:
    """Images [count, 3, side, side]; put preprocessed images of your own here."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def words(count: int, length: int, vocabulary: int, seed: int) -> torch.Tensor:
    """Token ids [count, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary - 2, (count, length), generator=generator)
