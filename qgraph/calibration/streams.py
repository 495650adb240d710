# SPDX-License-Identifier: Apache-2.0
"""Streams: the values between regions for all samples, sample-major, in memory or in mapped files.

Each region reads rows of its inputs and writes rows of its outputs, so a chain of regions costs
one pass over the network, however many regions there are. Samples of other shapes lie in buckets
of their own; every sample counts, those of a short last batch too.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from qgraph.calibration.loader import Arguments, Signature
from qgraph.calibration.out_of_memory import with_smaller_batches
from qgraph.calibration.sweep import Masks
from qgraph.errors import CalibrationError

DEFAULT_MEMORY = 2 << 30  # bytes in memory before values go to files
ROW_MASK = "row mask"
GUARD = 8  # one sample of so many is held out
_UNSAFE = str.maketrans(dict.fromkeys("/\\:. ", "_"))


class Shelf:
    """Hands out big tensors: in memory within a budget, else in memory-mapped files.

    Attributes:
        folder: where files go; None makes a temporary folder when the first is needed.
        persistent: whether every tensor is a file, so that a killed run finds it again.
        in_memory, on_disk: bytes handed out so far.
    """

    def __init__(
        self, folder: Path | None = None, *, max_memory: int | None = None,
        persistent: bool = False,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.persistent = persistent
        self.budget = DEFAULT_MEMORY if max_memory is None else max_memory
        self.in_memory = self.on_disk = 0
        self._held: dict[str, int] = {}

    def allocate(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor under a name that is not in use."""
        size = math.prod(shape) * dtype.itemsize
        if not self.persistent and self.in_memory + size <= self.budget:
            self.in_memory += size
            self._held[name] = size
            return torch.empty(tuple(shape), dtype=dtype)
        self.on_disk += size
        path = self.path(name)
        _reserve(path, size)
        return mapped(path, shape, dtype)

    def put(self, name: str, value: Tensor) -> Tensor:
        """A copy of a tensor, under a name that is not in use."""
        return self.allocate(name, value.shape, value.dtype).copy_(value)

    def path(self, name: str) -> Path:
        """The file of a name."""
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="qgraph-"))
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{name.translate(_UNSAFE)}.bin"

    def free(self, name: str) -> None:
        """Forget a tensor; a file's mapping stays valid until its last reader is gone."""
        if name in self._held:
            self.in_memory -= self._held.pop(name)
        elif self.folder is not None:
            self.path(name).unlink(missing_ok=True)


def _reserve(path: Path, size: int) -> None:
    """Take the space at once: writing to a mapping on a full disk would end the process."""
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate") and size:
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        msg = f"{path}: {size} bytes for activations cannot be had: {error.strerror or error}"
        raise CalibrationError(msg) from error


def mapped(path: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor whose bytes are the file's."""
    count = math.prod(shape)
    if count == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(tuple(shape))


@dataclass
class Bucket:
    """Samples of one shape.

    Attributes:
        samples: their numbers in the order of the loader.
        values: per port a tensor [samples, rows, ...]: each sample owns `rows` rows; ports
            without a batch axis hold [1, ...] and are listed in `shared`.
        shared: ports that are the same for all samples.
    """

    samples: list[int]
    values: dict[str, Tensor] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)

    def rows(self, port: str, picks: Tensor | slice) -> Tensor:
        """Rows of a port for some samples (positions in the bucket), as the network sees them."""
        stored = self.values[port]
        if port in self.shared:
            return stored[0]
        return stored[picks].flatten(0, 1)


class Batching:
    """How values of a traced graph belong to samples.

    Attributes:
        dynamic: whether the graph takes any number of samples; if not, a sample is a whole batch.
        growing: names of the values whose first axis grows with the batch.
    """

    def __init__(self, module: GraphModule) -> None:
        tensors = {
            node.name: node.meta["val"]
            for node in module.graph.nodes
            if isinstance(node.meta.get("val"), Tensor)
        }
        self.growing = {
            name for name, value in tensors.items()
            if value.ndim and isinstance(value.shape[0], torch.SymInt)
        }  # fmt: skip
        self.dynamic = any(
            not isinstance(size, int)
            for node in module.graph.nodes
            if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor)
            for size in node.meta["val"].shape[:1]
        )

    def stored(self, name: str, value: Tensor, samples: int) -> tuple[Tensor, bool]:
        """The value as [samples, rows, ...], or [1, ...] where it is shared, and whether it is.

        Raises:
            CalibrationError: rows cannot be dealt out to the samples.
        """
        if not self.dynamic:
            return (value[None, None] if value.ndim == 0 else value.unsqueeze(0)), False
        if name not in self.growing:
            return value.unsqueeze(0), True
        if value.shape[0] % samples:
            msg = f"{name}: {value.shape[0]} rows cannot be dealt out to {samples} samples"
            raise CalibrationError(msg)
        return value.unflatten(0, (samples, -1)), False


