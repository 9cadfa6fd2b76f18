"""The ensemble is its members' weighted mean on one scale, and its weights come from labels."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import planted_benchmark
from tiny_models import tiny_encoder

from airrep.attributor import Attributor
from airrep.attributors import make_attributor
from airrep.attributors.ensemble import EnsembleAttributor, combine, fit_weights
from airrep.encoder import AirRepEncoder
from airrep.examples import InputError
from airrep.label_store import Labels
from airrep.metrics import lds_per_target

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
    members = [("airrep", params), "tfidf"]
    both = EnsembleAttributor(members, weights=[1, 0], pooling=pooling).fit(DATA.pool)
    np.testing.assert_allclose(both.score(DATA.targets), alone.score(DATA.targets), rtol=1e-4)
    np.testing.assert_allclose(
        both.score_subsets(DATA.targets, SUBSETS),
        alone.score_subsets(DATA.targets, SUBSETS),
        rtol=1e-4,
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


def test_fitted_weights_find_the_better_member_and_the_better_mixture() -> None:
    data = planted_benchmark(pool_size=40, target_count=30, subset_count=60)
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((3, *data.truth.shape))
    useless = noise[0]
    weights = fit_weights([useless, data.truth], data.labels, "sum")
    assert weights[1] > 0.9
    # Two equally noisy views of the truth are best at halves.
    views = [data.truth + 2 * noise[1], data.truth + 2 * noise[2]]
    weights = fit_weights([*views, useless], data.labels, "sum")
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(weights, [0.5, 0.5, 0], atol=0.2)


def test_fitted_weights_are_never_worse_than_one_member_alone() -> None:
    parts = [scores_of("bm25"), scores_of("random"), scores_of("same_task")]
    labels = DATA.labels
    best = fit_weights(parts, labels, "sum")

    def lds(weights: np.ndarray) -> float:
        sums = [combine(parts, weights)[:, subset].sum(axis=1) for subset in labels.subsets]
        return float(lds_per_target(np.stack(sums, axis=1), labels.losses)[0].mean())

    assert lds(best) >= max(lds(one) for one in np.eye(3))


def test_attention_and_missing_labels() -> None:
    """One member is all there is to weigh; a label that is missing is left out."""
    losses = DATA.labels.losses.copy()
    losses[0, :3] = np.nan
    labels = Labels(SUBSETS, losses, DATA.labels.numbers)
    assert fit_weights([DATA.truth], labels).tolist() == [1.0]


@pytest.mark.parametrize(
    ("members", "weights"),
    [([], None), (["bm25"], [0]), (["bm25"], [1, 1]), (["bm25", "tfidf"], [2, -1])],
)
def test_wrong_weights_are_refused(members: list[str], weights: list[float] | None) -> None:
    message = rf"ensemble of {len(members)} members got weights .* a number of at least 0 for each"
    with pytest.raises(InputError, match=message):
        EnsembleAttributor(members, weights).fit(DATA.pool)


def test_members_of_other_shapes_are_refused() -> None:
    with pytest.raises(InputError, match=r"\(2, 3\), \(2, 4\)\]; give scores of the same targets"):
        combine([np.ones((2, 3)), np.ones((2, 4))], [1, 1])
