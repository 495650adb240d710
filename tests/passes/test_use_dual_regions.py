# SPDX-License-Identifier: Apache-2.0
"""Which edges get a dual-region format, what each refusal says, and that one sweep is enough."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qgraph.formats import LevelEncoding
from qgraph.formats.dual_region import NON_NEGATIVE, SIGNED, shift_of
from qgraph.graph.seen_through import (
    activation_behind,
    is_normalised_after,
    producer,
    rectified_behind,
    softmax_behind,
)
from qgraph.graph.trace import trace
from qgraph.passes import UseDualRegions
from qgraph.passes.use_dual_regions import (
    affine_encoding,
    attention_score,
    best_affine,
    row_weights,
)
from qgraph.pipeline import Pass
from tests.passes.deciding import Decided, decided, seeded


class Attention(nn.Module):
    """Attention whose probabilities are dropped out, expanded and reshaped on their way to V."""

    def __init__(self, sharpness: float = 0.3) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.out = nn.Linear(16, 16)
        self.sharpness = sharpness

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in self.parts())
        a = (q @ k.transpose(-2, -1) * self.sharpness).softmax(-1)
        a = F.dropout(a, 0.1, training=False).contiguous()
        out: Tensor = self.out((a @ v).transpose(1, 2).flatten(2))
        return out

    def parts(self) -> tuple[nn.Module, ...]:
        return self.query, self.key, self.value


class Mlp(nn.Module):
    """Linear, an activation, and data movement before the second linear."""

    def __init__(self, function: Any, scale: float = 3.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)
        self.function = function
        with torch.no_grad():
            self.first.weight *= scale

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.function(self.first(x)).transpose(0, 1).contiguous().transpose(0, 1)
        out: Tensor = self.second(hidden)
        return out


def decided_(model: nn.Module, *items: Pass, name: str = "int6") -> Decided:
    return decided(seeded(model), *items, name=name)


def test_attention_probabilities_get_two_regions_through_dropout_and_copies():
    found = decided_(Attention(), UseDualRegions())
    dual = [s for s in found.context.plan if isinstance(s.encoding, LevelEncoding)]
    assert len(dual) == 1
    encoding = dual[0].encoding
    assert isinstance(encoding, LevelEncoding)
    assert encoding.name == NON_NEGATIVE
    assert shift_of(encoding) >= 1
    assert float(encoding.fake(torch.ones(()))) == 1.0
    assert softmax_behind(dual[0].value) is not None
    (record,) = [d for d in found.context.decisions if d.by == "use-dual-regions"]
    assert record.outcome == "applied"
    assert record.numbers["gain_db"] >= 0.2


@pytest.mark.parametrize(
    "function",
    [
        F.gelu, F.silu, F.hardswish, F.mish, F.elu,
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda x: torch.sigmoid(x) * x,
    ],
)  # fmt: skip
def test_every_gelu_like_function_before_a_linear_is_matched(function):
    force = UseDualRegions(force=("*",))
    found = decided_(Mlp(function), force)
    (site,) = [s for s in found.context.plan if isinstance(s.encoding, LevelEncoding)]
    assert isinstance(site.encoding, LevelEncoding)
    assert site.encoding.name == SIGNED
    assert site.edge.consumer.name.startswith("linear")
    assert activation_behind(site.value) is not None


def test_a_gated_activation_is_no_gelu_like_output():
    class Gated(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            a, b = self.first(x).chunk(2, dim=-1)
            out: Tensor = self.second(torch.cat([F.gelu(a) * b, F.gelu(a) * b], -1))
            return out

    found = decided_(Gated(F.gelu), UseDualRegions(force=("*",)))
    assert found.lines("use-dual-regions") == []
    assert not any(isinstance(s.encoding, LevelEncoding) for s in found.context.plan)


def test_where_affine_is_as_good_the_site_stays_affine_and_says_so():
    found = decided_(Attention(sharpness=0.02), UseDualRegions(min_gain_db=1.0), name="int4")
    outcomes = found.lines("use-dual-regions")
    assert [outcome for outcome, _ in outcomes] == ["kept"]
    assert "affine is as good" in outcomes[0][1]
    assert all("region" not in text for text in found.formats().values())


def test_a_constant_value_is_refused_and_ranges_are_chosen_by_the_next_pass():
    class Silent(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.second(F.gelu(self.first(x) * 0.0))
            return out

    found = decided_(Silent(F.gelu), UseDualRegions())
    assert found.lines("use-dual-regions") == [("refused", "the value is constant")]
    assert all(s.encoding is not None for s in found.context.plan.activations())


def test_a_glob_leaves_a_site_alone_and_another_forces_it():
    plain = decided_(Mlp(F.gelu), UseDualRegions(skip=("second",), force=("second",)))
    assert plain.lines("use-dual-regions") == [("kept", "left alone on request")]
    forced = decided_(Mlp(F.gelu), UseDualRegions(min_gain_db=99.0, force=("second",)))
    assert [outcome for outcome, _ in forced.lines("use-dual-regions")] == ["applied"]


def test_a_graph_without_softmax_gelu_or_relu_is_unchanged():
    with_pass = decided_(Mlp(torch.tanh), UseDualRegions())
    without = decided_(Mlp(torch.tanh))
    assert with_pass.formats() == without.formats()
    assert with_pass.context.decisions == without.context.decisions


def test_a_relu_with_a_long_tail_gets_regions_of_positive_values_even_behind_pooling():
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv1d(12, 8, 1), nn.Conv1d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.second(F.max_pool1d(F.relu(self.first(x)), 2))
            return out

    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(4, 12, 16, generator=generator) ** 5 for _ in range(4)]
    found = decided(Pooled(), UseDualRegions(), name="int4", data=data)
    site = next(s for s in found.context.plan.activations() if s.edge.consumer.name == "conv1d_1")
    assert rectified_behind(site.value) is not None
    forced = decided(Pooled(), UseDualRegions(force=("second",)), name="int4", data=data)
    site = next(s for s in forced.context.plan.activations() if s.edge.consumer.name == "conv1d_1")
    assert isinstance(site.encoding, LevelEncoding)
    assert site.encoding.name == NON_NEGATIVE


def test_errors_count_relative_to_rows_only_before_a_norm():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
            self.norm = nn.LayerNorm(16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x + self.inner(x))
            return y + self.last(y)

    module = trace(Both().eval(), torch.randn(3, 16))
    inner, last = (n for n in module.graph.nodes if n.name.startswith("linear"))
    assert is_normalised_after(inner)
    assert not is_normalised_after(last)
    energy = torch.tensor([0.0, 1.0, 1.0, 1.0, 1e6])
    assert torch.equal(row_weights(energy, 0.0), torch.ones(5))
    weights = row_weights(energy, 1.5)
    assert weights[4] < 1e-4 * weights[1]
    assert torch.isfinite(row_weights(torch.zeros(4), 1.5)).all()


def test_a_decided_site_is_not_decided_again():
    @dataclasses.dataclass(frozen=True)
    class Again(UseDualRegions):
        name = "use-dual-regions-again"

    found = decided_(Attention(), UseDualRegions(), Again())
    assert {d.by for d in found.context.decisions} == {"use-dual-regions"}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(3, 8), st.integers(2, 40))
def test_affine_competes_with_a_range_searched_by_the_same_score(seed, bits, keys):
    generator = torch.Generator().manual_seed(seed)
    rows = (torch.randn(32, keys, generator=generator) * 3).softmax(-1)
    score = attention_score(rows, torch.randn(32, keys, 4, generator=generator))
    low, high = best_affine(score, 0.0, float(rows.max()), bits)
    best = score(affine_encoding(low, high, bits))
    for fraction in (1.0, 0.8, 0.5, 0.25):
        rival = affine_encoding(0.0, float(rows.max()) * fraction, bits)
        assert best <= score(rival) * 1.2 + 1e-12


def test_movement_is_seen_through_and_computation_is_not():
    class Moves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a = x.softmax(-1)
            moved = F.pad(a.roll(1, 1)[:, 1:], (0, 1)).permute(1, 0).reshape(-1)
            return moved + (a * 2).sum()

    module = trace(Moves().eval(), torch.randn(5, 6))
    nodes = {n.name: n for n in module.graph.nodes}
    last_move = next(
        n
        for n in reversed(module.graph.nodes)
        if "view" in n.name or "resh" in n.name or "clone" in n.name
    )
    assert producer(last_move) is next(n for n in nodes.values() if "softmax" in n.name)
    doubled = next(n for n in nodes.values() if n.name.startswith("mul"))
    assert softmax_behind(doubled) is None
