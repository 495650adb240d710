# SPDX-License-Identifier: Apache-2.0
"""Bit ladders over resolution levels: uniform, symmetric progressive, and with a decoder offset.

Li et al., "Mixed-Precision Network Quantization for Infrared Small Target Segmentation", IEEE TGRS
2024: bits do not increase with depth and the decoder mirrors the encoder. The family is small, so
every member is evaluated with the additive sensitivities: exact and deterministic.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qgraph.calibration.assignment import Assignment, Bits, Group, Problem, infeasible
from qgraph.errors import ConfigError
from qgraph.graph.encoder_decoder import Side

MAX_PAIRS = 200_000_000
_CHUNK = 1_000_000
_OUTSIDE = frozenset({Side.STEM, Side.HEAD, Side.GATE})
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Tables:
    """Sums over the groups of each (level, is-decoder) part.

    Attributes:
        weight_bits, activation_bits: widths, fewest first.
        levels: levels that hold a group, shallowest first.
        omega: [parts, W, A]; inf where a group lacks the pair. costs: the same per resource.
        part_level, part_is_decoder: position in `levels` and side of each part.
        fixed: groups outside the ladders with the bits they keep; base: their total costs.
    """

    weight_bits: tuple[int, ...]
    activation_bits: tuple[int, ...]
    levels: tuple[int, ...]
    omega: Array
    costs: dict[str, Array]
    part_level: tuple[int, ...]
    part_is_decoder: tuple[bool, ...]
    fixed: dict[str, Bits]
    base: dict[str, float]


@dataclass(slots=True)
class _Best:
    """The best member so far; smaller keys win."""

    key: tuple[float, ...] | None = None
    weights: tuple[int, ...] = ()
    activations: tuple[int, ...] = ()
    offset: Bits = (0, 0)


def is_on_ladder(group: Group) -> bool:
    """Whether the ladders rule a group; stem, heads, gates and unplaced groups keep most bits."""
    return group.level is not None and group.side not in _OUTSIDE


def solve_uniform(problem: Problem) -> Assignment:
    """Return the best single pair of bits for all groups on the ladder.

    Raises:
        BudgetInfeasibleError: no pair fits.
    """
    return _solve(problem, mode="uniform", offsets=[(0, 0)], only_constant=True)


def solve_spmix(
    problem: Problem, *, with_offset: bool = False, activation_at_least_weight: bool = False
) -> Assignment:
    """Return the best pair of non-increasing ladders, decoder tied to encoder.

    Ties in omega go to lower costs (resources in alphabetic order), then to the lexicographically
    larger ladders. `with_offset` also tries the decoder one step lower on either ladder.

    Raises:
        BudgetInfeasibleError: no member fits.
        ConfigError: the family is too large to enumerate, or no pair of bits suits all groups.
    """
    offsets = list(itertools.product((0, 1), (0, 1))) if with_offset else [(0, 0)]
    return _solve(
        problem,
        mode="spmix_delta" if with_offset else "spmix",
        offsets=offsets,
        activation_at_least_weight=activation_at_least_weight,
    )


def _tables(problem: Problem) -> _Tables:
    """Sum the merged groups into parts."""
    ruled = [g for g in problem.groups if is_on_ladder(g)]
    widest = {
        g.name: max(g.candidates, key=lambda c: (sum(c.bits), c.bits))
        for g in problem.groups
        if not is_on_ladder(g)
    }
    pairs = {c.bits for g in ruled for c in g.candidates}
    weight_bits = tuple(sorted({w for w, _ in pairs}))
    activation_bits = tuple(sorted({a for _, a in pairs}))
    levels = tuple(sorted({g.level for g in ruled if g.level is not None}))
    parts = sorted({(g.level, g.side is Side.DECODER) for g in ruled if g.level is not None})
    shape = (len(parts), len(weight_bits), len(activation_bits))
    omega, costs = np.zeros(shape), {r: np.zeros(shape) for r in problem.resources}
    for group in ruled:
        part = parts.index((group.level or 0, group.side is Side.DECODER))
        for (i, w), (j, a) in itertools.product(enumerate(weight_bits), enumerate(activation_bits)):
            candidate = group.at((w, a))
            omega[part, i, j] += math.inf if candidate is None else candidate.omega
            for resource, table in costs.items():
                table[part, i, j] += 0.0 if candidate is None else candidate.costs[resource]
    return _Tables(
        weight_bits,
        activation_bits,
        levels,
        omega,
        costs,
        tuple(levels.index(level) for level, _ in parts),
        tuple(is_decoder for _, is_decoder in parts),
        {name: candidate.bits for name, candidate in widest.items()},
        {r: math.fsum(c.costs[r] for c in widest.values()) for r in problem.resources},
    )


def _ladders(widths: int, levels: int, *, only_constant: bool) -> NDArray[np.int64]:
    """All non-increasing index vectors [count, levels], lexicographically largest first."""
    if only_constant:
        return np.repeat(np.arange(widths)[::-1, None], levels, axis=1).astype(np.int64)
    vectors = itertools.combinations_with_replacement(range(widths - 1, -1, -1), levels)
    return np.asarray(list(vectors), dtype=np.int64).reshape(-1, levels)


def _total(
    table: Array, tables: _Tables, chosen: tuple[NDArray[np.int64], NDArray[np.int64]], offset: Bits
) -> Array:
    """Sum a table over all parts: [weight ladders, activation ladders]."""
    weights, activations = chosen
    total = np.zeros((len(weights), len(activations)))
    for part, level in enumerate(tables.part_level):
        lower = offset if tables.part_is_decoder[part] else (0, 0)
        rows = np.maximum(weights[:, level] - lower[0], 0)
        columns = np.maximum(activations[:, level] - lower[1], 0)
        total += table[part][np.ix_(rows, columns)]
    return total


def _solve(
    problem: Problem,
    *,
    mode: str,
    offsets: list[Bits],
    only_constant: bool = False,
    activation_at_least_weight: bool = False,
) -> Assignment:
    problem.check_each_budget()
    tables = _tables(problem.merged())
    if not tables.levels:
        return problem.evaluate(problem.expand(tables.fixed), mode=mode)
    depth = len(tables.levels)
    all_weights = _ladders(len(tables.weight_bits), depth, only_constant=only_constant)
    all_activations = _ladders(len(tables.activation_bits), depth, only_constant=only_constant)
    if len(all_weights) * len(all_activations) * len(offsets) > MAX_PAIRS:
        msg = (
            f"{len(all_weights)} x {len(all_activations)} ladders over {depth} levels are too many"
            f" to enumerate (at most {MAX_PAIRS}); use fewer widths or levels, or mode 'free'"
        )
        raise ConfigError(msg)
    best, least = _Best(), dict.fromkeys(problem.budgets, math.inf)
    rows = max(1, _CHUNK // len(all_activations))
    for offset in offsets:
        for start in range(0, len(all_weights), rows):
            chosen = (all_weights[start : start + rows], all_activations)
            omega = _total(tables.omega, tables, chosen, offset)
            if activation_at_least_weight:
                omega[~_is_above(tables, chosen, offset)] = math.inf
            costs = {r: _total(t, tables, chosen, offset) for r, t in tables.costs.items()}
            fits = np.isfinite(omega)
            for resource, limit in problem.budgets.items():
                amount = costs[resource] + tables.base[resource]
                least[resource] = min(
                    least[resource], float(np.min(amount, where=fits, initial=math.inf))
                )
                fits &= amount <= limit
            _improve(best, omega, costs, fits, chosen=chosen, offset=offset)
    return _answer(problem, tables, best, least, mode=mode)


def _is_above(
    tables: _Tables, chosen: tuple[NDArray[np.int64], NDArray[np.int64]], offset: Bits
) -> NDArray[np.bool_]:
    """Whether activation bits >= weight bits in every part, per pair of ladders."""
    widths = np.asarray(tables.weight_bits)[:, None], np.asarray(tables.activation_bits)[None, :]
    table = np.where(widths[1] >= widths[0], 0.0, 1.0)
    violations = np.repeat(table[None], len(tables.part_level), axis=0)
    return np.asarray(_total(violations, tables, chosen, offset) == 0.0)


def _improve(
    best: _Best,
    omega: Array,
    costs: dict[str, Array],
    fits: NDArray[np.bool_],
    *,
    chosen: tuple[NDArray[np.int64], NDArray[np.int64]],
    offset: Bits,
) -> None:
    """Replace the best member if one of these is better; earlier members win full ties."""
    if not fits.any():
        return
    least = float(np.min(omega, where=fits, initial=math.inf))
    rows, columns = np.nonzero(fits & (omega == least))
    keys = [costs[r][rows, columns] for r in sorted(costs)]
    first = int(np.lexsort(tuple(reversed(keys)))[0]) if keys else 0
    key = (least, *(float(k[first]) for k in keys))
    if best.key is None or key < best.key:
        best.key, best.offset = key, offset
        best.weights = tuple(int(v) for v in chosen[0][rows[first]])
        best.activations = tuple(int(v) for v in chosen[1][columns[first]])


def _answer(
    problem: Problem, tables: _Tables, best: _Best, least: dict[str, float], *, mode: str
) -> Assignment:
    """Turn ladder positions into bits per group, or say which budget no member meets."""
    if best.key is None:
        accepted: tuple[str, ...] = ()
        for resource, limit in problem.budgets.items():
            if limit < least[resource] < math.inf:
                raise infeasible(resource, limit=limit, best=least[resource], beside=accepted)
            accepted += (resource,)
        msg = f"mode {mode!r}: no ladder has bits that every group of its levels offers"
        raise ConfigError(msg)
    bits = dict(tables.fixed)
    for group in problem.merged().groups:
        if group.name in bits or group.level is None:
            continue
        position = tables.levels.index(group.level)
        lower = best.offset if group.side is Side.DECODER else (0, 0)
        bits[group.name] = (
            tables.weight_bits[max(best.weights[position] - lower[0], 0)],
            tables.activation_bits[max(best.activations[position] - lower[1], 0)],
        )
    return problem.evaluate(problem.expand(bits), mode=mode)
