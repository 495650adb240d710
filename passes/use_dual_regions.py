# SPDX-License-Identifier: Apache-2.0
"""Give softmax and GELU-like outputs a dual-region format where that measurably helps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.calibration import (
    Histogram,
    JointReservoir,
    Reservoir,
    affine_parameters,
    choose_range,
    choose_range_for_output,
)
from qgraph.calibration.clip_grid import CodeRange, search_clip
from qgraph.calibration.decibels import decibels
from qgraph.calibration.fused import FusedStatistics
from qgraph.calibration.histogram import Bins
from qgraph.calibration.output_ranges import sketch
from qgraph.calibration.ranges import expected_error
from qgraph.calibration.table_error import table_error
from qgraph.context import Context
from qgraph.formats import AffineEncoding, Encoding, IntGrid, LevelEncoding, check_bits
from qgraph.formats.dual_region import (
    dual_region,
    duplicate_codes,
    region_size,
    shift_of,
    signed_dual_region,
)
from qgraph.graph.ignore import Ignore
from qgraph.graph.ops import OpKind
from qgraph.graph.plan import Site
from qgraph.graph.requests import Request
from qgraph.graph.seen_through import (
    activation_behind,
    rectified_behind,
    softmax_behind,
)
from qgraph.passes.choose_ranges import output_weight, relative_power
from qgraph.pipeline import Fact, Pass, Promise

PRODUCTS = frozenset({OpKind.LINEAR, OpKind.CONV, OpKind.MATMUL})
TOPS = 10  # clip candidates of a signed format, 2^(1/4) apart
JOINT_CELLS = 1 << 18  # elements of V that the joint sample of one attention may hold
JOINT_ROWS = 4  # rows of A that are sampled for each of `rows`: heads differ a lot

SILENT = 1e-8  # rows whose output has less than this share of the largest energy count as zero

Score = Callable[[Encoding], float]


@dataclass(frozen=True)
class UseDualRegions(Pass):
    """Replace the affine format of post-softmax and post-GELU operands by a dual-region one.

    Matches operands of linears, convolutions and matrix products that come from a softmax (split
    ``m`` searched, 1.0 stays representable), from a GELU-like function (split and steps searched;
    the sign picks the region) or from a ReLU, through any data movement. Splits are ranked by
    expected error over the value's histogram, and the best few by the error that the consumer's
    output sees on sampled rows. The affine format competes with a range searched by the same score.

    Attributes:
        min_gain_db: the format must lower that error by so much, else the site stays affine.
        enough_db: where affine is this good already, it stays: plain products are faster.
        max_shift: largest split tried; default ``bits - 1``.
        rows: sampled rows behind the output-aware score.
        skip: globs of consumers that are left alone.
        force: globs of consumers that get the format whatever the benefit test says.
    """

    name: ClassVar[str] = "use-dual-regions"
    promise: ClassVar[Promise] = Promise.IDENTICAL
    requires: ClassVar[frozenset[str]] = frozenset({Fact.PLANNED, Fact.STATISTICS})

    min_gain_db: float = 0.5
    enough_db: float = 40.0
    max_shift: int | None = None
    rows: int = 128
    skip: tuple[str, ...] = ()
    force: tuple[str, ...] = ()

    def statistics(self, module: GraphModule, context: Context) -> Iterable[Request]:  # noqa: D102
        for (value, _), sites in matched(context).items():
            yield Request(value, "Range")
            if joint := joint_request(sites, self.rows):
                yield joint
            if not softmax_behind(value) and output_weight(module, sites) is not None:
                yield row_request(value, sites, self.rows)
            else:
                yield Request(value, "Histogram")

    def run(self, module: GraphModule, context: Context) -> bool:  # noqa: D102
        for (value, bits), sites in matched(context).items():
            if not context.left_alone(self.name, value, sites, self.skip):
                self._decide(module, context, value, sites, bits)
        return False

    def _decide(
        self, module: GraphModule, context: Context, value: Node, sites: list[Site], bits: int
    ) -> None:
        seen = context.statistics[value]
        low, high = seen.range().bounds()
        bins = _bins(seen)
        if low == high:
            context.record(self.name, value, "refused", "the value is constant")
            return
        if softmax_behind(value) and not (low >= 0.0 and high <= 1.0 + 1e-5):
            context.record(self.name, value, "refused", f"not in [0, 1]: [{low:.4g}, {high:.4g}]")
            return
        shifts = range((bits - 1 if self.max_shift is None else self.max_shift) + 1)
        if softmax_behind(value):
            candidates = [dual_region(bits, shift) for shift in shifts]
        elif activation_behind(value):
            candidates = signed_candidates(bits, shifts, high)
        else:
            candidates = rectified_candidates(bits, shifts, high)
        expected = table_error(bins, candidates)
        score, affine = self._rivals(module, context, value, sites, bits)
        if score is None:
            best = candidates[int(expected.argmin())]
            grid = CodeRange(0, (1 << bits) - 1, symmetric=False)
            ends = (torch.tensor([end], dtype=torch.float64) for end in affine)
            signal = float(bins.mass @ ((bins.left + bins.right) / 2).square())
            error = float(expected.min()) / signal
            other = float(expected_error(bins, grid, *ends)) / signal
        else:
            short = candidates if softmax_behind(value) else shortlist(candidates, expected)
            scored = [(score(each), at) for at, each in enumerate(short)]
            error, at = min(scored)
            best, other = short[at], score(affine_encoding(*affine, bits))
        self._conclude(context, value, sites, best, error, other)

    def _rivals(
        self, module: GraphModule, context: Context, value: Node, sites: list[Site], bits: int
    ) -> tuple[Score | None, tuple[float, float]]:
        """The score on sampled rows (None: only the histogram), and the best affine range."""
        seen = context.statistics[value]
        low, high = seen.range().bounds()
        joint = joint_request(sites, self.rows)
        if joint is not None:
            first, second = context.statistics[value, *joint.partners].get(JointReservoir).sampled()
            attend = attention_score(first, second)
            return attend, best_affine(attend, low, high, bits)
        weight = output_weight(module, sites)
        if weight is not None and (rows := seen.find(Reservoir)) is not None:
            power = relative_power(sites)
            found = choose_range_for_output(
                rows.sampled(), weight, low=low, high=high, bits=bits, relative=power
            )
            return linear_score(rows.sampled(), weight, power), found
        return None, choose_range(seen.get(Histogram), seen.range(), bits=bits)

    def _conclude(
        self, context: Context, value: Node, sites: list[Site], best: LevelEncoding,
        error: float, other: float,
    ) -> None:  # fmt: skip
        gain = decibels(other, error)
        shift = shift_of(best)
        numbers = {
            "gain_db": gain, "shift": float(shift), "bits": float(best.bits),
            "unused_codes": float(duplicate_codes(best)),
        }  # fmt: skip
        forced = any(Ignore.of(self.force).matches(site.edge.consumer) for site in sites)
        if gain < self.min_gain_db and not forced:
            why = f"affine is as good: {gain:+.2f} dB, needed {self.min_gain_db:g}"
            context.record(self.name, value, "kept", why, **numbers)
            return
        if other <= 10 ** (-self.enough_db / 10) and not forced:
            why = f"affine keeps {decibels(1.0, other):.1f} dB: enough"
            context.record(self.name, value, "kept", why, **numbers)
            return
        reason = f"regions 2^{shift} apart, {gain:+.2f} dB against affine"
        for site in sites:
            site.decide(best, self.name, reason)
        context.record(self.name, value, "applied", reason, **numbers)


def _bins(seen: FusedStatistics) -> Bins:
    """The density of a value, from the sampled rows where no histogram was asked for."""
    whole, rows = seen.find(Histogram), seen.find(Reservoir)
    if whole is None and rows is not None:
        whole = Histogram()
        whole.update(rows.sampled())
        return whole.bins()
    return seen.get(Histogram).bins()


def matched(context: Context) -> dict[tuple[Node, int], list[Site]]:
    """Undecided operands of products that come from a softmax, a GELU-like function or a ReLU."""
    found = {}
    for key, sites in context.plan.by_value(undecided_only=True).items():
        here = [site for site in sites if site.kind in PRODUCTS]
        attended = softmax_behind(key[0]) and any(site.kind is OpKind.MATMUL for site in here)
        if here and (attended or activation_behind(key[0]) or rectified_behind(key[0])):
            found[key] = here
    return found


def signed_candidates(bits: int, shifts: Iterable[int], high: float) -> list[LevelEncoding]:
    """Fine steps and splits whose coarse top lies at ``high`` or up to 2^2.5 below."""
    check_bits(bits)
    tops = max(high, 1e-6) * torch.exp2(-torch.arange(TOPS, dtype=torch.float64) / 4)
    size = region_size(bits)
    return [
        signed_dual_region(bits, shift, (top / ((size - 1) << shift)).float())
        for shift in shifts
        for top in tops
    ]


def rectified_candidates(bits: int, shifts: Iterable[int], high: float) -> list[LevelEncoding]:
    """Splits and clips of a value that is never negative; see `signed_candidates`."""
    tops = max(high, 1e-6) * torch.exp2(-torch.arange(TOPS, dtype=torch.float64) / 4)
    return [dual_region(bits, shift, high=top) for shift in shifts for top in tops.tolist()]


def shortlist(candidates: list[LevelEncoding], expected: Tensor) -> list[LevelEncoding]:
    """Per clip the split of the smallest expected error, of all clips of each split in turn.

    The histogram alone must not choose the clip: it hardly sees the few large values on which
    the consumer's output depends.
    """
    best = expected.reshape(-1, TOPS).argmin(0).tolist()
    return [candidates[split * TOPS + clip] for clip, split in enumerate(best)]


def row_request(value: Node, sites: Sequence[Site], rows: int) -> Request:
    """Sampled rows of a value, asked for as `choose-ranges` does, so that they are kept once."""
    axis = -1 if sites[0].axis is None else sites[0].axis
    return Request(value, "Reservoir", (("axis", axis), ("rows", rows), ("per_sample", 16)))


def joint_request(sites: Sequence[Site], rows: int) -> Request | None:
    """Rows of A with their V, where A is the left operand of one batched product."""
    if len(sites) != 1 or sites[0].kind is not OpKind.MATMUL or sites[0].edge.path != (0,):
        return None
    value, other = sites[0].value, sites[0].edge.consumer.args[1]
    if not softmax_behind(value) or not isinstance(other, Node) or other.op == "get_attr":
        return None
    first, second = value.meta["val"].shape, other.meta["val"].shape
    same = [str(a) == str(b) for a, b in zip(first[:-2], second[:-2], strict=False)]
    if len(first) != len(second) or len(first) < 3 or not all(same):
        return None
    sizes = [int(s) if isinstance(s, int) else 64 for s in second[-2:]]
    kept = min(rows * JOINT_ROWS, JOINT_CELLS // max(1, sizes[0] * sizes[1]))
    if kept < 8:
        return None
    leads = (len(first) - 1, len(first) - 2)
    options = (("leads", leads), ("per_sample", 8), ("rows", kept))
    return Request(value, "JointReservoir", options, (other,))


def attention_score(rows: Tensor, values: Tensor) -> Score:
    """``|(q(A) - A) V|^2 / |A V|^2`` over sampled rows A [n, S] with their V [n, S, D]."""
    signal = float(torch.bmm(rows.unsqueeze(1), values).square().sum()) or 1.0
    return lambda encoding: (
        float(torch.bmm((encoding.fake(rows) - rows).unsqueeze(1), values).square().sum()) / signal
    )


def linear_score(rows: Tensor, weight: Tensor, power: float) -> Score:
    """``|(q(x) - x) W^T|^2 / |x W^T|^2`` over sampled rows [n, C], rows weighted by `row_weights`.

    Outputs are projected to 64 random directions.
    """
    factor = sketch(weight, 64)
    energy = (rows @ factor.T).square().sum(1)
    importance = row_weights(energy, power)
    signal = float(energy @ importance) or 1.0

    def score(encoding: Encoding) -> float:
        error = (encoding.fake(rows) - rows) @ factor.T
        return float(error.square().sum(1) @ importance) / signal

    return score


def row_weights(energy: Tensor, power: float) -> Tensor:
    """Weight of each row's squared error, [n], falling with the energy of the row's own output.

    A norm behind a layer divides by the size of its output, so errors count about relative to
    their row there; without this a few massive rows decide alone. Power 0 weighs all rows alike.
    """
    loud = energy[energy > energy.amax() * SILENT]
    if not loud.numel():
        return torch.ones_like(energy)
    middle = loud.median()
    weights: Tensor = (middle / (energy + middle)) ** power
    return weights


def best_affine(score: Score, low: float, high: float, bits: int) -> tuple[float, float]:
    """The affine range of the smallest score."""

    def losses(lows: Tensor, highs: Tensor) -> Tensor:
        pairs = zip(lows.tolist(), highs.tolist(), strict=True)
        return torch.tensor([score(affine_encoding(a, b, bits)) for a, b in pairs])

    return search_clip(losses, min(low, 0.0), max(high, 0.0))


def affine_encoding(low: float, high: float, bits: int) -> AffineEncoding:
    """Unsigned affine codes over a range."""
    grid = IntGrid(bits, signed=False)
    scale, zero_point = affine_parameters(low, high, grid.qmin, grid.qmax, symmetric=False)
    return AffineEncoding(scale=scale, zero_point=zero_point, qmin=grid.qmin, qmax=grid.qmax)
