# SPDX-License-Identifier: Apache-2.0
"""Models that people have, each with the pipeline, the inputs and the options that suit it.

python -m examples.recipes segformer                       # small, random weights
python -m examples.recipes segformer --weights PATH        # weights that you have
"""

from examples.recipes.recipe import RECIPES, Recipe, quantize

__all__ = ["RECIPES", "Recipe", "quantize"]
