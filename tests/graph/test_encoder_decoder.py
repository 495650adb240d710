# SPDX-License-Identifier: Apache-2.0
"""Encoder-decoder structure from shapes: textbook nets, odd ones, and laws of invariance."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from examples.zoo.sirst.models import NestedUNet, ResUNet
from qgraph.graph.encoder_decoder import Shape, Side, Structure, find_structure
from qgraph.graph.trace import trace

SMALL = (2, 3, 4, 5, 6)
TINY = (2, 3, 4)


def graph(model: nn.Module, size: int = 32, batch: int = 2, channels: int = 1) -> GraphModule:
    return trace(model.eval(), torch.rand(batch, channels, size, size))


def structure(model: nn.Module, size: int = 32, batch: int = 2, channels: int = 1) -> Structure:
    return find_structure(graph(model, size, batch, channels))


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2)


class Plain(nn.Module):
    """Strided stages with a squeeze-excite gate and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = conv(1, 4, stride=2), conv(4, 4)
        self.two, self.squeeze, self.excite = conv(4, 8, stride=2), conv(8, 2, 1), conv(2, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor):
        x = torch.relu(self.two(torch.relu(self.one(torch.relu(self.stem(x))))))
        gate = torch.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        x = x * torch.sigmoid(self.excite(gate))
        return self.head(x.mean((2, 3)))


class Pyramid(nn.Module):
    """A feature pyramid: lateral 1x1, top-down additions, fuse convolutions, a head per level."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(1, 4)
        self.down = nn.ModuleList([conv(4, 8, stride=2), conv(8, 16, stride=2)])
        self.lateral = nn.ModuleList([conv(4, 6, 1), conv(8, 6, 1), conv(16, 6, 1)])
        self.fuse = nn.ModuleList([conv(6, 6), conv(6, 6)])
        self.heads = nn.ModuleList([conv(6, 1, 1) for _ in range(3)])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        stages = [torch.relu(self.stem(x))]
        for down in self.down:
            stages.append(torch.relu(down(stages[-1])))
        top = self.lateral[2](stages[2])
        outputs = [self.heads[2](top)]
        for level in (1, 0):
            top = F.interpolate(top, scale_factor=2.0) + self.lateral[level](stages[level])
            top = self.fuse[level](top)
            outputs.append(self.heads[level](top))
        return tuple(outputs)


class Transformer(nn.Module):
    """Patches, four attention-free token blocks and a classifier: one resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 8, 8, stride=8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(7)])
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor):
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            scores = torch.softmax(tokens @ tokens.transpose(1, 2), dim=-1)
            tokens = tokens + block(scores @ tokens)
        return self.head(tokens.mean(1))


