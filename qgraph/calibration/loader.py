# SPDX-License-Identifier: Apache-2.0
"""From what calibration loaders yield to the arguments of a traced module."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from qgraph.errors import CalibrationError

LOGGER = logging.getLogger("qgraph")
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
DEFAULT_CAP = 1 << 30  # bytes of one-shot batches that are kept in memory


@dataclass(frozen=True)
class Signature:
    """What a traced module takes.

    Attributes:
        positional: names of the positional arguments; keyword: names of the keyword arguments.
        leaves: the example value (or None) of every tensor, positional first; names: of each.
        spec: tree of (args, kwargs), None for a plain graph.
        device: of the module's tensors, None when it has none.
    """

    positional: tuple[str, ...]
    keyword: tuple[str, ...]
    leaves: tuple[Any, ...]
    names: tuple[str, ...]
    spec: Any
    device: torch.device | None

    @classmethod
    def of(cls, module: GraphModule) -> Signature:
        """Read it off a graph module's placeholders and pytree."""
        nodes = [node for node in module.graph.nodes if node.op == "placeholder"]
        leaves = tuple(node.meta.get("val") for node in nodes)
        names = tuple(str(node.target) for node in nodes)
        tensors = [*module.parameters(), *module.buffers()]
        device = tensors[0].device if tensors else None
        info = getattr(module.graph._codegen, "pytree_info", None)
        if info is None or info.in_spec is None:
            return cls(names, (), leaves, names, None, device)
        positional, keyword = info.in_spec.children()
        arguments = [name.removeprefix("*") for name in info.orig_args if name != "self"]
        keywords = tuple(str(key) for key in keyword.context or ())
        first = tuple(name for name in arguments if name not in keywords)
        first = (*first, *(f"arg{i}" for i in range(len(first), positional.num_children)))
        return cls(first[: positional.num_children], keywords, leaves, names, info.in_spec, device)

    def __str__(self) -> str:
        shown = []
        for name, leaf in zip(self.names, self.leaves, strict=True):
            shown.append(f"{name}: {_describe(leaf)}" if isinstance(leaf, Tensor) else name)
        return f"({', '.join(shown)})"

    def flat(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The leaves of a call, in the order of the placeholders.

        Raises:
            CalibrationError: if the call's structure is not the signature's.
        """
        ordered = {name: kwargs[name] for name in self.keyword if name in kwargs}
        if self.spec is None:
            leaves = [*args, *(kwargs[name] for name in self.names[len(args) :] if name in kwargs)]
            matches = len(leaves) == len(self.names)
        else:
            leaves, spec = pytree.tree_flatten((tuple(args), ordered))
            matches = spec == self.spec and len(ordered) == len(kwargs)
        if not matches:
            msg = f"the model takes {self}, got {_describe((args, kwargs))}"
            raise CalibrationError(msg)
        return leaves

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, batch: int) -> None:
        """Compare a call's structure, shapes, dtypes and devices with the signature.

        Raises:
            CalibrationError: naming the batch, the input, and both sides.
        """
        leaves = self.flat(args, kwargs)
        for name, leaf, example in zip(self.names, leaves, self.leaves, strict=True):
            if not isinstance(leaf, Tensor):
                continue
            if self.device is not None and leaf.device != self.device:
                msg = (
                    f"batch {batch}: input {name!r} is on {leaf.device}, the model on "
                    f"{self.device}; move one of them"
                )
                raise CalibrationError(msg)
            if isinstance(example, Tensor) and not _fits(leaf, example):
                msg = (
                    f"batch {batch}: input {name!r} is {_describe(leaf)}, the model takes "
                    f"{_describe(example)} (s...: any size)"
                )
                raise CalibrationError(msg)


def _fits(value: Tensor, example: Tensor) -> bool:
    """Rank, static sizes and kind of dtype agree, and there is at least one element."""
    if value.ndim != example.ndim or value.numel() == 0:
        return False
    if value.is_floating_point() != example.is_floating_point():
        return False
    pairs = zip(value.shape, example.shape, strict=True)
    return all(not isinstance(want, int) or have == want for have, want in pairs)


def _describe(value: Any) -> str:
    """A short form of a batch: types, shapes and dtypes."""
    if isinstance(value, Tensor):
        size = ", ".join(str(n) for n in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{size}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{k}: {_describe(v)}' for k, v in value.items())}}}"
    if isinstance(value, (tuple, list)):
        inside = ", ".join(_describe(item) for item in value)
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
    return type(value).__name__


def adapter(
    module: GraphModule, transform: Callable[[Any], Any] | None = None
) -> Callable[[Any], Arguments]:
    """Build the function batch -> (args, kwargs) for a module.

    Accepted: a tensor, a tuple or list of positional inputs, a mapping by argument name
    (transformers' BatchEncoding too; names that the model does not take are left out),
    ``(args, kwargs)``, and ``(inputs, label)`` pairs where a pair does not fit the signature
    itself. `transform` is applied to the batch first.

    Raises:
        CalibrationError: (when called) on anything else; shows the batch and the signature.
    """
    signature = Signature.of(module)
    dropped: set[str] = set()

    def adapt(batch: Any) -> Arguments:
        batch = batch if transform is None else transform(batch)
        found = _arguments(signature, batch)
        if found is None:
            kind = f"{type(batch).__module__}.{type(batch).__qualname__}"
            msg = (
                f"a batch of type {kind}, {_describe(batch)}, does not fit the model, which takes "
                f"{signature}; give transform=, a function from a batch to the model's inputs"
            )
            raise CalibrationError(msg)
        extra = _left_out(signature, batch) - dropped
        if extra:
            dropped.update(extra)
            LOGGER.warning("calibration batches hold %s, which the model does not take", extra)
        return found

    return adapt


def _left_out(signature: Signature, batch: Any) -> set[str]:
    if not isinstance(batch, Mapping):
        return set()
    return {str(k) for k in batch} - {*signature.positional, *signature.keyword}


def _arguments(signature: Signature, batch: Any) -> Arguments | None:
    """The call a batch stands for; None when it fits nothing."""
    if isinstance(batch, Tensor):
        return bind(signature, (batch,), {})
    if isinstance(batch, Mapping):
        return _from_mapping(signature, batch)
    if not isinstance(batch, (tuple, list)):
        return None
    if len(batch) == 2 and isinstance(batch[0], (tuple, list)) and isinstance(batch[1], dict):
        return bind(signature, tuple(batch[0]), dict(batch[1]))
    found = bind(signature, tuple(batch), {})
    if found is None and len(batch) == 2:  # (inputs, label)
        found = _arguments(signature, batch[0])
    if found is None and len(batch) == 1:
        found = _arguments(signature, batch[0])
    return found


def _from_mapping(signature: Signature, batch: Mapping[Any, Any]) -> Arguments | None:
    names = (*signature.positional, *signature.keyword)
    if all(name in batch for name in names):
        positional = tuple(batch[name] for name in signature.positional)
        return positional, {name: batch[name] for name in signature.keyword}
    return bind(signature, (dict(batch),), {})


def bind(signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """Fit positional and keyword inputs to the signature, moving them across by name.

    None when they do not fit.
    """
    names = (*signature.positional, *signature.keyword)
    if len(args) > len(names):
        return None
    given = dict(zip(names, args, strict=False))
    if given.keys() & kwargs.keys() or {*given, *kwargs} != set(names):
        return None
    given |= kwargs
    call = tuple(given[n] for n in signature.positional), {n: given[n] for n in signature.keyword}
    try:
        signature.flat(*call)
    except CalibrationError:
        return None
    return call


def first_batch(loader: Iterable[Any], *, cap: int = DEFAULT_CAP) -> tuple[Any, Iterable[Any]]:
    """The first batch, and a loader that still gives all batches, the first included, each time.

    A one-shot iterator is read into memory, up to `cap` bytes.

    Raises:
        CalibrationError: no batches, not iterable, or a one-shot iterator beyond `cap`.
    """
    try:
        iterator = iter(loader)
    except TypeError as error:
        msg = f"the calibration loader is a {type(loader).__qualname__}, which is not iterable"
        raise CalibrationError(msg) from error
    kept: Iterable[Any] = _materialise(iterator, cap) if iterator is loader else loader
    for batch in kept if iterator is loader else iterator:
        return batch, kept
    msg = "the calibration loader gave 0 batches"
    raise CalibrationError(msg)


def _materialise(iterator: Iterator[Any], cap: int) -> list[Any]:
    kept: list[Any] = []
    size = 0
    for batch in iterator:
        leaves = pytree.tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
        size += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        if size > cap:
            msg = (
                f"the calibration loader is a one-shot iterator of more than {cap} bytes "
                f"({len(kept)} batches read); pass a list or a DataLoader"
            )
            raise CalibrationError(msg)
        kept.append(batch)
    return kept
