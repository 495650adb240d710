# SPDX-License-Identifier: Apache-2.0
"""Sums over batches that survive a killed run and add up over the ranks of a job."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from qgraph.atomic import write_file
from qgraph.errors import CalibrationError


def rank_and_size() -> tuple[int, int]:
    """This rank and the number of ranks; (0, 1) outside a torch.distributed job."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


class State:
    """Sums of named fp64 vectors, and the batches (or jobs) that they hold.

    Ranks take turns with batches, all reading the same loader; `total` adds up what they have.

    Args:
        path: JSON file that is replaced after each batch, or None.
        key: what the sums belong to; a file with another key is started anew.
    """

    def __init__(self, path: Path | None = None, key: str = "") -> None:
        self.rank, self.size = rank_and_size()
        self.path = path if path is None or self.size == 1 else _ranked(path, self.rank)
        self.key = key
        self.done: set[int] = set()
        self.sums: dict[str, list[float]] = {}
        if self.path is not None and self.path.exists():
            self._load(self.path)

    def wants(self, number: int) -> bool:
        """Whether this rank has that batch still to do."""
        return number % self.size == self.rank and number not in self.done

    def add(self, number: int, found: dict[str, Tensor]) -> None:
        """Add the sums of one batch, and save."""
        for name, value in found.items():
            if not bool(torch.isfinite(value).all()):
                msg = f"batch {number}: the sensitivity of {name} is not finite"
                raise CalibrationError(msg)
            new = value.double().reshape(-1).tolist()
            old = self.sums.get(name, [0.0] * len(new))
            self.sums[name] = [a + b for a, b in zip(old, new, strict=True)]
        self.done.add(number)
        if self.path is not None:
            self._save(self.path)

    def total(self) -> dict[str, Tensor]:
        """The sums over all ranks, in rank order, the same on each."""
        parts = [self.sums]
        if self.size > 1:
            gathered: list[dict[str, list[float]] | None] = [None] * self.size
            dist.all_gather_object(gathered, self.sums)
            parts = [part for part in gathered if part is not None]
        names = sorted({name for part in parts for name in part})
        return {
            name: torch.stack([
                torch.tensor(part[name], dtype=torch.float64) for part in parts if name in part
            ]).sum(0)
            for name in names
        }  # fmt: skip

    def _load(self, path: Path) -> None:
        try:
            data = json.loads(path.read_text())
        except (OSError, ValueError):
            return
        if data.get("key") == self.key:
            self.done = set(data["done"])
            self.sums = data["sums"]

    def _save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = {"key": self.key, "done": sorted(self.done), "sums": self.sums}
        write_file(path, [json.dumps(data).encode()])


def _ranked(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.stem}.rank{rank}{path.suffix}")
