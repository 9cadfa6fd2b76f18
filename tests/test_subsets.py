"""Subset plans and target splits: seeded, distinct, and bounded."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airrep.examples import InputError
from data_builders.subsets import make_plan, split_targets


def as_lists(plan: list[np.ndarray]) -> list[list[int]]:
    return [subset.tolist() for subset in plan]


@given(
    kind=st.sampled_from(["fixed", "bernoulli"]),
    pool=st.sets(st.integers(0, 500), min_size=8, max_size=40),
    seed=st.integers(0, 9),
    longer=st.integers(1, 12),
)
@settings(deadline=None)
def test_a_plan_is_sorted_distinct_seeded_and_extends(
    kind: str, pool: set[int], seed: int, longer: int
) -> None:
    options: dict[str, Any] = {"fraction": 0.5, "kind": kind, "seed": seed}
    plan = make_plan(sorted(pool), 12, **options)
    assert len({subset.tobytes() for subset in plan}) == 12
    for subset in plan:
        assert subset.dtype == np.int64
        assert len(subset) > 0
        assert set(subset.tolist()) <= pool
        assert (np.diff(subset) > 0).all()
        if kind == "fixed":
            assert len(subset) == round(len(pool) / 2)
    extended = make_plan(sorted(pool, reverse=True), 12 + longer, **options)
    assert as_lists(extended[:12]) == as_lists(plan)
    assert as_lists(make_plan(sorted(pool), 12, **{**options, "seed": seed + 1})) != as_lists(plan)


def test_a_seed_gives_the_same_plan_in_every_version() -> None:
    """Plans on disk are recognised by their hash, so the draw must not change."""
    assert as_lists(make_plan(range(50), 3, size=4, seed=7)) == [
        [2, 9, 14, 38],
        [2, 19, 23, 32],
        [18, 24, 30, 38],
    ]
    assert as_lists(make_plan(range(50), 3, fraction=0.1, kind="bernoulli", seed=7)) == [
        [1, 6, 8, 24, 34, 35],
        [1, 4, 10, 21, 24, 29],
        [2, 5, 6, 10, 13, 15, 23, 32, 33, 37, 48],
    ]


@pytest.mark.parametrize("kind", ["fixed", "bernoulli"])
def test_every_row_is_drawn_equally_often(kind: str) -> None:
    plan = make_plan(range(100), 2000, size=20, kind=kind, seed=0)
    counts = np.bincount(np.concatenate(plan), minlength=100)
    # Binomial(2000, 0.2): mean 400, standard deviation 17.9; 5 of them are allowed.
    assert abs(counts.mean() - 400) < 5 * 1.79
    assert np.abs(counts - 400).max() < 5 * 17.9


@pytest.mark.parametrize(
    ("rows", "options", "count"),
    [
        (6, {"size": 3}, math.comb(6, 3)),
        (6, {"size": 6}, 1),
        (5, {"fraction": 0.3, "kind": "bernoulli"}, 2**5 - 1),
        (5, {"fraction": 1.0, "kind": "bernoulli"}, 1),
        (16, {"size": 5}, math.comb(16, 5)),  # too many to list: drawn until all are found
    ],
)
def test_all_subsets_can_be_drawn_and_not_one_more(
    rows: int, options: dict[str, Any], count: int
) -> None:
    plan = make_plan(range(rows), count, **options, seed=1)
    assert len({subset.tobytes() for subset in plan}) == count
    with pytest.raises(InputError, match=f"asks for {count + 1} .* has only {count},"):
        make_plan(range(rows), count + 1, **options, seed=1)


@pytest.mark.parametrize("kind", ["fixed", "bernoulli"])
def test_excluded_plans_do_not_come_back(kind: str) -> None:
    options: dict[str, Any] = {"size": 2, "kind": kind, "seed": 3}
    first = make_plan(range(5), 4, **options)
    # Subsets that could not be drawn anyway take nothing away.
    others = [[np.asarray([7, 8])], [subset[::-1].astype(np.int32) for subset in first]]
    total = 10 if kind == "fixed" else 31
    second = make_plan(range(5), total - 4, **options, exclude_plans=others)
    assert len({subset.tobytes() for subset in [*first, *second]}) == total
    with pytest.raises(InputError, match=f"has only {total}, of which 4 are excluded"):
        make_plan(range(5), total - 3, **options, exclude_plans=others)


def test_a_draw_that_hardly_ever_succeeds_ends_with_an_error() -> None:
    with pytest.raises(InputError, match=r"No new subset came up .* change the fraction"):
        make_plan(range(30), 40, fraction=1e-9, kind="bernoulli", seed=0)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (range(5), {"size": 6}, "size is 6, but there are 5 rows"),
        (range(5), {"size": 0}, "size is 0, but there are 5 rows"),
        (range(5), {"fraction": 1.5}, r"fraction is 1\.5; give one above 0 and at most 1"),
        (range(5), {"fraction": 0.0}, r"fraction is 0\.0"),
        (range(5), {"fraction": 0.05}, r"A fraction of 0\.05 of 5 rows is an empty subset"),
        (range(5), {}, "size None and fraction None; give exactly one"),
        (range(5), {"size": 2, "fraction": 0.5}, r"size 2 and fraction 0\.5; give exactly one"),
        (range(5), {"size": 2, "kind": "some"}, "no subset kind 'some'; choose one of fixed"),
        ([], {"size": 1}, "rows to draw from have shape"),
        ([0.5, 1.0], {"size": 1}, "type float64; give a list of integer pool rows"),
        ([1, 1, 2], {"size": 1}, "repeat or are negative"),
        ([-1, 1, 2], {"size": 1}, "repeat or are negative"),
    ],
)
def test_wrong_plans_are_refused(rows: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_plan(rows, 1, **options, seed=0)


def test_a_plan_without_subsets_is_refused() -> None:
    with pytest.raises(InputError, match="asks for 0 subsets; ask for at least 1"):
        make_plan(range(5), 0, size=2, seed=0)


@given(count=st.integers(20, 200), first=st.floats(0.1, 0.8), seed=st.integers(0, 5))
def test_splits_are_disjoint_cover_all_and_have_their_shares(
    count: int, first: float, seed: int
) -> None:
    shares = {"train": first, "valid": 0.1, "test": 0.9 - first}
    splits = split_targets(count, shares, seed)
    assert list(splits) == list(shares)
    assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(count))
    for name, rows in splits.items():
        assert rows.dtype == np.int64
        assert (np.diff(rows) > 0).all()
        assert abs(len(rows) - shares[name] * count) < 1 + 1e-6
    again = split_targets(count, shares, seed)
    assert all((again[name] == rows).all() for name, rows in splits.items())


def test_another_seed_splits_differently() -> None:
    one, two = (split_targets(100, {"a": 0.5, "b": 0.5}, seed)["a"] for seed in (0, 1))
    assert one.tolist() != two.tolist()


@pytest.mark.parametrize(
    ("count", "shares", "message"),
    [
        (10, {}, "give positive shares that add up to 1"),
        (10, {"a": 0.5, "b": 0.6}, "give positive shares that add up to 1"),
        (10, {"a": 1.5, "b": -0.5}, "give positive shares that add up to 1"),
        (3, {"a": 0.9, "b": 0.1}, "3 targets leave none for the split 'b'"),
    ],
)
def test_wrong_shares_are_refused(count: int, shares: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        split_targets(count, shares, 0)