class Hourglass(nn.Module):
    """Strides down and up by transposed convolution, without skips or with gated additive ones."""

    def __init__(self, *, is_gated: bool) -> None:
        super().__init__()
        self.is_gated = is_gated
        self.stem, self.encode = conv(1, 4), conv(4, 4)
        self.down, self.bottom = conv(4, 8, stride=2), conv(8, 8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.gate, self.decode, self.head = conv(4, 4, 1), conv(4, 4), conv(4, 1, 1)

    def forward(self, x: Tensor):
        skip = torch.relu(self.encode(torch.relu(self.stem(x))))
        x = self.up(torch.relu(self.bottom(torch.relu(self.down(skip)))))
        if self.is_gated:
            x = x + skip * torch.sigmoid(self.gate(x))
        return self.head(torch.relu(self.decode(x)))


class Odd(nn.Module):
    """A U-Net whose odd input makes upsampled maps one pixel too large, cropped at the merge."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.encode = conv(1, 4), conv(4, 4)
        self.down, self.smooth = conv(4, 4, stride=2), conv(4, 4)
        self.decode, self.head = conv(8, 4), conv(4, 1, 1)

    def forward(self, x: Tensor):
        skip = self.encode(self.stem(x))
        up = self.smooth(F.interpolate(self.down(skip), scale_factor=2.0))
        up = up[:, :, : skip.shape[2], : skip.shape[3]]
        return self.head(self.decode(torch.cat([up, skip], 1)))


class AttentivePixels(nn.Module):
    """Self-attention over pixels with two heads of four channels, at the coarse resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = conv(1, 4), conv(4, 8, stride=2)
        self.mix, self.head = conv(8, 4), conv(4, 1)

    def forward(self, x: Tensor):
        x = torch.relu(self.down(torch.relu(self.stem(x))))
        batch, channels, rows, columns = x.shape
        heads = x.view(batch, 2, channels // 2, rows * columns).transpose(2, 3)
        mixed = torch.softmax(heads @ heads.transpose(2, 3), dim=-1) @ heads
        x = self.mix(x + mixed.transpose(2, 3).reshape(batch, channels, rows, columns))
        return self.head(torch.relu(x))


class Idle(nn.Module):
    """The same network with operations that change nothing."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor):
        return self.inner(x * 1.0 + 0.0).clone()


def test_a_residual_u_net_has_nine_blocks_and_four_pairs():
    found = structure(ResUNet(SMALL))
    assert found.shape is Shape.ENCODER_DECODER
    assert found.num_levels == 5
    assert found.notes == ()
    sizes = {block: len(names) for block, names in found.blocks().items()}
    expected = {"stem": 1, "E0": 2, "E1": 3, "E2": 3, "E3": 3, "B4": 3}
    assert sizes == {**expected, "D3": 3, "D2": 3, "D1": 3, "D0": 3, "head": 1}
    for pair, level in zip(found.skips, (3, 2, 1, 0), strict=True):
        sources = {found.placements[name].block for name in pair.sources}
        sinks = {found.placements[name].block for name in pair.sinks}
        assert pair.level == level
        assert f"E{level}" in sources <= {f"E{level}", "stem"}
        assert sinks == {f"D{level}"}


def test_a_nested_u_net_has_sixteen_nodes_and_dense_skips():
    found = structure(NestedUNet(SMALL))
    blocks = [b for b in found.blocks() if b not in {"stem", "head"}]
    assert found.num_levels == 5
    assert len(blocks) == 16
    assert sorted(b for b in blocks if b[0] != "D") == ["B4", "E0", "E1", "E2", "E3"]
    assert sum(b.startswith("D0") for b in blocks) == 5
    assert [pair.level for pair in found.skips] == [0, 1, 2, 3, 0, 1, 2, 0, 1, 0]
    for pair in found.skips:
        levels = {found.placements[name].level for name in (*pair.sources, *pair.sinks)}
        assert levels == {pair.level}


def test_a_feature_pyramid_decodes_in_its_fuse_convolutions():
    module = graph(Pyramid(), size=32)
    found = find_structure(module)
    weights = {n.name: str(n.args[1]) for n in module.graph.nodes if n.name in found.placements}
    sides = {weights[name].rsplit("_weight")[0]: p for name, p in found.placements.items()}
    assert found.num_levels == 3
    for name, placement in sides.items():
        if "fuse" in name:
            assert placement.side is Side.DECODER
        elif "lateral" in name:
            wanted = Side.BOTTLENECK if placement.level == 2 else Side.ENCODER
            assert placement.side is wanted
        elif "heads" in name:
            assert placement.side is Side.HEAD
    assert [(p.level, len(p.sources), len(p.sinks)) for p in found.skips] == [(1, 1, 1), (0, 1, 1)]
    assert found.placements[found.skips[0].sources[0]].side is Side.ENCODER
    assert found.placements[found.skips[0].sinks[0]].side is Side.DECODER


def test_a_transformer_is_flat_and_its_pseudo_levels_rise_and_fall():
    found = structure(Transformer())
    placements = list(found.placements.values())
    levels = [p.level or 0 for p in placements]
    assert found.shape is Shape.FLAT
    assert found.skips == ()
    assert placements[0].side is Side.STEM
    assert placements[-1].side is Side.HEAD
    assert max(levels) == found.num_levels - 1 == 4
    peak = levels.index(max(levels))
    assert levels[: peak + 1] == sorted(levels[: peak + 1])
    assert levels[peak:] == sorted(levels[peak:], reverse=True)
    assert {p.side for p in placements} >= {Side.ENCODER, Side.BOTTLENECK, Side.DECODER}


def test_a_classifier_is_plain_and_its_gate_is_apart():
    found = structure(Plain())
    sides = [p.side for p in found.placements.values()]
    assert found.shape is Shape.PLAIN
    assert found.num_levels == 2
    assert sides == [
        Side.STEM, Side.ENCODER, Side.BOTTLENECK, Side.GATE, Side.GATE, Side.HEAD,
    ]  # fmt: skip
    assert [p.level for p in found.placements.values()] == [0, 0, 1, 1, 1, 1]


def test_an_auto_encoder_without_skips_says_so():
    found = structure(Hourglass(is_gated=False))
    assert found.shape is Shape.ENCODER_DECODER
    assert found.skips == ()
    assert found.notes == ("no skip connections; decoder and encoder are tied by level only",)
    assert {p.side for p in found.placements.values() if p.level == 1} == {Side.BOTTLENECK}


def test_a_gated_additive_skip_is_found_and_its_gate_is_apart():
    module = graph(Hourglass(is_gated=True))
    found = find_structure(module)
    gates = [name for name, p in found.placements.items() if p.side is Side.GATE]
    assert len(gates) == 1
    merges = [p.merge for p in found.skips]
    assert [pair.level for pair in found.skips] == [0]
    assert merges == [n.name for n in module.graph.nodes if "mul" in n.name]
    assert found.placements[found.skips[0].sources[0]].side is Side.ENCODER


def test_sizes_that_differ_by_rounding_are_one_level():
    found = structure(Odd(), size=25)
    assert found.num_levels == 2
    assert [pair.level for pair in found.skips] == [0]


def test_attention_over_pixels_is_no_change_of_resolution():
    found = structure(AttentivePixels(), size=16)
    assert found.shape is Shape.PLAIN
    assert [p.side for p in found.placements.values()] == [
        Side.STEM, *[Side.BOTTLENECK] * 4, Side.HEAD,
    ]  # fmt: skip
    assert [p.level for p in found.placements.values()] == [0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("model", [ResUNet(TINY), NestedUNet(TINY), Hourglass(is_gated=True)])
def test_batch_and_input_size_do_not_change_the_structure(model):
    reference = structure(model)
    assert structure(model, size=64, batch=3) == reference


def test_operations_that_change_nothing_do_not_change_the_blocks():
    reference, idle = structure(ResUNet(TINY)), structure(Idle(ResUNet(TINY)))
    assert list(idle.placements.values()) == list(reference.placements.values())
    assert [p.level for p in idle.skips] == [p.level for p in reference.skips]


def test_the_analysis_leaves_the_graph_alone_and_repeats_itself():
    module = graph(ResUNet(TINY))
    before = str(module.graph)
    assert find_structure(module) == find_structure(module)
    assert str(module.graph) == before


def test_products_behind_no_image_are_reported_without_a_level():
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = conv(1, 4), conv(4, 4, stride=2)
            self.words, self.more = nn.Linear(6, 4), nn.Linear(4, 4)
            self.three, self.head = conv(4, 4), conv(4, 1)

        def forward(self, image: Tensor, text: Tensor):
            query = self.more(torch.relu(self.words(text)))
            x = self.two(torch.relu(self.one(image))) + query[:, :, None, None]
            return self.head(torch.relu(self.three(x)))

    module = trace(TwoInputs().eval(), torch.rand(2, 1, 16, 16), torch.rand(2, 6))
    found = find_structure(module)
    free = [p for p in found.placements.values() if p.level is None]
    assert [p.side for p in free] == [Side.FLAT, Side.FLAT]
    assert any("2 products follow no image" in note for note in found.notes)
