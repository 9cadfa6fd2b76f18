"""The studies of benchmarks/theory at small size: each must show what its table claims."""

from itertools import product

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from benchmarks.theory import exponents, ladder, problems, removal, subsets, table


@pytest.fixture(scope="module")
def gaussian():
    return problems.gaussian_problem(120, 20, 30, 1.0, np.random.default_rng(0), strength=2.0)


# Problems and tables


def test_gaussian_labels_follow_the_features_as_strongly_as_asked():
    rng = np.random.default_rng(0)
    problem = problems.gaussian_problem(20_000, 3, 10, 1.0, rng, strength=2.0)
    assert problem.features.shape == (20_000, 3)
    assert problem.target_features.shape == (10, 3)
    assert np.linalg.norm(problem.fit().weights) == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [("wine", (120, 14), 3), ("breast_cancer", (120, 31), 2), ("digits", (120, 21), 10)],
)
def test_bundled_data_are_split_without_overlap(name, shape, classes):
    pytest.importorskip("sklearn")
    problem = problems.bundled_problem(name, 50, 1.0, np.random.default_rng(0), 120)
    assert problem.features.shape == shape
    assert problem.classes == classes
    pool = {row.tobytes() for row in problem.features}
    assert not pool & {row.tobytes() for row in problem.target_features}


def test_tables_are_markdown_with_spread(capsys):
    table.print_table(["name", "value"], [["one", table.spread([1.0, 2.0, 3.0])]])
    assert capsys.readouterr().out == "| name | value |\n|---|---|\n| one | 2.00 ± 1.00 |\n"


# Ladder


@pytest.mark.parametrize("classes", [2, 3])
def test_margin_gradients_are_the_margins(classes):
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(30, 3)), rng.integers(0, classes, 30)
    influence = problems.Problem(features, labels, features, labels, 1.0).influence()

    def margins(flat):
        return influence.head.moved(flat).margins(features, labels)

    found = ladder.margin_gradients(features, labels, influence)
    numeric = approx_fprime(np.zeros(found.shape[1]), margins, 1e-7)
    np.testing.assert_allclose(found, numeric, atol=1e-5)


def test_trak_by_the_kernel_is_trak_by_the_features():
    rng = np.random.default_rng(0)
    target, pool = rng.normal(size=(4, 6)), rng.normal(size=(20, 6))
    expected = target @ np.linalg.inv(pool.T @ pool + 0.5 * np.eye(6)) @ pool.T
    np.testing.assert_allclose(ladder.trak(target, pool, 0.5), expected)
    squares = pool.T @ pool
    trace = np.trace(squares @ np.linalg.inv(squares + 0.5 * np.eye(6)))
    assert ladder.effective_dimension(pool, 0.5) == pytest.approx(trace)


def test_each_step_down_the_ladder_loses_size_and_a_wide_projection_little_order(gaussian):
    found = ladder.study(gaussian, seed=0, left_out=20, subsets=20)
    rungs = found["rungs"]
    assert 0 < found["effective_dimension"] < found["weights"] == 20
    assert rungs["ALO"]["error"] < rungs["IF"]["error"] / 2
    assert rungs["IF"]["error"] < rungs["TRAK"]["error"] < 1
    assert rungs["ALO"]["rank"] > 0.98
    assert rungs["TRAK at 20"]["lds"] > 0.95 * rungs["TRAK"]["lds"]
    assert rungs["TRAK at 0.5"]["rank"] < rungs["TRAK at 20"]["rank"]


def test_what_is_kept_is_a_share_of_the_best_trak():
    rung = {"error": 0.5, "rank": 0.5}
    run = {
        "rungs": {
            "IF": {**rung, "lds": 0.9},
            "TRAK": {**rung, "lds": 0.8},
            "TRAK at 1": {**rung, "lds": 0.6},
        }
    }
    rows = ladder.summary([run, run])
    assert [row[-1] for row in rows] == ["", "1.00 ± 0.00", "0.75 ± 0.00"]


# Exponents


def test_regression_recovers_a_power_law():
    n, k, d = np.asarray(list(product([10, 20], [1, 3], [2, 5])), dtype=float).T
    y = np.log(7 * k * d**0.5 / n**2)
    found, fit = exponents.regress(y, np.log(n), np.log(k), np.log(d))
    np.testing.assert_allclose(found, [-2, 1, 0.5])
    assert fit == pytest.approx(1)


def test_random_groups_have_the_stated_exponents():
    grid = list(product([500, 2000], [4, 16], [4, 16]))
    runs = [exponents.study(grid, "random", seed, draws=6) for seed in range(2)]
    for name, stated in exponents.STATED.items():
        found = np.mean([run[name][0] for run in runs], axis=0)
        np.testing.assert_allclose(found, stated, atol=0.3)


def test_groups_are_what_they_are_called():
    problem = problems.gaussian_problem(200, 3, 0, 1.0, np.random.default_rng(0))
    head, rng = problem.fit(), np.random.default_rng(1)
    logits = problem.features @ head.weights[0]
    losses = head.losses(problem.features, problem.labels)
    aligned = exponents.choose_group(problem, head, 10, "aligned", rng)
    assert (problem.labels[aligned] == 1).all()
    assert logits[aligned].min() > np.median(logits)
    wrong = exponents.choose_group(problem, head, 10, "wrong", rng)
    assert losses[wrong].min() > np.median(losses)
    for kind in exponents.GROUPS:
        assert len(set(exponents.choose_group(problem, head, 10, kind, rng))) == 10


# Removal


def test_rescaling_mends_the_size_of_single_effects_and_newton_that_of_groups(gaussian):
    single = removal.removal(gaussian, "single", seed=0, draws=15)["slope"]
    assert single["IF"] < 0.85
    assert single["RIF"] == pytest.approx(1, abs=0.06)
    assert single["RIF"] == pytest.approx(single["NS"])
    cluster = removal.removal(gaussian, "cluster", seed=0, draws=15)
    slope = cluster["slope"]
    assert slope["IF"] < slope["RIF"] < 0.95
    assert slope["NS"] == pytest.approx(1, abs=0.1)
    assert min(cluster["rank"].values()) > 0.9


def test_removed_groups_are_of_one_class_and_near_each_other(gaussian):
    for kind in ("class", "cluster"):
        rows = removal.choose_group(gaussian, kind, np.random.default_rng(0))
        assert len(set(rows)) == 6
        assert len(set(gaussian.labels[rows])) == 1

    def width(kind):
        rows = removal.choose_group(gaussian, kind, np.random.default_rng(0))
        return gaussian.features[rows].std(axis=0).mean()

    assert width("cluster") < width("class")


def test_flipped_labels_are_found_and_leaving_them_out_helps():
    pytest.importorskip("sklearn")
    problem = problems.bundled_problem("breast_cancer", 50, 1.0, np.random.default_rng(0), 200)
    cells = removal.flips(problem, seed=0)
    assert min(cells["self IF"], cells["self RIF"]) > 0.9
    assert cells["fall"] > 0
    assert min(cells[f"fall by {name}"] for name in removal.METHODS) > 0
    # Without flipped labels there is nothing to find.
    with pytest.raises(ValueError, match="0 of 200 examples are flipped"):
        removal.flips(problem, seed=0, share=0.0)


# Subsets


def test_newton_steps_rank_subsets_better_than_sums_of_single_effects(gaussian):
    small = subsets.study(gaussian, 0.3, seed=0, subsets=25)
    assert small["NS"] > max(small["IF"], small["RIF"]) + 0.05
    large = subsets.study(gaussian, 0.95, seed=0, subsets=25)
    assert min(large.values()) > 0.9
