# SPDX-License-Identifier: Apache-2.0
"""Errors that quantized operands cause at a product's output, on sampled rows.

A row is one output position: a patch of a convolution's input, a token of a linear's. Rows are
drawn half uniformly and half in proportion to their weight, and each error is divided by its row's
probability: an unbiased estimate that does not miss targets of nine pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from qgraph.calibration.affine import affine_parameters
from qgraph.formats import AffineEncoding, IntGrid
from qgraph.graph.ops import argument, aten, product

FRACTIONS = (1.0, 0.85, 0.7, 0.55, 0.42, 0.32, 0.24)
MAX_ROWS = 1 << 24  # what torch.multinomial takes


@dataclass(frozen=True, slots=True)
class Rows:
    """Sampled rows of a product whose weight is constant.

    Attributes:
        data: [n, G, K], G groups.
        weight: [G, O / G, K].
        importance: [n, O], weights of squared errors.
    """

    data: Tensor
    weight: Tensor
    importance: Tensor

    def output(self, data: Tensor, weight: Tensor) -> Tensor:
        """[n, O]."""
        if weight.shape[0] == 1:
            return data[:, 0] @ weight[0].T
        return torch.einsum("ngk,gok->ngo", data, weight).flatten(1)

    def weight_errors(self, candidates: Iterable[Tensor]) -> Tensor:
        """fp64 [candidates]: weighted squared error of each quantized weight [G, O / G, K]."""
        return torch.stack([self._energy(self.data, w - self.weight) for w in candidates])

    def data_errors(self, candidates: Iterable[AffineEncoding]) -> Tensor:
        """fp64 [candidates]: weighted squared error of each encoding of the data."""
        errors = torch.stack([fake(e, self.data).sub_(self.data) for e in candidates])
        # One product for all: a weight is larger than its rows, and is read once.
        outputs = self.output(errors.flatten(0, 1), self.weight).unflatten(0, (len(errors), -1))
        found: Tensor = (outputs.square_() * self.importance).sum((1, 2), dtype=torch.float64)
        return found

    def _energy(self, data: Tensor, weight: Tensor) -> Tensor:
        error = self.output(data, weight)
        return (error.square_() * self.importance).sum(dtype=torch.float64)


def fake(encoding: AffineEncoding, x: Tensor) -> Tensor:
    """``decode(encode(x))`` per tensor, without a detour over integers."""
    scale, zero = encoding.scale, float(encoding.zero_point)
    codes = torch.round(x / scale).clamp_(encoding.qmin - zero, encoding.qmax - zero)
    return codes.mul_(scale)


def data_candidates(
    low: float, high: float, widths: Iterable[int], fractions: Iterable[float] = FRACTIONS
) -> list[AffineEncoding]:
    """Unsigned encodings per tensor: every width by every fraction of the range."""
    return [data_encoding(low, high, bits, f) for bits in widths for f in fractions]


def data_encoding(low: float, high: float, bits: int, fraction: float) -> AffineEncoding:
    """The encoding of one width that covers a fraction of the range."""
    grid = IntGrid(bits, signed=False)
    scale, zero = affine_parameters(
        low * fraction, high * fraction, grid.qmin, grid.qmax, symmetric=False
    )
    return AffineEncoding(scale=scale, zero_point=zero, qmin=grid.qmin, qmax=grid.qmax)


def grouped(weight: Tensor, groups: int) -> Tensor:
    """[G, O / G, K] of a weight [O, ...]."""
    flat = weight.flatten(1)
    return flat.reshape(groups, flat.shape[0] // groups, flat.shape[1])


def has_rows(node: Node) -> bool:
    """Whether rows of this product can be sampled: linears and 2-D convolutions."""
    return node.target in {aten.linear.default, aten.conv2d.default}


def sample_rows(
    node: Node, data: Tensor, weight: Tensor, gradient: Tensor, *, count: int, seed: int
) -> Rows:
    """Draw `count` rows of a linear or 2-D convolution.

    Args:
        node: the product.
        data, weight: its operands.
        gradient: shape of its output; an error counts with the square of this.
        count: rows, drawn with replacement.
        seed: of the draw.
    """
    is_conv = node.target is aten.conv2d.default
    squares = gradient.movedim(1, -1) if is_conv else gradient
    squares = squares.reshape(-1, squares.shape[-1]).square()
    chosen, probability = _draw(squares.sum(1), count, seed)
    importance = squares[chosen] / (count * probability[:, None])
    groups = int(argument(node, 6)) if is_conv else 1  # type: ignore[call-overload]
    rows = _patches(node, data, weight, chosen) if is_conv else data.reshape(-1, data.shape[-1])
    rows = rows if is_conv else rows[chosen]
    return Rows(rows.reshape(len(chosen), groups, -1), grouped(weight, groups), importance)


def _draw(energy: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices [n] and their probabilities [n]."""
    generator = torch.Generator(energy.device).manual_seed(seed)
    total = energy.sum()
    uniform = torch.full_like(energy, 1.0 / energy.numel())
    mixed = 0.5 * uniform + 0.5 * energy / total if float(total) > 0 else uniform
    if energy.numel() > MAX_ROWS:
        part = torch.randint(energy.numel(), (MAX_ROWS,), generator=generator)
        inner = mixed[part] / mixed[part].sum()
        chosen = part[torch.multinomial(inner, count, replacement=True, generator=generator)]
    else:
        chosen = torch.multinomial(mixed, count, replacement=True, generator=generator)
    return chosen, mixed[chosen]