@dataclass
class Stream:
    """Values of ports for all samples, by bucket.

    Attributes:
        label: prefix of file names.
        buckets: one per shape of sample.
    """

    label: str
    shelf: Shelf
    batching: Batching
    buckets: list[Bucket]

    def advance(
        self, run: Callable[..., tuple[Tensor, ...]], inputs: Sequence[str],
        outputs: Sequence[str], *, batch: int = 32, side: Stream | None = None,
    ) -> None:  # fmt: skip
        """Run a region over all samples and keep its outputs.

        Args:
            run: the region, from `inputs` to the tuple of `outputs`.
            inputs, outputs: names of ports.
            batch: samples per call.
            side: where to look for inputs that this stream does not hold.
        """
        with_smaller_batches(
            lambda size: self._advance(run, inputs, outputs, size, side),
            batch if self.batching.dynamic else 1, what=f"values {', '.join(outputs)}"[:80],
        )  # fmt: skip

    def _advance(
        self, run: Callable[..., tuple[Tensor, ...]], inputs: Sequence[str],
        outputs: Sequence[str], size: int, side: Stream | None,
    ) -> None:  # fmt: skip
        for number, bucket in enumerate(self.buckets):
            other = bucket if side is None else side.buckets[number]
            for start in range(0, len(bucket.samples), size):
                picks = slice(start, min(start + size, len(bucket.samples)))
                with torch.no_grad():
                    made = run(*(read(bucket, other, name, picks) for name in inputs))
                for name, value in zip(outputs, made, strict=True):
                    self._write(number, name, value, picks)

    def _write(self, number: int, name: str, value: Tensor, picks: slice) -> None:
        bucket = self.buckets[number]
        rows, shared = self.batching.stored(name, value, picks.stop - picks.start)
        if name not in bucket.values:
            count = 1 if shared else len(bucket.samples)
            key = self.key(number, name)
            bucket.values[name] = self.shelf.allocate(key, (count, *rows.shape[1:]), value.dtype)
            if shared:
                bucket.shared.add(name)
        bucket.values[name][slice(0, 1) if shared else picks] = rows

    def key(self, number: int, name: str) -> str:
        """Name of a tensor on the shelf."""
        return f"{self.label}-{name}-{number}"

    def drop(self, names: Iterable[str]) -> None:
        """Forget ports that nobody reads any more."""
        for number, bucket in enumerate(self.buckets):
            for name in names:
                if bucket.values.pop(name, None) is not None:
                    self.shelf.free(self.key(number, name))

    def manifest(self) -> list[dict[str, Any]]:
        """What `restore` needs to map the stored ports again."""
        return [
            {
                "samples": bucket.samples,
                "shared": sorted(bucket.shared),
                "values": {
                    name: [list(t.shape), str(t.dtype).removeprefix("torch.")]
                    for name, t in bucket.values.items()
                },
            }
            for bucket in self.buckets
        ]

    def restore(self, manifest: list[dict[str, Any]]) -> None:
        """Map the ports of a manifest from their files."""
        self.buckets = [Bucket(list(b["samples"]), {}, set(b["shared"])) for b in manifest]
        for number, saved in enumerate(manifest):
            for name, (shape, dtype) in saved["values"].items():
                path = self.shelf.path(self.key(number, name))
                kind = getattr(torch, dtype)
                self.buckets[number].values[name] = mapped(path, shape, kind)


def read(bucket: Bucket, other: Bucket, name: str, picks: Tensor | slice) -> Tensor:
    """Rows of a port from the bucket, or from its twin in another stream."""
    return (bucket if name in bucket.values else other).rows(name, picks)


