# SPDX-License-Identifier: Apache-2.0
"""Which softmaxes are attention, why others are not, and what hides a shift of the logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qgraph.graph.attention_sites import AttentionSite, NoSite, attention_sites, shift_obstacle
from qgraph.graph.trace import trace

Logits = Callable[[Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """softmax(logits(q, k)) @ v on [B, T, C]."""

    def __init__(self, logits: Logits, dim: int = -1) -> None:
        super().__init__()
        self.logits, self.dim = logits, dim
        self.bias = nn.Parameter(torch.randn(5, 5))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.logits(q, k).softmax(self.dim) @ v


def found(logits: Logits, dim: int = -1) -> AttentionSite | NoSite:
    inputs = tuple(torch.randn(2, 5, 4) for _ in range(3))
    (site,) = attention_sites(trace(Attention(logits, dim).eval(), *inputs))
    return site


def products(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(1, 2)


def test_a_site_names_its_nodes():
    site = found(lambda q, k: products(q, k) / 2)
    assert isinstance(site, AttentionSite)
    assert (site.query.name, site.values.name) == ("q", "v")
    assert "transpose" in site.key.name or "permute" in site.key.name
    assert site.probabilities is site.softmax
    assert len(site.between) == 1


REASONS: dict[str, tuple[Logits, int, str]] = {
    "another axis": (products, 1, "softmax is not over the last axis"),
    "two products": (lambda q, k: products(q, k) + products(k, q), -1, "a sum of 2 products"),
    "no product": (lambda q, k: q[..., :1] + k[:, None, :, 0], -1, "no product of two activations"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_is_no_attention_says_why(name):
    logits, dim, words = REASONS[name]
    site = found(logits, dim)
    assert isinstance(site, NoSite)
    assert words in site.reason


# what stands between product and softmax, and the op that would not hand a shift on
BETWEEN: dict[str, tuple[Logits, str]] = {
    "nothing": (products, ""),
    "a number": (lambda q, k: products(q, k) * 0.5, ""),
    "a mask": (lambda q, k: products(q, k).masked_fill(torch.ones(5, 5).tril() == 0, -1e9), ""),
    "a factor per query": (lambda q, k: products(q, k) * q[..., :1], ""),
    "a factor per key": (lambda q, k: products(q, k) * k[:, None, :, 0], "mul"),
    "a soft cap": (lambda q, k: torch.tanh(products(q, k)), "tanh"),
    "turned keys": (lambda q, k: products(q, k).flip(-1), "flip"),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_the_first_op_that_loses_a_shift_of_all_keys_is_found(name):
    logits, op = BETWEEN[name]
    site = found(logits)
    assert isinstance(site, AttentionSite)
    obstacle = shift_obstacle(site)
    assert (obstacle is None) if not op else (obstacle is not None and op in str(obstacle.target))


def test_logits_that_meet_themselves_lose_a_shift():
    def twice(q: Tensor, k: Tensor) -> Tensor:
        logits = products(q, k)
        return logits + logits.relu()

    site = found(twice)
    assert isinstance(site, AttentionSite)
    assert shift_obstacle(site) is not None
