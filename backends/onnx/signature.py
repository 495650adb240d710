# SPDX-License-Identifier: Apache-2.0
"""The model's own signature, kept in the file: argument names, structure, output structure."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from qgraph.errors import ArtifactError, ExportError, InputError


@dataclass(frozen=True, slots=True)
class Input:
    """One tensor input: its leaf in the flattened arguments, name, dtype and shape.

    A symbolic dimension is a string.
    """

    leaf: int
    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Signature:
    """How a call's arguments become the file's inputs, and its outputs the model's result.

    Attributes:
        in_spec, out_spec: serialised pytree specs of ``(args, kwargs)`` and of the result.
        arguments: parameter names in calling order.
        num_positional: how many of them the traced call passed by position.
        inputs: the tensor inputs, in the file's order.
        outputs: per output leaf the index of the file's output, or None with a constant.
        constants: the constant of each leaf that is no tensor.
        output_names: names of the file's outputs.
    """

    in_spec: str
    out_spec: str
    arguments: tuple[str, ...]
    num_positional: int
    inputs: tuple[Input, ...]
    outputs: tuple[int | None, ...]
    constants: tuple[Any, ...]
    output_names: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data for the file's metadata."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Signature:
        """Read what `to_json` wrote.

        Raises:
            ArtifactError: fields are missing or of the wrong kind.
        """
        try:
            inputs = tuple(
                Input(int(i["leaf"]), str(i["name"]), str(i["dtype"]), tuple(i["shape"]))
                for i in data["inputs"]
            )
            for item in inputs:
                _dtype(item.dtype)
            _check_specs(data["in_spec"], data["out_spec"])
            return cls(
                in_spec=str(data["in_spec"]), out_spec=str(data["out_spec"]),
                arguments=tuple(map(str, data["arguments"])),
                num_positional=int(data["num_positional"]), inputs=inputs,
                outputs=tuple(data["outputs"]), constants=tuple(data["constants"]),
                output_names=tuple(map(str, data["output_names"])),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            msg = f"the file's qgraph signature is damaged: {error!r}"
            raise ArtifactError(msg) from error

    def flatten(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors of a call, in the file's input order.

        Raises:
            InputError: the arguments do not have the traced structure.
        """
        args, kwargs = self._bind(args, kwargs)
        leaves, spec = pytree.tree_flatten((tuple(args), kwargs))
        if pytree.treespec_dumps(spec) != self.in_spec:
            msg = f"arguments have the structure {spec}, the model was traced with {self.in_spec}"
            raise InputError(msg)
        return [self._checked(leaves[i.leaf], i) for i in self.inputs]

    def unflatten(self, tensors: Sequence[Tensor]) -> Any:
        """The model's output structure; a dict by name where its class is not importable."""
        leaves = [
            constant if index is None else tensors[index]
            for index, constant in zip(self.outputs, self.constants, strict=True)
        ]
        try:
            spec = pytree.treespec_loads(self.out_spec)
        except (NotImplementedError, ValueError, KeyError, ImportError, AttributeError, TypeError):
            return dict(zip(self.output_names, tensors, strict=True))
        return pytree.tree_unflatten(leaves, spec)

    def _bind(
        self, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Let arguments be passed by position or keyword, whichever the trace used."""
        if len(args) > len(self.arguments):
            msg = f"got {len(args)} positional arguments, the model takes {len(self.arguments)}"
            raise InputError(msg)
        given = dict(zip(self.arguments, args, strict=False))
        for name, value in kwargs.items():
            if name not in self.arguments or name in given:
                why = "given twice" if name in given else f"unknown, allowed: {self.arguments}"
                msg = f"argument {name!r} is {why}"
                raise InputError(msg)
            given[name] = value
        missing = [name for name in self.arguments if name not in given]
        if missing:
            msg = f"missing arguments: {', '.join(missing)}"
            raise InputError(msg)
        ordered = [given[name] for name in self.arguments]
        cut = self.num_positional
        return ordered[:cut], dict(zip(self.arguments[cut:], ordered[cut:], strict=True))

    @staticmethod
    def _checked(value: Any, declared: Input) -> Tensor:
        if not isinstance(value, Tensor):
            msg = f"input {declared.name!r} must be a tensor, got {type(value).__name__}"
            raise InputError(msg)
        expected = _dtype(declared.dtype)
        if value.dtype != expected:
            if value.dtype.is_floating_point != expected.is_floating_point:
                msg = f"input {declared.name!r} has dtype {value.dtype}, expected {expected}"
                raise InputError(msg)
            value = value.to(expected)
        wanted = declared.shape
        if value.ndim != len(wanted) or any(
            isinstance(w, int) and w != g for w, g in zip(wanted, value.shape, strict=False)
        ):
            msg = f"input {declared.name!r} has shape {list(value.shape)}, expected {list(wanted)}"
            raise InputError(msg)
        checked: Tensor = value.detach().cpu()
        return checked


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        msg = f"unknown dtype {name!r}"
        raise ValueError(msg)
    return found


def _check_specs(*specs: object) -> None:
    """Refuse enumerations in structures: torch imports the module that they name.

    Raises:
        ValueError, TypeError: there is one, or a structure is no JSON text.
    """
    pending: list[object] = [json.loads(str(spec)) for spec in specs]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            if "__enum__" in item:
                msg = "enumerations are not accepted in structures"
                raise ValueError(msg)
            pending.extend(item.values())
            context = item.get("context")
            if isinstance(context, str):  # JSON text inside JSON
                with contextlib.suppress(json.JSONDecodeError):
                    pending.append(json.loads(context))
        elif isinstance(item, list):
            pending.extend(item)


def symbols(module: GraphModule) -> dict[str, str]:
    """Readable names of the symbolic sizes of the inputs: ``batch`` first, then ``dim1``..."""
    names: dict[str, str] = {}
    for node in module.graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" else None
        for axis, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if isinstance(size, torch.SymInt) and str(size) not in names:
                first = axis == 0 and "batch" not in names.values()
                names[str(size)] = "batch" if first else f"dim{len(names)}"
    return names


def read_signature(
    module: GraphModule, input_names: Sequence[str] | None, output_names: Sequence[str] | None
) -> Signature:
    """The signature of a graph module with pytree code generation (or a plain one).

    Raises:
        ExportError: names given do not match in number or name two values, or a structure cannot
            be stored.
    """
    info = getattr(module.graph._codegen, "pytree_info", None)
    holders = [n for n in module.graph.nodes if n.op == "placeholder"]
    results = list(_results(module))
    leaves = [i for i, n in enumerate(holders) if isinstance(n.meta.get("val"), Tensor)]
    names = _names("input", input_names, [holders[i].name for i in leaves])
    tensors = [r for r in results if isinstance(r, Node)]
    distinct = list(dict.fromkeys(tensors))
    in_spec = info.in_spec if info else _plain_spec(len(holders))
    out_spec = info.out_spec if info else pytree.tree_structure(tuple(results))
    paths = _paths(out_spec, len(results))
    wanted = [p for p, r in zip(paths, results, strict=True) if isinstance(r, Node)]
    given = _names("output", output_names, _unique(wanted, tensors, names))
    if not set(given).isdisjoint(names):
        msg = f"output_names has {given}, but the inputs are called {names}"
        raise ExportError(msg)
    labels = symbols(module)
    positional, keyword = in_spec.children()
    arguments = _arguments(info, holders, positional, keyword)
    try:
        stored = pytree.treespec_dumps(in_spec), pytree.treespec_dumps(out_spec)
    except NotImplementedError as error:
        msg = f"the model's argument or result structure cannot be stored: {error}"
        raise ExportError(msg) from error
    return Signature(
        in_spec=stored[0], out_spec=stored[1], arguments=arguments,
        num_positional=positional.num_children,
        inputs=tuple(
            Input(i, name, *_kind(holders[i], labels))
            for i, name in zip(leaves, names, strict=True)
        ),
        outputs=tuple(distinct.index(r) if isinstance(r, Node) else None for r in results),
        constants=tuple(None if isinstance(r, Node) else r for r in results),
        output_names=tuple(given),
    )  # fmt: skip


def _results(module: GraphModule) -> Sequence[Any]:
    output = next(n for n in reversed(module.graph.nodes) if n.op == "output")
    value = output.args[0]
    return value if isinstance(value, (tuple, list)) else (value,)


def _kind(node: Node, labels: dict[str, str]) -> tuple[str, tuple[int | str, ...]]:
    value = node.meta["val"]
    shape = tuple(
        labels.get(str(s), str(s)) if isinstance(s, torch.SymInt) else int(s) for s in value.shape
    )
    return str(value.dtype).removeprefix("torch."), shape


def _plain_spec(count: int) -> pytree.TreeSpec:
    return pytree.tree_structure((tuple(range(count)), {}))


def _arguments(info: Any, holders: list[Node], positional: Any, keyword: Any) -> tuple[str, ...]:
    count = positional.num_children
    original = list(info.orig_args) if info else [n.name for n in holders]
    original = [n for n in original if n != "self"]
    names = original[:count] if len(original) >= count else [f"arg{i}" for i in range(count)]
    return (*names, *(str(k) for k in keyword.context or ()))


def _paths(spec: Any, count: int) -> list[str]:
    tree = pytree.tree_unflatten(list(range(count)), spec)
    try:
        found, _ = pytree.tree_flatten_with_path(tree)
    except ValueError:  # a class that torch knows without the names of its parts
        return [f"output_{i}" for i in range(count)]
    texts = ["_".join(_key(k) for k in path) for path, _ in found]
    return [t if t and not t[0].isdigit() else f"output_{t}" if t else "output" for t in texts]


def _key(key: Any) -> str:
    for field in ("key", "idx", "name"):
        if hasattr(key, field):
            return str(getattr(key, field))
    return "".join(c for c in str(key) if c.isalnum() or c == "_")


def _unique(paths: list[str], tensors: list[Node], inputs: list[str]) -> list[str]:
    """One name per distinct output node: a tensor returned twice is written once.

    A file has one value by a name, so a path that an input or another path has taken is numbered.
    """
    named: dict[Node, str] = {}
    for path, node in zip(paths, tensors, strict=True):
        named.setdefault(node, path)
    taken, found = {*inputs, *named.values()}, list[str]()
    for path in named.values():
        name = path
        if path in inputs or path in found:
            numbered = (f"{path}_{number}" for number, _ in enumerate(taken, 1))
            name = next(n for n in numbered if n not in taken)
            taken.add(name)
        found.append(name)
    return found


def _names(what: str, given: Sequence[str] | None, found: list[str]) -> list[str]:
    if given is None:
        return found
    if len(given) != len(found) or len(set(given)) != len(given):
        msg = f"{what}_names has {list(given)}, but the model has {len(found)}: {found}"
        raise ExportError(msg)
    return list(given)


def dump(signature: Signature, **extra: Any) -> str:
    """The metadata string of a file."""
    return json.dumps({"version": 1, "signature": signature.to_json(), **extra})


def load(text: str) -> tuple[Signature, dict[str, Any]]:
    """Read the metadata string of a file.

    Raises:
        ArtifactError: it is no JSON, or of an unknown version.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        msg = f"the file's qgraph metadata is not JSON: {error}"
        raise ArtifactError(msg) from error
    if not isinstance(data, dict) or data.get("version") != 1:
        msg = "the file's qgraph metadata has an unknown version"
        raise ArtifactError(msg)
    return Signature.from_json(data.get("signature", {})), data
