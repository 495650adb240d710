# SPDX-License-Identifier: Apache-2.0
"""`make hostile`: flipped bits, truncations and forgeries of a saved model, counted.

python -m tests.hostile.run [--flips 1000] [--bytes 3000] [--forged 3000]. Results of the last run
are in log.json. Exits with 1 if anything but an ArtifactError came, damage went unnoticed, or a
forgery that loads does not run, or not alike on both backends.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import struct
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.utils import _pytree as pytree

import qgraph
from tests.hostile.mutations import damaged_bytes, forge

LOG = Path(__file__).parent / "log.json"
SLOW = 5.0  # seconds
Answers = tuple[list[torch.Tensor], list[torch.Tensor]]
ROOM = 16 << 20  # bytes of Python memory beside the file's


@dataclass
class Counts:
    """What loading did.

    Attributes:
        refused: with an ArtifactError.
        loaded: without any error; of those are
        same: that answer as the original does: texts and figures of the report differ.
        other: that answer otherwise, alike on both backends: other codes, scales, arguments.
        wrong: other errors, slow ones and hungry ones, in words.
    """

    refused: int = 0
    loaded: int = 0
    same: int = 0
    other: int = 0
    slowest: float = 0.0
    hungriest: int = 0
    wrong: list[str] = field(default_factory=list)

    def load(self, path: Path, what: str) -> qgraph.QuantizedModel | None:
        """Load a file and count what came."""
        found = None
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        began = time.process_time()
        try:
            found = qgraph.load(path)
            self.loaded += 1
        except qgraph.ArtifactError:
            self.refused += 1
        except BaseException as error:  # noqa: BLE001  any other error is what this looks for
            self.wrong.append(f"{what}: {type(error).__name__}: {error}"[:300])
        seconds, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1] - held
        self.slowest, self.hungriest = max(self.slowest, seconds), max(self.hungriest, peak)
        if seconds > SLOW:
            self.wrong.append(f"{what}: took {seconds:.1f} s")
        if peak > 2 * path.stat().st_size + ROOM:
            self.wrong.append(f"{what}: took {peak} bytes")
        return found if isinstance(found, qgraph.QuantizedModel) else None

    def call(self, forged: qgraph.QuantizedModel, whole: Answers, what: str) -> None:
        """Run what was loaded; it may be another model, but must be one that works."""
        try:
            found = answers(forged)
        except Exception as error:  # noqa: BLE001  it should not have been loaded
            self.wrong.append(f"{what}: loads, but does not run: {type(error).__name__}: {error}")
            return
        if not equal(found[0], found[1]):
            self.wrong.append(f"{what}: the backends answer differently")
        alike = equal(found[0], whole[0])
        self.same, self.other = self.same + alike, self.other + (not alike)


def answers(model: qgraph.QuantizedModel) -> Answers:
    """Of both backends, on the same inputs; bare tensors, whatever they come in."""
    inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    reference, integer = (
        pytree.tree_leaves(model.lower(backend)(inputs)) for backend in ("reference", "integer")
    )
    return reference, integer


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """Bit for bit, NaN equal to itself."""
    pairs = list(zip(first, second, strict=True))
    return all(torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0)) for a, b in pairs)


def saved(folder: Path) -> Path:
    """A small model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    path = folder / "whole.qgraph"
    qgraph.compile(model, [torch.randn(4, 6)], "w4a8", progress=False).save(path)
    return path


def flipped(data: bytes, count: int) -> Iterable[tuple[str, bytes]]:
    """Single bits: all of the header's length, then distinct ones anywhere."""
    rng = random.Random(0)
    for place in [*range(64), *rng.sample(range(64, 8 * len(data)), count - 64)]:
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        yield f"bit {place}", bytes(changed)


def truncated(data: bytes) -> Iterable[tuple[str, bytes]]:
    """At every byte of the header, and at every one behind it."""
    for size in range(len(data)):
        yield f"{size} bytes", data[:size]


def measure(whole: Path, flips: int, random_bytes: int, forged: int) -> dict[str, Counts]:
    """All kinds of damage."""
    data, path = whole.read_bytes(), whole.with_name("m.qgraph")
    found = {name: Counts() for name in ("flipped bits", "truncations", "bytes", "forgeries")}
    damage = ((f"damage {n}", damaged_bytes(data, n)) for n in range(random_bytes))
    sources = (flipped(data, flips), truncated(data), damage)
    for counts, source in zip(found.values(), sources, strict=False):
        for what, content in source:
            path.write_bytes(content)
            counts.load(path, what)
        if counts.loaded:  # every byte is covered by a digest
            counts.wrong.append(f"{counts.loaded} damaged files were loaded")
    right = answers(cast("qgraph.QuantizedModel", qgraph.load(whole)))
    for number in range(forged):
        what = f"forgery {number} ({forge(whole, path, number)})"
        model = found["forgeries"].load(path, what)
        if model is not None:
            found["forgeries"].call(model, right, what)
    return found


def main() -> int:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile.run", description=__doc__)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--bytes", dest="random_bytes", type=int, default=3000)
    parser.add_argument("--forged", type=int, default=3000)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    tracemalloc.start()
    with tempfile.TemporaryDirectory() as folder:
        whole = saved(Path(folder))
        data = whole.read_bytes()
        header = 8 + struct.unpack("<Q", data[:8])[0]
        found = measure(whole, options.flips, options.random_bytes, options.forged)
    print(f"a file of {len(data)} bytes, {header} of them header")
    kinds: Counter[str] = Counter()
    for name, counts in found.items():
        tried = counts.refused + counts.loaded
        print(
            f"{name}: {tried} tried, {counts.refused} refused, {counts.loaded} loaded"
            f" ({counts.same} answer as the original, {counts.other} otherwise), slowest"
            f" {counts.slowest:.2f} s, most memory {counts.hungriest >> 10} KiB,"
            f" {len(counts.wrong)} wrong"
        )
        for line in counts.wrong[:20]:
            print(f"  WRONG {line}")
        kinds["wrong"] += len(counts.wrong)
    LOG.write_text(json.dumps({n: vars(c) for n, c in found.items()}, indent=1) + "\n")
    return 1 if kinds["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
