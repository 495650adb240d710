# SPDX-License-Identifier: Apache-2.0
"""Blocks of token networks as people write them: [B, 16, 8] to the same shape."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, TOKENS, SIDE = 8, 16, 4


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.across = nn.Sequential(nn.Linear(TOKENS, 8), nn.GELU(), nn.Linear(8, TOKENS))
        self.along = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.first(x).transpose(1, 2)).transpose(1, 2)
        return x + self.along(self.second(x))


class GatedMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 16, bias=False), nn.Linear(WIDTH, 16, bias=False)
        self.down = nn.Linear(16, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class RootMeanSquare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain, self.linear = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.linear(x * scale * self.gain)


class Pooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        image = self.norm(x).transpose(1, 2).unflatten(2, (SIDE, SIDE))
        mixed = F.avg_pool2d(image, 3, 1, 1, count_include_pad=False) - image
        return x + self.mlp(mixed.flatten(2).transpose(1, 2))


class Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        image = torch.roll(x.unflatten(1, (SIDE, SIDE)), (-1, -1), (1, 2))
        w = image.unflatten(2, (2, 2)).unflatten(1, (2, 2)).transpose(2, 3)
        w = w.flatten(3, 4).flatten(1, 2)
        q, k, v = self.qkv(w).chunk(3, -1)
        y = self.out((q @ k.transpose(-1, -2) * 0.35).softmax(-1) @ v)
        y = y.unflatten(1, (2, 2)).unflatten(3, (2, 2)).transpose(2, 3)
        back = y.flatten(3, 4).flatten(1, 2)
        return x + torch.roll(back, (1, 1), (1, 2)).flatten(1, 2)


class ClassToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.places = nn.Parameter(0.1 * torch.randn(1, TOKENS + 1, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        y = self.attention(x, x, x, need_weights=False)[0]
        return y[:, 1:] + y[:, :1]


class EncoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class DecoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(WIDTH, 2, 16, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.flip(1))


class LinearAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k = F.elu(self.q(x)) + 1, F.elu(self.k(x)) + 1
        summed = k.transpose(1, 2) @ self.v(x)
        return x + (q @ summed) / (q @ k.sum(1)[:, :, None] + 1e-3)


class Temporal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depth = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, groups=WIDTH)
        self.mix = nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depth(x.transpose(1, 2))[..., :TOKENS]  # causal
        return x + self.mix(F.silu(y)).transpose(1, 2)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        state, states = torch.zeros_like(x[:, 0]), []
        for step in x.unbind(1)[:3]:
            state = torch.tanh(self.inner(state) + self.outer(step))
            states.append(state)
        return x + torch.stack(states, 1).mean(1, keepdim=True)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.route = nn.Linear(WIDTH, 3)
        self.weight = nn.Parameter(0.3 * torch.randn(3, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        gates = self.route(x).softmax(-1)
        every = torch.einsum("bnc,ecd->bned", x, self.weight)
        return x + (every * gates[..., None]).sum(2)


class Merged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.less = nn.LayerNorm(4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        image = x.unflatten(1, (SIDE, SIDE))
        parts = [image[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return x + self.less(self.norm(torch.cat(parts, -1))).flatten(1, 2).repeat(1, 4, 1)


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) * self.right(x) - x * 0.5


class Masked(nn.Module):
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.v = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mask", torch.ones(TOKENS, TOKENS).tril().bool())

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).split(WIDTH, -1)
        logits = (q @ k.mT / 3).masked_fill(~self.mask, float("-inf"))
        return x + logits.softmax(-1) @ self.v(x)


class SpatialGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(WIDTH, 16), nn.LayerNorm(8)
        self.across, self.down = nn.Conv1d(TOKENS, TOKENS, 1), nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        kept, gate = F.gelu(self.up(x)).chunk(2, -1)
        return x + self.down(kept * self.across(self.norm(gate)))


TOKEN_BLOCKS: dict[str, Callable[[], nn.Module]] = {
    cls.__name__: cls
    for cls in (
        Mixer, GatedMlp, RootMeanSquare, Pooling, Windows, ClassToken, EncoderLayer, DecoderLayer,
        LinearAttention, Temporal, Recurrent, Experts, Merged, Bilinear, Masked, SpatialGate,
    )
}  # fmt: skip
