# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.ranks`: CPU time of each of two ranks against one process, results equal.

MiniLM (`int8`, verification off). Rounds alternate between one process and a job of `--ranks`
gloo processes with one thread each; the median of each counts. Tracing is the same work on each
rank and left out, as in all ratios of calibration; the total with it is shown too.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import qgraph
from benchmarks.onnx_models import CASES
from qgraph.calibration import ranks as ranks_module
from qgraph.graph.verify import checksum, tensors

RESULT = Path("benchmarks/results/ranks.json")
LIMIT = 0.58


def compile_once(model: str, batches: int, pipeline: str) -> dict[str, Any]:
    """CPU seconds of the passes and of everything, bytes sent, and a digest of the result."""
    case = CASES[model](batches)
    traced = qgraph.trace(case.model, **case.calibration[0])
    start = time.process_time()
    with counted_bytes() as sent:
        quantized = qgraph.compile(traced, case.calibration, pipeline, verify=False, progress=False)
    total = time.process_time() - start
    steps = {step.name: step.cpu_seconds for step in quantized.report.steps}
    content = [(n, checksum(t)) for n, t in tensors(quantized.graph_module).items()]
    digest = hashlib.sha256(repr(content).encode()).hexdigest()
    return {"total": total, "passes": sum(steps.values()), "calibrate": steps["calibrate"],
            "bytes": sum(sent), "digest": digest}  # fmt: skip


@contextlib.contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Sizes of the messages that this rank packs meanwhile."""
    sizes: list[int] = []
    original = ranks_module._pack

    def counting(tensors: Sequence[dict[str, Tensor]], device: torch.device) -> Tensor:
        packed = original(tensors, device)
        sizes.append(packed.numel())
        return packed

    with mock.patch.object(ranks_module, "_pack", counting):
        yield sizes


def job(options: argparse.Namespace, size: int) -> list[dict[str, Any]]:
    """The findings of each rank of a job of `size` processes."""
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for rank in range(size):
            command = [
                sys.executable, "-m", "benchmarks.ranks", "--rank", str(rank), "--ranks", str(size),
                "--folder", folder, "--model", options.model, "--batches", str(options.batches),
                "--pipeline", options.pipeline,
            ]  # fmt: skip
            running.append(subprocess.Popen(command))
        if any(process.wait() for process in running):
            msg = "a rank failed; see its error above"
            raise SystemExit(msg)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(size)]


def rank_main(options: argparse.Namespace) -> None:
    """What one process of a job does."""
    torch.set_num_threads(1)
    if options.ranks > 1:
        store = f"file://{options.folder}/store"
        dist.init_process_group("gloo", store, rank=options.rank, world_size=options.ranks)
    found = compile_once(options.model, options.batches, options.pipeline)
    (Path(options.folder) / f"{options.rank}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()


def main() -> None:
    """Alternate, print, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batches", type=int, default=48, help="calibration batches")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", choices=CASES, default="minilm")
    parser.add_argument("--pipeline", default="int8")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        rank_main(options)
        return
    alone, together = [], []
    for _ in range(options.rounds):
        alone += job(options, 1)
        together.append(job(options, options.ranks))
    ratios = {}
    for what in ("passes", "total", "calibrate"):
        one = statistics.median(row[what] for row in alone)
        worst = statistics.median(max(row[what] for row in round_) for round_ in together)
        ratios[what] = worst / one
    equal = {row["digest"] for row in alone} | {r["digest"] for round_ in together for r in round_}
    sent = max(row["bytes"] for round_ in together for row in round_)
    print(f"{options.model}, {options.pipeline}, {options.batches} batches, {options.ranks} ranks: "
          f"each rank's CPU time over one process's {ratios['passes']:.2f} (limit {LIMIT}); "
          f"sweep {ratios['calibrate']:.2f}; results equal: {len(equal) == 1}; "
          f"at most {sent:,} bytes sent by a rank")  # fmt: skip
    report = {"model": options.model, "pipeline": options.pipeline, "batches": options.batches,
              "ranks": options.ranks, "rounds": options.rounds, "ratios": ratios,
              "equal": len(equal) == 1, "bytes_sent": sent, "torch": torch.__version__,
              "one_process": alone, "ranks_of_each_round": together}  # fmt: skip
    RESULT.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
