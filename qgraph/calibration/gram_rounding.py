# SPDX-License-Identifier: Apache-2.0
"""Rounding that makes up for its own errors: each column of a weight answers for those before it.

The squared error of a product's output is a quadratic form of the weight's error E, ``E H E^T``
with ``H = sum_n m_n x_n x_n^T``. With ``H = R D R^T``, R unit upper triangular, it is
``sum_j D_j |e_j + sum_{i<j} e_i R_ij|^2``: rounding column j of ``w_j + sum_{i<j} e_i R_ij`` takes
the best code there given all earlier ones. That equals GPTQ (arXiv 2210.17323), by the
factorisation of QuIP (arXiv 2307.13304); no inverse is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qgraph.errors import ConfigError
from qgraph.formats import AffineEncoding, Encoding
from qgraph.formats.affine import expand

BLOCK = 64  # columns whose feedback is summed one by one; earlier ones come in one product


class InputSums:
    """Weighted sums over rows of a product's input, in fp64.

    Attributes:
        square: [G, K, K], ``sum m x^ x^^T`` of the quantized network's inputs.
        drift: [G, K, K], ``sum m (x - x^) x^^T``, x being the float network's.
        beside: [G, O, K], ``sum m r x^^T``, r being what else the output should make up for.
        rows: how many rows were added.
    """

    def __init__(self, groups: int, outputs: int, length: int) -> None:
        self.square = torch.zeros(groups, length, length, dtype=torch.float64)
        self.drift = torch.zeros_like(self.square)
        self.beside = torch.zeros(groups, outputs, length, dtype=torch.float64)
        self.rows = 0

    def add(
        self, rough: Tensor, exact: Tensor, importance: Tensor | None = None,
        beside: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Add rows.

        Args:
            rough, exact: fp32 [G, N, K] of the quantized and the float network.
            importance: m, fp32 [N].
            beside: r, fp32 [G, N, O].
        """
        weighted = rough if importance is None else rough * importance[None, :, None]
        self.square += weighted.transpose(1, 2) @ rough
        if exact is not rough:
            self.drift += (exact - rough).transpose(1, 2) @ weighted
        if beside is not None:
            self.beside += beside.transpose(1, 2) @ weighted
        self.rows += rough.shape[1]

    def merge(self, other: InputSums) -> None:
        """Add the sums of another product with the same weight."""
        self.square += other.square
        self.drift += other.drift
        self.beside += other.beside
        self.rows += other.rows


@dataclass(frozen=True, slots=True)
class Compensated:
    """What rounding with feedback gave.

    Attributes:
        codes: int32, shape of the weight.
        target: fp32, shape of the weight: the float weight that serves the quantized inputs best.
        before, after: the quadratic form at round-to-nearest of the given weight and at `codes`,
            relative to the output's energy.
    """

    codes: Tensor
    target: Tensor
    before: float
    after: float


