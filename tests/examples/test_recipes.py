# SPDX-License-Identifier: Apache-2.0
"""Recipes run with small random weights: they trace, keep the outputs, and the backends agree."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from examples.recipes.recipe import RECIPES, named, quantize
from qgraph.report import sqnr

PACKAGES = {"torchvision_resnet": "torchvision", "timm_vit": "timm"}
FAST = {"bert"}  # the others take more than five seconds


def marked(name):
    package = PACKAGES.get(name, "transformers")
    missing = importlib.util.find_spec(package) is None
    marks = [pytest.mark.skipif(missing, reason=f"needs {package}")]
    return pytest.param(name, marks=marks if name in FAST else [*marks, pytest.mark.slow])


@pytest.mark.parametrize("name", [marked(name) for name in RECIPES])
@pytest.mark.filterwarnings("default")
def test_a_recipe_quantizes_its_model(name):
    recipe = named(name)
    torch.manual_seed(0)
    model = recipe.tiny().eval()
    batch = recipe.batch(model, 2, 7)
    with torch.no_grad():
        wanted = model(batch) if isinstance(batch, Tensor) else model(**batch)
    quantized = quantize(recipe, model)
    got = quantized(batch) if isinstance(batch, Tensor) else quantized(**batch)
    assert type(got) is type(wanted) or isinstance(wanted, dict)
    pairs = zip(tree_leaves(dict(wanted) if isinstance(wanted, dict) else wanted),
                tree_leaves(dict(got) if isinstance(got, dict) else got), strict=True)  # fmt: skip
    quality = [sqnr(a, b) for a, b in pairs if isinstance(a, Tensor) and a.is_floating_point()]
    assert min(quality) > 10
    assert quantized.verify().mismatches == 0
