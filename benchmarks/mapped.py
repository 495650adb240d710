# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.mapped --gib 12`: a model larger than half of memory, weights in a file.

The file is mapped (`torch.load(..., mmap=True)`), so its pages are the system's to drop. What the
compilation itself needs is anonymous memory, sampled while it runs: mostly the int8 codes, a
quarter of the weights. Layers of 4096 x 4096; results are saved to disk, loaded, and compared.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

import qgraph

RESULT = Path("benchmarks/results/mapped.json")
WIDTH = 4096
LIMIT = 0.35  # of the weights


class Tower(nn.Module):
    """Residual layers."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4096] to the same."""
        for layer in self.layers:
            x = x + 0.1 * torch.relu(layer(x))
        return x


def anonymous() -> int:
    """Bytes of this process that only swap could hold."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
    message = "this system does not tell anonymous memory apart"
    raise SystemExit(message)


class Peak:
    """Largest anonymous memory while the block runs."""

    def __enter__(self) -> Peak:
        self.bytes, self.running = anonymous(), True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.bytes = max(self.bytes, anonymous())
            time.sleep(0.01)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()


def write(path: Path, depth: int) -> None:
    """Random weights."""
    torch.manual_seed(0)
    torch.save(Tower(depth).state_dict(), path)


def main() -> None:
    """Write, map, compile, save, load, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=4.0, help="of weights")
    options = parser.parse_args()
    torch.set_num_threads(1)
    depth = max(1, round(options.gib * 2**30 / (4 * WIDTH * WIDTH)))
    with tempfile.TemporaryDirectory() as folder:
        path, target = Path(folder) / "weights.pt", Path(folder) / "out.qgraph"
        child = os.fork()
        if not child:  # what writing leaves behind must not count
            write(path, depth)
            os._exit(0)
        os.waitpid(child, 0)
        with torch.device("meta"):
            model = Tower(depth).eval()
        model.load_state_dict(torch.load(path, mmap=True, weights_only=True), assign=True)
        data = [torch.randn(4, WIDTH) for _ in range(4)]
        start = anonymous()
        with Peak() as compiling:
            made = qgraph.compile(model, data, "int8", verify=False, progress=False)
        with Peak() as saving:
            made.save(target)
        expected = made.graph_module(data[0])  # a backend would decode all weights at once
        loaded = cast(qgraph.QuantizedModel, qgraph.load(target))
        same = torch.equal(loaded.graph_module(data[0]), expected)
        weights = path.stat().st_size
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {
        "weights_gib": weights / 2**30, "share_of_memory": weights / memory,
        "compile_share": (compiling.bytes - start) / weights, "limit": LIMIT,
        "saving_share": (saving.bytes - start) / weights, "loads_the_same": same,
    }  # fmt: skip
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
