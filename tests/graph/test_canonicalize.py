# SPDX-License-Identifier: Apache-2.0
"""No-ops go, constants are folded, and every op has one spelling."""

# mypy: disable-error-code="no-any-return,operator,index,assignment"
# Attributes and calls of nn.Module are Tensor | Module, or Any, to the type checker.
from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qgraph.graph.canonicalize import REWRITES, canonicalize
from qgraph.graph.einsum import decompose_einsum
from qgraph.graph.fold_constants import fold_constants
from qgraph.graph.trace import trace
from tests.graph.rewriting import assert_rewrites, ops, randomize


class Lambda(nn.Module):
    def __init__(self, function: Callable[..., object], weight: Tensor | None = None) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(4, 6) if weight is None else weight)

    def forward(self, *inputs: Tensor) -> object:
        return self.function(self, *inputs)


def noops(self: Lambda, x: Tensor) -> Tensor:
    y = nn.functional.dropout(x, 0.5, training=False).clone().contiguous().detach()
    y = y.to(torch.float32).transpose(1, 1).permute(0, 1, 2)[:, :, :]
    y = nn.functional.pad(y, (0, 0)).reshape(y.shape).expand(-1, -1, -1)
    return y.relu()


def test_what_does_nothing_is_dropped():
    module = assert_rewrites(Lambda(noops).eval(), (torch.randn(2, 3, 4),))
    assert ops(module) == Counter(relu=1)


def test_a_copy_of_an_input_is_still_a_copy():
    module = trace(Lambda(lambda _, x: (x.clone(), x + 1)).eval(), torch.randn(2, 3))
    canonicalize(module)
    x = torch.randn(2, 3)
    assert module(x)[0].data_ptr() != x.data_ptr()
    assert canonicalize(module) is False


def test_copies_before_a_reshape_are_not_needed():
    model = Lambda(lambda _, x: x.transpose(1, 2).contiguous().view(x.shape[0], -1) * 2).eval()
    module = assert_rewrites(model, (torch.randn(2, 3, 4),))
    assert ops(module)["clone"] == 0
    assert ops(module)["reshape"] == 1


def test_a_squeeze_of_a_symbolic_batch_stays():
    module = trace(Lambda(lambda _, x: x.squeeze(0) + 1).eval(), torch.randn(3, 4))
    canonicalize(module)
    assert module(torch.randn(1, 4)).shape == (4,)


def test_constants_are_folded_but_returned_ones_are_made_anew():
    def function(self: Lambda, x: Tensor) -> tuple[Tensor, Tensor]:
        table = (torch.arange(6.0) * 2).sin() + self.weight[0]
        return x + table, torch.zeros(3)

    model = Lambda(function).eval()
    module = assert_rewrites(model, (torch.randn(2, 6),))
    assert ops(module) == Counter(add=1, zeros=1)
    first = module(torch.zeros(1, 6))[1]
    first += 1
    assert not module(torch.zeros(1, 6))[1].any()


def test_random_numbers_and_written_buffers_are_no_constants():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x + self.calls

    module = trace(Counting().eval(), torch.zeros(2, 3))
    canonicalize(module)
    assert [float(module(torch.zeros(2, 3)).max()) for _ in range(2)] == [1.0, 2.0]
    noisy = trace(Lambda(lambda _, x: x + torch.rand(3)).eval(), torch.zeros(2, 3))
    assert fold_constants(noisy) is False


def test_a_large_expansion_of_little_is_not_folded():
    model = Lambda(lambda s, x: x.sum() + s.weight.reshape(-1)[:1].expand(1 << 23)).eval()
    module = trace(model, torch.randn(2, 3))
    canonicalize(module)
    assert max(t.numel() for t in module.state_dict().values()) < 1 << 10


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (lambda s, x: torch.addmm(s.weight[0], x, s.weight[:3].T @ s.weight[:3]), [(2, 6)],
         Counter(linear=1)),
        (lambda s, x: x @ s.weight.T, [(2, 3, 6)], Counter(linear=1)),
        (lambda s, x: x @ s.weight, [(2, 3, 4)], Counter(linear=1)),
        (lambda s, x: x.sum(0) @ s.weight, [(2, 4)], Counter(sum=1, linear=1)),
        (lambda _, x, y: torch.bmm(x, y), [(2, 3, 4), (2, 4, 5)], Counter(matmul=1)),
        (lambda _, x, y, z: torch.baddbmm(z, x, y, beta=0.5, alpha=2), [(2, 3, 4), (2, 4, 5),
         (2, 3, 5)], Counter(matmul=1, mul=2, add=1)),
        (lambda _, x: torch._softmax(x, -1, False), [(2, 3)], Counter(softmax=1)),
        (lambda _, x: torch.native_layer_norm(x, [3], None, None, 1e-3)[0], [(2, 3)],
         Counter(layer_norm=1)),
        (lambda s, x: torch.convolution(x, s.weight[..., None], None, [2], [1], [1], False, [0], 1),
         [(2, 6, 7)], Counter(conv1d=1)),
        (lambda s, x: torch.convolution(x, s.weight[..., None], None, [2], [0], [1], True, [1], 2),
         [(2, 4, 7)], Counter(conv_transpose1d=1)),
        (lambda _, x: torch.t(x), [(2, 3)], Counter(transpose=1)),
        (lambda _, x: torch.native_group_norm(x, None, None, x.shape[0], 4, 5, 2, 0.1)[0],
         [(2, 4, 5)], Counter(group_norm=1)),
        (lambda _, x, y, z: torch.baddbmm(z, x, y, beta=0), [(2, 3, 4), (2, 4, 5), (2, 3, 5)],
         Counter(matmul=1)),
        (lambda s, x, y: torch.addmm(x, y, s.weight[:3].T), [(2, 3), (2, 6)],
         Counter(linear=1, add=1)),
        (lambda s, x: torch.addmm(s.weight[0], x, s.weight[:3].T @ s.weight[:3], alpha=3), [(2, 6)],
         Counter(linear=1, mul=1, add=1)),
    ],
)  # fmt: skip
def test_every_op_has_one_spelling(function, shapes, expected):
    inputs = tuple(torch.randn(*shape) for shape in shapes)
    assert ops(assert_rewrites(randomize(Lambda(function)), inputs)) == expected


