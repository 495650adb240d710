# SPDX-License-Identifier: Apache-2.0
"""`make mutants`: plant each bug in a copy, run its room's tests until the first fails.

python -m tests.mutation.run [--only SUBSTRING] [--seconds 60] [--generated N] [--seed S]
    [--coverage .coverage] [--open] [--sum] [--fresh]
Without --generated: the named bugs. Results go to log.jsonl; what is caught there already is
skipped, and so are survivors that explained.json explains. Exits with 1 if another one survives.
--open: survivors of earlier draws once more, with all tests of their file. --sum: only count.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.mutation.covering import Covering
from tests.mutation.generated import Generated, sample, tests_of
from tests.mutation.history import Key, Line, open_bugs, summary
from tests.mutation.mutants import MUTANTS, Mutant
from tests.mutation.planting import ROOT, Change, copy_of_the_repository, run

LOG = Path(__file__).parent / "log.jsonl"
EXPLAINED = Path(__file__).parent / "explained.json"


@dataclass(frozen=True)
class Bug:
    """A named or a generated bug, and the tests that must notice it.

    `room`: whole files of tests to turn to where picked ones let it pass.
    """

    change: Change
    old: str
    new: str
    tests: tuple[str, ...]
    room: tuple[str, ...] = ()

    @property
    def key(self) -> Key:
        """What the log knows it by."""
        return self.change.file, self.old, self.new

    @property
    def is_reached(self) -> bool:
        """Whether its tests come from a coverage file."""
        return any("::" in test for test in self.tests)

    @classmethod
    def named(cls, mutant: Mutant) -> Bug:
        """From the list."""
        start = (ROOT / mutant.file).read_text().index(mutant.old)
        change = Change(mutant.file, start, start + len(mutant.old), mutant.new)
        return cls(change, mutant.old, mutant.new, tuple(mutant.tests.split()))

    @classmethod
    def generated(cls, found: Generated, covering: Covering | None) -> Bug:
        """By a rule; with a coverage file, the tests that run the line."""
        file, room = found.change.file, found.tests
        tests: tuple[str, ...] = ()
        if covering is not None:
            tests = covering.tests(file, (ROOT / file).read_text(), found.line)
        return cls(found.change, found.old, found.new, tests or room, room if tests else ())


def explained() -> dict[Key, str]:
    """Why a survivor is no bug."""
    return {(e["file"], e["old"], e["new"]): e["why"] for e in json.loads(EXPLAINED.read_text())}


def logged() -> dict[Key, Line]:
    """The last result of each bug."""
    lines = [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []
    return {(line["file"], line["old"], line["new"]): line for line in lines}


def sound(bug: Bug, copy: Path, seconds: float) -> bool:
    """Whether the tests pass where no bug is planted; without that a catch means nothing.

    Those of a coverage file passed when it was made.
    """
    tests = " ".join(bug.tests)
    if bug.is_reached or logged().get((tests, "", ""), {}).get("why") == "all tests passed":
        return True
    found = run(None, bug.tests, copy, 4 * seconds)
    note({"file": tests, "old": "", "new": "", "why": found.why, "seconds": round(found.seconds)})
    print(f"whole: {found.why or found.output[-2000:]}, {found.seconds:.0f} s {tests}", flush=True)
    return found.why == "all tests passed"


def note(line: Line) -> None:
    """Append a result."""
    with LOG.open("a") as log:
        log.write(json.dumps(line) + "\n")


def _bugs(options: argparse.Namespace) -> list[Bug]:
    if options.open:
        survivors = open_bugs(LOG, set(explained()))
        return [Bug(change, old, new, tests_of(change.file)) for change, old, new in survivors]
    if options.generated:
        covering = Covering(options.coverage) if options.coverage else None
        return [Bug.generated(g, covering) for g in sample(options.generated, options.seed)]
    return [Bug.named(mutant) for mutant in MUTANTS]


def main() -> int:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.run", description=__doc__)
    parser.add_argument("--only", default="", help="substring of the file")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--generated", type=int, default=0, help="so many by rule instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--coverage", type=Path, help="what `make coverage` wrote")
    parser.add_argument("--open", action="store_true", help="survivors of earlier draws")
    parser.add_argument("--sum", action="store_true", help="count what the log holds of draws")
    options = parser.parse_args()
    if options.sum:
        print(summary(LOG, set(explained())))
        return 0
    if options.fresh:
        LOG.unlink(missing_ok=True)
    chosen = [bug for bug in _bugs(options) if options.only in bug.change.file]
    done, known = logged(), explained()
    waiting = [b for b in chosen if b.key not in known and done.get(b.key, {}).get("why", "?")]
    waiting.sort(key=lambda bug: not bug.is_reached)  # they need no run of sound tests first
    with copy_of_the_repository() as copy:
        for bug in waiting:
            if not sound(bug, copy, options.seconds):
                continue
            verdict = run(bug.change, bug.tests, copy, options.seconds)
            if verdict.why and bug.room:  # those that run the line may be more than were picked
                verdict = run(bug.change, bug.room, copy, options.seconds)
            file, old, new = bug.key
            line: Line = {"file": file, "old": old, "new": new, "tests": " ".join(bug.tests)}
            line |= {"draw": options.seed} if options.generated else {}
            line |= {"by": verdict.by} if verdict.by else {}
            note({**line, "why": verdict.why, "seconds": round(verdict.seconds)})
            word = f"SURVIVED ({verdict.why})" if verdict.why else "caught"
            print(f"{word:8} {file}: {old[:70]!r} -> {new[:70]!r}", flush=True)
    done = logged()
    caught = sum(done.get(b.key, {}).get("why") == "" for b in chosen)
    excused = sum(b.key in known for b in chosen)
    missing = sum(b.key not in done and b.key not in known for b in chosen)
    print(
        f"{caught} of {len(chosen)} planted bugs caught, {excused} survivors explained,"
        f" {missing} not run, {len(chosen) - caught - excused - missing} survive"
    )
    return 1 if caught + excused < len(chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
