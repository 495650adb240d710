# SPDX-License-Identifier: Apache-2.0
"""All statistics of one value, served from one shared observation of each tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from torch import Tensor
from torch.fx import Node

from qgraph.calibration.channel_histogram import ChannelHistogram
from qgraph.calibration.extrema import ChannelRange, Range
from qgraph.calibration.histogram import Histogram
from qgraph.calibration.later import Later
from qgraph.calibration.moments import Gram, Moments
from qgraph.calibration.reservoir import JointReservoir, Reservoir
from qgraph.calibration.statistics import Observation, Statistic
from qgraph.errors import CalibrationError, ConfigError, unknown_name
from qgraph.graph.requests import Request

S = TypeVar("S", bound=Statistic)

KINDS: dict[str, type[Statistic]] = {
    kind.__name__: kind
    for kind in (
        Range, ChannelRange, Moments, Gram, Histogram, ChannelHistogram, Reservoir, JointReservoir,
    )
}  # fmt: skip


def make_statistic(kind: str, **options: int | tuple[int, ...]) -> Statistic:
    """A statistic by its class name.

    Raises:
        ConfigError: on an unknown kind or option; names the nearest.
    """
    if kind not in KINDS:
        what = "statistic"
        raise unknown_name(what, kind, KINDS)
    for name in options:
        if name not in KINDS[kind].OPTIONS:
            what = f"option of {kind}"
            raise unknown_name(what, name, KINDS[kind].OPTIONS)
    return KINDS[kind](**options)


class FusedStatistics:
    """The statistics of one value (or, for joint ones, of several values).

    Equal requests are served once; ranges per channel also give the tensor's range; sampled
    values are shared.

    Args:
        statistics: what to gather.
        check: whether a non-finite value is an error of the sweep. Off for values such as masked
            logits, where -inf is meant.
    """

    def __init__(self, statistics: Iterable[Statistic], *, check: bool = True) -> None:
        unique: dict[str, Statistic] = {}
        for statistic in statistics:
            unique.setdefault(repr(statistic), statistic)
        # per-channel ranges first: the tensor's range then costs nothing
        order = sorted(unique.values(), key=lambda s: not isinstance(s, ChannelRange))
        self.statistics: tuple[Statistic, ...] = tuple(order)
        self.check = check

    def update(
        self, x: Tensor, *, mask: Tensor | None = None, later: Later | None = None
    ) -> int | Tensor:
        """Add the samples of `x`; returns how many values were NaN or infinite.

        What `later` takes counts from its next run on.
        """
        seen = Observation(x, mask, later)
        if not seen.x.shape[0]:
            return 0
        for statistic in self.statistics:
            statistic.observe(seen)
        return seen.extrema().nonfinite if self.check else 0

    def update_all(self, values: Sequence[Tensor]) -> None:
        """Add the samples of several values to the joint statistics."""
        seen = [Observation(value) for value in values]
        for statistic in self.statistics:
            if not isinstance(statistic, JointReservoir):
                msg = f"{statistic!r} summarises one value, got {len(values)}"
                raise ConfigError(msg)
            statistic.observe_all(seen)

    def merge(self, other: FusedStatistics) -> None:
        """Add what `other` has seen."""
        for mine, theirs in zip(self.statistics, other.statistics, strict=True):
            mine.merge(theirs)

    def get(self, kind: type[S], **options: int | tuple[int, ...]) -> S:
        """The statistic of a class, and with these options where several were asked for.

        Raises:
            CalibrationError: if none was asked for.
        """
        found = self.find(kind, **options)
        if found is None:
            msg = f"no {kind.__name__}{options or ''} here; there are {list(self.statistics)}"
            raise CalibrationError(msg)
        return found

    def find(self, kind: type[S], **options: int | tuple[int, ...]) -> S | None:
        """Like `get`, but None where none was asked for."""
        for statistic in self.statistics:
            if isinstance(statistic, kind) and options.items() <= statistic.options().items():
                return statistic
        return None

    def range(self) -> Range:
        """The tensor's range, from `Range` or else from a `ChannelRange`."""
        whole = self.find(Range)
        return whole if whole is not None else self.get(ChannelRange).tensor_range()

    def state(self) -> dict[str, Tensor]:
        """All states, as ``<statistic>/<name>``."""
        states = ((repr(each), each.state()) for each in self.statistics)
        return {f"{name}/{key}": value for name, state in states for key, value in state.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Replace the statistics by saved ones of the same kinds and options."""
        loaded = []
        for each in self.statistics:
            prefix = f"{each!r}/"
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            loaded.append(type(each).from_state(own))
        self.statistics = tuple(loaded)


def build_statistics(
    requests: Iterable[Request],
) -> dict[Node | tuple[Node, ...], FusedStatistics]:
    """Statistics for every requested value; equal requests are served once.

    Keys are nodes, or tuples of nodes for statistics over several values.
    """
    wanted: dict[Node | tuple[Node, ...], list[Statistic]] = {}
    for request in dict.fromkeys(requests):
        options = dict(request.options)
        statistic = make_statistic(request.kind, **options)  # type: ignore[arg-type]
        joint = (request.node, *request.partners) if request.partners else request.node
        wanted.setdefault(joint, []).append(statistic)
    return {key: FusedStatistics(each) for key, each in wanted.items()}
