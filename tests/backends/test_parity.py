# SPDX-License-Identifier: Apache-2.0
"""Reports of parity: what counts as a difference, and from where on it is an error."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from qgraph.backends.integer import Mode
from qgraph.backends.parity import Difference, ParityReport, ParityRow, code_range, compare
from qgraph.errors import VerificationError
from qgraph.formats import AffineEncoding, IntGrid, LevelEncoding
from qgraph.formats.dual_region import dual_region
from tests.backends.builders import quantize
from tests.backends.exact import SCALE, coded, decode, encode, insert_product
from tests.backends.single_ops import SingleOp

SAME = Difference(0, 0)


def row(name: str, codes: int = 100, **found: Any) -> ParityRow:
    given = {"forced": SAME, "free": SAME, **found}
    return ParityRow(
        node=name, module_path=f"path.{name}", source="", codes=codes, saturated=0.0, **given
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "wanted"),
    [
        ([1, 2, 3], [1, 2, 3], (0, 0)),
        ([1, 2, 3], [1, 0, 3], (1, 2)),
        ([1, 2, 3], [4, 1, 3], (2, 3)),
        ([0, 0, 255], [255, 0, 0], (2, 255)),
        ([], [], (0, 0)),
        ([1, 2], [1, 2, 3], (3, 2**31 - 1)),
        ([1, 2, 3, 4], [1], (4, 2**31 - 1)),
    ],
)
def test_codes_that_differ_are_counted_and_the_largest_gap_is_kept(ours, theirs, wanted):
    found = Difference.between(*(torch.tensor(v, dtype=torch.uint8) for v in (ours, theirs)))
    assert (found.mismatches, found.worst) == wanted
    assert str(found) == ("0" if wanted[0] == 0 else f"{wanted[0]}/{wanted[1]}")


@pytest.mark.parametrize(
    ("rows", "culprit"),
    [
        ([row("a"), row("b")], None),
        ([row("a"), row("b", forced=Difference(1, 1)), row("c", forced=Difference(9, 9))], "b"),
        ([row("a", free=Difference(50, 9)), row("b")], None),
        ([row("a", runtime=Difference(50, 9)), row("b")], None),
        ([row("a", runtime_forced=Difference(1, 1)), row("b")], None),
        ([row("a", runtime_forced=Difference(1, 2)), row("b")], "a"),
        ([row("a", runtime_forced=SAME), row("b", runtime_forced=Difference(2, 1))], "b"),
        ([row("a", runtime_forced=Difference(1, 1)),
          row("b", runtime_forced=Difference(2, 1))], "b"),
        ([row("a", 200_000, runtime_forced=Difference(2, 1))], None),
        ([row("a", 200_000, runtime_forced=Difference(3, 1))], "a"),
        ([row("a", 199_999, runtime_forced=Difference(2, 1))], "a"),
        ([row("a", 150_000, runtime_forced=Difference(1, 1)),
          row("b", 50_000, runtime_forced=Difference(1, 1))], None),
        ([row("a", 150_000, runtime_forced=Difference(1, 1)), row("b", 50_000),
          row("c", 49_000, runtime_forced=Difference(1, 1))], "a"),
    ],
)  # fmt: skip
def test_a_report_is_refused_from_the_first_code_of_ours_and_from_the_stated_rate_of_others(
    rows, culprit
):
    report = ParityReport(tuple(rows))
    if culprit is None:
        assert report.check() is report
    else:
        with pytest.raises(VerificationError, match=f"at {culprit} in path.{culprit}"):
            report.check()
    assert report.codes == sum(r.codes for r in rows)
    assert report.mismatches == sum(r.forced.mismatches for r in rows)
    first = next((r for r in rows if r.forced.mismatches > 0), None)
    assert report.first_difference is first
    late = next((r for r in rows if r.runtime is not None and r.runtime.mismatches > 0), None)
    assert report.first_runtime_difference is late
    assert json.loads(report.to_json())["totals"] == {
        "codes": report.codes, "mismatches": report.mismatches,
    }  # fmt: skip


def test_a_report_shows_every_backend_that_ran():
    text = str(ParityReport((row("a"), row("b", free=Difference(3, 2)))))
    assert "onnxruntime" not in text
    assert "first difference" not in text
    cells = [line.split() for line in text.splitlines()[1:3]]
    assert cells == [
        ["a", "path.a", "100", "0", "0", "-", "-"], ["b", "path.b", "100", "0", "3/2", "-", "-"],
    ]  # fmt: skip
    text = str(ParityReport((
        row("a", runtime_forced=SAME, runtime=SAME),
        row("b", 50, runtime_forced=Difference(2, 1), runtime=Difference(5, 4)),
        row("c", forced=Difference(7, 1)),
    )))  # fmt: skip
    assert "250 codes: integer against reference, each op on the same codes: 7 differ" in text
    assert "each op on the same codes: 2 of 150 codes differ, by at most 1" in text
    assert "free: 5 of 150 codes differ, by at most 4" in text
    assert text.count("first at b, path.b") == 2
    assert "first difference: c, path.c" in text
    assert "a, path.a" not in text


def test_a_long_source_line_is_cut_to_the_width_of_a_page():
    found = ParityRow(
        node="n", module_path="m", source="s" * 300, codes=1, saturated=0.0,
        forced=Difference(1, 1), free=SAME, runtime=Difference(1, 1),
    )  # fmt: skip
    cut = [line for line in str(ParityReport((found,))).splitlines() if "sss" in line]
    assert [len(line) for line in cut] == [100, 100]


def test_each_mode_is_held_against_a_reference_that_rounds_as_it_does():
    grid, bytes_ = coded(0, 255), torch.arange(8, dtype=torch.uint8).reshape(1, 8)
    b = SingleOp()
    eye = torch.eye(8, dtype=torch.int8), coded(-128, 127)
    y = insert_product(b, torch.ops.aten.linear.default, (bytes_, grid), eye)
    # Two steps of the product are one code, so every odd byte is a tie.
    halves = AffineEncoding.per_tensor(2 * SCALE * SCALE, 0, IntGrid(8, signed=False))
    q = encode(b, y, "out", halves)
    module = b.finish(decode(b, q, "out", halves))

    class Even:
        def codes(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return {q.name: torch.tensor([[0, 0, 1, 2, 2, 2, 3, 4]])}

    up = Difference(2, 1)  # 0.5 and 2.5 become 1 and 3, not 0 and 2
    modes: dict[Mode, Difference] = {"onnxruntime": SAME, "fixed_point": up}
    for mode, wanted in modes.items():
        report = compare(module, ((bytes_,), {}), session=Even(), mode=mode)
        assert report.check() is report
        assert [row.runtime for row in report.rows if row.node == q.name] == [wanted]


def test_codes_at_either_end_are_counted_as_saturated():
    grid = IntGrid(2, signed=False)

    def narrow(site: Any, values: Any) -> AffineEncoding:
        return AffineEncoding.per_tensor(1.0, 1, grid)

    model, x = nn.Linear(3, 2, bias=False), torch.tensor([[-5.0, 0.0, 1.0], [9.0, 0.1, 0.2]])

    class Session:
        def codes(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            assert torch.equal(args[0], x)
            return {name: torch.zeros(2, 3) for name in ("unknown", *names)}

    names: list[str] = []
    module = quantize(model, (x,), narrow)
    report = compare(module, ((x,), {}))
    (found,) = report.rows
    assert found.codes == 6
    assert found.saturated == pytest.approx(2 / 6)
    assert (found.forced, found.free, found.runtime, found.runtime_forced) == (
        SAME, SAME, None, None,
    )  # fmt: skip
    names.append(found.node)
    (found,) = compare(module, ((x,), {}), session=Session()).rows
    assert found.runtime == Difference(5, 3)
    assert code_range(AffineEncoding.per_tensor(1.0, 0, IntGrid(4, signed=True))) == (-8, 7)
    assert code_range(dual_region(4, 1)) == (0, len(dual_region(4, 1).levels) - 1)
    levels = torch.tensor([[0, 1, 3, 9, 11], [0, 2, 4, 5, 8]])
    by_row = LevelEncoding.nearest("any", torch.ones(2), levels, storage_bits=3, axis=0)
    assert code_range(by_row) == (0, 4)
