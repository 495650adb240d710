# SPDX-License-Identifier: Apache-2.0
"""Stacks of named blocks in any order: images, then tokens, then a head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from qgraph.errors import unknown_name
from qgraph.testing.case import Case, Inputs, Recipe
from qgraph.testing.image_blocks import IMAGE_BLOCKS, WIDTH
from qgraph.testing.token_blocks import SIDE, TOKEN_BLOCKS


class _Stack(nn.Module):
    def __init__(self, recipe: Stack) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.image = nn.Sequential(*(IMAGE_BLOCKS[name]() for name in recipe.image))
        self.token = nn.Sequential(*(TOKEN_BLOCKS[name]() for name in recipe.token))
        self.patches = nn.Conv2d(WIDTH, WIDTH, 2, 2)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(self.image(self.stem(x)))
        x = self.token(x.flatten(2).transpose(1, 2))
        scores: Tensor = self.head(x.mean(1))
        return scores


@dataclass(frozen=True)
class Stack(Recipe):
    """A stem, image blocks, patches, token blocks, a head; input [B, 3, 8, 8], output [B, 3].

    Attributes:
        image: names of `IMAGE_BLOCKS`, such as "InvertedResidual" or "Dense".
        token: names of `TOKEN_BLOCKS`, such as "Mixer" or "Windows".
    """

    image: tuple[str, ...] = ()
    token: tuple[str, ...] = ()

    def build(self) -> nn.Module:  # noqa: D102
        for names, known in ((self.image, IMAGE_BLOCKS), (self.token, TOKEN_BLOCKS)):
            for name in names:
                if name not in known:
                    what = "block"
                    raise unknown_name(what, name, known)
        return _Stack(self)

    def inputs(self, batch: int) -> Inputs:  # noqa: D102
        return (torch.randn(batch, 3, 2 * SIDE, 2 * SIDE),)


def stacks(max_blocks: int = 2) -> st.SearchStrategy[Case]:
    """Cases with stacks of up to that many blocks of each kind."""

    def some(known: dict[str, object]) -> st.SearchStrategy[tuple[str, ...]]:
        return st.lists(st.sampled_from(sorted(known)), max_size=max_blocks).map(tuple)

    recipes = st.builds(Stack, image=some({**IMAGE_BLOCKS}), token=some({**TOKEN_BLOCKS}))
    return st.builds(Case, recipe=recipes, seed=st.integers(0, 99))
