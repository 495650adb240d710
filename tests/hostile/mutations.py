# SPDX-License-Identifier: Apache-2.0
"""Ways to damage a saved model, by number: bytes as they lie, and values behind sound digests."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qgraph.artifact import container, write_file

ODD: tuple[Any, ...] = (
    None, True, 0, -1, 2**63, 2**70, -(2**70), 1e308, "", "x" * 300, "\0", "__class__",
    "aten::sin.default",
    [], {}, [[]], {"node": "ghost"}, {"dtype": "load"}, {"float": "nan"}, {"slice": [1]}, [0] * 50,
)  # fmt: skip
NUMBERS = (float("nan"), float("inf"), -1.0, 0.0, 1e-45, 3e38)


def flip(data: bytes, rng: random.Random) -> bytes:
    """One bit."""
    place = rng.randrange(8 * len(data))
    changed = bytearray(data)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def overwrite(data: bytes, rng: random.Random) -> bytes:
    """A run of other bytes."""
    at, size = rng.randrange(len(data)), rng.randint(1, 40)
    return data[:at] + rng.randbytes(size) + data[at + size :]


def insert(data: bytes, rng: random.Random) -> bytes:
    """Bytes too many."""
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.randint(1, 40)) + data[at:]


def remove(data: bytes, rng: random.Random) -> bytes:
    """Bytes too few."""
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.randint(1, 40) :]


def repeat(data: bytes, rng: random.Random) -> bytes:
    """A part once more."""
    at, size = rng.randrange(len(data)), rng.randint(1, 400)
    return data[: at + size] + data[at:]


def exchange(data: bytes, rng: random.Random) -> bytes:
    """Two parts change places."""
    first, second = sorted(rng.sample(range(len(data) - 40), 2))
    size = rng.randint(1, min(40, max(1, second - first)))
    changed = bytearray(data)
    changed[first : first + size], changed[second : second + size] = (
        changed[second : second + size],
        changed[first : first + size],
    )
    return bytes(changed)


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flip, overwrite, insert, remove, repeat, exchange,
)  # fmt: skip


def damaged_bytes(data: bytes, number: int) -> bytes:
    """The file with damage `number`, which always changes it."""
    rng = random.Random(number)
    changed = data
    while changed == data:
        changed = BYTES[number % len(BYTES)](data, rng)
    return changed


def forge(whole: Path, target: Path, number: int) -> str:
    """Write a file with sound digests and one to three odd values; tells what was done."""
    rng = random.Random(number)
    content = container.read(whole)
    manifest = copy.deepcopy(content.manifest)
    tensors = {name: tensor.clone() for name, tensor in content.tensors.items()}
    done = [_tensor(tensors, rng) if rng.random() < 0.2 else _value(manifest, rng)
            for _ in range(rng.randint(1, 3))]  # fmt: skip
    write_file(target, container.chunks(manifest, tensors))
    return "; ".join(done)


def _value(manifest: Any, rng: random.Random) -> str:
    place: Any = manifest
    key: Any = rng.choice(["graph", "graph", "graph", "report", "sample"])
    place.setdefault(key, 0)
    path = [str(key)]
    while isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.85:
        place = place[key]
        key = rng.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
        path.append(str(key))
    action = rng.random()
    if action < 0.15:
        del place[key]
        return f"{'/'.join(path)} removed"
    if action < 0.3 and isinstance(place, list):
        place.insert(rng.randrange(len(place) + 1), copy.deepcopy(rng.choice(place)))
        return f"{'/'.join(path)} has a twin"
    place[key] = copy.deepcopy(rng.choice(ODD))
    return f"{'/'.join(path)} = {place[key]!r:.40}"


def _tensor(tensors: dict[str, torch.Tensor], rng: random.Random) -> str:
    name = rng.choice(sorted(tensors))
    kind = rng.randrange(4)
    value = tensors[name]
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[name] = torch.zeros((*value.shape, 2), dtype=value.dtype)
    elif kind == 2:
        tensors[name] = value.to(rng.choice([torch.float64, torch.int64, torch.uint8]))
    elif value.is_floating_point():
        value.fill_(rng.choice(NUMBERS))
    else:
        value.fill_(rng.choice([torch.iinfo(value.dtype).min, torch.iinfo(value.dtype).max]))
    return f"{name}: {('removed', 'reshaped', 'cast', 'filled')[kind]}"