def test_a_tied_output_layer_reads_the_embedding_itself():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.embedding(tokens) @ self.embedding.weight.T

    module = assert_rewrites(randomize(Tied()), (torch.randint(0, 7, (2, 3)),))
    assert ops(module) == Counter(embedding=1, linear=1)
    assert len(module.state_dict()) == 1


EQUATIONS = [
    "bhwc,hkc->bhwk", "bhwc,wkc->bhwk", "bqc,bchw->bqhw", "bchw,bdhw->bcd", "ij,jk->ik",
    "ij,jk", "bi,bi->b", "bi,bj->bij", "bij->bji", "bij->j", "i,i->", "bi,i->b", "i,bi->b",
    "...ij,...jk->...ik", "...ij,jk->...ik", "bia,bja->bij", "abc,acd->abd", "nqhd,nkhd->nhqk",
    "nhqk,nkhd->nqhd", "ab,bc,cd->ad", "bij,bj->bi", "bj,bij->bi", "ab,cd->abcd", "abx,acy->abc",
    "b i j, b j k -> b i k",
]  # fmt: skip
SIZES = dict(zip("abcdhijknqwxy", (2, 3, 4, 5, 2, 3, 4, 5, 2, 3, 4, 2, 3), strict=True))


def shapes_of(equation: str) -> list[list[int]]:
    terms = equation.replace(" ", "").split("->")[0].split(",")
    return [
        [2, 3] * ("..." in term) + [SIZES[c] for c in term.replace("...", "")] for term in terms
    ]


def assert_einsums(equations: list[str]) -> None:
    """Check many equations in one graph: an export costs more than what is tested."""
    counts = [len(shapes_of(equation)) for equation in equations]
    args = tuple(torch.randn(s) for equation in equations for s in shapes_of(equation))

    def function(_: Lambda, *x: Tensor) -> list[Tensor]:
        starts = [sum(counts[:at]) for at in range(len(counts))]
        return [
            torch.einsum(equation, *x[start : start + count])
            for equation, start, count in zip(equations, starts, counts, strict=True)
        ]

    module = assert_rewrites(Lambda(function).eval(), args, decompose_einsum, batch=None)
    left = ops(module)
    assert left["einsum"] == left["reshape"] == left["bmm"] == 0


def test_einsum_becomes_matmul_without_reshapes():
    assert_einsums(EQUATIONS)


def any_equation(draw: random.Random) -> str:
    left, right = (draw.sample("abcdhi", draw.randint(1, 4)) for _ in range(2))
    every = sorted({*left, *right})
    output = draw.sample(every, draw.randint(0, len(every)))
    return f"{''.join(left)},{''.join(right)}->{''.join(output)}"


@given(seed=st.integers(0, 10_000))
@settings(max_examples=2, deadline=None)
def test_any_einsum_of_two_operands_keeps_its_value(seed):
    draw = random.Random(seed)
    assert_einsums([any_equation(draw) for _ in range(10)])


@pytest.mark.parametrize("equation", ["ii->i", "ij,jj->i"])
def test_diagonals_are_left_to_einsum(equation):
    args = tuple(torch.randn(3, 3) for _ in equation.split("->")[0].split(","))
    module = trace(Lambda(lambda _, *x: torch.einsum(equation, *x)).eval(), *args)
    assert decompose_einsum(module) is False


def test_a_canonical_graph_is_not_changed_by_any_rewrite():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU(), nn.RMSNorm(4)).eval()
    module = trace(model, torch.randn(2, 4))
    assert canonicalize(module) is False
    assert ops(module) == Counter(linear=1, layer_norm=1, gelu=1, rms_norm=1)
    assert not any(rewrite(module) for rewrite in REWRITES)
