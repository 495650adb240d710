# SPDX-License-Identifier: Apache-2.0
"""Attention in all the ways people write it, tiny: 25 with keys whose signs may change, 6 without.

All take (x [B, N, 8], y [B, M, 8]) and have 2 heads of 4 channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM, HEADS, HEAD = 8, 2, 4
SIDE = 2  # windows of SIDE * SIDE tokens, for relative positions


def split(x: Tensor, heads: int = HEADS) -> Tensor:
    """[B, N, H*D] -> [B, H, N, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, H*D]."""
    return x.transpose(1, 2).flatten(2)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def angles(length: int, size: int) -> Tensor:
    return torch.arange(length)[:, None] * (1.0 + torch.arange(size))[None]


class Separate(nn.Module):
    """Separate projections; subclasses bend one thing."""

    heads_of_key: ClassVar[int] = HEADS

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        own = self.heads_of_key * HEAD
        self.q = nn.Linear(DIM, DIM, bias=bias)
        self.k = nn.Linear(DIM, own, bias=bias)
        self.v = nn.Linear(DIM, own, bias=bias)
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k = self.queries(self.q(x)), self.keys(self.k(y))
        v = self.repeat(split(self.v(y), self.heads_of_key))
        logits = self.logits(q, k)
        return self.out(join(logits.softmax(-1) @ v))

    def queries(self, q: Tensor) -> Tensor:
        return self.turn(split(q))

    def keys(self, k: Tensor) -> Tensor:
        return self.repeat(self.turn(split(k, self.heads_of_key)))

    def turn(self, x: Tensor) -> Tensor:
        return x

    def repeat(self, x: Tensor) -> Tensor:
        return x

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-2, -1) / HEAD**0.5


class NoBias(Separate):
    def __init__(self) -> None:
        super().__init__(bias=False)


class ScaledKeys(Separate):
    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ (k * HEAD**-0.5).transpose(-2, -1)


class Masked(Separate):
    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        seen = torch.ones(q.shape[-2], k.shape[-2]).tril().bool()
        return super().logits(q, k).masked_fill(~seen, float("-inf"))


class SoftCapped(Separate):
    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        return 2.0 * torch.tanh(super().logits(q, k) / 2.0)


class Temperature(Separate):
    def __init__(self) -> None:
        super().__init__()
        self.heat = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        return super().logits(q, k) * self.heat


class Interleaved(Separate):
    """Rows of heads alternate."""

    def turn(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2).unflatten(-1, (HEAD, HEADS)).permute(0, 3, 1, 2)


class FusedHeads(nn.Module):
    """One linear whose rows are ordered head, (q, k, v), channel."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = self.qkv(x + y[:, : x.shape[1]]).unflatten(-1, (HEADS, 3, HEAD)).unbind(-2)
        q, k, v = (item.transpose(1, 2) for item in (q, k, v))
        return self.out(join((q * 0.5 @ k.transpose(-2, -1)).softmax(-1) @ v))


class Fused(FusedHeads):
    """As in ViT: q, k, v, then heads; opened from scaled_dot_product_attention."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (split(item) for item in self.qkv(x + y[:, : x.shape[1]]).chunk(3, -1))
        return self.out(join(F.scaled_dot_product_attention(q, k, v)))


class RelativePositions(FusedHeads):
    """Decomposed relative positions on windows of SIDE x SIDE tokens, as in SAM's encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.tall = nn.Parameter(torch.randn(SIDE, SIDE, HEAD))
        self.wide = nn.Parameter(torch.randn(SIDE, SIDE, HEAD))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x[:, : SIDE * SIDE] + y[:, : SIDE * SIDE]
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD)).permute(2, 0, 3, 1, 4).unbind(0)
        grid = q.unflatten(2, (SIDE, SIDE))
        down = torch.einsum("bhyxc,ykc->bhyxk", grid, self.tall)
        across = torch.einsum("bhyxc,xkc->bhyxk", grid, self.wide)
        bias = (down[..., :, None] + across[..., None, :]).flatten(4).flatten(2, 3)
        return self.out(join((q * 0.5 @ k.transpose(-2, -1) + bias).softmax(-1) @ v))


class Packed(nn.Module):
    """nn.MultiheadAttention on two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.attention(x, y, y, need_weights=False)[0]
        return result


class PackedSelf(Packed):
    """nn.MultiheadAttention on one input, weights returned: heads merge into the batch."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = x + y[:, : x.shape[1]]
        result: Tensor = self.attention(z, z, z)[0]
        return result


class Grouped(Separate):
    """One key head for all query heads, repeated."""

    heads_of_key = 1

    def repeat(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(HEADS, dim=1)


class GroupedSdpa(Separate):
    """Grouped heads inside scaled_dot_product_attention."""

    heads_of_key = 1

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = split(self.q(x)), split(self.k(y), 1), split(self.v(y), 1)
        return self.out(join(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)))


