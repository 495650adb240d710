# SPDX-License-Identifier: Apache-2.0
"""Channel maps: which rows make which channels, which signs are free, and that folding is exact."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from qgraph.errors import PassError
from qgraph.graph.build import shallow_copy
from qgraph.graph.channel_maps import ChannelMaps, channel_maps
from qgraph.graph.sign_folding import fold_signs, unfold_signs
from qgraph.graph.verify import Sample, record_values, tensors
from qgraph.testing.attention_kinds import DIM, HEAD, HEADS, ILLEGAL, LEGAL
from tests.graph.attention_models import canonical

TOKENS, KEYS = 5, 7
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def inputs(dtype: torch.dtype = torch.float32, seed: int = 0, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((batch, TOKENS, DIM), (batch, KEYS, DIM))
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


@functools.cache
def graph(name: str) -> GraphModule:
    torch.manual_seed(0)
    return canonical({**LEGAL, **{k: v[0] for k, v in ILLEGAL.items()}}[name](), *inputs())


def free_roots(maps: ChannelMaps) -> list[int]:
    found = set()
    for item in maps.sites:
        for label in item.key_rows.flatten().tolist():
            if label and maps.classes.reason(label) is None:
                found.add(maps.classes.find(label))
    return sorted(found)


def outputs(module: GraphModule, given: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [t for t in tree_leaves(module(*given)) if isinstance(t, Tensor)]


@pytest.mark.parametrize("name", LEGAL)
def test_every_legal_attention_is_mapped_and_free(name: str) -> None:
    maps = channel_maps(graph(name))
    assert maps.sites
    for item in maps.sites:
        assert item.refusal == ""
        assert item.query_rows.shape == item.key_rows.shape == (HEADS, HEAD)
        query, key = (maps.classes.roots(r) for r in (item.query_rows, item.key_rows))
        assert torch.equal(query, key)


@pytest.mark.parametrize("name", ILLEGAL)
def test_every_illegal_attention_is_refused_with_its_reason(name: str) -> None:
    maps = channel_maps(graph(name))
    assert len(maps.sites) == 1
    assert ILLEGAL[name][1] in maps.sites[0].refusal
    assert not free_roots(maps)


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("Separate", HEADS * HEAD),
        ("Packed", HEADS * HEAD),
        ("PackedSelf", HEADS * HEAD),
        ("Fused", HEADS * HEAD),
        ("Grouped", HEAD),
        ("GroupedSdpa", HEAD),
        ("RotaryHalf", HEADS * HEAD // 2),
        ("RotaryPairs", HEADS * HEAD // 2),
        ("PartialRotary", HEADS * (HEAD // 4 + HEAD // 2)),
        ("RelativePositions", HEAD),
        ("UnitNormed", HEADS * HEAD),
    ],
)
def test_rows_that_must_agree_form_classes(name: str, classes: int) -> None:
    assert len(free_roots(channel_maps(graph(name)))) == classes


def test_rotary_pairs_are_the_rotated_channels() -> None:
    for name, pairs in (("RotaryHalf", (0, 2)), ("RotaryPairs", (0, 1))):
        maps = channel_maps(graph(name))
        roots = maps.classes.roots(maps.sites[0].key_rows)
        assert roots[0, pairs[0]] == roots[0, pairs[1]]
        assert len(set(roots[0].tolist())) == 2


def test_rows_of_a_projection_with_heads_outside_are_found() -> None:
    maps = channel_maps(graph("FusedHeads"))
    rows = [[maps.weight_rows(v)[1] for v in head] for head in maps.sites[0].key_rows.tolist()]
    assert rows == [[4, 5, 6, 7], [16, 17, 18, 19]]
    maps = channel_maps(graph("Interleaved"))
    rows = [[maps.weight_rows(v)[1] for v in head] for head in maps.sites[0].query_rows.tolist()]
    assert rows == [[0, 2, 4, 6], [1, 3, 5, 7]]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(LEGAL)), dtype=st.sampled_from(DTYPES),
    choice=st.integers(0, 2**16 - 1), seed=st.integers(0, 99), batch=st.integers(1, 3),
)  # fmt: skip
def test_folding_any_free_signs_changes_no_bit(
    name: str, dtype: torch.dtype, choice: int, seed: int, batch: int
) -> None:
    module = copy.deepcopy(graph(name)).to(dtype)  # .to() writes into shared parameters
    given_inputs = inputs(dtype, seed, batch)
    before = outputs(module, given_inputs)
    site = channel_maps(module).sites[0].site
    sample = Sample(tuple(given_inputs))
    watched = {site.logits.name, site.key.name}
    was = record_values(module, sample, watched)
    maps = channel_maps(module)
    flipped = [r for i, r in enumerate(free_roots(maps)) if choice >> i & 1]
    assert fold_signs(module, maps, flipped) is bool(flipped)
    module.recompile()
    now = record_values(module, sample, watched)
    assert torch.equal(was[site.logits.name], now[site.logits.name])
    assert torch.equal(was[site.key.name].abs(), now[site.key.name].abs())
    for a, b in zip(before, outputs(module, given_inputs), strict=True):
        assert a.dtype == b.dtype == dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", LEGAL)
def test_every_kind_keeps_every_bit_in_every_precision(name: str) -> None:
    for dtype in DTYPES:
        module = copy.deepcopy(graph(name)).to(dtype)
        given_inputs = inputs(dtype)
        maps = channel_maps(module)
        watched = {item.site.logits.name for item in maps.sites}
        sample = Sample(tuple(given_inputs))
        before, was = outputs(module, given_inputs), record_values(module, sample, watched)
        assert fold_signs(module, maps, free_roots(maps)[::2])
        module.recompile()
        after, now = outputs(module, given_inputs), record_values(module, sample, watched)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), dtype
        assert all(torch.equal(was[n], now[n]) for n in watched), dtype


@pytest.mark.parametrize("name", ["Separate", "Fused", "RelativePositions", "Tied", "Twice"])
def test_unfolding_restores_the_weights(name: str) -> None:
    module = shallow_copy(graph(name))
    before = {n.name: n.args for n in module.graph.nodes}
    values = {n: t.clone() for n, t in tensors(module).items()}
    maps = channel_maps(module)
    fold_signs(module, maps, free_roots(maps)[:3])
    assert unfold_signs(module)
    for node in module.graph.nodes:
        for old, new in zip(before.get(node.name, ()), node.args, strict=False):
            if getattr(new, "op", "") == "get_attr" and old is not new:
                assert torch.equal(values[old.target], module.get_buffer(new.target))
    assert not unfold_signs(module)


def test_keys_become_gamma_times_keys_and_nothing_else_changes() -> None:
    module = shallow_copy(graph("Separate"))
    sample = Sample(tuple(inputs()))
    was = record_values(module, sample)
    maps = channel_maps(module)
    flipped = free_roots(maps)[1::2]
    fold_signs(module, maps, flipped)
    now = record_values(module, sample)
    key = maps.sites[0].site.key.name  # [B, H, D, S]
    gamma = 1.0 - 2.0 * torch.isin(
        maps.classes.roots(maps.sites[0].key_rows), torch.tensor(flipped)
    )
    assert torch.equal(now[key], was[key] * gamma[:, :, None])
    changed = {n for n in was if not torch.equal(was[n], now[n])}
    assert len(changed) == 2 * 3 + 1  # per projection: linear and the split in two moves; then K^T


def test_a_free_sign_inside_a_rotary_pair_would_change_logits() -> None:
    module = shallow_copy(graph("RotaryHalf"))
    before = outputs(module, inputs())
    maps = channel_maps(module)
    maps.classes.parent = list(range(len(maps.classes.parent)))  # as if no rows had to agree
    query, key = maps.sites[0].query_rows[0, 0].item(), maps.sites[0].key_rows[0, 0].item()
    fold_signs(module, maps, [int(query), int(key)])
    module.recompile()
    assert not torch.allclose(before[0], outputs(module, inputs())[0], atol=1e-3)


def test_pinned_rows_cannot_be_folded() -> None:
    module = shallow_copy(graph("LayerNormed"))
    maps = channel_maps(module)
    root = maps.classes.find(int(maps.sites[0].key_rows[0, 0]))
    with pytest.raises(PassError, match="LayerNorm"):
        fold_signs(module, maps, [root])


def test_tied_weights_stay_one_tensor() -> None:
    module = shallow_copy(graph("Tied"))
    maps = channel_maps(module)
    fold_signs(module, maps, free_roots(maps)[:2])
    q, k = (n for n in maps.labels.sources)
    assert q.args[1].target == k.args[1].target  # type: ignore[union-attr]
