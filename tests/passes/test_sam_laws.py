# SPDX-License-Identifier: Apache-2.0
"""Laws of PTQ4SAM that no other test holds; docs/methods/ptq4sam.md names the test of each law."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import qgraph
from qgraph.backends import integer, reference
from qgraph.calibration import ChannelHistogram, ChannelRange
from qgraph.calibration.operand_channels import OperandChannels
from qgraph.formats import AffineEncoding, IntGrid, LevelEncoding
from qgraph.formats.power_of_two import NAME, power_of_two, power_table, tau_of
from qgraph.graph.build import insert_call, shallow_copy
from qgraph.graph.channel_maps import ChannelMaps, channel_maps
from qgraph.graph.dialect import (
    DEQUANTIZE,
    DEQUANTIZE_LEVELS,
    QUANTIZE,
    QUANTIZE_LEVELS,
    encoding_of,
    is_dequantize,
    is_quantize,
)
from qgraph.graph.sign_folding import fold_signs
from qgraph.graph.verify import tensors
from qgraph.model import QuantizedModel
from qgraph.passes import SearchSoftmaxBase
from qgraph.passes.insert_quantizers import parameter_nodes
from qgraph.testing.attention_kinds import Fused, GroupedSdpa, Separate
from tests.graph.test_channel_maps import DTYPES, free_roots, graph, inputs
from tests.passes.attention_pipelines import batches


def flip_rows(model: nn.Module, maps: ChannelMaps, flipped: list[int]) -> None:
    """Change the signs of these classes in the module's own weights."""
    labels = {
        label
        for item in maps.sites
        for rows in (item.query_rows, item.key_rows)
        for label in rows.flatten().tolist()
        if maps.classes.find(label) in flipped
    }
    with torch.no_grad():
        for name, row in {maps.weight_rows(label) for label in labels}:
            for kind in ("weight", "bias"):
                model.get_parameter(f"{name.removesuffix('weight')}{kind}")[row].neg_()


@pytest.mark.parametrize("cls", [Fused, GroupedSdpa])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchs_own_attention_kernel_sees_no_bit_of_folded_signs(
    cls: type[nn.Module], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)  # as `graph` builds it
    model = cls().to(dtype).eval()
    changed = copy.deepcopy(model)
    maps = channel_maps(graph(cls.__name__))
    flip_rows(changed, maps, free_roots(maps)[::2])
    assert not all(
        torch.equal(a, b) for a, b in zip(model.parameters(), changed.parameters(), strict=True)
    )
    given_inputs = inputs(dtype)
    with torch.no_grad():
        assert torch.equal(model(*given_inputs), changed(*given_inputs))


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["Separate", "Fused", "RotaryHalf", "Packed"]), st.integers(0, 2**8 - 1))
def test_folding_twice_is_the_identity_and_touches_only_rows_of_queries_and_keys(
    name: str, choice: int
) -> None:
    module = shallow_copy(graph(name))
    before = {n: t.clone() for n, t in tensors(module).items()}
    reads = {n.name: [str(a) for a in n.args] for n in module.graph.nodes}
    for _ in range(2):
        maps = channel_maps(module)
        flipped = [r for i, r in enumerate(free_roots(maps)) if choice >> i & 1]
        assert fold_signs(module, maps, flipped) is bool(flipped)
    after = tensors(module)
    for n, tensor in before.items():
        if n in after:
            assert torch.equal(after[n], tensor)
    for node in module.graph.nodes:
        old = reads.get(node.name, [])
        for was, now in zip(old, node.args, strict=False):
            if getattr(now, "op", "") == "get_attr" and str(now) != was:
                stored = [
                    t for t in before.values() if t.shape == module.get_buffer(now.target).shape
                ]
                assert any(torch.equal(t, module.get_buffer(now.target)) for t in stored)


def operand(x: Tensor) -> OperandChannels:
    """Statistics of an operand [N, C]."""
    extrema, histogram = ChannelRange(-1), ChannelHistogram(-1, positions=0)
    extrema.update(x)
    histogram.update(x)
    return OperandChannels(torch.arange(1, x.shape[1] + 1), extrema, histogram, 1.0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([-1.0, 1.0]), min_size=2, max_size=6), st.integers(0, 99))