class RotaryHalf(Separate):
    """Rotary positions, rotate-half style: channels (i, i + D/2) are pairs."""

    def turn(self, x: Tensor) -> Tensor:
        phase = angles(x.shape[-2], HEAD // 2).repeat(1, 2)
        return x * phase.cos() + rotate_half(x) * phase.sin()


class PartialRotary(Separate):
    """Rotary positions on the first half of each head."""

    def turn(self, x: Tensor) -> Tensor:
        turned, rest = x.chunk(2, dim=-1)
        phase = angles(x.shape[-2], HEAD // 4).repeat(1, 2)
        turned = turned * phase.cos() + rotate_half(turned) * phase.sin()
        return torch.cat([turned, rest], dim=-1)


class RotaryPairs(Separate):
    """Rotary positions on channels (2i, 2i + 1)."""

    def turn(self, x: Tensor) -> Tensor:
        phase = angles(x.shape[-2], HEAD // 2)
        even, odd = x.unflatten(-1, (HEAD // 2, 2)).unbind(-1)
        first = even * phase.cos() - odd * phase.sin()
        second = even * phase.sin() + odd * phase.cos()
        return torch.stack([first, second], dim=-1).flatten(-2)


class RmsNormed(Separate):
    """RMS norm on queries and keys, spelled out."""

    def turn(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class UnitNormed(Separate):
    """Cosine attention."""

    def turn(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


class Tied(Separate):
    """Queries and keys share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.k = self.q


class Twice(Separate):
    """The same attention runs twice."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(super().forward(x, y), y)


class TwoWay(nn.Module):
    """Tokens look at the image, then the image at the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.look, self.answer = Separate(), Separate()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        tokens = x + self.look(x, y)
        return self.answer(y, tokens)


class LowRank(Separate):
    """An adapter beside the key projection."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(DIM, 2, bias=False), nn.Linear(2, DIM, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        k = split(self.k(y) + self.up(self.down(y)))
        return self.out(join(self.logits(split(self.q(x)), k).softmax(-1) @ split(self.v(y))))


class KeysReadElsewhere(Separate):
    """Another linear reads the keys: its columns are rewritten along."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        k = self.k(y)
        context = self.logits(split(self.q(x)), split(k)).softmax(-1) @ split(self.v(y))
        return self.out(join(context)) + self.aside(k).mean(1, keepdim=True)


class Convolved(nn.Module):
    """Projections by 1x1 convolutions over a map."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(DIM, DIM, 1) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        image = (x + y[:, : x.shape[1]]).transpose(1, 2)[..., None]
        q, k, v = (
            f(image).flatten(2).unflatten(1, (HEADS, HEAD)) for f in (self.q, self.k, self.v)
        )
        return ((q.transpose(-2, -1) @ k).softmax(-1) @ v.transpose(-2, -1)).flatten(1)


class LayerNormed(Separate):
    """LayerNorm over each head of queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HEAD)

    def turn(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x)
        return normed


class Rectified(Separate):
    """A feature map that is not odd."""

    def turn(self, x: Tensor) -> Tensor:
        return F.relu(x) + 1.0


class Placed(Separate):
    """Positions are added to the keys after their projection."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(1, 1, 1, HEAD))

    def turn(self, x: Tensor) -> Tensor:
        return x + self.place


class Returned(Separate):
    """The keys are an output of the model."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x, y), self.k(y)


class NullKey(Separate):
    """A learned key that every query sees."""

    def __init__(self) -> None:
        super().__init__()
        self.none = nn.Parameter(torch.randn(1, HEADS, 1, HEAD))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        none = self.none.expand(y.shape[0], -1, -1, -1)
        k, v = (torch.cat([split(f(y)), none], dim=2) for f in (self.k, self.v))
        return self.out(join(self.logits(split(self.q(x)), k).softmax(-1) @ v))


class NoProjection(Separate):
    """Keys are the normalised input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        k = split(self.norm(y))
        return self.out(join(self.logits(split(self.q(x)), k).softmax(-1) @ split(self.v(y))))


LEGAL: dict[str, Callable[[], nn.Module]] = {
    cls.__name__: cls
    for cls in (
        Separate, NoBias, ScaledKeys, Masked, SoftCapped, Temperature, Interleaved, FusedHeads,
        Fused, RelativePositions, Packed, PackedSelf, Grouped, GroupedSdpa, RotaryHalf,
        PartialRotary, RotaryPairs, RmsNormed, UnitNormed, Tied, Twice, TwoWay, LowRank,
        KeysReadElsewhere, Convolved,
    )
}  # fmt: skip
ILLEGAL: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "LayerNormed": (LayerNormed, "LayerNorm"),
    "Rectified": (Rectified, "not odd"),
    "Placed": (Placed, "fixed sign"),
    "Returned": (Returned, "returned by the model"),
    "NullKey": (NullKey, "fixed sign"),
    "NoProjection": (NoProjection, "not made by a linear"),
}
