# SPDX-License-Identifier: Apache-2.0
"""Each row of the table of bad inputs names a test that exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROWS = [
    line for line in (ROOT / "docs/bad_inputs.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| Input")
]  # fmt: skip


def test_every_row_names_a_test_that_exists():
    assert len(ROWS) > 25
    for row in ROWS:
        match = re.search(r"`(tests/[\w/]+\.py)::(test_\w+)`", row)
        assert match is not None, row
        assert f"def {match[2]}(" in (ROOT / match[1]).read_text(), row
