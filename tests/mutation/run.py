# SPDX-License-Identifier: Apache-2.0
"""`make mutants`: plant each bug in a copy, run its room's tests until the first fails.

python -m tests.mutation.run [--only SUBSTRING] [--seconds 60]. Exits with 1 if one survives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.mutation.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
SKIPPED = shutil.ignore_patterns(
    ".git", ".venv", "out", "*.safetensors", "*_cache", "__pycache__", "site", "*.egg-info"
)


def survives(mutant: Mutant, copy: Path, seconds: float) -> str:
    """Why the planted bug was not caught, or ""; the copy is whole again afterwards."""
    target = copy / mutant.file
    whole = target.read_text()
    target.write_text(whole.replace(mutant.old, mutant.new))
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider",
        "-m", "not slow and not cuda", *mutant.tests.split(),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, timeout=seconds, capture_output=True, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no test failed within {seconds:.0f} s"
    finally:
        target.write_text(whole)
    if done.returncode == 0:
        return "all tests passed"
    return "" if done.returncode == 1 else f"pytest ended with {done.returncode}"


def main() -> int:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.run", description=__doc__)
    parser.add_argument("--only", default="", help="substring of the file")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if options.only in m.file]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, symlinks=True, ignore=SKIPPED)
        for mutant in chosen:
            why = survives(mutant, copy, options.seconds)
            survivors += bool(why)
            verdict = f"SURVIVED ({why})" if why else "caught"
            print(
                f"{verdict:8} {mutant.file}: {mutant.old[:60]!r} -> {mutant.new[:60]!r}", flush=True
            )
    print(f"{len(chosen) - survivors} of {len(chosen)} planted bugs caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
