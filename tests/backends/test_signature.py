# SPDX-License-Identifier: Apache-2.0
"""The signature that a file carries: names, order, sizes, structure, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from qgraph.backends.onnx.signature import Input, Signature, dump, load, read_signature, symbols
from qgraph.errors import ArtifactError, ExportError, InputError

SPEC = pytree.treespec_dumps(pytree.tree_structure(((0, 0), {"c": 0})))
RESULT = pytree.treespec_dumps(pytree.tree_structure({"y": 0, "n": [0, 0]}))


def signature(**changes: Any) -> Signature:
    plain: dict[str, Any] = {
        "in_spec": SPEC, "out_spec": RESULT, "arguments": ("a", "b", "c"), "num_positional": 2,
        "inputs": (Input(0, "a", "float32", ("batch", 3)), Input(2, "c", "int64", (2,))),
        "outputs": (1, None, 0), "constants": (None, 7, None), "output_names": ("y", "n"),
    }  # fmt: skip
    return Signature(**{**plain, **changes})


A, C = torch.randn(5, 3), torch.tensor([1, 2])


def test_arguments_are_taken_by_position_or_by_name() -> None:
    for args, kwargs in (
        ((A, 0, C), {}), ((A, 0), {"c": C}), ((A,), {"c": C, "b": 9}),
        ((), {"a": A, "b": 1, "c": C}),
    ):  # fmt: skip
        first, second = signature().flatten(args, kwargs)
        assert torch.equal(first, A)
        assert torch.equal(second, C)


WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "too many": ((A, 0, C, C), {}, "got 4 positional arguments, the model takes 3"),
    "twice": ((A, 0, C), {"a": A}, "'a' is given twice"),
    "unknown": ((A, 0, C), {"d": A}, "'d' is unknown"),
    "missing": ((A,), {}, "missing arguments: b, c"),
    "another structure": (((A, A), 0, C), {}, "structure"),
    "no tensor": ((3, 0, C), {}, "'a' must be a tensor, got int"),
    "other numbers": ((A.long(), 0, C), {}, "'a' has dtype torch.int64, expected torch.float32"),
    "floats for integers": ((A, 0, C.float()), {}, "'c' has dtype"),
    "another size": ((A[:, :2], 0, C), {}, r"shape \[5, 2\], expected \['batch', 3\]"),
    "one axis less": ((A[0], 0, C), {}, "shape"), "one axis more": ((A[None], 0, C), {}, "shape"),
    "another length": ((A, 0, C[:1]), {}, "shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_arguments_that_do_not_fit_are_named(name: str) -> None:
    args, kwargs, words = WRONG[name]
    with pytest.raises(InputError, match=words):
        signature().flatten(args, kwargs)


def test_other_floats_and_integers_are_converted_and_gradients_dropped() -> None:
    first, second = signature().flatten((A.double().requires_grad_(), 0, C.int()), {})
    assert (first.dtype, second.dtype) == (torch.float32, torch.int64)
    assert not first.requires_grad


def test_results_get_their_structure_and_constants_back() -> None:
    x, y = torch.zeros(1), torch.ones(2)
    found = signature().unflatten([x, y])
    assert found["y"] is y
    assert found["n"] == [7, x]
    odd = json.dumps([1, {"type": "missing.Class", "context": "[]", "children_spec": []}])
    assert signature(out_spec=odd).unflatten([x, y]) == {"y": x, "n": y}


def test_files_carry_all_of_it() -> None:
    again, data = load(dump(signature(), more=3))
    assert again == signature()
    assert (data["more"], data["version"]) == (3, 1)
    plain = json.loads(dump(signature()))
    for version in (0, 2, None):
        with pytest.raises(ArtifactError, match="unknown version"):
            load(json.dumps({**plain, "version": version}))
    for key in plain["signature"]:
        broken = {k: v for k, v in plain["signature"].items() if k != key}
        with pytest.raises(ArtifactError, match="damaged"):
            Signature.from_json(broken)


@pytest.mark.parametrize("where", ["in_spec", "out_spec"])
@pytest.mark.parametrize("deep", [True, False])
def test_structures_may_not_name_enumerations(where: str, deep: bool) -> None:
    enum = {"__enum__": True, "fqn": "os:system", "name": "x"}
    spec: Any = [1, {"type": "builtins.dict", "context": json.dumps([enum]), "children_spec": []}]
    if not deep:
        spec = [1, [{"a": [enum]}]]
    data = {**signature().to_json(), where: json.dumps(spec)}
    with pytest.raises(ArtifactError, match="enumerations"):
        Signature.from_json(data)


def graph(values: list[Any], outputs: Any) -> tuple[GraphModule, list[Node]]:
    made = Graph()
    nodes = []
    for at, value in enumerate(values):
        node = made.placeholder(f"x{at}")
        node.meta["val"] = value
        nodes.append(node)
    made.output(outputs(nodes))
    return GraphModule(torch.nn.Module(), made), nodes


def symbolic(*shapes: tuple[Any, ...]) -> list[Tensor]:
    """Fake tensors; a letter stands for an open size."""
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    known: dict[str, Any] = {}
    letters = dict.fromkeys(s for shape in shapes for s in shape if isinstance(s, str))
    for at, letter in enumerate(letters):
        source = ConstantSource(f"s{at}")
        symbol = env.create_symbol(5 + at, source)
        known[letter] = env.create_symintnode(symbol, hint=5 + at, source=source)
    with mode:
        return [torch.empty([known.get(s, s) for s in shape]) for shape in shapes]


@pytest.mark.parametrize(
    ("shapes", "names"),
    [
        ([("b", 3)], ["batch"]), ([("b", "t", 4), ("b", "u")], ["batch", "dim1", "dim2"]),
        ([(3, "t")], ["dim0"]), ([(3, "t"), ("b", "t")], ["dim0", "batch"]),
        ([("b", "t"), ("c", "t")], ["batch", "dim1", "dim2"]), ([(3, 4)], []),
    ],
)  # fmt: skip
def test_open_sizes_are_the_batch_and_numbered_dimensions(
    shapes: list[tuple[Any, ...]], names: list[str]
) -> None:
    module, nodes = graph([7, *symbolic(*shapes)], tuple)
    assert list(symbols(module).values()) == names
    found = read_signature(module, None, None)
    letters = dict(
        zip(dict.fromkeys(s for sh in shapes for s in sh if isinstance(s, str)), names, strict=True)
    )
    assert [i.shape for i in found.inputs] == [
        tuple(letters.get(s, s) for s in shape) for shape in shapes
    ]
    assert [i.leaf for i in found.inputs] == list(range(1, len(shapes) + 1))
    assert [i.name for i in found.inputs] == [n.name for n in nodes[1:]]
    assert found.arguments == tuple(n.name for n in nodes)
    assert found.num_positional == len(nodes)


def test_a_value_returned_twice_is_written_once_and_constants_stay() -> None:
    x, y = torch.zeros(2), torch.zeros(3, dtype=torch.int64)
    module, _ = graph([x, y], lambda n: (n[1], 5, n[0], n[1], None))
    found = read_signature(module, None, None)
    assert found.outputs == (0, None, 1, 0, None)
    assert found.constants == (None, 5, None, None, None)
    assert found.output_names == ("output_0", "output_2")
    assert [i.dtype for i in found.inputs] == ["float32", "int64"]
    assert found.unflatten([y, x]) == (y, 5, x, y, None)
    assert all(map(torch.equal, found.flatten([x, y], {}), (x, y)))


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"], ["a", "a"]])
def test_given_names_are_as_many_as_tensors_and_differ(names: list[str]) -> None:
    module, _ = graph([torch.zeros(2), torch.zeros(3)], tuple)
    with pytest.raises(ExportError, match="input_names"):
        read_signature(module, names, None)
    with pytest.raises(ExportError, match="output_names"):
        read_signature(module, None, names)
    found = read_signature(module, ["p", "q"], ["r", "s"])
    assert [i.name for i in found.inputs] == ["p", "q"]
    assert found.output_names == ("r", "s")


class Keyless:
    """Torch can take it apart and knows no names for the parts."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts


