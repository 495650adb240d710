# SPDX-License-Identifier: Apache-2.0
"""Vision and text together: an image tower, a text tower, and how they meet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from qgraph.testing.case import Case, Inputs, Recipe

WIDTH = 8


class _TwoTower(nn.Module):
    def __init__(self, recipe: TwoTower) -> None:
        super().__init__()
        self.recipe = recipe
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.words = nn.Embedding(recipe.vocabulary, WIDTH)
        self.text = nn.TransformerEncoderLayer(
            WIDTH, 2, 2 * WIDTH, batch_first=True, activation="gelu", norm_first=True
        )
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.gain, self.shift = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        t = self.text(self.words(tokens))
        match self.recipe.fusion:
            case "similarity":
                a, b = F.normalize(x, dim=-1), F.normalize(t.mean(1, keepdim=True), dim=-1)
                return (a @ b.transpose(-1, -2)).squeeze(-1)
            case "attention":
                logits = self.query(x) @ self.key(t).transpose(-1, -2) / WIDTH**0.5
                x = x + logits.softmax(-1) @ self.value(t)
            case _:
                pooled = t[:, :1]
                x = x * (1 + self.gain(pooled)) + self.shift(pooled)
        mask: Tensor = self.head(F.gelu(x)).squeeze(-1)
        return mask


@dataclass(frozen=True)
class TwoTower(Recipe):
    """Referring segmentation in small; inputs [B, 3, 16, 16] and token ids [B, 5].

    Attributes:
        fusion: "similarity" (as CLIP), "attention" (words inside the image tower) or
            "modulation" (as FiLM).
        vocabulary: number of words.
    """

    fusion: str = "attention"
    vocabulary: int = 11

    def build(self) -> nn.Module:  # noqa: D102
        return _TwoTower(self)

    def inputs(self, batch: int) -> Inputs:  # noqa: D102
        return torch.randn(batch, 3, 16, 16), torch.randint(self.vocabulary, (batch, 5))


def two_towers() -> st.SearchStrategy[Case]:
    """Cases with an image and a text tower."""
    recipes = st.builds(
        TwoTower,
        fusion=st.sampled_from(["attention", "similarity", "modulation"]),
        vocabulary=st.integers(3, 20),
    )
    return st.builds(Case, recipe=recipes, seed=st.integers(0, 99))
