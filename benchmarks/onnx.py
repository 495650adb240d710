# SPDX-License-Identifier: Apache-2.0
"""ONNX files side by side: fp32, ours, and onnxruntime's quantize_static, in one process.

    python -m benchmarks.onnx [--models minilm vit unet] [--runs 15] [--json out.json]

Sessions run interleaved on one thread; the figures are medians of CPU time. The equal set of
quantized ops is what `scope` names here and `op_types_to_quantize` there.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from torch import Tensor

from benchmarks.onnx_models import CASES, Case
from qgraph.backends.onnx import kernels
from qgraph.backends.onnx.export import export
from qgraph.backends.onnx.session import session_options
from qgraph.compiler import compile as compile_model
from qgraph.pipelines import pipeline

SCOPES: dict[str, tuple[str, ...] | str] = {
    "matmul": ("linear", "conv", "matmul"),
    "full": "full",
}


@dataclass
class Row:
    """One file of one model.

    Attributes:
        model, file: what was run.
        milliseconds: median CPU time of one batch.
        ratio: to the fp32 file, the median over rounds of the ratio within a round.
        size: bytes; size_ratio: to the fp32 file.
        sqnr: dB of the output over the evaluation batches.
        integer_share: part of the time in integer kernels.
    """

    model: str
    file: str
    milliseconds: float
    ratio: float
    size: int
    size_ratio: float
    sqnr: float
    integer_share: float


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Iterable[dict[str, np.ndarray]]) -> None:
        self._feeds: Iterator[dict[str, np.ndarray]] = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next calibration batch, None at the end."""
        return next(self._feeds, None)


def write_float(case: Case, path: Path) -> None:
    """The fp32 file as torch.onnx.export writes it."""
    batch = case.calibration[0]
    shapes = {name: {0: torch.export.Dim.AUTO} for name in batch}
    torch.onnx.export(
        case.model, kwargs=batch, f=str(path), dynamo=True, opset_version=21, verbose=False,
        dynamic_shapes=shapes, external_data=False, input_names=list(batch),
    )  # fmt: skip


def write_static(case: Case, source: Path, path: Path, ops: list[str] | None) -> None:
    """onnxruntime's own static quantization: u8 activations, s8 weights per channel, min-max."""
    feeds = [{k: v.numpy() for k, v in b.items()} for b in case.calibration]
    quantize_static(
        str(source), str(path), _Reader(feeds), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=ops,
    )  # fmt: skip


def write_ours(case: Case, scope: str, name: str, folder: Path) -> list[Path]:
    """Our files of one scope, in both containers where that differs."""
    base, _, tables = name.partition("-table")
    width: dict[str, Any] = {"embedding_bits": int(tables)} if tables else {}
    chosen = pipeline(base, scope=SCOPES[scope], **width)
    batch = case.calibration[0]
    quantized = compile_model(case.model, case.calibration, chosen, example_inputs=batch)
    paths = []
    for container in ("int8",) if name == "int8" else ("int8", "native"):
        path = folder / f"qgraph {name} {scope} {container}.onnx"
        export(quantized.graph_module, path, container=container)
        paths.append(path)
    return paths


def sqnr(reference: Tensor, result: Tensor) -> float:
    """Signal to quantization noise, dB."""
    noise = (reference - result).double().square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / noise))


def measure(case: Case, paths: list[Path], runs: int) -> list[Row]:
    """Time and fidelity of all files, interleaved; the first is the fp32 one."""
    sessions = [
        onnxruntime.InferenceSession(
            str(p), session_options(threads=1), providers=["CPUExecutionProvider"]
        )
        for p in paths
    ]
    feeds = [{k: v.numpy() for k, v in b.items()} for b in case.evaluation]
    times = np.zeros((runs, len(sessions)))
    for round_ in range(-1, runs):
        for index, session in enumerate(sessions):
            start = time.process_time()
            session.run(None, feeds[0])
            if round_ >= 0:
                times[round_, index] = time.process_time() - start
    rows = []
    for index, (path, session) in enumerate(zip(paths, sessions, strict=True)):
        table = kernels(path, feeds[:1], runs=3, threads=1)
        rows.append(Row(
            case.name, path.stem, float(np.median(times[:, index]) * 1e3),
            float(np.median(times[:, index] / times[:, 0])), path.stat().st_size,
            path.stat().st_size / paths[0].stat().st_size, fidelity(case, session, feeds),
            table.share("integer"),
        ))  # fmt: skip
    return rows


def fidelity(case: Case, session: Any, feeds: list[dict[str, np.ndarray]]) -> float:
    """SQNR of the output against the torch model over the evaluation batches."""
    references, results = [], []
    for batch, feed in zip(case.evaluation, feeds, strict=True):
        with torch.no_grad():
            reference = case.output(case.model(**batch))
        result = torch.from_numpy(session.run(None, feed)[0])
        keep = case.mask(batch) if case.mask else torch.ones(reference.shape[:1], dtype=torch.bool)
        references.append(reference[keep].flatten())
        results.append(result[keep].flatten())
    return sqnr(torch.cat(references), torch.cat(results))


def run(case: Case, names: list[str], runs: int, folder: Path) -> list[Row]:
    """All files of one model."""
    paths = [folder / "fp32.onnx"]
    write_float(case, paths[0])
    for scope, ops in case.static_ops.items():
        path = folder / f"quantize_static {scope}.onnx"
        write_static(case, paths[0], path, ops)
        paths.append(path)
        has_table = any(isinstance(m, torch.nn.Embedding) for m in case.model.modules())
        for name in names:
            if "-table" in name and not (has_table and scope == "full"):
                continue
            paths.extend(write_ours(case, scope, name, folder))
    return measure(case, paths, runs)


def table(rows: list[Row]) -> str:
    """The rows as text."""
    lines = [
        f"{'model':<8}{'file':<34}{'ms':>9}{'ratio':>7}{'MB':>8}{'size':>7}{'dB':>8}{'integer':>9}"
    ]
    lines += [
        f"{r.model:<8}{r.file:<34}{r.milliseconds:>9.2f}{r.ratio:>7.2f}{r.size / 1e6:>8.2f}"
        f"{r.size_ratio:>7.3f}{r.sqnr:>8.2f}{r.integer_share:>9.0%}"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.onnx", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=[*CASES], default=[*CASES])
    parser.add_argument("--pipelines", nargs="+", default=["int8", "w4a8", "w4a8-table4"])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            found = run(CASES[name](), options.pipelines, options.runs, Path(folder))
        print(table(found), flush=True)
        rows.extend(found)
    if options.json:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        host = {
            "processor": platform.processor(), "onnxruntime": onnxruntime.__version__,
            "torch": torch.__version__, "commit": commit,
        }  # fmt: skip
        text = json.dumps({"host": host, "rows": [asdict(r) for r in rows]}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
