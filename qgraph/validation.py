# SPDX-License-Identifier: Apache-2.0
"""Validate one compilation, not only the compiler: what `compile(..., verify="full")` checks.

On the user's own batch: every backend computes the reference's codes; the saved file and the ONNX
file come back as the same model; a second compilation gives the same bytes; the caller's model is
what it was. Random models are put through the same functions by `make fuzz`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from qgraph.backends import parity
from qgraph.backends.onnx import Session
from qgraph.errors import VerificationError
from qgraph.graph.verify import Sample, checksum, tensors
from qgraph.model import QuantizedModel, load
from qgraph.report.report import Report

Fingerprint = dict[str, object]


def fingerprint(model: Any) -> Fingerprint:
    """What must be the same afterwards: each tensor's content, and modes of modules."""
    held = model.state_dict if isinstance(model, ExportedProgram) else tensors(model)
    found: Fingerprint = {n: checksum(t) for n, t in held.items()}
    if isinstance(model, nn.Module):
        found |= {f"requires_grad of {n}": p.requires_grad for n, p in model.named_parameters()}
        found |= {f"training of {n or 'the model'}": m.training for n, m in model.named_modules()}
    if isinstance(model, torch.fx.GraphModule):
        found["graph"] = str(model.graph)
    return found


def check_unchanged(model: Any, before: Fingerprint) -> None:
    """`VerificationError` that names what changed in the caller's model."""
    after = fingerprint(model)
    changed = [n for n in {**before, **after} if before.get(n) != after.get(n)]
    if changed:
        msg = f"compile changed the caller's model: {', '.join(changed[:5])}"
        raise VerificationError(msg)


def file_bytes(quantized: QuantizedModel) -> bytes:
    """The saved file, which leaves times out."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.qgraph"
        quantized.save(path)
        return path.read_bytes()


def check_repeated(first: QuantizedModel, second: QuantizedModel) -> None:
    """`VerificationError` unless both save as the same bytes."""
    if file_bytes(first) != file_bytes(second):
        node = _first_difference(first, second)
        msg = f"a second compilation gave another model{f', first at {node}' if node else ''}"
        raise VerificationError(msg, node=node)


def _first_difference(first: QuantizedModel, second: QuantizedModel) -> str:
    """Of the tensors, by name; "" where only structure or report differ."""
    ours, theirs = tensors(first.graph_module), tensors(second.graph_module)
    differing = (
        name for name in ours
        if name not in theirs or checksum(ours[name]) != checksum(theirs[name])
    )  # fmt: skip
    return next(differing, "")


def check_saving(quantized: QuantizedModel, batch: Sample) -> QuantizedModel:
    """Save, load, compare outputs bit for bit on both backends; save again, compare the bytes.

    Raises:
        VerificationError: names the output that differs.
    """
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "first.qgraph", Path(folder) / "second.qgraph"
        quantized.save(first)
        loaded = load(first)
        assert isinstance(loaded, QuantizedModel)
        loaded.save(second)
        if first.read_bytes() != second.read_bytes():
            msg = "saving what was loaded gave other bytes"
            raise VerificationError(msg)
    for backend in ("reference", "integer"):
        want = tree_leaves(quantized.lower(backend)(*batch.args, **batch.kwargs))
        got = tree_leaves(loaded.lower(backend)(*batch.args, **batch.kwargs))
        _check_outputs(f"{backend} after loading", want, got)
    return loaded


def check_export(quantized: QuantizedModel, batch: Sample) -> None:
    """`VerificationError` unless the written ONNX file gives what the ONNX backend gives."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        quantized.to_onnx(path)
        session = load(path)
        assert isinstance(session, Session)
        got = tree_leaves(session(*batch.args, **batch.kwargs))
    want = tree_leaves(quantized.lower("onnx")(*batch.args, **batch.kwargs))
    _check_outputs("the ONNX file", want, got)


def check_fixed_point(quantized: QuantizedModel, batch: Sample) -> None:
    """`VerificationError` where integer-only arithmetic departs from its reference."""
    parity.compare(
        quantized.graph_module, (batch.args, batch.kwargs), mode="fixed_point"
    ).check()  # fmt: skip


def _check_outputs(what: str, want: list[Any], got: list[Any]) -> None:
    if len(want) != len(got):
        msg = f"{what}: {len(got)} outputs, before {len(want)}"
        raise VerificationError(msg)
    for number, (a, b) in enumerate(zip(want, got, strict=True)):
        if not _same(a, b):
            msg = f"{what}: output {number} differs"
            raise VerificationError(msg)


def _same(a: Any, b: Any) -> bool:
    """Bit for bit, where NaN equals NaN."""
    if not isinstance(a, (Tensor, np.ndarray)):
        return bool(a == b)
    first, second = torch.as_tensor(a), torch.as_tensor(b)
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    if not first.is_floating_point():
        return torch.equal(first, second)
    nan = first.isnan()
    return torch.equal(nan, second.isnan()) and torch.equal(first[~nan], second[~nan])


def validate(
    quantized: QuantizedModel,
    batch: Sample,
    again: Callable[[], QuantizedModel],
    untouched: Callable[[], None],
) -> Report:
    """All checks; returns the report with the parity and a note of what was checked.

    Args:
        quantized: what the compilation gave.
        batch: the user's own, on the model's device.
        again: compiles once more in the same way.
        untouched: raises when the caller's model has changed.

    Raises:
        VerificationError: names the promise that does not hold, and where.
    """
    found = quantized.verify(batch).check()
    check_fixed_point(quantized, batch)
    check_saving(quantized, batch)
    check_export(quantized, batch)
    check_repeated(quantized, again())
    untouched()
    note = (
        f"validated on a batch of yours: {found.codes} codes agree on all backends, integer-only"
        " arithmetic agrees, the saved and the exported file give the same outputs, a second"
        " compilation gives the same bytes, your model is unchanged"
    )
    report = quantized.report.with_parity(found)
    return replace(report, notes=(*report.notes, note))
