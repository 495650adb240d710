# SPDX-License-Identifier: Apache-2.0
"""Channel maps of attentions drawn op by op, whose rows are known beforehand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.fx import Node

from qgraph.graph.channel_maps import ChannelMaps, channel_maps, head_channels, projections
from tests.graph.sketch import Sketch, aten

BATCH, TOKENS, KEYS, WIDTH = 2, 5, 7, 4
Change = Callable[[Sketch, Node], Node]


def by_head(s: Sketch, x: Node, heads: int) -> Node:
    """[B, T, H * D] as [B, H, T, D]."""
    sizes = list(x.meta["val"].shape)
    apart = s.call(aten.reshape.default, x, [*sizes[:2], heads, sizes[2] // heads])
    return s.call(aten.transpose.int, apart, 1, 2)


def turned(s: Sketch, x: Node) -> Node:
    return s.call(aten.transpose.int, x, -2, -1)


def attend(s: Sketch, query: Node, key: Node, name: str = "values") -> Node:
    """Softmax of [.., T, D] times [.., D, S], and its product with values from elsewhere."""
    soft = s.call(aten.softmax.int, s.call(aten.matmul.default, query, key), -1)
    sizes = list(key.meta["val"].shape)
    values = s.input(*sizes[:-2], sizes[-1], 3, name=name)
    return s.call(aten.matmul.default, soft, values)


def sources(s: Sketch, queries: int, keys: int) -> tuple[Node, Node]:
    """Linears over two inputs of other lengths."""
    x, y = s.input(BATCH, TOKENS, WIDTH), s.input(BATCH, KEYS, WIDTH, name="y")
    return s.linear(x, queries, name="q"), s.linear(y, keys, name="k")


def mapped(
    query_heads: int, key_heads: int, width: int, change: Change = lambda _, k: k
) -> ChannelMaps:
    torch.manual_seed(0)
    s = Sketch()
    q, k = sources(s, query_heads * width, key_heads * width)
    query = by_head(s, q, query_heads)
    key = turned(s, by_head(s, change(s, k), key_heads))
    return channel_maps(s.returns(attend(s, query, key)))


def rows(maps: ChannelMaps, labels: torch.Tensor) -> list[list[tuple[str, int]]]:
    return [[maps.weight_rows(v) for v in head] for head in labels.tolist()]


@pytest.mark.parametrize(
    ("query_heads", "key_heads", "width"),
    [(1, 1, 3), (2, 2, 3), (3, 3, 2), (3, 1, 2), (1, 3, 2), (2, 2, 1), (1, 1, 1)],
)
def test_channel_d_of_head_h_is_row_h_times_d_of_its_own_weight(query_heads, key_heads, width):
    maps = mapped(query_heads, key_heads, width)
    assert not maps.refused
    (item,) = maps.sites
    assert item.refusal == ""
    heads = max(query_heads, key_heads)
    for name, labels, own in (("q", item.query_rows, query_heads), ("k", item.key_rows, key_heads)):
        assert labels.dtype == torch.int64
        want = [
            [(f"{name}_weight", h % own * width + d) for d in range(width)] for h in range(heads)
        ]
        assert rows(maps, labels) == want
    total = (query_heads + key_heads) * width
    every = [("q_weight", i) for i in range(query_heads * width)]
    every += [("k_weight", i) for i in range(key_heads * width)]
    assert [maps.weight_rows(label) for label in range(1, total + 1)] == every


def test_operands_tell_along_which_axes_their_rows_vary() -> None:
    for heads, width in ((2, 3), (1, 3), (2, 1), (1, 1)):
        maps = mapped(heads, heads, width)
        (item,) = maps.sites
        for operand, channel, labels in (
            (item.site.query, -1, item.query_rows), (item.site.key, -2, item.key_rows)
        ):  # fmt: skip
            found = maps.channels(operand)
            assert found is not None
            axes = tuple(a for a, size in ((-3, heads), (channel, width)) if size > 1)
            assert found[0] == (axes or (-1,))
            assert found[1].dtype == torch.int64
            assert found[1].tolist() == labels.flatten().tolist()
        assert maps.channels(item.site.probabilities) is None
        assert maps.channels(item.site.values) is None


@pytest.mark.parametrize(
    ("labels", "want"),
    [
        ([[1, 2, 3]], [[1, 2, 3]]),
        ([[1, 2], [3, 4]], [[1, 2], [3, 4]]),
        ([[1, 2], [3, 4]] * 3, [[1, 2], [3, 4]]),
        ([[1, 2]] * 4, [[1, 2]]),
        ([[1, 2], [1, 2], [3, 4], [3, 4]], None),
        ([[1, 2], [3, 4], [3, 4], [1, 2]], None),
        ([[1, 2], [3, 4], [1, 2]], None),
        ([[1, 2], [1, 2], [3, 4]], None),
        ([[0, 0], [1, 0], [0, 0], [1, 0]], [[0, 0], [1, 0]]),
        ([[1, 2], [1, 3], [1, 2], [1, 4]], None),
    ],
)
def test_heads_in_the_batch_are_one_period_where_they_repeat(labels, want):
    given = torch.tensor(labels, dtype=torch.int32)
    for found in (
        head_channels(given, -1),
        head_channels(given[:, None], -1),
        head_channels(given[:, :, None], -2),
        head_channels(given[None, :, :, None], -2),
    ):
        assert found.dtype == torch.int64
        assert found.tolist() == (labels if want is None else want)


def parts(*changes: object) -> Change:
    """Each channel through a function of its own (None: as it is)."""

    def change(s: Sketch, x: Node) -> Node:
        cut = [s.call(aten.slice.Tensor, x, -1, i, i + 1) for i in range(len(changes))]
        made = [c if f is None else s.call(f, c) for f, c in zip(changes, cut, strict=True)]
        return s.call(aten.cat.default, made, -1)

    return change


def test_one_free_row_is_enough_and_else_the_first_reason_is_told() -> None:
    for at in range(3):
        changes: list[object] = [aten.gelu.default] * 3
        changes[at] = None
        assert mapped(1, 1, 3, parts(*changes)).sites[0].refusal == ""
    gelu, exp = aten.gelu.default, aten.exp.default
    for names in ((gelu, exp, gelu), (exp, gelu, exp)):
        refusal = mapped(1, 1, 3, parts(*names)).sites[0].refusal
        assert "a function that is not odd" in refusal
        assert names[0].__name__.partition(".")[0] in refusal


def without_rows(s: Sketch, k: Node) -> Node:
    """What is left of a value and a table when the value is cut away: no row, yet computed."""
    table = s.stored(torch.randn(BATCH, KEYS, 3), "table")
    return s.call(aten.slice.Tensor, s.call(aten.cat.default, [table, k], -1), -1, 0, 3)


def absolute(s: Sketch, k: Node) -> Node:
    return s.call(aten.abs.default, k)


@pytest.mark.parametrize("which", ["key", "query"])
@pytest.mark.parametrize("change", [without_rows, absolute, None])
@pytest.mark.parametrize("returned", [False, True])
def test_an_operand_without_rows_is_named_with_the_reason_of_what_it_comes_from(
    which, change, returned
):
    s = Sketch()
    x, y = s.input(BATCH, KEYS, WIDTH), s.input(BATCH, KEYS, 3, name="y")
    plain, other = s.linear(x, 3, name="plain"), s.linear(x, 3, name="other")
    bare = y if change is None else change(s, other)
    query, key = (plain, bare) if which == "key" else (bare, plain)
    end = attend(s, query, turned(s, key))
    maps = channel_maps(s.returns(end, other) if returned else s.returns(end))
    (item,) = maps.sites
    if returned and change is not None:
        assert item.refusal.startswith(f"the {which}: returned by the model")
    else:
        words = f"the {which} is not made by a linear layer with stored weights"
        assert item.refusal.startswith(words)
    assert maps.channels(item.site.key if which == "key" else item.site.query) is None
    assert maps.channels(item.site.query if which == "key" else item.site.key) is not None
    bare_rows = item.key_rows if which == "key" else item.query_rows
    assert not bare_rows.any()
    assert change is without_rows or bare_rows.shape == (0, 0)


def test_channels_without_rows_beside_others_do_no_harm() -> None:
    def half(s: Sketch, k: Node) -> Node:
        table = s.stored(torch.randn(BATCH, KEYS, 1), "table")
        return s.call(aten.cat.default, [table, s.call(aten.slice.Tensor, k, -1, 1, 3)], -1)

    maps = mapped(1, 1, 3, half)
    (item,) = maps.sites
    assert item.refusal == ""
    assert item.key_rows.tolist() == [[0, 5, 6]]
    assert maps.channels(item.site.key) is not None
    assert rows(maps, item.key_rows[:, 1:]) == [[("k_weight", 1), ("k_weight", 2)]]


def test_projections_come_nearest_first_and_once_and_not_through_products() -> None:
    s = Sketch()
    x = s.input(2, 3, 4)
    a, b, c = (s.linear(x, 4, name=name) for name in "abc")
    behind = s.linear(a, 4, name="behind")
    deep = s.call(aten.relu.default, s.call(aten.neg.default, b))
    table = s.call(aten.neg.default, s.stored(torch.randn(4, 4)))
    computed = s.call(aten.linear.default, c, table)
    product = s.call(aten.matmul.default, b, turned(s, c))
    soft = s.call(aten.softmax.int, b, -1)
    image = s.input(2, 4, 6, name="image")
    conv = s.call(aten.conv1d.default, image, s.stored(torch.randn(3, 4, 1), "kernel"))
    add = aten.add.Tensor
    for operand, want in (
        (a, [a]),
        (behind, [behind]),
        (conv, [conv]),
        (s.call(add, deep, a), [a, b]),
        (s.call(add, a, deep), [a, b]),
        (s.call(add, a, a), [a]),
        (s.call(add, s.call(add, a, b), s.call(add, b, a)), [a, b]),
        (s.call(add, c, s.call(add, b, a)), [c, b, a]),
        (computed, [c]),
        (s.call(aten.cat.default, [soft, a], -1), [a]),
        (s.call(aten.cat.default, [product, a], -1), [a]),
        (product, []),
        (x, []),
        (table, []),
    ):
        assert list(projections(operand)) == want, operand


def test_attentions_come_in_order_and_a_softmax_of_two_products_is_refused() -> None:
    torch.manual_seed(0)
    s = Sketch()
    q, k = sources(s, 3, 3)
    first = attend(s, q, turned(s, k))
    both = s.call(aten.add.Tensor, *(s.call(aten.matmul.default, e, turned(s, k)) for e in (q, q)))
    soft = s.call(aten.softmax.int, both, -1)
    second = s.call(aten.matmul.default, soft, s.input(BATCH, KEYS, 3, name="v"))
    third = attend(s, s.linear(first, 3, name="third"), turned(s, k), "others")
    maps = channel_maps(s.returns(second, third))
    assert [rows(maps, item.query_rows)[0][0][0] for item in maps.sites] == [
        "q_weight", "third_weight",
    ]  # fmt: skip
    assert [item.softmax for item in maps.refused] == [soft]
