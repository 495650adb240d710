# SPDX-License-Identifier: Apache-2.0
"""The ranks of a torch.distributed job: who does what, and what they tell each other.

Messages are tensors packed as safetensors, in pieces of bounded size, over point-to-point sends
along a binary tree; nothing is pickled but short texts. Losing a rank is a typed error on all
others, and so is an error that one rank meets while the others wait for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor
from torch.fx import GraphModule
from torch.utils.data import DistributedSampler

from qgraph.errors import ConfigError, QGraphError, RankError
from qgraph.graph.verify import checksum, structure, tensors

Group = dist.ProcessGroup | None
T = TypeVar("T")


class Share(Iterable[Any]):
    """Every size-th batch of a loader that all ranks hold; has a length where the loader has."""

    def __init__(self, loader: Iterable[Any], rank: int, size: int) -> None:
        sampler = getattr(loader, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            msg = (
                "the calibration loader has a DistributedSampler; give every rank the whole "
                "loader, whose batches are shared out here"
            )
            raise ConfigError(msg)
        self.loader, self.rank, self.size = loader, rank, size

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.loader, (list, tuple)):
            return iter(self.loader[self.rank :: self.size])
        return itertools.islice(iter(self.loader), self.rank, None, self.size)

    def number(self, at: int) -> int:
        """Where the batch at this position lies in the loader."""
        return self.rank + at * self.size

    def __len__(self) -> int:
        if not isinstance(self.loader, Sized):
            msg = f"{type(self.loader).__name__} has no length"
            raise TypeError(msg)
        return len(range(self.rank, len(self.loader), self.size))


@dataclass(frozen=True)
class Ranks:
    """This process among those of its job.

    Attributes:
        rank: its number.
        size: how many there are; 1 outside a job.
        group: the process group; None: all.
    """

    rank: int = 0
    size: int = 1
    group: Group = None

    @classmethod
    def here(cls, group: Group = None) -> Ranks:
        """The ranks of the running job."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    @property
    def writes(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.rank == 0

    def share(self, loader: Iterable[Any]) -> Iterable[Any]:
        """This rank's batches."""
        return loader if self.size == 1 else Share(loader, self.rank, self.size)

    def quota(self, count: int) -> int:
        """How many of the first `count` batches are this rank's."""
        return len(range(self.rank, count, self.size))

    def gather(self, text: str, what: str) -> list[str]:
        """A short text of every rank, in rank order.

        Raises:
            RankError: a rank is gone.
        """
        if self.size == 1:
            return [text]
        found: list[str | None] = [None] * self.size
        with self._watched(what):
            dist.all_gather_object(found, text, group=self.group)
        return [str(each) for each in found]

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Run a part that each rank does alone; if one fails, all fail, saying which and why.

        Raises:
            RankError: another rank failed or is gone; this rank's own error comes unchanged.
        """
        try:
            yield
        except QGraphError as error:
            self.gather(f"{type(error).__name__}: {error}", what)
            raise
        told = self.gather("", what)
        bad = [f"rank {rank}: {text}" for rank, text in enumerate(told) if text]
        if bad:
            msg = f"{what} failed on {len(bad)} of {self.size} ranks; {'; '.join(bad)}"
            raise RankError(msg)

    def spread(self, count: int, work: Callable[[int], T], what: str) -> list[T]:
        """``[work(0), ..., work(count - 1)]``, each done by one rank.

        `work` gives a number, a text, or a flat tuple of these.

        Raises:
            RankError: `work` failed on another rank, or a rank is gone.
        """
        if self.size == 1:
            return [work(number) for number in range(count)]
        with self.together(what):
            mine = {number: work(number) for number in range(self.rank, count, self.size)}
        found: dict[int, Any] = {}
        for text in self.gather(json.dumps(mine), what):  # floats come back with the same bits
            for number, value in json.loads(text).items():
                found[int(number)] = tuple(value) if isinstance(value, list) else value
        return [found[number] for number in range(count)]

    def agree(self, what: str, digest: str) -> None:
        """Raise `RankError` unless all ranks hold the same."""
        told = self.gather(digest, what)
        odd = [rank for rank, each in enumerate(told) if each != told[0]]
        if odd:
            msg = (
                f"{what} differs between rank 0 and rank {', '.join(map(str, odd))}; give all "
                "ranks the same model, loader, options, threads and kind of machine"
            )
            raise RankError(msg)

    def send(self, tensors: Sequence[dict[str, Tensor]], to: int, what: str) -> None:
        """Send named tensors to a rank."""
        packed = _pack(tensors, self._device())
        with self._watched(what):
            dist.send(torch.tensor([packed.numel()], device=packed.device), self._global(to),
                      group=self.group)  # fmt: skip
            dist.send(packed, self._global(to), group=self.group)

    def receive(self, source: int, what: str) -> list[dict[str, Tensor]]:
        """What `send` sent."""
        length = torch.zeros(1, dtype=torch.int64, device=self._device())
        with self._watched(what):
            dist.recv(length, self._global(source), group=self.group)
            packed = torch.empty(int(length), dtype=torch.uint8, device=length.device)
            dist.recv(packed, self._global(source), group=self.group)
        return _unpack(packed)

    def broadcast(self, tensors: Sequence[dict[str, Tensor]], what: str) -> list[dict[str, Tensor]]:
        """The named tensors of rank 0, on every rank."""
        packed = _pack(tensors if self.rank == 0 else (), self._device())
        length = torch.tensor([packed.numel()], device=packed.device)
        with self._watched(what):
            dist.broadcast(length, self._global(0), group=self.group)
            if self.rank:
                packed = torch.empty(int(length), dtype=torch.uint8, device=length.device)
            dist.broadcast(packed, self._global(0), group=self.group)
        return _unpack(packed)

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def _device(self) -> torch.device:
        return torch.device("cuda" if dist.get_backend(self.group) == "nccl" else "cpu")

    @contextlib.contextmanager
    def _watched(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            cause = str(error).splitlines()[0].split(". ")[0]
            msg = (
                f"rank {self.rank} of {self.size} lost another rank during {what} ({cause}); look "
                "at the first error among all ranks' logs, then start the job again: with "
                "cache_dir= finished work is kept"
            )
            raise RankError(msg) from error


def _pack(tensors: Sequence[dict[str, Tensor]], device: torch.device) -> Tensor:
    flat = {
        f"{number}/{name}": value.cpu().contiguous()
        for number, each in enumerate(tensors)
        for name, value in each.items()
    }
    return torch.frombuffer(bytearray(save(flat)), dtype=torch.uint8).to(device)


def _unpack(packed: Tensor) -> list[dict[str, Tensor]]:
    found: dict[int, dict[str, Tensor]] = {}
    for key, value in load(packed.cpu().numpy().tobytes()).items():
        number, _, name = key.partition("/")
        found.setdefault(int(number), {})[name] = value
    return [found[number] for number in sorted(found)]


def check_equal(module: GraphModule) -> None:
    """Raise `RankError` unless all ranks of the job hold the same graph and tensors."""
    ranks = Ranks.here()
    if ranks.size > 1:
        content = [structure(module), *((n, checksum(t)) for n, t in tensors(module).items())]
        ranks.agree("the quantized graph", hashlib.sha256(repr(content).encode()).hexdigest())


def own_folder(folder: Path) -> Path:
    """Where this rank keeps state, apart from the others; rank 0 where a lone process would."""
    rank = Ranks.here().rank
    return folder / f"rank{rank}" if rank else folder


@contextlib.contextmanager
def job(timeout: float = 1800.0) -> Iterator[Ranks]:
    """The job that torchrun started, joined for the time of the context; else a lone process.

    A running process group is used as it is. Without CUDA ranks talk over gloo.

    Args:
        timeout: seconds that a rank waits for another one.

    Raises:
        RankError: not all ranks came.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if alone or not dist.is_available() or dist.is_initialized():
        yield Ranks.here()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        msg = f"the job of {os.environ['WORLD_SIZE']} processes cannot start: {error}"
        raise RankError(msg) from error
    try:
        yield Ranks.here()
    finally:
        dist.destroy_process_group()