class Columns:
    """Quantizes one column at a time of a weight viewed as [G, O, K].

    Raises:
        ConfigError: a format whose parameters vary along the columns in another way than blocks
            of an affine format do.
    """

    def __init__(self, encoding: Encoding, shape: torch.Size, groups: int) -> None:
        self.encoding, self.shape = encoding, shape
        self.view = (groups, shape[0] // groups, shape[1:].numel())
        self.scale: Tensor | None = None
        if isinstance(encoding, AffineEncoding):
            parts = (encoding.scale, encoding.zero_point)
            scale, zero = (
                expand(p, encoding.axis, encoding.block, shape).expand(shape).reshape(self.view)
                for p in parts
            )
            self.scale, self.zero = scale.double(), zero.double()
        elif encoding.axis not in {None, 0}:
            msg = f"{encoding.describe()} along axis {encoding.axis}; allowed: 0 or none"
            raise ConfigError(msg)

    def nearest(self, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Codes and values (fp64 [G, O]) nearest to `values` in a column."""
        if self.scale is not None:
            assert isinstance(self.encoding, AffineEncoding)
            scale, zero = self.scale[..., column], self.zero[..., column]
            codes = (values / scale).round_().add_(zero)
            codes.clamp_(self.encoding.qmin, self.encoding.qmax)
            return codes, (codes - zero) * scale
        flat = values.reshape(-1, *([1] * (len(self.shape) - 1))).float()
        codes = self.encoding.encode(flat)
        return (
            codes.double().reshape(values.shape),
            self.encoding.decode(codes).double().reshape(values.shape),
        )


def factor(square: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """R (unit upper triangular) and the damped H = R D R^T, both fp64 [G, K, K].

    Damping, relative to the mean of the diagonal, is raised until the factorisation exists.
    """
    size = square.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)[:, None, None]
    eye = torch.eye(square.shape[-1], dtype=square.dtype)
    while True:
        damped = square + damping * size * eye
        lower, failed = torch.linalg.cholesky_ex(damped.flip(1, 2))
        if not bool(failed.any()) or damping > 1e3:
            break
        damping = max(10 * damping, 1e-8)
    upper = lower.flip(1, 2)
    return upper / upper.diagonal(dim1=1, dim2=2)[:, None, :], damped


def serving(weight: Tensor, gram: InputSums, damped: Tensor) -> Tensor:
    """The float weight [G, O, K] whose outputs on x^ come nearest to those of `weight` on x.

    ``W + (W sum (x - x^) x^^T + sum r x^^T) H^-1``: ridge regression towards W.
    """
    wanted = weight @ gram.drift + gram.beside
    if not bool(wanted.any()):
        return weight
    found: Tensor = torch.cholesky_solve(wanted.transpose(1, 2), torch.linalg.cholesky(damped))
    return weight + found.transpose(1, 2)


def _with_feedback(target: Tensor, feedback: Tensor, columns: Columns) -> tuple[Tensor, Tensor]:
    """Codes and values [G, O, K], column by column, in the order of the columns."""
    codes, made = torch.empty_like(target), torch.empty_like(target)
    error = torch.zeros_like(target)
    length = target.shape[-1]
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        carried = error[..., :start] @ feedback[:, :start, start:stop]
        for j in range(start, stop):
            inner = error[..., start:j] @ feedback[:, start:j, j : j + 1]
            wanted = target[..., j] + carried[..., j - start] + inner[..., 0]
            codes[..., j], made[..., j] = columns.nearest(wanted, j)
            error[..., j] = target[..., j] - made[..., j]
    return codes, made


def _descend(
    target: Tensor, codes: Tensor, made: Tensor, square: Tensor, columns: Columns
) -> tuple[Tensor, Tensor]:
    """One round of coordinate descent: each column's best codes given all others."""
    error = target - made
    slope = error @ square
    diagonal = square.diagonal(dim1=1, dim2=2)
    for j in range(target.shape[-1]):
        wanted = made[..., j] + slope[..., j] / diagonal[:, None, j].clamp_min(1e-30)
        code, value = columns.nearest(wanted, j)
        moved = made[..., j] - value
        if bool(moved.any()):
            slope += moved[..., None] * square[:, j : j + 1, :]
            codes[..., j], made[..., j] = code, value
    return codes, made


@torch.no_grad()
def round_compensated(
    weight: Tensor,
    encoding: Encoding,
    gram: InputSums,
    *,
    damping: float = 0.3,
    ridge: float = 1.0,
    rounds: int = 2,
) -> Compensated:
    """Round a weight so that the product's output on quantized inputs stays near the float one.

    Args:
        weight: [O, ...], columns in the order of the flattened rest; G groups along O.
        encoding: its format; scales stay.
        gram: sums over the product's inputs.
        damping: added to the diagonal of H, relative to its mean.
        rounds: of coordinate descent afterwards, each column given all others.
    """
    columns = Columns(encoding, weight.shape, gram.square.shape[0])
    dense = weight.detach().double().reshape(columns.view)
    feedback, damped = factor(gram.square, damping)
    target = serving(dense, gram, factor(gram.square, ridge)[1])
    nearest = encoding.encode(weight.detach().float())
    plain = encoding.decode(nearest).double().reshape(columns.view)
    codes, made = _with_feedback(target, feedback, columns)
    worse = _form(target - made, damped) > _form(target - plain, damped)
    codes = torch.where(worse[..., None], nearest.double().reshape(columns.view), codes)
    made = torch.where(worse[..., None], plain, made)
    for _ in range(rounds):
        codes, made = _descend(target, codes, made, damped, columns)
    energy = _form(dense, gram.square).sum().clamp_min(1e-30)
    return Compensated(
        codes.to(torch.int32).reshape(weight.shape), target.float().reshape(weight.shape),
        float(_form(target - plain, gram.square).sum() / energy),
        float(_form(target - made, gram.square).sum() / energy),
    )  # fmt: skip


def _form(error: Tensor, square: Tensor) -> Tensor:
    """``e H e^T`` for each row of errors: [G, O]."""
    return ((error @ square) * error).sum(-1)