def test_one_sided_channels_never_widen_and_mirrored_statistics_are_those_of_mirrored_values(
    sides: list[float], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    signs = torch.tensor(sides)
    x = (torch.rand(50, len(sides), generator=generator) * 5 + 0.1) * signs
    folded = operand(x).mirrored(signs < 0)
    low, high = folded.bounds()
    assert torch.equal(low.float(), (x * signs).amin(0))
    assert torch.equal(high.float(), (x * signs).amax(0))
    (was_low, was_high), (now_low, now_high) = operand(x).range().bounds(), folded.range().bounds()
    widths = [max(h, 0.0) - min(b, 0.0) for b, h in ((was_low, was_high), (now_low, now_high))]
    assert widths[1] <= widths[0]
    assert bool((folded.moments()[0] > 0).all())


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([2, 3, 4, 8]), st.integers(0, 99))
def test_asymmetric_codes_of_a_negated_row_are_the_mirrored_codes(bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(40, generator=generator) + 0.5
    grid = IntGrid(bits, signed=False)
    low, high = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
    scale, zero = (high - low) / grid.qmax, round(-low / (high - low) * grid.qmax)
    plain = AffineEncoding.per_tensor(scale, zero, grid)
    mirrored = AffineEncoding.per_tensor(scale, grid.qmax - zero, grid)
    assert torch.equal(mirrored.fake(-row), -plain.fake(row))
    assert torch.equal(mirrored.encode(-row).int(), grid.qmax - plain.encode(row).int())


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([(4, 1), (4, 2), (4, 4), (6, 4), (6, 8)]), st.integers(0, 8))
def test_a_scale_smaller_by_m_steps_shifts_every_code_by_m(form: tuple[int, int], m: int) -> None:
    bits, tau = form
    table = power_table(bits, tau)
    code_of_rank = table.codes.long()
    last = int(code_of_rank[1:].max())
    # Levels of a hundred units and more: there the table is the exponential to half a percent.
    codes = torch.tensor([c for c in range(last + 1) if m <= c and 2.0 ** (15 - c / tau) > 100])
    x = torch.exp2(-codes.double() / tau).float()
    plain, smaller = power_of_two(bits, tau, 1.0), power_of_two(bits, tau, 2.0 ** (-m / tau))
    found = code_of_rank[smaller.encode(x).long()]
    assert torch.equal(code_of_rank[plain.encode(x).long()], codes)
    assert torch.equal(found, codes - m)


@pytest.mark.parametrize("bad", [float("nan"), 1e-45, 1e-38, 0.0])
def test_numbers_that_are_none_and_denormal_ones_have_a_code(bad: float) -> None:
    encoding = power_of_two(4, 2, 1.0)
    codes = encoding.encode(torch.tensor([bad, 0.5]))
    assert int(codes[0]) < encoding.levels.numel()
    assert encoding.fake(torch.tensor([0.5])).item() == 0.5
    if not math.isnan(bad):
        assert encoding.fake(torch.tensor([bad])).item() == 0.0


class Mixed(nn.Module):
    """Probabilities times values."""

    def forward(self, a: Tensor, v: Tensor) -> Tensor:
        """[B, T, S] and [B, S, D] to [B, T, D]."""
        return a @ v


def mixed_model(bits: int, tau: int, a: Tensor, v: Tensor) -> torch.fx.GraphModule:
    module = qgraph.trace(Mixed().eval(), a, v)
    product = next(n for n in module.graph.nodes if "matmul" in str(n.target))
    grid = IntGrid(8, signed=False)
    chosen = (
        (QUANTIZE_LEVELS, DEQUANTIZE_LEVELS, power_of_two(bits, tau, 1.0)),
        (QUANTIZE, DEQUANTIZE, AffineEncoding.per_tensor(0.03, 128, grid)),
    )
    for position, (quantize, dequantize, encoding) in enumerate(chosen):
        value = product.args[position]
        given = parameter_nodes(module, f"x{position}", encoding, before=product)
        codes = insert_call(module, quantize, value, *given, like=value, before=product)
        decoded = insert_call(module, dequantize, codes, *given, like=value, before=product)
        product.update_arg(position, decoded)
    module.recompile()
    return module


