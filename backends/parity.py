# SPDX-License-Identifier: Apache-2.0
"""Do the backends compute the same codes? Node by node, forced and free-running.

Forced: each op is given the reference's codes, so a mismatch is that op's own. Free-running:
mismatches cascade; they are reported, not bounded.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule

from qgraph.backends import integer, reference
from qgraph.backends.cutting import CutGraph
from qgraph.errors import VerificationError
from qgraph.formats import AffineEncoding, Encoding
from qgraph.graph.provenance import module_path, source_line

# The contract towards onnxruntime: at most one code, float ops included at most this often.
RUNTIME_CODES = 1
RUNTIME_RATE = 1e-5


class CodeSource(Protocol):
    """A runtime that can show its codes, such as `qgraph.backends.onnx.Session`."""

    def codes(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """Codes (integer arrays) by name of the quantize node."""
        ...


@dataclass(frozen=True, slots=True)
class Difference:
    """Codes of one quantizer compared with the reference's.

    Attributes:
        mismatches: how many differ.
        worst: largest difference.
    """

    mismatches: int
    worst: int

    @classmethod
    def between(cls, ours: Tensor, theirs: Tensor) -> Difference:
        """Compare codes of equal shape; another shape counts as all wrong."""
        if ours.shape != theirs.shape:
            return cls(max(ours.numel(), theirs.numel()), 2**31 - 1)
        gap = (ours.to(torch.int64) - theirs.to(torch.int64)).abs()
        return cls(int((gap > 0).sum()), int(gap.max()) if gap.numel() else 0)

    def __str__(self) -> str:
        return f"{self.mismatches}/{self.worst}" if self.mismatches else "0"


@dataclass(frozen=True, slots=True)
class ParityRow:
    """One quantize node.

    Attributes:
        node: its name.
        module_path: module that made the value.
        source: line of the model's code.
        codes: how many codes were compared.
        saturated: share of codes at either end of the range.
        forced: integer backend, given the reference's codes.
        free: integer backend on its own codes.
        runtime: onnxruntime on its own codes, None where it was not run.
        runtime_forced: onnxruntime, given the reference's codes.
    """

    node: str
    module_path: str
    source: str
    codes: int
    saturated: float
    forced: Difference
    free: Difference
    runtime: Difference | None = None
    runtime_forced: Difference | None = None


@dataclass(frozen=True, slots=True)
class ParityReport:
    """Rows in graph order; prints as a table, serialises to JSON."""

    rows: tuple[ParityRow, ...]

    @property
    def codes(self) -> int:
        """Codes compared."""
        return sum(row.codes for row in self.rows)

    @property
    def mismatches(self) -> int:
        """Integer against reference, forced."""
        return sum(row.forced.mismatches for row in self.rows)

    @property
    def first_difference(self) -> ParityRow | None:
        """The first quantizer at which the integer backend departs, given equal inputs."""
        return next((row for row in self.rows if row.forced.mismatches), None)

    @property
    def first_runtime_difference(self) -> ParityRow | None:
        """The first quantizer at which onnxruntime departs."""
        return next((r for r in self.rows if r.runtime and r.runtime.mismatches), None)

    def check(self) -> ParityReport:
        """Return the report if integer equals reference, and onnxruntime nearly so.

        Raises:
            VerificationError: naming the first node that differs and its source line; onnxruntime
                may differ by one code, at the stated rate.
        """
        row = self.first_difference
        if row is not None:
            raise _error("integer", row, row.forced)
        found = [(r, r.runtime_forced) for r in self.rows if r.runtime_forced is not None]
        for row, gap in found:
            if gap.worst > RUNTIME_CODES:
                raise _error("onnxruntime", row, gap)
        wrong, codes = sum(d.mismatches for _, d in found), sum(r.codes for r, _ in found)
        if wrong > max(1, codes * RUNTIME_RATE):
            row, gap = max(found, key=lambda item: item[1].mismatches)
            raise _error("onnxruntime", row, gap)
        return self

    def to_json(self) -> str:
        """All rows and the totals."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        totals = {"codes": self.codes, "mismatches": self.mismatches}
        return json.dumps({"totals": totals, "rows": rows}, indent=1)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        heads = ("codes", "forced", "free", "ort", "ort free")
        yield f"{'quantizer':24} {'module':24} " + " ".join(f"{h:>9}" for h in heads)
        for row in self.rows:
            cells = (row.codes, row.forced, row.free, row.runtime_forced, row.runtime)
            shown = " ".join(f"{'-' if c is None else str(c):>9}" for c in cells)
            yield f"{row.node[-24:]:24} {row.module_path[-24:]:24} {shown}"
        yield (
            f"{self.codes} codes: integer against reference, each op on the same codes:"
            f" {self.mismatches} differ"
        )
        worst = self.first_difference
        if worst is not None:
            yield f"first difference: {worst.node}, {worst.source or worst.module_path}"[:100]
        yield from self._runtime_lines()

    def _runtime_lines(self) -> Iterator[str]:
        for title, name in (("each op on the same codes", "runtime_forced"), ("free", "runtime")):
            found = [(r, getattr(r, name)) for r in self.rows if getattr(r, name) is not None]
            if not found:
                continue
            wrong = sum(d.mismatches for _, d in found)
            yield (
                f"onnxruntime, {title}: {wrong} of {sum(r.codes for r, _ in found)} codes differ,"
                f" by at most {max(d.worst for _, d in found)}"
            )
            first = next((r for r, d in found if d.mismatches), None)
            if first is not None:
                yield f"  first at {first.node}, {first.source or first.module_path}"[:100]


