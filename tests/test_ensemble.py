"""The ensemble is its members' weighted mean on one scale, and its weights come from labels."""

import base64
import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import planted_benchmark
from tiny_models import tiny_encoder

from airrep.attributor import Attributor
from airrep.attributors import make_attributor
from airrep.attributors.ensemble import (
    EnsembleAttributor,
    combine,
    fit_weights,
    reference_subsets,
    standardise,
)
from airrep.attributors.given import GivenAttributor
from airrep.benchmark import write_results
from airrep.encoder import AirRepEncoder
from airrep.evaluation import evaluate
from airrep.examples import InputError
from airrep.label_store import Labels
from airrep.metrics import lds_per_target
from airrep.report_data import explorer_blocks
from airrep.run_folder import RunFolder
from airrep.score_files import check_scores, read_scores
from data_builders.verify_claims import read_claims

DATA = planted_benchmark(pool_size=20, target_count=6, subset_count=8)
SUBSETS = DATA.labels.subsets


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    AirRepEncoder.from_base(tiny_encoder(folder / "base")).save_pretrained(folder / "airrep")
    return folder / "airrep"


def scores_of(name: str, **params) -> np.ndarray:
    return make_attributor(name, **params).fit(DATA.pool).score(DATA.targets)


def test_scores_are_on_the_first_members_scale_by_hand() -> None:
    first = np.array([[1.0, 3.0], [5.0, 5.0]])  # mean 2, std 1; no spread
    second = np.array([[40.0, 20.0], [0.0, 8.0]])  # z: 1, -1; -1, 1
    np.testing.assert_allclose(combine([first, second], [3, 1]), [[1.5, 2.5], [5, 5]])
    np.testing.assert_allclose(combine([second, first], [1, 1]), [[30, 30], [2, 6]])
    assert combine([first, second], [1, 0]).dtype == np.float32


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 100), st.floats(-100, 100))
def test_a_members_scale_and_origin_do_not_matter(seed: int, scale: float, origin: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, 3, 9))
    expected = combine([a, b], [0.3, 0.7])
    np.testing.assert_allclose(
        combine([a, scale * b + origin], [0.3, 0.7]), expected, rtol=1e-4, atol=1e-5
    )
    # The first one's are the ensemble's.
    np.testing.assert_allclose(
        combine([scale * a + origin, b], [3, 7]), scale * expected + origin, rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("pooling", ["sum", "attention"])
def test_with_all_weight_on_the_first_member_it_is_that_member(encoder: Path, pooling: str) -> None:
    params = {"encoder": str(encoder), "pooling": pooling}
    alone = make_attributor("airrep", **params).fit(DATA.pool)
    both = EnsembleAttributor([("airrep", params), "tfidf"], weights=[1, 0]).fit(DATA.pool)
    np.testing.assert_allclose(both.score(DATA.targets), alone.score(DATA.targets), rtol=1e-4)
    np.testing.assert_allclose(
        both.score_subsets(DATA.targets, SUBSETS),
        alone.score_subsets(DATA.targets, SUBSETS),
        rtol=1e-4,
        atol=1e-6,
    )


def test_members_may_be_given_in_three_ways() -> None:
    members = ["bm25", ("random", {"seed": 3}), make_attributor("tfidf")]
    found = EnsembleAttributor(members).fit(DATA.pool).score(DATA.targets)
    parts = [scores_of("bm25"), scores_of("random", seed=3), scores_of("tfidf")]
    np.testing.assert_allclose(found, combine(parts, [1, 1, 1]), rtol=1e-5)


def test_with_an_oracle_among_its_members_it_is_one() -> None:
    assert EnsembleAttributor(["bm25", "same_task"]).oracle
    assert not EnsembleAttributor(["bm25", "tfidf"]).fit(DATA.pool).oracle


def test_it_comes_back_from_its_folder_with_its_members(encoder: Path, tmp_path: Path) -> None:
    members = [("airrep", {"encoder": str(encoder)}), "bm25", "bm25"]
    made = EnsembleAttributor(members, weights=[2, 1, 1]).fit(DATA.pool)
    made.save(tmp_path / "one")
    loaded = Attributor.load(tmp_path / "one")
    assert isinstance(loaded, EnsembleAttributor)
    assert loaded.weights == [0.5, 0.25, 0.25]
    np.testing.assert_allclose(loaded.score(DATA.targets), made.score(DATA.targets), rtol=1e-4)
    loaded.fit(DATA.pool[:9]).save(tmp_path / "two")
    again = Attributor.load(tmp_path / "two")
    expected = made.fit(DATA.pool[:9]).score(DATA.targets)
    np.testing.assert_allclose(again.score(DATA.targets), expected, rtol=1e-4)
    own = sum(member.bytes_per_example for member in made.members_)
    assert own - 3 <= made.bytes_per_example <= own + 1


def sums(scores: np.ndarray, labels: Labels) -> np.ndarray:
    """Standardised scores (T, M) of the labels' subsets."""
    pooled = np.stack([scores[:, subset].sum(axis=1) for subset in labels.subsets], axis=1)
    return standardise(pooled, pooled)


def lds(scores: np.ndarray, labels: Labels) -> float:
    return float(lds_per_target(scores, labels.losses)[0].mean())


def test_fitted_weights_find_the_better_member_and_the_better_mixture() -> None:
    data = planted_benchmark(pool_size=40, target_count=30, subset_count=60)
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((3, *data.truth.shape))
    useless, truth = sums(noise[0], data.labels), sums(data.truth, data.labels)
    weights = fit_weights([useless, truth], data.labels.losses)
    assert weights[1] > 0.9
    # Two equally noisy views of the truth are best at halves.
    views = [sums(data.truth + 2 * noise[n], data.labels) for n in (1, 2)]
    weights = fit_weights([*views, useless], data.labels.losses)
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(weights, [0.5, 0.5, 0], atol=0.2)


def test_fitted_weights_are_never_worse_than_one_member_alone() -> None:
    parts = [sums(scores_of(name), DATA.labels) for name in ("bm25", "random", "same_task")]
    best = fit_weights(parts, DATA.labels.losses)
    mixed = sum(weight * part for weight, part in zip(best, parts, strict=True))
    assert lds(mixed, DATA.labels) >= max(lds(part, DATA.labels) for part in parts)


def test_one_member_is_all_there_is_to_weigh_and_missing_labels_are_left_out() -> None:
    losses = DATA.labels.losses.copy()
    losses[0, :3] = np.nan
    assert fit_weights([sums(DATA.truth, DATA.labels)], losses).tolist() == [1.0]


def test_each_member_pools_subsets_in_its_own_way(encoder: Path) -> None:
    """By hand: pooled apart, on the scale of random subsets, in the units of the first."""
    members = [make_attributor("airrep", encoder=str(encoder)), make_attributor("tfidf")]
    made = EnsembleAttributor(members, weights=[3, 1]).fit(DATA.pool)
    random = reference_subsets(SUBSETS, len(DATA.pool))
    # Those asked for have 12 of the pool's 20; the others have half of it at most.
    assert {len(subset) for subset in random} == {10}
    parts = []
    for member in made.members_:
        pooled = member.score_subsets(DATA.targets, SUBSETS)
        others = member.score_subsets(DATA.targets, random).astype(float)
        parts.append((pooled, others.mean(axis=1)[:, None], others.std(axis=1)[:, None]))
    (a, mean, std), (b, other_mean, other_std) = parts
    expected = mean + std * (0.75 * (a - mean) / std + 0.25 * (b - other_mean) / other_std)
    found = made.score_subsets(DATA.targets, SUBSETS)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    # What else is asked for does not matter, nor what was asked for before.
    np.testing.assert_allclose(made.score_subsets(DATA.targets, SUBSETS[2:4]), found[:, 2:4])
    backwards = made.score_subsets(DATA.targets[::-1], SUBSETS)
    np.testing.assert_allclose(backwards, found[::-1], rtol=1e-4, atol=1e-6)


def test_an_evaluation_stores_its_subset_scores_for_the_page_and_for_verification(
    tmp_path: Path,
) -> None:
    methods = {"ensemble": EnsembleAttributor(["bm25", "tfidf"]), "bm25": make_attributor("bm25")}
    results, scores = evaluate(methods, DATA.pool, DATA.targets, DATA.labels, benchmark="planted")
    own = methods["ensemble"].score_subsets(DATA.targets, SUBSETS)
    np.testing.assert_allclose(scores["ensemble@subsets"], own, rtol=1e-5)
    rows = {row["name"]: row for row in results["methods"]}
    assert rows["ensemble"]["pooling"] == "members"
    assert rows["ensemble"]["lds"] == pytest.approx(lds(own, DATA.labels))
    folder = RunFolder(tmp_path)
    write_results(folder, results, scores, DATA.pool, DATA.targets)
    stored = read_scores(folder.scores_file("ensemble@subsets"))
    np.testing.assert_array_equal(stored.subset_scores, scores["ensemble@subsets"])
    assert read_scores(folder.scores_file("ensemble")).pooling == "attention"
    names = "ensemble,bm25"
    claims = {one.name: one for one in read_claims(folder, DATA.pool, DATA.targets, names, {})}
    assert [one.name for one in read_claims(folder, DATA.pool, DATA.targets, None, {})] == ["bm25"]
    assert claims["ensemble"].given.subset_scores is not None
    assert claims["bm25"].given.subset_scores is None
    blocks = explorer_blocks([rows["ensemble"]], DATA.pool, DATA.targets, DATA.labels, scores, 3)
    block = json.loads(gzip.decompress(base64.b64decode(blocks["targets-0"])))
    shown = block[0]["views"][0]
    np.testing.assert_allclose(shown["predicted"], own[0], rtol=1e-3)


def test_one_members_large_scores_do_not_drown_the_other() -> None:
    """A useless member with a few huge scores takes over attention; pooled apart it cannot."""
    data = planted_benchmark(pool_size=40, target_count=30, subset_count=60)
    rng = np.random.default_rng(2)
    huge = np.where(rng.random(data.truth.shape) < 0.05, 1000.0, 0.0)
    ids = {"target_ids": None, "pool_ids": None}
    members = [
        GivenAttributor(check_scores(name, {"scores": scores, **ids}, {}))
        for name, scores in (("truth", data.truth), ("huge", huge))
    ]
    found = {}
    made = EnsembleAttributor(members, weights=[9, 1]).fit(data.pool)
    for pooling in ("members", "attention"):
        made.pooling = pooling
        found[pooling] = lds(made.score_subsets(data.targets, data.labels.subsets), data.labels)
    assert found["members"] > found["attention"] + 0.05


def test_targets_that_are_in_the_pool_have_the_scale_of_those_that_are_not() -> None:
    rng = np.random.default_rng(0)
    scores, reference = rng.normal(size=(6, 50)), rng.normal(size=(6, 400))
    expected = standardise(scores, reference)
    assert expected.std() == pytest.approx(1, abs=0.2)
    own = rng.random(reference.shape) < 0.05  # subsets that the target itself is in
    np.testing.assert_allclose(
        standardise(scores, np.where(own, 400.0, reference)), expected, atol=0.5
    )
    # Where most subsets score the same, percentiles say nothing and the deviation counts.
    rare = np.where(own, 3.0, 0.0)
    np.testing.assert_allclose(standardise(rare, rare), standardise(rare))


def test_subsets_as_large_as_the_pool_do_not_take_the_scale_away() -> None:
    whole = np.arange(len(DATA.pool))
    subsets = [whole, whole, whole, whole[:5], whole[5:10]]
    made = EnsembleAttributor(["bm25", "tfidf"]).fit(DATA.pool)
    found = made.score_subsets(DATA.targets, subsets)
    assert (np.ptp(found, axis=1) > 0).all()


def test_members_are_asked_again_where_anything_about_the_targets_differs() -> None:
    made = EnsembleAttributor(["same_task"]).fit(DATA.pool)
    made.score(DATA.targets)
    others = [replace(target, task="another") for target in DATA.targets]
    fresh = EnsembleAttributor(["same_task"]).fit(DATA.pool).score(others)
    np.testing.assert_array_equal(made.score(others), fresh)


@pytest.mark.parametrize("members", [None, "bm25", [3], [{"bm25": {}}], [("bm25",)]])
def test_what_is_no_list_of_members_is_refused(members: object) -> None:
    with pytest.raises(InputError, match="member"):
        EnsembleAttributor(members).fit(DATA.pool)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("members", "weights"),
    [
        ([], None),
        (["bm25"], [0]),
        (["bm25"], [1, 1]),
        (["bm25", "tfidf"], [2, -1]),
        (["bm25", "tfidf"], [np.inf, 1]),
        (["bm25"], "x"),
    ],
)
def test_wrong_weights_are_refused(members: list[str], weights: list[float] | None) -> None:
    message = rf"ensemble of {len(members)} members got weights .* a number of at least 0 for each"
    with pytest.raises(InputError, match=message):
        EnsembleAttributor(members, weights).fit(DATA.pool)


def test_members_of_other_shapes_are_refused() -> None:
    with pytest.raises(InputError, match=r"\(2, 3\), \(2, 4\)\]; give scores of the same targets"):
        combine([np.ones((2, 3)), np.ones((2, 4))], [1, 1])