@settings(max_examples=8, deadline=None)
@given(st.sampled_from([(4, 1), (4, 4), (6, 4), (8, 16)]), st.integers(0, 99))
def test_the_order_of_keys_is_nothing_to_the_integer_product(
    form: tuple[int, int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(2, 3, 40, generator=generator).mul(3).softmax(-1)
    v = torch.randn(2, 40, 5, generator=generator)
    module = mixed_model(*form, a, v)
    lowered, exact = integer.lower(module), reference.lower(module)
    order = torch.randperm(40, generator=generator)
    assert torch.equal(lowered(a, v), lowered(a[..., order], v[:, order]))
    assert torch.equal(lowered(a, v), exact(a, v))
    (product,) = exact.semantics.products.values()
    data, weight = product.data.encoding, product.weight.encoding
    levels, values = data.level(data.encode(a)).long(), weight.level(weight.encode(v)).long()
    assert int((levels @ values.abs()).max()) <= product.bound
    wide = (levels @ values).double() * float(data.scale) * float(weight.scale)
    torch.testing.assert_close(lowered(a, v).double(), wide, rtol=2e-7, atol=0.0)


@pytest.fixture(scope="module")
def quantized() -> QuantizedModel:
    torch.manual_seed(0)
    data = [{"x": x, "y": y} for x, y in batches()]
    chosen = qgraph.pipeline("sam_int4").replace(
        "search-softmax-base", SearchSoftmaxBase(formats=("power_of_two",), per_head=True)
    )
    return qgraph.compile(Separate().eval(), data, chosen, progress=False)


def test_two_evaluations_are_equal_and_weights_lie_on_their_grid(quantized: QuantizedModel) -> None:
    x, y = batches(1, seed=5)[0]
    for run in (quantized.graph_module, quantized):
        first, second = run(x, y), run(x, y)
        for a, b in zip(tree_leaves(first), tree_leaves(second), strict=True):
            assert torch.equal(a, b)
    assert not any(m.training for m in quantized.graph_module.modules())
    module = quantized.graph_module
    stored = [
        n for n in module.graph.nodes
        if is_dequantize(n) and getattr(n.args[0], "op", "") == "get_attr"
    ]  # fmt: skip
    assert len(stored) >= 4
    for node in stored:
        encoding = encoding_of(module, node)
        codes = module.get_buffer(str(node.args[0].target))
        assert not codes.is_floating_point()
        assert torch.equal(encoding.encode(encoding.decode(codes)), codes)


def test_base_scale_and_zero_come_back_from_a_saved_file(
    quantized: QuantizedModel, tmp_path: Path
) -> None:
    quantized.save(tmp_path / "m.qgraph")
    loaded = qgraph.load(tmp_path / "m.qgraph")
    assert isinstance(loaded, QuantizedModel)

    def bases(model: QuantizedModel) -> list[LevelEncoding]:
        module = model.graph_module
        found = [encoding_of(module, n) for n in module.graph.nodes if is_quantize(n)]
        return [e for e in found if isinstance(e, LevelEncoding)]

    (was,), (now,) = bases(quantized), bases(loaded)
    assert was.name == now.name == NAME
    assert was.levels.ndim == 2
    for field in ("scale", "levels", "thresholds"):
        assert torch.equal(getattr(was, field), getattr(now, field))
    for row in now.levels:
        alone = LevelEncoding(
            name=NAME, scale=now.scale[0], levels=row, storage_bits=4,
            thresholds=now.thresholds[0] if torch.equal(row, now.levels[0]) else now.thresholds[1],
        )  # fmt: skip
        assert tau_of(alone) in {1, 2, 4, 8, 16}
        assert 0 in row.tolist()
    x, y = batches(1, seed=5)[0]
    assert torch.equal(quantized(x, y), loaded(x, y))
