# SPDX-License-Identifier: Apache-2.0
"""Print and log the float metrics: `python -m examples.zoo.sirst.evaluate --model resunet`.

A command; import the function of the same name from the package, not this module.
"""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

import torch

from examples.zoo.log import append
from examples.zoo.sirst.scoring import MODELS, WEIGHTS, evaluate, load_model

LOG = Path(__file__).parent / "evaluation_log.jsonl"


def record(name: str, split: str, num_samples: int) -> dict[str, object]:
    """Evaluate a trained float model and return one line of the log."""
    scores = evaluate(load_model(name), split, num_samples)
    metrics = {key: value for key, value in scores.items() if isinstance(value, float)}
    return {
        "model": name,
        "split": split,
        "num_samples": num_samples,
        **{key: round(value, 7) for key, value in metrics.items()},
        "weight_bytes": (WEIGHTS / f"{name}.safetensors").stat().st_size,
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    """Evaluate and append a line to the log."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=[*sorted(MODELS), "all"], default="all")
    parser.add_argument("--split", default="evaluation")
    parser.add_argument("--num-samples", type=int, default=1000)
    options = parser.parse_args()
    names = sorted(MODELS) if options.model == "all" else [options.model]
    for name in names:
        append(LOG, record(name, options.split, options.num_samples))


if __name__ == "__main__":
    main()
