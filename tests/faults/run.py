# SPDX-License-Identifier: Apache-2.0
"""`make faults`: kill -9 at random moments of every long job, rerun, compare bytes.

python -m tests.faults.run [--count 120] [--only JOB] [--fresh]. Trials are numbered and logged in
log.jsonl; those that are there are not repeated. Exits with 1 if one failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tests.faults.jobs import JOBS, loader, model, wide
from tests.faults.killing import Uninterrupted, trial, uninterrupted

LOG = Path(__file__).parent / "log.jsonl"


def logged() -> list[dict[str, Any]]:
    """All trials."""
    return [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []


def totals(lines: list[dict[str, Any]]) -> str:
    """The log in words."""
    failed = [line for line in lines if line["failure"]]
    killed = sum(line["killed"] for line in lines)
    left = Counter(line["left"] for line in lines)
    kept = sum(line["kept"] > 0 for line in lines)
    half = sum(line["failure"].startswith("half-written") for line in lines)
    rubbish = sum(line["rubbish"] > 0 for line in lines)
    return (
        f"{len(lines)} trials, {killed} killed while running; a reader then found"
        f" {left['nothing']} times no file, {left['old']} an old one, {left['new']} the new one,"
        f" {half} times half of one; {kept} reruns went on from kept work, {rubbish} cleared"
        f" temporary files; {len(failed)} failed"
    )


def main() -> int:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.run", description=__doc__)
    parser.add_argument("--count", type=int, default=120, help="trials, dealt out to the jobs")
    parser.add_argument("--only", default="", choices=["", *JOBS])
    parser.add_argument("--fresh", action="store_true", help="forget earlier trials")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if options.fresh:
        LOG.unlink(missing_ok=True)
    jobs = [options.only] if options.only else list(JOBS)
    done = {(line["job"], line["seed"]) for line in logged()}
    for shared in (model, loader):
        shared()
    for seed in range(2):
        wide(seed)
    whole: dict[str, Uninterrupted] = {}
    failures = 0
    for number in range(options.count):
        job, seed = jobs[number % len(jobs)], number // len(jobs)
        if (job, seed) in done:
            continue
        if job not in whole:
            whole[job] = uninterrupted(job)
            print(f"{job}: {whole[job].seconds:.1f} s when nobody kills it", flush=True)
        found = trial(job, seed, whole[job])
        with LOG.open("a") as log:
            log.write(json.dumps(dataclasses.asdict(found)) + "\n")
        if found.failure:
            failures += 1
            print(f"FAILED {found}", flush=True)
    print(totals(logged()))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