def begin(
    module: GraphModule, loader: Iterable[Any], adapt: Callable[[Any], Arguments], shelf: Shelf,
    *, max_samples: int | None = None, row_masks: Masks | None = None,
) -> Stream:  # fmt: skip
    """The stream of a graph's inputs: one pass over the loader, within the shelf's memory.

    `row_masks` is kept beside them under the name `ROW_MASK`.

    Raises:
        CalibrationError: no batches, or inputs that do not fit the signature.
    """
    batching, signature = Batching(module), Signature.of(module)
    names = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    parts: dict[tuple[object, ...], list[tuple[int, dict[str, Tensor]]]] = {}
    numbers: dict[tuple[object, ...], list[int]] = {}
    taken = 0
    for count, batch in enumerate(loader):
        args, kwargs = adapt(batch)
        signature.check(args, kwargs, batch=count)
        leaves = dict(zip(names, signature.flat(args, kwargs), strict=True))
        here, rows = _rows(leaves, batching)
        mask = None if row_masks is None else row_masks(args, kwargs)
        if mask is not None:
            rows[ROW_MASK] = mask.bool().unsqueeze(1 if batching.dynamic else 0)
        if max_samples is not None and taken + here > max_samples:
            here, rows = _cut(rows, max_samples - taken)
        if here == 0:
            break
        key = _shape_key(rows)
        kept = {name: shelf.put(_part(count, name), value) for name, value in rows.items()}
        parts.setdefault(key, []).append((count, kept))
        numbers.setdefault(key, []).extend(range(taken, taken + here))
        taken += here
    if taken == 0:
        msg = "the calibration loader gave 0 batches"
        raise CalibrationError(msg)
    stream = Stream("float", shelf, batching, [Bucket(s) for s in numbers.values()])
    for number, group in enumerate(parts.values()):
        for name in [*group[0][1]]:
            _gather(stream, number, name, [part.pop(name) for _, part in group])
            for count, _ in group:
                shelf.free(_part(count, name))
    return stream


def _part(count: int, name: str) -> str:
    """Name of a batch's tensor on the shelf until all batches are there."""
    return f"batch-{count}-{name}"


def _rows(leaves: Mapping[str, Any], batching: Batching) -> tuple[int, dict[str, Tensor]]:
    """Samples of a batch and its tensors as [samples, rows, ...] or [1, ...]."""
    tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
    growing = [t.shape[0] for name, t in tensors.items() if name in batching.growing]
    samples = min(growing) if batching.dynamic and growing else 1
    return samples, {name: batching.stored(name, t, samples)[0] for name, t in tensors.items()}


def _cut(rows: dict[str, Tensor], count: int) -> tuple[int, dict[str, Tensor]]:
    return count, {name: t if t.shape[0] == 1 else t[:count] for name, t in rows.items()}


def _shape_key(rows: dict[str, Tensor]) -> tuple[object, ...]:
    return tuple((name, tuple(t.shape[1:])) for name, t in rows.items())


def _gather(stream: Stream, number: int, name: str, parts: list[Tensor]) -> None:
    bucket = stream.buckets[number]
    shared = stream.batching.dynamic and name not in stream.batching.growing | {ROW_MASK}
    count = 1 if shared else len(bucket.samples)
    key = stream.key(number, name)
    target = stream.shelf.allocate(key, (count, *parts[0].shape[1:]), parts[0].dtype)
    torch.cat(parts[:1] if shared else parts, out=target)
    bucket.values[name] = target
    if shared:
        bucket.shared.add(name)


def last_readers(inputs: Sequence[Sequence[str]]) -> dict[str, int]:
    """Per port the number of the last region that reads it."""
    return {name: number for number, names in enumerate(inputs) for name in names}


def split(stream: Stream, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Positions to train on and held-out ones, by bucket; one of eight samples is held out."""
    total = sum(len(b.samples) for b in stream.buckets)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(total, generator=generator).tolist()
    held = set(order[: -(-total // GUARD)]) if total > 1 else set()
    train, guard, at = [], [], 0
    for bucket in stream.buckets:
        places = range(len(bucket.samples))
        train.append([i for i in places if at + i not in held])
        guard.append([i for i in places if at + i in held])
        at += len(bucket.samples)
    return train, guard
