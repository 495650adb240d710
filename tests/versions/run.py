# SPDX-License-Identifier: Apache-2.0
"""`make versions`: exported files on every onnxruntime from 1.20 on, against the integer backend.

python -m tests.versions.run [--versions 1.20.1 1.31.1 ...]. Each version is installed into a folder
that is thrown away. Results go to log.json and to the table in docs/versions.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

import qgraph
from qgraph.backends.onnx.capabilities import SESSION_CONFIG
from qgraph.testing import AttentionNet, Case, Detector, Stack, TwoTower, UNet

LOG = Path(__file__).parent / "log.json"
PAGE = Path(__file__).parents[2] / "docs" / "versions.md"
PROBE = Path(__file__).parent / "probe.py"
# The last patch of each minor version.
VERSIONS = (
    "1.20.1", "1.21.1", "1.22.1", "1.23.2", "1.24.4", "1.25.1", "1.26.0", "1.27.0", "1.28.0",
    "1.29.0", "1.30.0", "1.31.1",
)  # fmt: skip
CASES: dict[str, tuple[Case, str, str]] = {
    "unet int8": (Case(UNet(norm=True)), "int8", "int8"),
    "unet w4a8 native INT4": (Case(UNet(norm=True)), "w4a8", "native"),
    "convolutions int8": (Case(Stack(("InvertedResidual", "ParallelBranches"))), "int8", "int8"),
    "transformer int8": (Case(Stack((), ("EncoderLayer",))), "int8", "int8"),
    "two towers ris w8a8": (Case(TwoTower()), "ris_w8a8", "int8"),
    "attention sam w4a4": (Case(AttentionNet("Separate", block=True)), "sam_w4a4", "int8"),
    "detector det w4a4": (Case(Detector()), "det_w4a4", "int8"),
    "convolutions w6a6": (Case(Stack(("Dense",))), "w6a6", "int8"),
}


def build(folder: Path) -> None:
    """Write the files, inputs, and what the integer backend gives."""
    for name, (case, pipeline, container) in CASES.items():
        quantized = qgraph.compile(case.model(), case.loader(), pipeline, progress=False)
        stem = folder / name.replace(" ", "_")
        quantized.to_onnx(stem.with_suffix(".onnx"), container=container)  # type: ignore[arg-type]
        inputs = case.inputs(7)
        outputs = [t for t in tree_leaves(quantized(*inputs)) if isinstance(t, torch.Tensor)]
        arrays = {f"in.{n}": t.numpy() for n, t in enumerate(inputs)}
        arrays |= {f"out.{n}": t.numpy() for n, t in enumerate(outputs)}
        np.savez(stem.with_suffix(".npz"), **arrays)  # type: ignore[arg-type]
    (folder / "settings.json").write_text(json.dumps(SESSION_CONFIG))


def probe(version: str, cases: Path) -> dict[str, Any]:
    """Install one version, run the probe, forget the version."""
    with tempfile.TemporaryDirectory() as folder:
        install = [
            sys.executable, "-m", "pip", "install", "--quiet", "--no-deps",
            "--disable-pip-version-check", "--target", folder, f"onnxruntime=={version}",
        ]  # fmt: skip
        done = subprocess.run(install, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["?"])[-1]
            return {"version": version, "error": f"not installable: {last[:160]}"}
        environment = os.environ | {"PYTHONPATH": folder}
        run = [sys.executable, str(PROBE), str(cases)]
        done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["?"])[-1]
            return {"version": version, "error": f"does not run: {last[:160]}"}
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if found["version"] != version:
        found["error"] = f"ran {found['version']} instead"
    return found


def table(found: list[dict[str, Any]]) -> Iterator[str]:
    """One row per version; notes say what is not equal."""
    names = [name.replace(" ", "_") for name in CASES]
    yield "| onnxruntime | " + " | ".join(CASES) + " |"
    yield "|---" * (len(names) + 1) + "|"
    notes: list[str] = []
    for line in found:
        cells = []
        for name in names:
            result = line.get("results", {}).get(name, line.get("error", "?"))
            if result != "equal" and result not in notes:
                notes.append(result)
            cells.append("equal" if result == "equal" else f"({notes.index(result) + 1})")
        yield f"| {line['version']} | " + " | ".join(cells) + " |"
    yield ""
    for number, note in enumerate(notes, 1):
        yield f"({number}) {re.sub('[|<>]', ' ', note)}"
        yield ""


def main() -> int:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.versions.run", description=__doc__)
    parser.add_argument("--versions", nargs="*", default=list(VERSIONS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        for version in options.versions:
            found.append(probe(version, Path(folder)))
            print(json.dumps(found[-1]), flush=True)
    LOG.write_text(json.dumps(found, indent=1) + "\n")
    begin, end = "<!-- table -->\n", "<!-- end -->"
    if PAGE.exists():
        before, _, rest = PAGE.read_text().partition(begin)
        after = rest.partition(end)[2]
        PAGE.write_text(before + begin + "\n".join(table(found)) + "\n" + end + after)
    odd = [f for f in found if "error" in f]
    return 1 if odd else 0


if __name__ == "__main__":
    sys.exit(main())
