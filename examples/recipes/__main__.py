# SPDX-License-Identifier: Apache-2.0
"""Run one recipe: ``python -m examples.recipes NAME [--weights PATH] [--html FILE]``."""

from __future__ import annotations

import argparse

import torch

from examples.recipes.recipe import RECIPES, named, quantize


def main() -> None:
    """Quantize, print the summary, and say whether the backends agree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--weights", help="a folder or a name that is cached; default: random")
    parser.add_argument("--pipeline", help="another one than the recipe's")
    parser.add_argument("--html", help="write the report here")
    given = parser.parse_args()
    recipe = named(given.name)
    torch.manual_seed(0)
    model = (recipe.tiny() if given.weights is None else recipe.load(given.weights)).eval()
    options = {} if given.pipeline is None else {"pipeline": given.pipeline}
    quantized = quantize(recipe, model, **options)
    print(quantized.report.summary())
    parity = quantized.verify()
    print(f"integer against reference: {parity.mismatches} of {parity.codes} codes differ")
    if given.html:
        quantized.report.to_html(given.html)


if __name__ == "__main__":
    main()
