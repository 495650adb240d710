# SPDX-License-Identifier: Apache-2.0
"""Do the backends compute the same codes? Node by node, forced and free-running.

Forced: each op is given the reference's codes, so a mismatch is that op's own. Free-running:
mismatches cascade; they are reported, not bounded.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule

from qgraph.backends import integer, reference
from qgraph.errors import VerificationError
from qgraph.formats import AffineEncoding, Encoding
from qgraph.graph.dialect import is_quantize
from qgraph.graph.provenance import module_path, source_line

# The contract towards onnxruntime: at most one code, integer kernels at most this often.
RUNTIME_CODES = 1
RUNTIME_RATE = 1e-6


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
    """

    node: str
    module_path: str
    source: str
    codes: int
    saturated: float
    forced: Difference
    free: Difference
    runtime: Difference | None = None


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
        """Return the report if integer equals reference.

        Raises:
            VerificationError: naming the first node that differs and its source line.
        """
        row = self.first_difference
        if row is None:
            return self
        msg = (
            f"integer differs from reference at {row.node} in {row.module_path or 'the model'}"
            f"{f' at {row.source}' if row.source else ''}: {row.forced.mismatches} of {row.codes}"
            f" codes, by up to {row.forced.worst}"
        )
        raise VerificationError(msg, node=row.node, max_abs=float(row.forced.worst))

    def to_json(self) -> str:
        """All rows and the totals."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        totals = {"codes": self.codes, "mismatches": self.mismatches}
        return json.dumps({"totals": totals, "rows": rows}, indent=1)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        heads = ("codes", "forced", "free", "runtime")
        yield f"{'quantizer':28} {'module':28} " + " ".join(f"{h:>9}" for h in heads)
        for row in self.rows:
            runtime = "-" if row.runtime is None else str(row.runtime)
            yield (
                f"{row.node[-28:]:28} {row.module_path[-28:]:28} {row.codes:>9}"
                f" {row.forced!s:>9} {row.free!s:>9} {runtime:>9}"
            )
        yield (
            f"{self.codes} codes: integer against reference, each op on the same codes:"
            f" {self.mismatches} differ"
        )
        worst = self.first_difference
        if worst is not None:
            yield f"first difference: {worst.node}, {worst.source or worst.module_path}"[:100]
        yield from self._runtime_lines()

    def _runtime_lines(self) -> Iterator[str]:
        compared = [(r.codes, r.runtime) for r in self.rows if r.runtime is not None]
        if not compared:
            return
        wrong = sum(d.mismatches for _, d in compared)
        yield (
            f"onnxruntime, free-running: {wrong} of {sum(c for c, _ in compared)} codes differ,"
            f" by at most {max(d.worst for _, d in compared)}"
        )
        first = self.first_runtime_difference
        if first is not None:
            yield f"first at {first.node}, {first.source or first.module_path}"[:100]


def compare(
    module: GraphModule,
    sample_inputs: tuple[tuple[Any, ...], dict[str, Any]],
    *,
    session: CodeSource | None = None,
    mode: integer.Mode = "onnxruntime",
) -> ParityReport:
    """Compare the codes of all backends, quantizer by quantizer.

    Args:
        module: a quantized graph.
        sample_inputs: (args, kwargs) of the model.
        session: a runtime that shows its codes; None leaves its column empty.
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
    limits = {n.name: code_range(e) for n, e in lowered.semantics.encodings.items()}
    rows = [
        ParityRow(
            node=node.name, module_path=module_path(node), source=source_line(node),
            codes=expected[node.name].numel(),
            saturated=_ends(expected[node.name], limits[node.name]),
            forced=forced[node.name], free=free[node.name], runtime=runtime.get(node.name),
        )
        for node in module.graph.nodes
        if is_quantize(node) and node.name in forced
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
