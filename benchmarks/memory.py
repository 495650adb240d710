# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.memory`: peak memory of compile() over that of the plain float process.

Each measurement is a process of its own: one runs the float model over the calibration batches, the
other compiles it with the same batches; both import the same packages. What counts is the peak of
resident memory, imports included, as the operating system tells it; rounds alternate, the ratio is
that of the medians. `--models sam` compiles the image encoder of SAM ViT-B at 1024 pixels, whose
address space is limited to 12 GiB.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import qgraph
from benchmarks.large_models import sam
from benchmarks.onnx_models import CASES, Case
from qgraph.report.text import table

RESULT = Path("benchmarks/results/memory.json")
LIMIT = 1.3
SAM_LIMIT = 8 << 30
DEFAULT = ("minilm", "vit", "unet")


MODELS: dict[str, Callable[..., Case]] = {**CASES, "sam": sam}


def peak() -> int:
    """Peak of this process's resident memory in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def child(model: str, batches: int, pipeline: str, *, verify: bool) -> dict[str, int]:
    """Peaks of this process after building the model, and at the end; `pipeline` "" is float."""
    if model == "sam":
        resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    case = MODELS[model](batches)
    built = peak()
    if pipeline:
        qgraph.compile(case.model, case.calibration, pipeline, verify=verify, progress=False)
    else:
        with torch.no_grad():
            for batch in case.calibration:
                case.model(**batch)
    return {"built": built, "peak": peak()}


def measured(model: str, batches: int, pipeline: str, *, verify: bool) -> dict[str, int]:
    """`child` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", "--models", model,
               "--batches", str(batches), "--pipeline", pipeline]  # fmt: skip
    command += [] if verify else ["--no-verify"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds, and the range of the rounds' own ratios."""
    pairs = [
        tuple(measured(model, options.batches, name, verify=not options.no_verify)["peak"]
              for name in (options.pipeline, ""))
        for _ in range(options.rounds)
    ]  # fmt: skip
    ours, floats = (statistics.median(each) for each in zip(*pairs, strict=True))
    ratios = sorted(a / b for a, b in pairs)
    return {
        "batches": options.batches, "rounds": options.rounds, "float_bytes": floats,
        "bytes": ours, "ratio": ours / floats, "lowest": ratios[0], "highest": ratios[-1],
    }  # fmt: skip


def main() -> None:
    """Measure all models, print, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=DEFAULT)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--pipeline", default="int8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        found = child(options.models[0], options.batches, options.pipeline,
                      verify=not options.no_verify)  # fmt: skip
        print(json.dumps(found))
        return
    saved = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for model in options.models:
        name = f"{model} {options.pipeline}{', unverified' if options.no_verify else ''}"
        saved[name] = compared(model, options)
        RESULT.write_text(json.dumps(saved, indent=1) + "\n")
    lines = [
        (name, f"{row['float_bytes'] / 2**20:.0f}", f"{row['bytes'] / 2**20:.0f}",
         f"{row['ratio']:.2f}", f"{row['lowest']:.2f} .. {row['highest']:.2f}")
        for name, row in saved.items()
    ]  # fmt: skip
    print(table(("model", "float MiB", "compile MiB", f"ratio (limit {LIMIT})", "range"), lines))


if __name__ == "__main__":
    main()
