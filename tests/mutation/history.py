# SPDX-License-Identifier: Apache-2.0
"""What the log says of bugs by rule: at first sight, and by now.

Only the first result of a bug tells how good the tests are: later ones know it already.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.mutation.planting import ROOT, Change

Line = dict[str, object]
Key = tuple[str, str, str]


class Seen(NamedTuple):
    """First and last result of a bug: "" is caught."""

    first: str
    last: str
    draw: object


def history(lines: Iterable[Line]) -> dict[Key, Seen]:
    """Of the bugs by rule in a log: those of a draw, or shown to single tests."""
    found: dict[Key, Seen] = {}
    for line in lines:
        key = str(line["file"]), str(line["old"]), str(line["new"])
        if key in found or "draw" in line or "::" in str(line.get("tests", "")):
            why = str(line["why"])
            seen = found.get(key, Seen(why, why, line.get("draw", "earlier")))
            found[key] = seen._replace(last=why)
    return found


def summary(log: Path, explained: set[Key]) -> str:
    """One line a draw."""
    found = history(map(json.loads, log.read_text().splitlines()))
    lines = []
    for draw in dict.fromkeys(seen.draw for seen in found.values()):
        drawn = {key: seen for key, seen in found.items() if seen.draw == draw}
        bugs = [seen for key, seen in drawn.items() if key not in explained]
        first, last = (sum(not s[at] for s in bugs) for at in (0, 1))
        lines.append(
            f"draw {draw}: {len(drawn)} run, {len(drawn) - len(bugs)} no bugs (explained); of"
            f" {len(bugs)}: {first} caught at first sight ({first / max(1, len(bugs)):.0%}),"
            f" {last} by now"
        )
    return "\n".join(lines)


def open_bugs(log: Path, explained: set[Key]) -> Iterator[tuple[Change, str, str]]:
    """(change, old, new) of bugs whose last result is no catch, where their line stands once."""
    for (file, old, new), seen in history(map(json.loads, log.read_text().splitlines())).items():
        text = (ROOT / file).read_text() if (ROOT / file).exists() else ""
        if seen.last and (file, old, new) not in explained and text.count(old) == 1:
            start = text.index(old)
            yield Change(file, start, start + len(old), new), old, new
