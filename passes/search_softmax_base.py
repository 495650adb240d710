# SPDX-License-Identifier: Apache-2.0
"""Choose the format of attention probabilities by the error that the attention output sees."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.calibration import JointReservoir
from qgraph.context import Context
from qgraph.errors import unknown_name
from qgraph.formats import AffineEncoding, Encoding, IntGrid, LevelEncoding
from qgraph.formats.dual_region import dual_region
from qgraph.formats.levels import midpoints
from qgraph.formats.power_of_two import candidate_taus, power_of_two
from qgraph.graph.attention_sites import value_product
from qgraph.graph.edges import Edge
from qgraph.graph.ops import OpKind, kind
from qgraph.graph.plan import Site
from qgraph.graph.requests import Request
from qgraph.graph.row_labels import concrete
from qgraph.pipeline import Fact, Pass, Promise

CELLS = 1 << 22  # elements of values that the sample of one site may hold, and of a chunk
COARSE, REACH = 4, 6  # steps per octave of the first round; octaves below the largest value
FINE = 16
FAMILIES = ("uniform", "power_of_two", "dual_region")


@dataclass(frozen=True, slots=True)
class Choice:
    """A candidate and its error on the sampled rows."""

    error: float
    family: str
    encoding: Encoding
    detail: str


@dataclass(frozen=True, slots=True)
class _Sample:
    """Rows of A [n, S], their V [n, S, D], and the largest probability known."""

    rows: Tensor
    values: Tensor
    peak: float


@dataclass(frozen=True)
class SearchSoftmaxBase(Pass):
    """Search base, scale and kind of format for each attention's probabilities.

    The objective is the squared error of A V over sampled rows of A with their V, taken from the
    one sweep (PTQ4SAM's adaptive granularity, arXiv 2405.03144, section 3.3, on a fixed grid of
    scales: the error is not unimodal in the scale). Power-of-two bases, a uniform format and a
    dual-region one compete; the smallest error wins, a tie goes to the first in `formats`.

    Attributes:
        formats: families that may win, of ``"uniform"``, ``"power_of_two"``, ``"dual_region"``.
        min_gain_db: another format must beat the uniform one by so much.
        attention_rows: sampled rows per site.
    """

    name: ClassVar[str] = "search-softmax-base"
    promise: ClassVar[Promise] = Promise.IDENTICAL
    requires: ClassVar[frozenset[str]] = frozenset({Fact.PLANNED, Fact.STATISTICS})

    formats: tuple[str, ...] = FAMILIES
    min_gain_db: float = 0.0
    attention_rows: int = 128

    def __post_init__(self) -> None:
        for each in self.formats:
            if each not in FAMILIES:
                what = "format family"
                raise unknown_name(what, each, FAMILIES)

    def statistics(self, module: GraphModule, context: Context) -> Iterable[Request]:  # noqa: D102
        for _, site in attention_products(module, context):
            request = joint_request(site, self.attention_rows)
            if isinstance(request, Request):
                yield request
                yield Request(site.value, "Range")

    def run(self, module: GraphModule, context: Context) -> bool:  # noqa: D102
        for softmax, site in attention_products(module, context):
            if site.encoding is not None:
                context.record(self.name, softmax, "kept", f"{site.decided_by} has decided")
                continue
            request = joint_request(site, self.attention_rows)
            if not isinstance(request, Request):
                context.record(self.name, softmax, "refused", request)
                continue
            key = (site.value, *request.partners)
            rows, values = context.statistics[key].get(JointReservoir).sampled()
            self._decide(context, softmax, site, rows, values)
        return False

    def _decide(
        self, context: Context, softmax: Node, site: Site, rows: Tensor, values: Tensor
    ) -> None:
        if rows.numel() == 0 or float(rows.max()) <= 0.0:
            context.record(self.name, softmax, "refused", "no probabilities were sampled")
            return
        peak = max(context.statistics[site.value].range().bounds()[1], float(rows.max()))
        found = best_by_family(rows, values, site.bits, self.formats, peak=peak)
        uniform = found.get("uniform")
        best = min(found.values(), key=lambda each: each.error)
        gain = 0.0 if uniform is None else decibels(uniform.error, best.error)
        if uniform is not None and gain < max(self.min_gain_db, 1e-9):
            best, gain = uniform, 0.0
        numbers = {f"error_{family}": each.error for family, each in found.items()}
        reason = f"{best.detail}: smallest error of the attention output"
        if uniform is not None and best is not uniform:
            reason += f", {gain:.2f} dB below uniform"
        site.decide(best.encoding, self.name, reason)
        context.record(
            self.name, softmax, "applied" if best.family != "uniform" else "kept", reason,
            gain_db=gain, bits=float(site.bits), rows=float(rows.shape[0]), **numbers,
        )  # fmt: skip


def attention_products(module: GraphModule, context: Context) -> Iterator[tuple[Node, Site]]:
    """Planned probabilities: every softmax whose output is the left operand of a product."""
    for node in module.graph.nodes:
        if kind(node) is OpKind.SOFTMAX:
            product = value_product(node)
            site = None if product is None else context.plan.at(Edge(product, (0,)))
            if site is not None:
                yield node, site


def joint_request(site: Site, rows: int) -> Request | str:
    """Rows of A with their V, or why they cannot be sampled."""
    value, other = site.value, site.edge.consumer.args[1]
    if not isinstance(other, Node):
        return "the values are no tensor of the graph"
    first, second = value.meta["val"].shape, other.meta["val"].shape
    same = [str(a) == str(b) for a, b in zip(first[:-2], second[:-2], strict=False)]
    if len(first) != len(second) or len(first) < 3 or not all(same):
        return "probabilities and values do not share their leading dimensions"
    kept = max(8, min(rows, CELLS // max(1, concrete(second[-2]) * concrete(second[-1]))))
    options = (("leads", (len(first) - 1, len(first) - 2)), ("rows", kept))
    return Request(value, "JointReservoir", options, (other,))


def decibels(reference: float, error: float) -> float:
    """How far `error` lies below `reference`, in dB."""
    return 10.0 * math.log10(max(reference, 1e-300) / max(error, 1e-300))


def best_by_family(
    rows: Tensor, values: Tensor, bits: int, formats: tuple[str, ...] = FAMILIES, *,
    peak: float | None = None,
) -> dict[str, Choice]:  # fmt: skip
    """The best candidate of each family on rows A [n, S] with V [n, S, D].

    `peak` is the largest probability known (default: of the rows); grids of scales start there.
    """
    sample = _Sample(rows, values, float(rows.max()) if peak is None else peak)
    search = {"uniform": _uniform, "power_of_two": _powers, "dual_region": _regions}
    found = {family: search[family](sample, bits) for family in formats}
    return {family: choice for family, choice in found.items() if choice is not None}


def attention_errors(
    rows: Tensor, values: Tensor, scales: Tensor, levels: Tensor, thresholds: Tensor | None
) -> Tensor:
    """Sum of squared errors of A V, fp64 [K], for one table of levels at K scales.

    `thresholds` None: levels are all integers from 0 on, the affine rounding.
    """
    errors = []
    size = max(1, CELLS // max(1, rows.numel()))
    for part in scales.float().split(size):
        step = part.view(1, -1, 1)
        units = rows.unsqueeze(1) / step
        if thresholds is None:
            level = units.round_().clamp_(max=float(levels[-1]))
        else:
            level = levels.float()[torch.bucketize(units, thresholds)]
        moved = torch.bmm(level.mul_(step).sub_(rows.unsqueeze(1)), values)
        errors.append(moved.double().square().sum(dim=(0, 2)))
    return torch.cat(errors).cpu()


def _search(sample: _Sample, levels: Tensor, thresholds: Tensor | None) -> tuple[float, float]:
    """(smallest error, top): a log grid of the largest value's level, refined around the best."""
    peak, top_level = sample.peak, float(levels[-1])
    grid = torch.arange(-2, COARSE * REACH + 1, dtype=torch.float64) / COARSE
    best = (math.inf, peak)
    for turn in range(2):
        tops = peak * torch.exp2(-grid)
        errors = attention_errors(sample.rows, sample.values, tops / top_level, levels, thresholds)
        at = int(errors.argmin())
        best = min(best, (float(errors[at]), float(tops[at])))
        if turn == 0:
            near = torch.arange(1 - FINE // COARSE, FINE // COARSE, dtype=torch.float64)
            grid = grid[at] + near / FINE
    return best


def _uniform(sample: _Sample, bits: int) -> Choice:
    grid = IntGrid(bits, signed=False)
    levels = torch.arange(grid.qmax + 1, device=sample.rows.device)
    error, top = _search(sample, levels, None)
    scale = torch.tensor(top / grid.qmax, dtype=torch.float32)
    zero = torch.zeros((), dtype=torch.int32)
    encoding = AffineEncoding(scale=scale, zero_point=zero, qmin=grid.qmin, qmax=grid.qmax)
    return Choice(error, "uniform", encoding, f"uniform up to {top:.3g}")


def _powers(sample: _Sample, bits: int) -> Choice | None:
    found = []
    for tau in candidate_taus(bits):
        encoding = power_of_two(bits, tau, 1.0).to(sample.rows.device)
        error, top = _search(sample, encoding.levels, encoding.thresholds)
        found.append((error, tau, top))
    if not found:
        return None
    error, tau, top = min(found)
    chosen = power_of_two(bits, tau, top)
    return Choice(error, "power_of_two", chosen, f"base 2^(-1/{tau}) from {top:.3g} down")


def _regions(sample: _Sample, bits: int) -> Choice:
    found = []
    for shift in range(1, bits):
        levels = dual_region(bits, shift).levels.to(sample.rows.device)
        error, top = _search(sample, levels, midpoints(levels))
        found.append((error, shift, top))
    error, shift, top = min(found)
    chosen: LevelEncoding = dual_region(bits, shift, high=top)
    return Choice(error, "dual_region", chosen, f"regions 2^{shift} apart up to {top:.3g}")
