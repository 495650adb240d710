# SPDX-License-Identifier: Apache-2.0
"""`make mutants`: plant each bug in a copy, run its room's tests until the first fails.

python -m tests.mutation.run [--only SUBSTRING] [--seconds 60] [--generated 60] [--fresh]
Results go to log.jsonl; what is caught there already is skipped. Exits with 1 if one survives.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tests.mutation.mutants import MUTANTS, Mutant
from tests.mutation.planting import ROOT, Change, copy_of_the_repository, run

LOG = Path(__file__).parent / "log.jsonl"
Line = dict[str, object]


def place(mutant: Mutant) -> Change:
    """Where a named bug goes."""
    start = (ROOT / mutant.file).read_text().index(mutant.old)
    return Change(mutant.file, start, start + len(mutant.old), mutant.new)


def logged() -> dict[tuple[object, ...], Line]:
    """The last result of each bug."""
    lines = [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []
    return {(line["file"], line["old"], line["new"]): line for line in lines}


def sound(tests: str, copy: Path, seconds: float) -> bool:
    """Whether the tests pass where no bug is planted; without that a catch means nothing."""
    if logged().get((tests, "", ""), {}).get("why") == "all tests passed":
        return True
    found = run(None, tests, copy, 4 * seconds)
    note({"file": tests, "old": "", "new": "", "why": found.why, "seconds": round(found.seconds)})
    print(f"whole: {found.why or found.output[-2000:]}, {found.seconds:.0f} s {tests}", flush=True)
    return found.why == "all tests passed"


def note(line: Line) -> None:
    """Append a result."""
    with LOG.open("a") as log:
        log.write(json.dumps(line) + "\n")


def main() -> int:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.run", description=__doc__)
    parser.add_argument("--only", default="", help="substring of the file")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    options = parser.parse_args()
    if options.fresh:
        LOG.unlink(missing_ok=True)
    done = logged()
    chosen = [m for m in MUTANTS if options.only in m.file]
    waiting = [m for m in chosen if done.get(m[:3], {}).get("why", "?")]
    with copy_of_the_repository() as copy:
        for mutant in waiting:
            if not sound(mutant.tests, copy, options.seconds):
                continue
            verdict = run(place(mutant), mutant.tests, copy, options.seconds)
            note({**mutant._asdict(), "why": verdict.why, "seconds": round(verdict.seconds)})
            word = f"SURVIVED ({verdict.why})" if verdict.why else "caught"
            print(f"{word:8} {mutant.file}: {mutant.old[:60]!r} -> {mutant.new[:60]!r}", flush=True)
    done = logged()
    survivors = [m for m in chosen if done.get(m[:3], {}).get("why", "not run")]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} planted bugs caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
