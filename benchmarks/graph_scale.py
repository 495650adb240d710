# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.graph_scale`: what a pass costs per node, as graphs grow.

Chains of tiny blocks (layer norm, linear, GELU, residual add), so that kernels cost nothing and
what is measured is the toolkit; tracing is left out. Each size runs in a process of its own,
between two runs of a graph of 1,000 nodes: ratios of CPU times of one process say most on a
machine that does other things too. Verification is off unless `--verify` is given.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

import qgraph
from qgraph.report.text import table
from qgraph.testing.chains import NODES_PER_BLOCK, WIDTH, chain

RESULT = Path("benchmarks/results/graph_scale.json")
SIZES = (1000, 2000, 5000, 10000, 20000, 50000)
PIPELINES = ("int8", "ris_int4")
REFERENCE = 1000
FLAT, LIMIT_SECONDS = 1.5, 120.0
Row = dict[str, float]


def measure(pipeline: str, nodes: int, *, verify: bool) -> Row:
    """CPU seconds of each pass and of everything, and the number of nodes."""
    module = chain(nodes // NODES_PER_BLOCK)
    data = [torch.randn(2, 4, WIDTH) for _ in range(2)]
    start = time.process_time()
    quantized = qgraph.compile(module, data, pipeline, verify=verify, progress=False)
    total = time.process_time() - start
    found = {step.name: step.cpu_seconds for step in quantized.report.steps}
    found["everything else"] = total - sum(found.values())
    return found | {"total": total, "nodes": len(module.graph.nodes)}


def child(pipeline: str, nodes: int, *, verify: bool) -> dict[str, Row]:
    """One size between two references, all in this process."""
    measure(pipeline, 200, verify=verify)  # the first compilation pays for imports and caches
    before = measure(pipeline, REFERENCE, verify=verify)
    here = measure(pipeline, nodes, verify=verify)
    after = measure(pipeline, REFERENCE, verify=verify)
    mean = {name: (before[name] + after[name]) / 2 for name in before}
    return {"reference": mean, "size": here}


def per_node(row: Row) -> dict[str, float]:
    """Microseconds per node, by pass."""
    return {name: 1e6 * value / row["nodes"] for name, value in row.items() if name != "nodes"}


def main() -> None:
    """Measure all sizes, print microseconds per node and ratios, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--pipelines", nargs="+", default=PIPELINES)
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--child", action="store_true", help="measure one size in this process")
    options = parser.parse_args()
    if options.child:
        found = child(options.pipelines[0], options.sizes[0], verify=options.verify)
        print(json.dumps(found))
        return
    rows = []
    for pipeline in options.pipelines:
        for size in options.sizes:
            command = [sys.executable, "-m", "benchmarks.graph_scale", "--child", "--sizes",
                       str(size), "--pipelines", pipeline]  # fmt: skip
            command += ["--verify"] if options.verify else []
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            here, reference = per_node(found["size"]), per_node(found["reference"])
            rows.append(
                {"pipeline": pipeline, "nodes": found["size"]["nodes"],
                 "seconds": found["size"]["total"], "ratio": here["total"] / reference["total"],
                 "per_node_us": {name: round(value, 1) for name, value in here.items()}}
            )  # fmt: skip
            show(rows[-1])
    worst = max(row["ratio"] for row in rows)
    print(f"cost per node against {REFERENCE} nodes: at most {worst:.2f} (limit {FLAT})")
    name = "graph_scale_verified.json" if options.verify else RESULT.name
    report = {"torch": torch.__version__, "threads": torch.get_num_threads(),
              "verify": options.verify, "reference_nodes": REFERENCE, "rows": rows}  # fmt: skip
    RESULT.with_name(name).write_text(json.dumps(report, indent=1) + "\n")


def show(row: dict[str, object]) -> None:
    """Print one size."""
    passes = row["per_node_us"]
    assert isinstance(passes, dict)
    print(f"{row['pipeline']}, {row['nodes']} nodes: {row['seconds']:.1f} CPU s, "
          f"per node {row['ratio']:.2f} x that of {REFERENCE}")  # fmt: skip
    print(table(("pass", "us per node"), [(n, f"{v:.0f}") for n, v in passes.items()]), flush=True)


if __name__ == "__main__":
    main()
