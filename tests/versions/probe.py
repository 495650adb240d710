# SPDX-License-Identifier: Apache-2.0
"""Runs in a process of its own with one onnxruntime: loads each case, compares, prints JSON.

python probe.py FOLDER. Needs numpy and onnxruntime, nothing of qgraph's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def compare(path: Path, settings: dict[str, str]) -> str:
    """What the runtime makes of one file, in words; "equal" where every value is the expected."""
    stored = np.load(path.with_suffix(".npz"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        feeds = {i.name: stored[f"in.{n}"] for n, i in enumerate(session.get_inputs())}
        outputs = session.run(None, feeds)
    except Exception as error:  # noqa: BLE001  the class differs between versions
        return f"refused: {str(error).splitlines()[0][:160]}"
    wrong, worst, total = 0, 0.0, 0
    for number, got in enumerate(outputs):
        want = stored[f"out.{number}"]
        if want.shape != got.shape or want.dtype != got.dtype:
            return f"shape or dtype of output {number} differs"
        gap = np.abs(want.astype(np.float64) - got.astype(np.float64))
        wrong, total = wrong + int((gap > 0).sum()), total + gap.size
        worst = max(worst, float(gap.max()) / max(float(np.abs(want).max()), 1e-30))
    return "equal" if not wrong else f"{wrong} of {total} values differ, by at most {worst:.1e}"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    config = json.loads((folder / "settings.json").read_text())
    results = {path.stem: compare(path, config) for path in sorted(folder.glob("*.onnx"))}
    print(json.dumps({"version": onnxruntime.__version__, "results": results}))
