# SPDX-License-Identifier: Apache-2.0
"""`make fuzz`: random models x pipelines x backends, by number, resumed where the log ends.

python -m tests.validation.fuzz [--count 1000] [--minutes 60] [--from N]. Exits with 1 at failures.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tests.validation.cases import Outcome, check

LOG = Path(__file__).parent / "log.jsonl"
CHUNK = 20


def chunk(start: int) -> list[Outcome]:
    """Check `CHUNK` cases in this process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    return [check(number) for number in range(start, start + CHUNK)]


Line = dict[str, Any]


def summary(start: int, outcomes: list[Outcome]) -> Line:
    """One line of the log."""
    refused = Counter(o.refusal.split(":")[0] for o in outcomes if o.refusal)
    return {
        "from": start,
        "cases": len(outcomes),
        "codes": sum(o.codes for o in outcomes),
        "refused": dict(refused),
        "failed": [
            [o.number, " ".join(o.kinds), o.pipeline, o.failure[:300]]
            for o in outcomes
            if o.failure
        ],
        "kinds": sorted({kind for o in outcomes for kind in o.kinds}),
    }


def logged() -> list[Line]:
    """All lines of the log."""
    return [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []


def totals(lines: list[Line]) -> str:
    """The cumulative log in words."""
    kinds = {kind for line in lines for kind in line["kinds"]}
    failed = [case for line in lines for case in line["failed"]]
    refused = sum(sum(line["refused"].values()) for line in lines)
    cases = sum(line["cases"] for line in lines)
    codes = sum(line["codes"] for line in lines)
    return (
        f"{cases} cases of {len(kinds)} kinds, {codes} codes compared,"
        f" {refused} refused with a typed error, {len(failed)} failed"
    )


def main() -> int:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.validation.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--from", dest="first", type=int, help="default: behind the log's last")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    done = [line["from"] + CHUNK for line in logged()]
    first = max(done, default=0) if options.first is None else options.first
    starts = range(first, first + options.count, CHUNK)
    deadline = time.monotonic() + 60 * options.minutes
    failures = 0
    with ProcessPoolExecutor(options.processes, max_tasks_per_child=10) as pool:
        pending = {}
        waiting = iter(starts)
        for start in waiting:
            pending[start] = pool.submit(chunk, start)
            if len(pending) == options.processes:
                break
        bar = tqdm(total=len(starts) * CHUNK, disable=None)
        while pending:
            start = min(pending)
            line = summary(start, pending.pop(start).result())
            with LOG.open("a") as log:
                log.write(json.dumps(line) + "\n")
            bar.update(CHUNK)
            for case in line["failed"]:
                failures += 1
                print(f"FAILED case {case[0]}: {case[1]}, {case[2]}\n  {case[3]}", flush=True)
            following = next(waiting, None)
            if following is not None and time.monotonic() < deadline:
                pending[following] = pool.submit(chunk, following)
        bar.close()
    print(totals(logged()))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
