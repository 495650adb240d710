# SPDX-License-Identifier: Apache-2.0
"""Logs of evaluations: one JSON object a line, printed and appended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def append(log: Path, row: Mapping[str, object]) -> None:
    """Print a row and add it to a log."""
    line = json.dumps(row)
    with log.open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)
