# SPDX-License-Identifier: Apache-2.0
"""Seeded samples of rows that do not depend on how the data came in batches.

Every candidate row gets a priority by hashing its bits, its sample's bits, its position and the
seed; the k smallest priorities are kept. So the sample is a function of the data alone, and the
sample of a union is the bottom k of the samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qgraph.calibration.sampling import spread_indices
from qgraph.calibration.statistics import Observation, Statistic
from qgraph.errors import CalibrationError, ConfigError

# int64 numbers: an array on the host, where a few numbers cost less than as a tensor. Both wrap
# alike, and share the operators used here; their common type would have to say so one by one.
Ints: TypeAlias = Any
EMPTY = (1 << 63) - 1  # priority of an unused slot
ODD = 0x1E3779B97F4A7C15  # odd multipliers of the splitmix generator, fitted to int64
ODD_TOO = 0x3F58476D1CE4E5B9
HASHED = 8  # about so many elements of a row enter twice: once in the sum of all, once alone


def _mix(x: Ints) -> Ints:
    """Scramble int64 values (splitmix64's steps, wrapping)."""
    x = (x ^ (x >> 30)) * ODD_TOO
    x = (x ^ (x >> 27)) * ODD
    return x ^ (x >> 31)


def _fingerprint(rows: Tensor) -> Ints:
    """int64 [B, n] from the bits of fp32 rows [B, n, ...]; integer, so exact in any order."""
    bits = rows.flatten(2).contiguous().view(torch.int32)
    few = bits[..., :: max(2, bits.shape[-1] // HASHED)]
    found = bits.sum(-1, dtype=torch.int64) + few.sum(-1, dtype=torch.int64) * ODD
    return _plain(found)


def _plain(x: Tensor) -> Ints:
    """The same memory as a numpy array, where it lies on the host."""
    return x.numpy() if x.device.type == "cpu" else x


def _pad_to(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Zeros appended to the payload dimensions of rows [n, ...] up to `shape`."""
    missing = [wanted - have for wanted, have in zip(shape, rows.shape[1:], strict=True)]
    pads = [p for amount in reversed(missing) for p in (0, amount)]
    return F.pad(rows, pads) if any(pads) else rows


class _BottomK(Statistic):
    """Priorities [k] and one tensor [k, ...] per payload; unused slots have priority EMPTY."""

    rows: int
    seed: int

    def __init__(self) -> None:
        if self.rows < 1:
            msg = f"a reservoir of {self.rows} rows cannot hold any"
            raise ConfigError(msg)
        self.priority: Tensor | None = None
        self.payloads: list[Tensor] = []

    def fields(self) -> dict[str, Tensor]:
        """The tensors, rows in the order of their priority."""
        if self.priority is None:
            return {}
        order = self.priority.argsort(stable=True)
        named = {f"payload{i}": rows[order] for i, rows in enumerate(self.payloads)}
        return {"priority": self.priority[order]} | named

    def _load(self, fields: dict[str, Tensor]) -> None:
        if fields:
            self.priority = fields["priority"]
            self.payloads = [fields[f"payload{i}"] for i in range(len(fields) - 1)]

    def _priorities(self, payloads: list[Tensor], keep: Tensor | None) -> Tensor:
        """int64 [B, n]; rows that do not count get EMPTY."""
        content = _fingerprint(payloads[0])
        for other in payloads[1:]:
            content = _mix(content) + _fingerprint(other)
        kept = None if keep is None else _plain(keep)
        counted = content if kept is None else content * kept
        whole = counted.sum(1)[:, None]
        position = _plain(torch.arange(content.shape[1], device=payloads[0].device))
        salt = (self.seed * ODD + (1 << 63)) % (1 << 64) - (1 << 63)  # wrapped to int64
        priority = _mix(content + ((whole + position) * ODD_TOO + salt)) & (EMPTY - 1)
        if kept is not None:
            priority = priority * kept + EMPTY * ~kept
        return torch.as_tensor(priority)

    def _offer(self, payloads: list[Tensor], keep: Tensor | None) -> None:
        """Offer candidate rows, each payload [B, n, ...]."""
        if payloads[0].shape[0] * payloads[0].shape[1] == 0:
            return
        priority = self._priorities(payloads, keep).flatten()
        self._admit(priority, [rows.flatten(0, 1) for rows in payloads])

    def _admit(self, priority: Tensor, payloads: list[Tensor]) -> None:
        """Keep the smallest priorities of what is held and what is offered."""
        if self.priority is None:
            self.priority = torch.full((self.rows,), EMPTY, device=priority.device)
            self.payloads = [rows.new_zeros(self.rows, *rows.shape[1:]) for rows in payloads]
        shapes = [
            [max(a, b) for a, b in zip(old.shape[1:], new.shape[1:], strict=True)]
            for old, new in zip(self.payloads, payloads, strict=True)
        ]
        self.payloads = [_pad_to(x, s) for x, s in zip(self.payloads, shapes, strict=True)]
        offered = [_pad_to(x, s) for x, s in zip(payloads, shapes, strict=True)]
        if priority.device.type == "cpu":
            self._replace(priority, offered)
        else:
            joined = torch.cat([self.priority, priority])
            self.priority, best = joined.topk(self.rows, largest=False)
            pairs = zip(self.payloads, offered, strict=True)
            self.payloads = [torch.cat(pair)[best] for pair in pairs]

    def _replace(self, priority: Tensor, offered: list[Tensor]) -> None:
        """Overwrite evicted slots only: once the sample has settled, few rows are copied."""
        assert self.priority is not None
        held, new = self.priority.numpy(), priority.numpy()
        if new.min() >= held.max():
            return
        best = np.concatenate([held, new]).argsort(kind="stable")[: self.rows]
        stays = np.zeros(self.rows, dtype=bool)
        stays[best[best < self.rows]] = True
        slots, taken = np.flatnonzero(~stays), np.sort(best[best >= self.rows]) - self.rows
        held[slots] = new[taken]
        for rows, others in zip(self.payloads, offered, strict=True):
            rows.numpy()[slots] = others.numpy()[taken]

    def _combine(self, other: Self) -> None:
        fields = other.fields()
        payloads = [fields[f"payload{i}"] for i in range(len(fields) - 1)]
        self._admit(fields["priority"], payloads)

    def _sampled(self) -> list[Tensor]:
        if self.priority is None:
            return []
        fields = self.fields()
        valid = fields["priority"] < EMPTY
        return [fields[f"payload{i}"][valid] for i in range(len(self.payloads))]


class Reservoir(_BottomK):
    """A sample of the vectors along `axis` of a value.

    Args:
        axis: channel axis.
        rows: vectors kept.
        per_sample: vectors of one sample that are candidates, at fixed spread positions.
        seed: another seed, another sample.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("axis", "rows", "per_sample", "seed")

    def __init__(self, axis: int = -1, rows: int = 256, per_sample: int = 8, seed: int = 0) -> None:
        self.axis = axis
        self.rows = rows
        self.per_sample = per_sample
        self.seed = seed
        super().__init__()

    def observe(self, seen: Observation) -> None:  # noqa: D102
        room = None if seen.later is None else seen.room
        seen.put_off(self._offer_one, *seen.vectors(self.axis, self.per_sample, room))

    def _offer_one(self, values: Tensor, keep: Tensor | None) -> None:
        self._offer([values], keep)

    def sampled(self) -> Tensor:
        """fp32 [n, C], n <= rows, in an order that depends on content only."""
        found = self._sampled()
        return found[0] if found else torch.zeros(0, 0)


class JointReservoir(_BottomK):
    """Rows of several values at the same sampled indices.

    With attention probabilities [B, H, T, S], values [B, H, S, D] and outputs [B, H, T, D],
    ``leads=(3, 2, 3)`` samples indices (b, h, t) and keeps A[b, h, t] [S], V[b, h] [S, D] and
    O[b, h, t] [D]. Payloads whose length varies between batches are padded with zeros.

    Args:
        leads: per value, how many of its leading dimensions the sampled index runs over; the
            first has the longest.
        rows, per_sample, seed: as in `Reservoir`.
        index_axis: a leading dimension whose index is kept as one more payload [1]; 0: none.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("leads", "rows", "per_sample", "seed", "index_axis")

    def __init__(
        self, leads: tuple[int, ...], rows: int = 128, per_sample: int = 4, seed: int = 0,
        *, index_axis: int = 0,
    ) -> None:  # fmt: skip
        if not leads or min(leads) < 1 or max(leads) != leads[0]:
            msg = f"leads={leads}; allowed: numbers from 1, the first the largest"
            raise ConfigError(msg)
        if not 0 <= index_axis < leads[0]:
            msg = f"index_axis={index_axis}; allowed: 0 to {leads[0] - 1}"
            raise ConfigError(msg)
        self.leads = tuple(leads)
        self.index_axis = index_axis
        self.rows = rows
        self.per_sample = per_sample
        self.seed = seed
        super().__init__()

    def observe(self, seen: Observation) -> None:  # noqa: D102
        self.observe_all([seen])

    def update_all(self, values: Sequence[Tensor]) -> None:
        """Add the samples of several values at once."""
        self.observe_all([Observation(value) for value in values])

    def observe_all(self, seen: Sequence[Observation]) -> None:
        """Add an observation of each value.

        Raises:
            CalibrationError: if the values do not share their leading dimensions.
        """
        values = [each.x for each in seen]
        lead = values[0].shape[: self.leads[0]]
        shapes = [list(v.shape) for v in values]
        same = [v.shape[:n] == lead[:n] for v, n in zip(values, self.leads, strict=False)]
        if len(values) != len(self.leads) or not all(same):
            msg = f"values of shapes {shapes} do not share leading dimensions {self.leads}"
            raise CalibrationError(msg)
        inner = tuple(lead[1:])
        if math.prod(lead) == 0:
            return
        index = spread_indices(inner, self.per_sample, values[0].device)[1] if inner else ()
        payloads = []
        for value, n in zip(values, self.leads, strict=True):
            picked = Observation.at(value, index[: n - 1]) if n > 1 else value.unsqueeze(1)
            count = index[0].shape[0] if inner else 1
            payloads.append(picked.expand(picked.shape[0], count, *value.shape[n:]))
        if self.index_axis:
            places = index[self.index_axis - 1].to(torch.float32).view(1, -1, 1)
            payloads.append(places.expand(lead[0], -1, -1))
        self._offer(payloads, None)

    def sampled(self) -> tuple[Tensor, ...]:
        """One fp32 tensor [n, ...] per value, the same index at the same place.

        With `index_axis`, one more: that index of each row, [n, 1].
        """
        return tuple(self._sampled())
