# SPDX-License-Identifier: Apache-2.0
"""`make demo`: compile real models, evaluate every backend, print one table, save ONNX files."""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path

from examples.demo_minilm import minilm_rows
from examples.demo_ris import ris_rows
from qgraph.report.text import table

TEXT = ("model", "backend", "SQNR dB", "cosine", "rank corr", "MiB", "time/float", "codes off")
RIS = ("model", "backend", "mIoU", "oIoU", "MiB", "time/float", "codes off")


def main() -> None:
    """Run all parts of the demo."""
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.WARNING)
    out = Path("out")
    out.mkdir(exist_ok=True)
    start = time.perf_counter()
    print(table(TEXT, minilm_rows(out)), flush=True)
    print(f"\n{table(RIS, ris_rows(out))}")
    print(f"\nfiles are in {out}/; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
