# SPDX-License-Identifier: Apache-2.0
"""The demo's first part: the real MiniLM text encoder at int8, on real sentences."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

import qgraph
from examples.minilm import calibration_batches, evaluation_batches, load_model
from qgraph.report import sqnr

Batch = dict[str, Tensor]
Row = tuple[object, ...]
MIB = 1024**2


def minilm_rows(out: Path, *, calibration: int = 32, evaluation: int = 8) -> list[Row]:
    """Compile MiniLM, save its ONNX file under `out`, return a row per backend."""
    model = load_model()
    batches = evaluation_batches(evaluation)
    quantized = qgraph.compile(model, calibration_batches(calibration), pipeline="int8")
    file = quantized.to_onnx(out / "minilm_int8.onnx")
    parity = quantized.verify(batches[0])
    (out / "minilm_parity.json").write_text(parity.to_json(), encoding="utf-8")
    runtime_off = sum(r.runtime.mismatches for r in parity.rows if r.runtime is not None)
    float_size = sum(p.numel() * p.element_size() for p in model.parameters()) / MIB
    reference = [_run(model, batch) for batch in batches]
    base = latency(model, batches[0])
    rows: list[Row] = [("minilm", "float", "", "", "", f"{float_size:.1f}", "1.00", "")]
    differences = {
        "reference": "",
        "integer": f"{parity.mismatches} of {parity.codes}",
        "onnx": f"{runtime_off} free-running",
    }
    for name, off in differences.items():
        backend = quantized.lower(name)  # type: ignore[arg-type]
        outputs = [_run(backend, batch) for batch in batches]
        size = f"{file.size / MIB:.1f}" if name == "onnx" else ""
        ratio = latency(backend, batches[0]) / base
        rows.append(
            ("minilm", name, *quality(reference, outputs, batches), size, f"{ratio:.2f}", off)
        )
    return rows


def quality(reference: list[Tensor], outputs: list[Tensor], batches: list[Batch]) -> Row:
    """SQNR of unmasked tokens, mean cosine of sentence embeddings, Spearman of similarities."""
    masks = [batch["attention_mask"].bool() for batch in batches]
    wanted = torch.cat([r[m] for r, m in zip(reference, masks, strict=True)])
    got = torch.cat([o[m] for o, m in zip(outputs, masks, strict=True)])
    ours, theirs = (
        torch.cat([_pooled(h, m) for h, m in zip(hidden, masks, strict=True)])
        for hidden in (outputs, reference)
    )
    cosine = torch.cosine_similarity(ours, theirs).mean().item()
    upper = torch.triu_indices(len(ours), len(ours), 1)
    similar = [(e @ e.T)[upper[0], upper[1]].numpy() for e in (ours, theirs)]
    rank = float(spearmanr(*similar).statistic)
    return (f"{sqnr(wanted, got):.2f}", f"{cosine:.5f}", f"{rank:.4f}")


def _pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def _run(model: Callable[..., Any], batch: Batch) -> Tensor:
    with torch.no_grad():
        hidden: Tensor = model(**batch).last_hidden_state
    return hidden


def latency(model: Callable[..., Any], batch: Batch, *, repeats: int = 5) -> float:
    """Median seconds of one batch."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        _run(model, batch)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
