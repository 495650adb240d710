# SPDX-License-Identifier: Apache-2.0
"""What a statistic is, and the observation of one tensor that several statistics share.

A statistic is a mergeable summary with bounded memory. Its value depends on the multiset of
samples (rows of dim 0), not on how they were batched, ordered or spread over ranks. Shared
intermediate results (extrema, sampled values) are computed once per tensor by `Observation`.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from qgraph.calibration.later import Later
from qgraph.calibration.sampling import (
    RUN,
    run_count,
    run_rows,
    spread_indices,
    stride_for,
    unravelled,
)
from qgraph.errors import ArtifactError, CalibrationError, ConfigError

INF = float("inf")


class Extrema(NamedTuple):
    """Smallest and largest finite value ([] or [C] fp32), and how many values there were."""

    low: Tensor
    high: Tensor
    seen: int | Tensor
    nonfinite: int | Tensor


class Sample(NamedTuple):
    """Sampled values; `keep` marks those that count (None: all)."""

    values: Tensor
    keep: Tensor | None


def channel_axis(axis: int, ndim: int) -> int:
    """`axis` counted from the front; dim 0 is the sample axis and cannot be a channel axis."""
    front = axis + ndim if axis < 0 else axis
    if not 0 < front < ndim and not (ndim == 1 and front == 0):
        msg = f"channel axis {axis} does not fit a value of {ndim} dimensions [sample, ...]"
        raise ConfigError(msg)
    return front


Axes = int | tuple[int, ...]
Room = Callable[[tuple[int, ...]], Tensor]  # an uninitialised fp32 tensor of a shape, on the host


def channel_axes(axes: Axes, ndim: int) -> tuple[int, ...]:
    """Channel axes counted from the front; several axes are one channel axis, flattened."""
    several = axes if isinstance(axes, tuple) else (axes,)
    return tuple(channel_axis(axis, ndim) for axis in several)


class Observation:
    """One tensor as statistics see it: fp32, with lazily computed, shared reads.

    Args:
        x: floating tensor; dim 0 is the sample axis.
        mask: bool [B, T]: True where a row of x [B, T, C] counts (a token that is not padding).
            Values that do not have exactly one dimension more than the mask ignore it.
        later: takes small work on the host; None: it is done at once.
    """

    def __init__(self, x: Tensor, mask: Tensor | None = None, later: Later | None = None) -> None:
        if not x.is_floating_point():
            msg = f"statistics need a floating tensor, got {x.dtype} {list(x.shape)}"
            raise CalibrationError(msg)
        x = x.detach()
        self.x = x if x.dtype == torch.float32 else x.to(torch.float32)
        self.later = later if self.on_host else None
        if self.x.ndim < 2:
            self.x = self.x.reshape(1, -1)
        fits = mask is not None and mask.ndim + 1 == x.ndim and mask.shape == x.shape[:-1]
        self.mask = mask.to(x.device, torch.bool) if fits and mask is not None else None
        self._extrema: Extrema | None = None
        self._channels: dict[tuple[int, ...], Extrema] = {}
        self._rows: Tensor | None = None
        self._samples: dict[tuple[int, int, int], Sample] = {}

    @property
    def on_host(self) -> bool:
        """Whether reading a scalar back costs nothing."""
        return self.x.device.type == "cpu"

    def room(self, shape: tuple[int, ...]) -> Tensor:
        """Uninitialised fp32 beside the value, for what is then `put_off`."""
        if not self.on_host:
            return torch.empty(shape, device=self.x.device)
        return scratch(shape) if self.later is None else self.later.room(shape)

    def put_off(self, work: Callable[..., None], values: Tensor, *rest: Any) -> None:
        """Call ``work(values, *rest)``, later if that is possible; see `Later.put_off`."""
        if self.later is None:
            work(values, *rest)
        else:
            self.later.put_off(work, values, *rest)

    @staticmethod
    def at(x: Tensor, index: tuple[Tensor, ...]) -> Tensor:
        """Every sample of x [B, ...] at the same positions: [B, n, rest]."""
        return x[(slice(None), *index)]  # type: ignore[index]

    def rows(self) -> Tensor:
        """All rows that count, [N, C] (last axis C)."""
        if self._rows is None:
            x, mask = self.x, self.mask
            self._rows = x.reshape(-1, x.shape[-1]) if mask is None else x[mask]
        return self._rows

    def extrema(self) -> Extrema:
        """Extrema over everything."""
        if self._extrema is None:
            if self._channels:
                per_channel = next(iter(self._channels.values()))
                low, high = per_channel.low.amin(), per_channel.high.amax()
                self._extrema = Extrema(low, high, per_channel.seen, per_channel.nonfinite)
            else:
                self._extrema = self._reduce(())
        return self._extrema

    def channel_extrema(self, axis: Axes) -> Extrema:
        """Extrema per channel of `axis`; several axes (such as head and channel) are flattened."""
        axes = channel_axes(axis, self.x.ndim)
        if axes not in self._channels:
            found = self._reduce(axes)
            self._channels[axes] = found._replace(
                low=found.low.flatten(), high=found.high.flatten()
            )
        return self._channels[axes]

    def _reduce(self, axes: tuple[int, ...]) -> Extrema:
        x, weight = self.x, self.mask
        if weight is not None and self.on_host and axes in {(), (x.ndim - 1,)}:
            x, weight, axes = self.rows(), None, (1,) if axes else ()
        dims = [d for d in range(x.ndim) if d not in axes]
        shape = [x.shape[axis] for axis in axes]
        if x.numel() == 0:
            return Extrema(x.new_full(shape, INF), x.new_full(shape, -INF), 0, 0)
        if self.on_host and weight is None:
            # two reads of what was just made, not aminmax: see `python -m benchmarks.extrema`
            low, high = x.amin(dims), x.amax(dims)
            # an end that is NaN or infinite makes this sum so; torch.isfinite costs four reads
            if math.isfinite((low.sum() if axes else low).item()) and math.isfinite(
                (high.sum() if axes else high).item()
            ):
                return Extrema(low, high, x.numel(), 0)
        finite = torch.isfinite(x)
        counted = torch.ones_like(finite) if weight is None else weight.unsqueeze(-1)
        counted = counted.expand_as(x)
        ok = finite & counted
        low = torch.where(ok, x, INF).amin(dims)
        high = torch.where(ok, x, -INF).amax(dims)
        total = counted.sum()
        return Extrema(low, high, total, total - ok.sum())

    def sample(self, rate: int, floor: int = 4096, cap: int = 1 << 16) -> Sample:
        """Values [B, ...] in runs at a fixed stride inside each sample; see `stride_for`."""
        key = (rate, floor, cap)
        if key not in self._samples:
            self._samples[key] = self._strided(*key)
        return self._samples[key]

    def _strided(self, rate: int, floor: int, cap: int) -> Sample:
        x = self.x
        count, length = x.shape[0], math.prod(x.shape[1:])
        stride = stride_for(length, rate, floor, cap)
        if stride == 1:
            values = x.reshape(count, length)
        elif x.is_contiguous():
            runs = (count, run_count(length, stride), RUN)
            values = x.as_strided(runs, (length, stride, 1))
        else:
            values = self.at(x, unravelled(tuple(x.shape[1:]), stride, x.device))
        if self.mask is None:
            return Sample(values, None)
        tokens = run_rows(length, stride, x.shape[-1], x.device)
        return Sample(values, self.mask.flatten(1)[:, tokens].view(values.shape))

    def vectors(self, axis: Axes, count: int, room: Room | None = None) -> Sample:
        """Vectors [B, n, C] along `axis`, at n <= `count` fixed positions of each sample.

        They lie in memory that `room` gives for their shape; without it they are valid until the
        next call only, since tensors share a buffer, and may be a view of the value.
        """
        axes = channel_axes(axis, self.x.ndim)
        y = self.x.movedim(axes, tuple(range(-len(axes), 0)))
        inner = tuple(y.shape[1 : -len(axes)])
        if not inner:
            keep = None if self.mask is None else self.mask.unsqueeze(1)
            return Sample(_placed(y.flatten(1).unsqueeze(1), room), keep)
        flat, index = spread_indices(inner, count, y.device)
        use_mask = self.mask is not None and axes == (self.x.ndim - 1,)
        keep = self.mask.flatten(1)[:, flat] if use_mask and self.mask is not None else None
        if len(index) > 1 or not self.on_host:
            return Sample(_placed(self.at(y, index).flatten(2), room), keep)
        out = (room or scratch)((y.shape[0], len(flat), *y.shape[2:]))
        return Sample(torch.index_select(y, 1, index[0], out=out).flatten(2), keep)


def _placed(rows: Tensor, room: Room | None) -> Tensor:
    return rows if room is None else room(tuple(rows.shape)).copy_(rows)


_ROOM = threading.local()


def scratch(shape: tuple[int, ...]) -> Tensor:
    """An uninitialised fp32 tensor on the host, valid until the next call of this thread.

    Fresh memory costs more than what is done in it here: the system clears every page.
    """
    size = math.prod(shape)
    held: Tensor | None = getattr(_ROOM, "held", None)
    if held is None or held.numel() < size:
        held = _ROOM.held = torch.empty(size, device="cpu")
    return held[:size].view(shape)


def count_indices(index: Tensor, size: int) -> Tensor:
    """int64 [size]: how often each value of `index` occurs (all in [0, size)); no host round trip.

    torch.bincount waits for the device, so devices other than the CPU scatter instead.
    """
    index = index.reshape(-1)
    if index.device.type == "cpu":
        return torch.bincount(index, minlength=size)
    counts = torch.zeros(size, dtype=torch.int64, device=index.device)
    return counts.scatter_add_(0, index.long(), torch.ones_like(index, dtype=torch.int64))


class Statistic(ABC):
    """A mergeable summary of a value; see the module docstring.

    Class attributes:
        OPTIONS: names of the constructor's options (ints or tuples of ints), kept as attributes.
        FIELDS: names of the tensor attributes that hold the summary; None before the first
            update where the shape is not known yet.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ()
    FIELDS: ClassVar[tuple[str, ...]] = ()

    def update(self, x: Tensor, *, mask: Tensor | None = None) -> None:
        """Add the samples of `x` (dim 0 is the sample axis); `mask` as in `Observation`."""
        self.observe(Observation(x, mask))

    @abstractmethod
    def observe(self, seen: Observation) -> None:
        """Add an observation."""

    @abstractmethod
    def _combine(self, other: Self) -> None:
        """Add another summary with the same options, on the same device, not empty."""

    def merge(self, other: Self) -> None:
        """Add what `other` has seen.

        Raises:
            ConfigError: if the two were made with different options.
        """
        if type(self) is not type(other) or self.options() != other.options():
            msg = f"cannot merge {other!r} into {self!r}"
            raise ConfigError(msg)
        theirs = other.fields()
        mine = self.fields()
        if not mine:
            self._load({name: value.clone() for name, value in theirs.items()})
        elif theirs:
            device = next(iter(mine.values())).device
            same = self.from_state(other.state())
            same.place(device)
            self._combine(same)

    def options(self) -> dict[str, int | tuple[int, ...]]:
        """The constructor's options."""
        return {name: getattr(self, name) for name in self.OPTIONS}

    def fields(self) -> dict[str, Tensor]:
        """The summary's tensors that exist."""
        found = {name: getattr(self, name) for name in self.FIELDS}
        return {name: value for name, value in found.items() if value is not None}

    def _load(self, fields: dict[str, Tensor]) -> None:
        for name, value in fields.items():
            if name not in self.FIELDS:
                msg = f"{type(self).__name__} has no field {name!r}; it has {self.FIELDS}"
                raise ArtifactError(msg)
            setattr(self, name, value)

    def place(self, device: torch.device) -> None:
        """Move the summary to a device."""
        self._load({name: value.to(device) for name, value in self.fields().items()})

    def state(self) -> dict[str, Tensor]:
        """Everything as tensors: copies of the fields, and the options as ``option.<name>``."""
        options = {f"option.{k}": torch.tensor(v) for k, v in self.options().items()}
        return options | {k: v.clone() for k, v in self.fields().items()}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        """Rebuild from `state()`.

        Raises:
            ArtifactError: on a field that this statistic does not have.
        """
        options: dict[str, int | tuple[int, ...]] = {}
        for name in cls.OPTIONS:
            value = state[f"option.{name}"].tolist()
            options[name] = tuple(value) if isinstance(value, list) else value
        made = cls(**options)
        made._load({k: v.clone() for k, v in state.items() if not k.startswith("option.")})
        return made

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v}" for k, v in self.options().items())
        return f"{type(self).__name__}({options})"
