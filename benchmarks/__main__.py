# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks`: W8A8 side by side with other toolkits, in one alternating run.

Each toolkit compiles each model in a process of its own, on the same batches; rounds alternate
between toolkits and the median counts. Cost is CPU time over that of the float model's forward of
the same batches in the same process; memory is the process's peak over that of a process that
only runs the float model. Results go to benchmarks/results/peers.json as they come and from there
into docs/performance.md. Toolkits: ``pip install "qgraph[bench]"``; each may be missing or fail
alone, and is then listed with its error.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.large_models import LARGE
from benchmarks.memory import peak
from benchmarks.onnx_models import CASES, Case
from benchmarks.peers import PACKAGES, PEERS, Clock, Run
from benchmarks.performance_page import write_page
from benchmarks.zoo_models import ZOO

RESULT = Path("benchmarks/results/peers.json")
MODELS = {**CASES, **LARGE, **ZOO}
Row = dict[str, Any]


def fidelity(case: Case, run: Run) -> dict[str, float]:
    """SQNR in dB and cosine of the output over held-out batches, rows that count."""
    signal = noise = product = ours = 0.0
    for batch in case.evaluation:
        exact, made = case.output(case.model(**batch)), run(batch)
        if case.mask is not None:
            keep = case.mask(batch)
            exact, made = exact[keep], made[keep]
        a, b = exact.double(), made.double()
        signal += float(a.square().sum())
        noise += float((a - b).square().sum())
        product += float((a * b).sum())
        ours += float(b.square().sum())
    decibels = 10 * math.log10(signal / noise) if noise else 999.0
    return {"sqnr": decibels, "cosine": product / math.sqrt(signal * ours) if ours else 0.0}


def forward_seconds(case: Case) -> float:
    """CPU seconds of the float model over the calibration batches."""
    case.model(**case.calibration[0])  # the first one also pays for caches
    start = time.process_time()
    for batch in case.calibration:
        case.model(**batch)
    return time.process_time() - start


@torch.no_grad()
def child(model: str, peer: str, batches: int) -> Row:
    """One toolkit on one model, in this process."""
    torch.set_num_threads(1)
    case, clock = MODELS[model](batches), Clock()
    run = PEERS[peer](case, clock)
    reached = peak()
    found = {"seconds": clock.seconds, "peak": reached, "forward": forward_seconds(case)}
    return found | fidelity(case, run)


def measured(model: str, peer: str, batches: int, limit: float) -> Row:
    """`child` in a process of its own; its error where it failed."""
    command = [sys.executable, "-m", "benchmarks", "--child", peer, "--models", model,
               "--batches", str(batches)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NNCF_EXTENSION_LOAD_TIMEOUT": "0"}
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True,
                              timeout=limit, env=environment)  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {limit:.0f} s"}
    if done.returncode == 0:
        found: Row = json.loads(done.stdout.splitlines()[-1])
        return found
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    return {"error": without_paths(lines[-1] if lines else f"exit code {done.returncode}")}


def without_paths(text: str) -> str:
    """An error's text as it may be published: short, and without folders of this machine."""
    return re.sub(r"(/[\w.\-]+){2,}/", "", text)[:160]


def summary(rounds: list[Row], floats: list[Row]) -> Row:
    """Medians over the rounds of one toolkit, or its error."""
    good = [row for row in rounds if "error" not in row]
    if not good:
        return {"error": rounds[0]["error"]}
    base = statistics.median(row["peak"] for row in floats if "error" not in row)
    median = statistics.median
    return {
        "rounds": len(good),
        "cost": median(row["seconds"]["compile"] / row["forward"] for row in good),
        "trace": median(row["seconds"].get("trace", 0.0) / row["forward"] for row in good),
        "memory": median(row["peak"] / base for row in good),
        "sqnr": median(row["sqnr"] for row in good),
        "cosine": median(row["cosine"] for row in good),
    }


def host() -> Row:
    """Versions, and what of the machine matters for the figures."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "numpy", "onnx", *PEERS):
        package = PACKAGES.get(name, name)
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    capability = torch.backends.cpu.get_cpu_capability()
    return {"machine": platform.machine(), "capability": capability, "cores": os.cpu_count(),
            "threads": 1, "versions": versions}  # fmt: skip


def main() -> None:
    """Alternate over toolkits, save after each round, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[*PEERS])
    parser.add_argument("--batches", type=int, default=8, help="calibration batches")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds for one compilation")
    parser.add_argument("--page", action="store_true", help="only write the page again")
    parser.add_argument("--child", choices=PEERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.models[0], options.child, options.batches)))
        return
    saved: Row = json.loads(RESULT.read_text()) if RESULT.exists() else {"models": {}}
    if not options.page:
        saved["host"] = host()
        for model in options.models:
            compare(model, options, saved)
    write_page(saved)


def merged(before: Row, batches: int, rows: dict[str, Row]) -> Row:
    """New rows beside those of toolkits that this run left out, if they saw the same batches."""
    kept = before["peers"] if before.get("batches") == batches else {}
    found = {**kept, **rows}
    return {"batches": batches, "peers": {name: found[name] for name in PEERS if name in found}}


def compare(model: str, options: argparse.Namespace, saved: Row) -> None:
    """All rounds of one model."""
    names = ["float", *(peer for peer in options.peers if peer != "float")]
    rounds: dict[str, list[Row]] = {peer: [] for peer in names}
    for number in range(options.rounds):
        for peer in names:
            failed = [row for row in rounds[peer] if "error" in row]
            if not failed:
                rounds[peer].append(measured(model, peer, options.batches, options.limit))
                print(model, number, peer, rounds[peer][-1], flush=True)
            rows = {name: summary(each, rounds["float"]) for name, each in rounds.items() if each}
            saved["models"][model] = merged(saved["models"].get(model, {}), options.batches, rows)
            RESULT.write_text(json.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    main()