def _error(who: str, row: ParityRow, gap: Difference) -> VerificationError:
    msg = (
        f"{who} differs from reference at {row.node} in {row.module_path or 'the model'}"
        f"{f' at {row.source}' if row.source else ''}: {gap.mismatches} of {row.codes}"
        f" codes, by up to {gap.worst}"
    )
    return VerificationError(msg, node=row.node, max_abs=float(gap.worst))


def compare(
    module: GraphModule,
    sample_inputs: tuple[tuple[Any, ...], dict[str, Any]],
    *,
    session: CodeSource | None = None,
    lower_runtime: Callable[[GraphModule], CodeSource] | None = None,
    mode: integer.Mode = "onnxruntime",
) -> ParityReport:
    """Compare the codes of all backends, quantizer by quantizer.

    Args:
        module: a quantized graph.
        sample_inputs: (args, kwargs) of the model.
        session: a runtime that shows its codes; None leaves its column empty.
        lower_runtime: starts a runtime on a graph; it is then also given the reference's codes,
            op by op.
        mode: of the integer backend; its reference follows.
    """
    args, kwargs = sample_inputs
    expected: dict[str, Tensor] = {}
    if mode == "onnxruntime":
        model = reference.lower(module)
        model.run(args, kwargs, lambda node, codes: expected.setdefault(node.name, codes))
    else:
        exact = integer.fixed_point_reference(module)
        exact.run(args, kwargs, expected.setdefault)
    lowered = integer.lower(module, mode=mode)
    forced: dict[str, Difference] = {}
    free: dict[str, Difference] = {}

    def force(name: str, codes: Tensor) -> Tensor:
        forced[name] = Difference.between(codes, expected[name])
        return expected[name]

    def watch(name: str, codes: Tensor) -> Tensor:
        free[name] = Difference.between(codes, expected[name])
        return codes

    lowered.run(args, kwargs, force)
    lowered.run(args, kwargs, watch)
    runtime = {} if session is None else _of_runtime(session, expected, args, kwargs)
    runtime_forced = {}
    if lower_runtime is not None:
        cut = CutGraph(module)
        fed, codes = cut.feed(args, kwargs)
        runtime_forced = _of_runtime(lower_runtime(cut.module), codes, tuple(fed), {})
    limits = {n.name: code_range(e) for n, e in lowered.semantics.encodings.items()}
    rows = [
        ParityRow(
            node=node.name, module_path=module_path(node), source=source_line(node),
            codes=expected[node.name].numel(),
            saturated=_ends(expected[node.name], limits[node.name]),
            forced=forced[node.name], free=free[node.name], runtime=runtime.get(node.name),
            runtime_forced=runtime_forced.get(node.name),
        )
        for node in module.graph.nodes
        if node.name in forced
    ]  # fmt: skip
    return ParityReport(tuple(rows))


def code_range(encoding: Encoding) -> tuple[int, int]:
    """Smallest and largest code of an encoding."""
    if isinstance(encoding, AffineEncoding):
        return encoding.qmin, encoding.qmax
    return 0, encoding.table().shape[-1] - 1


def _ends(codes: Tensor, limits: tuple[int, int]) -> float:
    wide = codes.to(torch.int32)
    at_ends = (wide == limits[0]) | (wide == limits[1])
    return float(at_ends.float().mean()) if codes.numel() else 0.0


def _of_runtime(
    session: CodeSource, expected: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Difference]:
    found = session.codes(*args, **kwargs)
    return {
        name: Difference.between(torch.as_tensor(codes), expected[name])
        for name, codes in found.items()
        if name in expected
    }