pytree.register_pytree_node(
    Keyless, lambda value: (list(value.parts), None), lambda parts, _: Keyless(*parts),
    serialized_type_name="tests.backends.test_signature.Keyless",
)  # fmt: skip


class Place:
    """A key without a field of a name that torch uses."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __str__(self) -> str:
        return f"<part_{self.at}>"

    def get(self, parent: Keyless) -> Any:
        return parent.parts[self.at]


class Parted(Keyless):
    """Its parts have names that only their text tells."""


pytree.register_pytree_node(
    Parted, lambda value: (list(value.parts), None), lambda parts, _: Parted(*parts),
    serialized_type_name="tests.backends.test_signature.Parted",
    flatten_with_keys_fn=lambda value: (
        [(Place(at), part) for at, part in enumerate(value.parts)], None,
    ),
)  # fmt: skip


def returning(results: Any, *keywords: str) -> GraphModule:
    """Inputs x0, x1... come back as the leaves of that structure; the last ones are keywords."""
    leaves, spec = pytree.tree_flatten(results)
    module, nodes = graph([torch.zeros(2)] * len(leaves), tuple)
    given = tuple(leaves[: len(leaves) - len(keywords)]), dict.fromkeys(keywords, 0)
    info = _PyTreeInfo(["self", *(n.name for n in nodes)], pytree.tree_structure(given), spec)
    module.graph.set_codegen(_PyTreeCodeGen(info))
    return module


def test_keywords_are_arguments_behind_those_by_position() -> None:
    found = read_signature(returning([0, 0, 0, 0], "scale", "mask"), None, None)
    assert found.arguments == ("x0", "x1", "scale", "mask")
    assert found.num_positional == 2
    values = [torch.full((2,), float(at)) for at in range(4)]
    by_name = {"mask": values[3], "scale": values[2]}
    assert all(map(torch.equal, found.flatten(values[:2], by_name), values))


@pytest.mark.parametrize(
    ("results", "names"),
    [
        ({"y": 0, "n": [0, 0]}, ["y", "n_0", "n_1"]),
        ((0, {"a": 0}), ["output_0", "output_1_a"]), ({"": 0}, ["output"]),
        (Keyless(0, 0, 0), ["output_0", "output_1", "output_2"]),
        (Parted(0, 0), ["part_0", "part_1"]),
        # A file has one value by a name.
        ({"x0": 0, "y": 0}, ["x0_1", "y"]), ({"x0": 0, "x0_1": 0}, ["x0_2", "x0_1"]),
        ({"0": 0, "output_0": 0}, ["output_0", "output_0_1"]),
        ({"a_b_c": 0, "a_b": {"c": 0}, "a": {"b_c": 0}}, ["a_b_c", "a_b_c_1", "a_b_c_2"]),
        ({"a_b": 0, "a": {"b": 0}, "a_b_1": 0}, ["a_b", "a_b_2", "a_b_1"]),
    ],
)  # fmt: skip
def test_results_are_called_by_their_places_and_no_two_values_alike(
    results: Any, names: list[str]
) -> None:
    found = read_signature(returning(results), None, None)
    assert list(found.output_names) == names
    assert not {i.name for i in found.inputs} & set(names)


def test_names_are_not_given_to_an_input_and_an_output() -> None:
    module = returning({"p": 0, "q": 0})
    with pytest.raises(ExportError, match="output_names"):
        read_signature(module, None, ["r", "x1"])
    assert read_signature(module, ["p", "r"], None).output_names == ("p_1", "q")
