# SPDX-License-Identifier: Apache-2.0
"""Blocks of convolutional networks as people write them: [B, 8, H, W] to the same shape."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 8


def unit(inside: int, outside: int, kernel: int = 3, *, groups: int = 1) -> nn.Sequential:
    """Convolution, norm, activation."""
    conv = nn.Conv2d(inside, outside, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outside), nn.ReLU())


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.mid = unit(WIDTH, 4, 1), unit(4, 4)
        self.up, self.norm = nn.Conv2d(4, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.up(self.mid(self.down(x)))))


class PreActivated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.relu(self.norm(x)))


class InvertedResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depth = nn.Conv2d(WIDTH, 16, 1), nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.project = nn.Conv2d(16, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(F.relu6(self.depth(F.relu6(self.expand(x)))))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = unit(WIDTH, WIDTH)
        self.less, self.more = nn.Conv2d(WIDTH, 2, 1), nn.Conv2d(2, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        gate = F.hardsigmoid(self.more(F.relu(self.less(F.adaptive_avg_pool2d(y, 1)))))
        return y * gate


class ChannelThenSpatial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.place = nn.Linear(WIDTH, WIDTH), nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3)))
        x = x * pooled.sigmoid()[:, :, None, None]
        seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * self.place(seen).sigmoid()


class ConvNextBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depth = nn.Conv2d(WIDTH, WIDTH, 5, padding=2, groups=WIDTH)
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, 8)
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


class Ghost(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.primary, self.cheap = unit(WIDTH, 4, 1), unit(4, 4, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary(x)
        return torch.cat([y, self.cheap(y)], 1)


class Shuffled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(unit(4, 4, 1), unit(4, 4, groups=4))

    def forward(self, x: Tensor) -> Tensor:
        kept, used = x.chunk(2, 1)
        y = torch.cat([kept, self.branch(used)], 1)
        return y.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = unit(WIDTH, 4), unit(12, 4)
        self.transition = nn.Conv2d(16, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.first(x)], 1)
        return self.transition(torch.cat([x, self.second(x)], 1))


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.three, self.five = unit(WIDTH, 2, 1), unit(WIDTH, 2), unit(WIDTH, 2, 5)
        self.pooled = unit(WIDTH, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pooled(F.max_pool2d(x, 3, 1, 1))
        return torch.cat([self.one(x), self.three(x), self.five(x), pooled], 1)


class PooledPyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.less, self.more = unit(WIDTH, 4, 1), nn.Conv2d(16, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels = [self.less(x)]
        for _ in range(3):
            levels.append(F.max_pool2d(levels[-1], 3, 1, 1))
        return F.silu(self.more(torch.cat(levels, 1)))


class CrossStage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = unit(WIDTH, 4, 1), unit(WIDTH, 4, 1)
        self.deep, self.out = unit(4, 4), unit(8, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        right = self.right(x)
        return self.out(torch.cat([right + self.deep(right), self.left(x)], 1))


class ParallelBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.three, self.one = (nn.Conv2d(WIDTH, WIDTH, k, padding=k // 2) for k in (3, 1))
        self.norms = nn.ModuleList(nn.BatchNorm2d(WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.norms
        return F.relu(first(self.three(x)) + second(self.one(x)) + third(x))


class GroupNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, groups=2), nn.GroupNorm(2, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.conv(x)))


class InstanceNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, padding_mode="reflect")
        self.norm = nn.InstanceNorm2d(WIDTH, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.leaky_relu(self.norm(self.conv(x)), 0.2)


class Asymmetric(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Conv2d(WIDTH, WIDTH, (1, 3), padding=(0, 1))
        self.column = nn.Conv2d(WIDTH, WIDTH, (3, 1), padding=(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(self.column(self.row(x)))


class SubPixel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.less, self.more = nn.Conv2d(WIDTH, 2, 1), nn.Conv2d(8, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.more(F.pixel_unshuffle(self.less(x), 2).repeat_interleave(2, -1)
                         .repeat_interleave(2, -2))  # fmt: skip


class DownAndUp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = unit(WIDTH, WIDTH), nn.ConvTranspose2d(WIDTH, WIDTH, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.up(self.conv(F.avg_pool2d(x, 2)))


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.PReLU(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(F.pad(x, (1, 1, 1, 1))[:, :, 1:-1, 1:-1]))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, 2 * WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.conv(x), 1) + x.clamp(-1.0, 1.0)


class NonLocal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(WIDTH, 4, 1) for _ in range(3))
        self.out = nn.Conv2d(4, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        theta, phi, g = (f(x).flatten(2) for f in (self.theta, self.phi, self.g))
        weights = (theta.transpose(1, 2) @ phi).softmax(-1)
        return x + self.out((g @ weights.transpose(1, 2)).unflatten(2, x.shape[-2:]))


class WeightShared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.mish(self.conv(x)))


class Rescaled(nn.Module):
    """By a factor that is not the ratio of the sizes, and back by size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.interpolate(x, scale_factor=1.3, mode="bilinear")
        y = self.conv(F.relu(y))
        return x + F.interpolate(y, size=x.shape[2:], mode="nearest")


IMAGE_BLOCKS: dict[str, Callable[[], nn.Module]] = {
    cls.__name__: cls
    for cls in (
        Bottleneck, PreActivated, InvertedResidual, SqueezeExcite, ChannelThenSpatial,
        ConvNextBlock, Ghost, Shuffled, Dense, Inception, PooledPyramid, CrossStage,
        ParallelBranches, GroupNormed, InstanceNormed, Asymmetric, SubPixel, DownAndUp, Learned,
        Gated, NonLocal, WeightShared, Rescaled,
    )
}  # fmt: skip
