# SPDX-License-Identifier: Apache-2.0
"""Networks around one attention, in all the ways people write attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from qgraph.errors import unknown_name
from qgraph.testing.attention_kinds import DIM, ILLEGAL, LEGAL
from qgraph.testing.case import Case, Inputs, Recipe

KINDS: dict[str, Callable[[], nn.Module]] = {
    **LEGAL, **{name: build for name, (build, _) in ILLEGAL.items()},
}  # fmt: skip


class _Transformer(nn.Module):
    """Norm, attention, shortcut, norm, MLP, shortcut."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attention = attention
        self.up, self.down = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        attended = self.attention(self.first(x), y)
        x = x + attended[:, : x.shape[1]] if attended.ndim == 3 else x
        result: Tensor = x + self.down(F.gelu(self.up(self.second(x))))
        return result


@dataclass(frozen=True)
class AttentionNet(Recipe):
    """One attention, alone or in a transformer block; inputs [B, N, 8] and [B, N, 8].

    Attributes:
        kind: one of `KINDS`, such as "Fused", "RotaryHalf", "RelativePositions" or "Masked".
        block: whether norms, an MLP and shortcuts surround it.
        tokens: N.
    """

    kind: str = "Separate"
    block: bool = False
    tokens: int = 4

    def build(self) -> nn.Module:  # noqa: D102
        if self.kind not in KINDS:
            what = "kind of attention"
            raise unknown_name(what, self.kind, KINDS)
        attention = KINDS[self.kind]()
        return _Transformer(attention) if self.block else attention

    def inputs(self, batch: int) -> Inputs:  # noqa: D102
        return torch.randn(batch, self.tokens, DIM), torch.randn(batch, self.tokens, DIM)


SINGLE = sorted(set(KINDS) - {"Returned", "Convolved", "TwoWay"})


@st.composite
def attention_models(draw: st.DrawFn) -> Case:
    """Cases with attention; shrinks to separate projections outside a block."""
    block = draw(st.booleans())
    kinds = SINGLE if block else sorted(KINDS)
    kinds.sort(key=lambda name: name != "Separate")
    recipe = AttentionNet(draw(st.sampled_from(kinds)), block)
    return Case(recipe, draw(st.integers(0, 99)))
