# SPDX-License-Identifier: Apache-2.0
"""Laws of bit assignment: budgets, optimality, nesting, symmetry, determinism."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.calibration import knapsack
from qgraph.calibration.assignment import (
    Candidate,
    Group,
    Problem,
    grid,
    repair_monotone,
)
from qgraph.calibration.hull_greedy import solve_greedy, walk
from qgraph.calibration.knapsack import solve_exact
from qgraph.calibration.ladders import solve_spmix, solve_uniform
from qgraph.calibration.pareto import MODES, pareto_front, solve
from qgraph.errors import BudgetInfeasibleError, ConfigError
from qgraph.graph.encoder_decoder import Side

LADDER = (2, 3, 4, 8)
laws = settings(max_examples=30, deadline=None)


def candidate(bits: tuple[int, int], omega: float, **costs: float) -> Candidate:
    return Candidate(bits=bits, omega=omega, costs=costs)


def chain(index: int, omegas: list[int], unit: int, macs: int, **where) -> Group:
    """A group whose pairs (b, b) cost unit*b bytes and macs*b*b bit operations."""
    candidates = tuple(
        candidate((b, b), float(o), size=unit * b, bops=macs * b * b)
        for b, o in zip(LADDER, omegas, strict=True)
    )
    return Group(name=f"op{index}", index=index, candidates=candidates, **where)


@st.composite
def chains(draw, max_groups: int = 5, is_decreasing: bool = False):
    groups = []
    for index in range(draw(st.integers(1, max_groups))):
        omegas = draw(st.lists(st.integers(0, 60), min_size=4, max_size=4, unique=is_decreasing))
        if is_decreasing:
            omegas = sorted(omegas, reverse=True)
        unit, macs = draw(st.integers(1, 20)), draw(st.integers(1, 20))
        groups.append(chain(index, omegas, unit, macs))
    return Problem(tuple(groups))


def extreme(problem: Problem, resource: str, pick) -> float:
    return math.fsum(pick(c.costs[resource] for c in g.candidates) for g in problem.groups)


def with_share(problem: Problem, **shares: float) -> Problem:
    """Budgets at a share of the way from the least to the largest cost, in whole units."""
    budgets = {}
    for resource, share in shares.items():
        low, high = extreme(problem, resource, min), extreme(problem, resource, max)
        budgets[resource] = float(math.floor(low + share * (high - low)))
    return replace(problem, budgets=budgets)


def brute_force(problem: Problem) -> float:
    best = math.inf
    for choice in itertools.product(*(g.candidates for g in problem.groups)):
        costs = {r: sum(c.costs[r] for c in choice) for r in problem.resources}
        if problem.fits(costs):
            best = min(best, math.fsum(c.omega for c in choice))
    return best


shares = st.floats(0.0, 1.0)


@given(chains(), shares, shares)
@laws
def test_exact_equals_brute_force_under_two_budgets(problem, size, bops):
    problem = with_share(problem, size=size, bops=bops)
    best = brute_force(problem)
    if best == math.inf:
        with pytest.raises(BudgetInfeasibleError):
            solve_exact(problem)
        return
    answer = solve_exact(problem)
    assert answer.omega == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert problem.fits(answer.costs)


@given(chains(max_groups=4, is_decreasing=True), st.data())
@laws
def test_a_budget_one_unit_short_of_a_choice_excludes_it(problem, data):
    huge = tuple(
        replace(
            g,
            candidates=tuple(
                replace(c, costs={"size": c.costs["size"] * 10.0**9 + c.bits[0]})
                for c in g.candidates
            ),
        )
        for g in problem.groups
    )
    choice = [data.draw(st.sampled_from(g.candidates[1:])) for g in huge]
    limit = math.fsum(c.costs["size"] for c in choice) - 1
    problem = Problem(huge, {"size": limit})
    answer = solve_exact(problem)
    assert problem.fits(answer.costs)
    assert answer.omega == pytest.approx(brute_force(problem), rel=1e-9)


def test_running_out_of_cuts_still_gives_an_answer_within_the_budget(monkeypatch):
    monkeypatch.setattr(knapsack, "MAX_CUTS", 1)
    pair = (candidate((2, 2), 1.0, size=1e9 / 2), candidate((4, 4), 0.0, size=1e9))
    problem = Problem((Group(name="g", index=0, candidates=pair),), {"size": 1e9 - 1})
    answer = solve_exact(problem)
    assert answer.bits == {"g": (2, 2)}
    assert problem.fits(answer.costs)


@given(chains(max_groups=6), shares, shares)
@laws
def test_a_larger_budget_never_raises_the_optimum(problem, one, other):
    small, large = sorted((one, other))
    tight, loose = (solve_exact(with_share(problem, size=s)) for s in (small, large))
    assert loose.omega <= tight.omega + 1e-9


@given(chains(max_groups=6), shares, shares)
@laws
def test_greedy_is_nested_in_the_budget(problem, one, other):
    small, large = sorted((one, other))
    tight, loose = (solve_greedy(with_share(problem, size=s)) for s in (small, large))
    for name, bits in tight.bits.items():
        assert loose.bits[name] >= bits


@given(chains(max_groups=5), shares)
@laws
def test_greedy_is_at_most_one_hull_step_above_the_optimum(problem, share):
    problem = with_share(problem, size=share)
    greedy, exact = solve_greedy(problem), solve_exact(problem)
    largest = max((s.before.omega - s.after.omega for s in walk(problem)), default=0.0)
    assert problem.fits(greedy.costs)
    assert exact.omega - 1e-9 <= greedy.omega <= exact.omega + largest + 1e-9


@given(chains(is_decreasing=True))
@laws
def test_extreme_budgets_give_the_fewest_and_the_most_bits(problem):
    for solver in (solve_exact, solve_greedy):
        rich = solver(with_share(problem, size=1.0))
        poor = solver(with_share(problem, size=0.0))
        assert set(rich.bits.values()) == {(8, 8)}
        assert set(poor.bits.values()) == {(2, 2)}


@given(chains(), shares, st.sampled_from([0.25, 8.0, 3.7]))
@laws
def test_scaling_omegas_or_costs_leaves_the_optimum_where_it_is(problem, share, factor):
    problem = with_share(problem, size=share)
    reference = solve_exact(problem).omega
    scaled = [
        replace(
            g,
            candidates=tuple(
                replace(c, costs={r: v * factor for r, v in c.costs.items()}) for c in g.candidates
            ),
        )
        for g in problem.groups
    ]
    budget = {"size": problem.budgets["size"] * factor * (1 + 1e-12)}
    assert solve_exact(Problem(tuple(scaled), budget)).omega == pytest.approx(reference)
    louder = [
        replace(g, candidates=tuple(replace(c, omega=c.omega * factor) for c in g.candidates))
        for g in problem.groups
    ]
    answer = solve_exact(Problem(tuple(louder), problem.budgets))
    assert answer.omega == pytest.approx(reference * factor)


@given(chains(), shares, st.randoms(use_true_random=False))
@laws
def test_the_answer_ignores_names_and_the_order_of_groups(problem, share, random):
    problem = with_share(problem, size=share, bops=1.0)
    shuffled = list(problem.groups)
    random.shuffle(shuffled)
    renamed = [replace(g, name=f"{random.random()}{g.name}") for g in shuffled]
    for mode in ("free", "greedy"):
        first = solve(problem, mode=mode)
        second = solve(Problem(tuple(renamed), problem.budgets), mode=mode)
        by_index = {g.index: second.bits[g.name] for g in renamed}
        assert [first.bits[g.name] for g in problem.groups] == [
            by_index[g.index] for g in problem.groups
        ]
        assert json.dumps(solve(problem, mode=mode).to_json()) == json.dumps(first.to_json())


@st.composite
def pyramids(draw, num_levels: int = 3):
    """Encoder and decoder groups with (w, a) pairs, a stem and a head."""
    pairs = grid((2, 4, 8), (2, 4, 8))
    groups = []
    places = [(level, Side.ENCODER) for level in range(num_levels - 1)]
    places += [(num_levels - 1, Side.BOTTLENECK)]
    places += [(level, Side.DECODER) for level in range(num_levels - 2, -1, -1)]
    for index, (level, side) in enumerate(places):
        size, macs = draw(st.integers(1, 30)), draw(st.integers(1, 30))
        weak, strong = draw(st.integers(0, 99)), draw(st.integers(0, 99))
        candidates = tuple(
            candidate((w, a), weak / w + strong / a, size=size * w, bops=macs * w * a)
            for w, a in pairs
        )
        groups.append(
            Group(name=f"g{index}", index=index, candidates=candidates, level=level, side=side)
        )
    fixed = (candidate((4, 4), 1.0, size=4, bops=16), candidate((8, 8), 0.5, size=8, bops=64))
    groups.append(Group(name="stem", index=-1, candidates=fixed, level=0, side=Side.STEM))
    groups.append(Group(name="head", index=99, candidates=fixed, level=0, side=Side.HEAD))
    return Problem(tuple(groups))


def ladder_brute_force(problem: Problem, offsets: list[tuple[int, int]]) -> float:
    """The definition of the family, written as loops."""
    widths, best = (2, 4, 8), math.inf
    vectors = [v for v in itertools.product(range(3), repeat=3) if list(v) == sorted(v)[::-1]]
    for w, a, (dw, da) in itertools.product(vectors, vectors, offsets):
        bits = {"stem": (8, 8), "head": (8, 8)}
        for g in problem.groups:
            if g.level is not None and g.side not in {Side.STEM, Side.HEAD}:
                is_decoder = g.side is Side.DECODER
                i = max(w[g.level] - dw * is_decoder, 0)
                j = max(a[g.level] - da * is_decoder, 0)
                bits[g.name] = (widths[i], widths[j])
        answer = problem.evaluate(bits, mode="brute")
        if problem.fits(answer.costs):
            best = min(best, answer.omega)
    return best


@given(pyramids(), shares, shares)
@settings(max_examples=15, deadline=None)
def test_spmix_equals_the_enumerated_family_and_never_beats_free(problem, size, bops):
    problem = with_share(problem, size=0.2 + 0.8 * size, bops=0.2 + 0.8 * bops)
    none, both = [(0, 0)], list(itertools.product((0, 1), (0, 1)))
    family = {"spmix": none, "spmix_delta": both}
    for mode, offsets in family.items():
        best = ladder_brute_force(problem, offsets)
        if best == math.inf:
            with pytest.raises(BudgetInfeasibleError):
                solve(problem, mode=mode)
            continue
        answer = solve(problem, mode=mode)
        assert answer.omega == pytest.approx(best, rel=1e-9)
        assert problem.fits(answer.costs)
        assert solve(problem, mode="free").omega <= answer.omega + 1e-9


@given(pyramids(), shares)
@settings(max_examples=15, deadline=None)
def test_spmix_is_symmetric_and_does_not_increase_with_depth(problem, share):
    problem = with_share(problem, size=0.3 + 0.7 * share)
    answer = solve_spmix(problem, activation_at_least_weight=True)
    levels: dict[int, set[tuple[int, int]]] = {}
    for group in problem.groups:
        if group.side in {Side.STEM, Side.HEAD}:
            assert answer.bits[group.name] == (8, 8)
            continue
        levels.setdefault(group.level or 0, set()).add(answer.bits[group.name])
    assert all(len(bits) == 1 for bits in levels.values())
    ladder = [next(iter(levels[level])) for level in sorted(levels)]
    assert all(a >= w for w, a in ladder)
    for shallow, deep in itertools.pairwise(ladder):
        assert shallow[0] >= deep[0]
        assert shallow[1] >= deep[1]


def test_equal_omegas_go_to_the_cheaper_ladder():
    flat = tuple(candidate((b, b), 1.0, size=b) for b in LADDER)
    group = Group(name="g", index=0, candidates=flat, level=0, side=Side.ENCODER)
    problem = Problem((group,), {"size": 100.0})
    assert solve_spmix(problem).bits == {"g": (2, 2)}
    assert solve_uniform(problem).bits == {"g": (2, 2)}


def test_uniform_uses_one_pair_for_all_groups_of_the_ladder():
    problem = Problem(
        (
            chain(0, [9, 4, 2, 1], 1, 1, level=0, side=Side.ENCODER),
            chain(1, [90, 40, 20, 10], 3, 1, level=1, side=Side.BOTTLENECK),
        ),
        {"size": 17.0},
    )
    assert set(solve_uniform(problem).bits.values()) == {(4, 4)}


def test_tied_groups_get_equal_bits_at_the_sum_of_their_costs():
    problem = Problem(
        (
            chain(0, [50, 3, 2, 0], 1, 1, tie="add"),
            chain(1, [0, 0, 0, 0], 9, 1, tie="add"),
            chain(2, [10, 5, 1, 0], 1, 1),
        ),
        {"size": 38.0},
    )
    for mode in ("free", "greedy"):
        answer = solve(problem, mode=mode)
        assert answer.bits["op0"] == answer.bits["op1"] == (3, 3)
        assert answer.bits["op2"] == (8, 8)
        assert answer.costs["size"] == 38.0


def test_ties_without_common_bits_are_refused():
    one = Group(name="a", index=0, candidates=(candidate((2, 2), 0.0, size=1),), tie="t")
    other = Group(name="b", index=1, candidates=(candidate((4, 4), 0.0, size=1),), tie="t")
    with pytest.raises(ConfigError, match="no bits in common"):
        solve_exact(Problem((one, other)))


@pytest.mark.parametrize("mode", MODES)
def test_an_impossible_budget_is_named_with_the_best_value(mode):
    problem = Problem((chain(0, [4, 3, 2, 1], 10, 1, level=0),), {"bops": 64.0, "size": 19.0})
    with pytest.raises(BudgetInfeasibleError, match=r"size=19 .* best possible is 20") as caught:
        solve(problem, mode=mode)
    assert caught.value.resource == "size"
    assert caught.value.best_possible == 20


@pytest.mark.parametrize("mode", ["free", "spmix"])
def test_budgets_that_exclude_each_other_are_named_together(mode):
    pairs = (
        candidate((2, 8), 0.0, size=2, memory=8),
        candidate((8, 2), 0.0, size=8, memory=2),
    )
    group = Group(name="g", index=0, candidates=pairs, level=0)
    problem = Problem((group,), {"size": 2.0, "memory": 5.0})
    with pytest.raises(BudgetInfeasibleError, match="within the budgets of size is 8") as caught:
        solve(problem, mode=mode)
    assert caught.value.resource == "memory"
    assert caught.value.best_possible == 8


def test_greedy_refuses_groups_without_a_cheapest_candidate():
    pairs = (candidate((2, 8), 0.0, size=2, act=8), candidate((8, 2), 0.0, size=8, act=2))
    group = Group(name="g", index=0, candidates=pairs)
    with pytest.raises(ConfigError, match="cheapest in every resource"):
        solve_greedy(Problem((group,), {"size": 9.0, "act": 9.0}))


def test_a_pair_without_a_candidate_is_never_chosen_by_a_ladder():
    low = (candidate((2, 2), 5.0, size=2), candidate((4, 8), 1.0, size=4))
    high = (candidate((2, 2), 5.0, size=2), candidate((4, 4), 0.0, size=4))
    groups = tuple(
        Group(name=name, index=i, candidates=c, level=0)
        for i, (name, c) in enumerate({"low": low, "high": high}.items())
    )
    assert set(solve_spmix(Problem(groups)).bits.values()) == {(2, 2)}
    disjoint = (groups[0], replace(groups[1], candidates=high[1:]))
    with pytest.raises(ConfigError, match="no ladder has bits"):
        solve_spmix(Problem(disjoint))


def test_a_family_beyond_enumeration_is_refused():
    candidates = tuple(candidate(b, 0.0, size=1) for b in grid(LADDER, LADDER))
    groups = tuple(Group(name=f"g{i}", index=i, candidates=candidates, level=i) for i in range(60))
    with pytest.raises(ConfigError, match="too many to enumerate"):
        solve_spmix(Problem(groups))


@given(chains(max_groups=6))
@laws
def test_the_front_is_strictly_monotone_and_ends_at_the_least_omega(problem):
    front = pareto_front(problem, "size", points=6)
    for cheap, dear in itertools.pairwise(front):
        assert cheap.costs["size"] < dear.costs["size"]
        assert cheap.omega > dear.omega
    assert front[-1].omega == pytest.approx(solve_exact(problem).omega)


@given(chains())
@laws
def test_repaired_sensitivities_do_not_increase_with_bits_and_repair_is_idempotent(problem):
    for group in problem.groups:
        repaired = repair_monotone(group)
        omegas = [c.omega for c in sorted(repaired.candidates, key=lambda c: c.bits)]
        assert omegas == sorted(omegas, reverse=True)
        assert repair_monotone(repaired) == repaired


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ((), "needs candidates"),
        ((candidate((2, 2), 0.0, size=1), candidate((2, 2), 1.0, size=1)), "distinct bits"),
        ((candidate((2, 2), math.nan, size=1),), "must be >= 0"),
        ((candidate((2, 2), 0.0, size=-1),), "must be >= 0"),
        ((candidate((2, 2), 0.0, bops=1),), "has costs for"),
    ],
)
def test_unusable_groups_are_refused(candidates, message):
    good = Group(name="good", index=0, candidates=(candidate((2, 2), 0.0, size=1),))
    with pytest.raises(ConfigError, match=message):
        Problem((good, Group(name="bad", index=1, candidates=candidates)), {"size": 1.0})


def test_repeated_names_unknown_modes_and_unknown_bits_are_refused():
    group = chain(0, [1, 1, 1, 1], 1, 1)
    with pytest.raises(ConfigError, match="repeated: op0"):
        Problem((group, group))
    with pytest.raises(ConfigError, match="did you mean 'spmix'"):
        solve(Problem((group,)), mode="spmixx")
    with pytest.raises(ConfigError, match="no candidate with bits"):
        Problem((group,)).evaluate({"op0": (7, 7)}, mode="free")


def test_no_group_and_no_budget_are_fine():
    assert solve_exact(Problem(())).bits == {}
    group = chain(0, [4, 3, 2, 1], 1, 1)
    assert solve_exact(Problem((group,))).bits == {"op0": (8, 8)}
    assert solve_greedy(Problem((group,))).bits == {"op0": (8, 8)}


def test_a_network_of_many_groups_is_solved_with_a_stated_gap():
    groups = tuple(
        chain(i, [97 * (i % 7) + 30, 40 + i % 5, 11, 1], 1 + i % 13, 1 + i % 11) for i in range(150)
    )
    problem = with_share(Problem(groups), size=0.4, bops=0.3)
    answer = solve(problem)
    assert problem.fits(answer.costs)
    assert 0.0 <= answer.gap <= 1e-4
    assert answer.omega <= solve_greedy(problem).omega