def _pair(value: Any) -> tuple[int, int]:
    items = [value] if isinstance(value, int) else list(value)
    return int(items[0]), int(items[-1])


def _patches(node: Node, data: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    """[n, C, kh, kw] of a 2-D convolution's input."""
    stride, dilation = _pair(argument(node, 3)), _pair(argument(node, 5))
    rows, columns = _pair(argument(node, 4))
    x = F.pad(data, (columns, columns, rows, rows))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[-2:], strict=True)]
    windows = x.unfold(2, reach[0], stride[0]).unfold(3, reach[1], stride[1])
    windows = windows[..., :: dilation[0], :: dilation[1]]
    height, width = windows.shape[2], windows.shape[3]
    image, place = chosen // (height * width), chosen % (height * width)
    return windows[image, :, place // width, place % width]


@dataclass(frozen=True, slots=True)
class Whole:
    """One sample of any product: the fallback where rows cannot be drawn.

    Attributes:
        call: (data, weight) -> output.
        data, weight: operands cut to one sample where they have a batch.
        importance: shape of the output.
    """

    call: Callable[[Tensor, Tensor], Tensor]
    data: Tensor
    weight: Tensor
    importance: Tensor

    def errors(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """fp64 [pairs]: weighted squared error of each pair of quantized operands."""
        exact = self.call(self.data, self.weight)
        found = [
            ((self.call(a, b) - exact).square_() * self.importance).sum(dtype=torch.float64)
            for a, b in pairs
        ]
        return torch.stack(found)


def whole_sample(
    node: Node, data: Tensor, weight: Tensor, gradient: Tensor, *, seed: int, is_constant: bool
) -> Whole:
    """One randomly drawn sample of a batch, its error scaled up to the batch."""
    what = product(node)
    assert what is not None
    size = data.shape[0]
    at = int(torch.randint(size, (), generator=torch.Generator().manual_seed(seed)))
    rest = [a for i, a in enumerate(node.args) if i not in {what.data, what.weight, what.bias}]

    def call(a: Tensor, b: Tensor) -> Tensor:
        tail = ([None] if what.bias is not None else []) + rest
        operands = (a, b) if what.data < what.weight else (b, a)
        result: Tensor = node.target(*operands, *tail, **node.kwargs)  # type: ignore[operator]
        return result

    cut = slice(at, at + 1)
    other = weight if is_constant or weight.shape[0] != size else weight[cut]
    return Whole(call, data[cut], other, gradient[cut].square() * size)
