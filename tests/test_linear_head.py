"""The linear head and what leaving examples out does to it, against arithmetic and refitting."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime
from tiny_lm import save_tiny_lm

from airrep.attributor import Attributor, NotApplicableError
from airrep.attributors.influence import InfluenceAttributor
from airrep.attributors.newton_step import NewtonStepAttributor
from airrep.attributors.rescaled_influence import RescaledInfluenceAttributor
from airrep.examples import Example, InputError
from airrep.gradients.linear_head import LinearHead, fit_linear_head
from airrep.gradients.linear_influence import HeadInfluence
from airrep.metrics import lds_per_target

METHODS = (InfluenceAttributor, RescaledInfluenceAttributor, NewtonStepAttributor)
ESTIMATES = ("influence", "rescaled_influence", "newton_step")


def problem(n=60, d=4, classes=3, seed=0):
    """Features with an intercept, and labels that follow them with noise."""
    rng = np.random.default_rng(seed)
    features = np.column_stack([rng.normal(size=(n, d - 1)), np.ones(n)])
    logits = features @ rng.normal(size=(d, classes)) + rng.gumbel(size=(n, classes))
    labels = logits.argmax(axis=1)
    labels[:classes] = np.arange(classes)
    return features, labels


def fitted(n=60, d=4, classes=3, l2=0.5, seed=0):
    features, labels = problem(n, d, classes, seed)
    head = fit_linear_head(features, labels, l2, classes)
    return HeadInfluence(head, features, labels), features, labels


def without(n, *rows):
    counts = np.ones(n)
    counts[list(rows)] = 0
    return counts


def objective(weights, features, labels, classes, l2, counts):
    """Written out from the definition, with no code of the head."""
    total = l2 / 2 * (weights**2).sum()
    for x, label, count in zip(features, labels, counts, strict=True):
        logits = weights.reshape(-1, len(x)) @ x
        logits = np.array([0.0, logits[0]]) if classes == 2 else logits
        total += count * (np.log(np.exp(logits).sum()) - logits[label])
    return total


def refitted(influence, features, labels, counts):
    """Change (c d,) of the weights by really fitting again."""
    head = influence.head
    again = fit_linear_head(features, labels, head.l2, head.classes, counts, start=head)
    return (again.weights - head.weights).ravel()


# The head


def test_one_feature_by_hand():
    """Two examples at x = 1, labels 1 and 0 and 1: p = 2/3 without ridge, so the logit is ln 2."""
    features, labels = np.ones((3, 1)), np.array([1, 0, 1])
    head = fit_linear_head(features, labels, l2=1e-9)
    assert head.weights[0, 0] == pytest.approx(np.log(2), abs=1e-8)
    np.testing.assert_allclose(head.probabilities(features[:1]), [[1 / 3, 2 / 3]])
    np.testing.assert_allclose(head.losses(features, labels), -np.log([2 / 3, 1 / 3, 2 / 3]))
    np.testing.assert_allclose(head.margins(features, labels), np.log([2, 1 / 2, 2]), atol=1e-8)
    np.testing.assert_allclose(head.residuals(features, labels), [[-1 / 3], [2 / 3], [-1 / 3]])
    np.testing.assert_allclose(head.hessian(features), [[3 * 2 / 9]], rtol=1e-6)


def test_influences_by_hand():
    """Same data: H = 2/3, a = 2/9, h = 1/3. Leaving an example of label 1 out: p falls to 1/2."""
    features, labels = np.ones((3, 1)), np.array([1, 0, 1])
    influence = HeadInfluence(fit_linear_head(features, labels, l2=1e-9), features, labels)
    np.testing.assert_allclose(influence.leverages()[:, 0, 0], 1 / 3, rtol=1e-6)
    counts = without(3, 0)
    assert influence.influence(counts)[0] == pytest.approx(-1 / 2, abs=1e-6)
    assert influence.rescaled_influence(counts)[0] == pytest.approx(-3 / 4, abs=1e-6)
    assert influence.newton_step(counts)[0] == pytest.approx(-3 / 4, abs=1e-6)
    # The truth, ln 1 - ln 2 = -0.693, lies between.
    assert refitted(influence, features, labels, counts)[0] == pytest.approx(-np.log(2), abs=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_gradient_and_hessian_are_the_objectives(classes):
    features, labels = problem(n=12, d=3, classes=classes)
    counts = np.random.default_rng(1).integers(0, 3, size=12)
    rows = 1 if classes == 2 else classes
    weights = np.random.default_rng(2).normal(size=(rows, 3))
    head = LinearHead(weights, classes, l2=0.7)

    def value(flat):
        return objective(flat, features, labels, classes, 0.7, counts)

    def gradient(flat):
        moved = LinearHead(flat.reshape(weights.shape), classes, 0.7)
        return counts @ moved.gradients(features, labels) + 0.7 * flat

    numeric = approx_fprime(weights.ravel(), value, 1e-7)
    np.testing.assert_allclose(gradient(weights.ravel()), numeric, atol=1e-5)
    numeric = approx_fprime(weights.ravel(), gradient, 1e-7)
    np.testing.assert_allclose(head.hessian(features, counts), numeric, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 4), st.integers(1, 5), st.integers(4, 30), st.integers(0, 1000))
def test_the_fit_is_the_minimum(classes, d, n, seed):
    features, labels = problem(n, d, classes, seed)
    head = fit_linear_head(features, labels, 0.1, classes)
    gradient = head.gradients(features, labels).sum(axis=0) + 0.1 * head.weights.ravel()
    assert np.abs(gradient).max() < 1e-9 * n
    lowest = objective(head.weights, features, labels, classes, 0.1, np.ones(n))
    rng = np.random.default_rng(seed)
    for size in (1e-3, 1.0):
        other = head.weights + size * rng.normal(size=head.weights.shape)
        assert objective(other, features, labels, classes, 0.1, np.ones(n)) > lowest


@pytest.mark.parametrize("classes", [2, 4])
def test_the_fit_is_scikit_learns(classes):
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = problem(n=80, classes=classes)
    theirs = linear_model.LogisticRegression(
        C=1 / 0.5, fit_intercept=False, solver="newton-cholesky", tol=1e-12
    ).fit(features, labels)
    ours = fit_linear_head(features, labels, 0.5)
    np.testing.assert_allclose(ours.weights, theirs.coef_, atol=1e-6)


def test_a_count_of_two_is_the_example_twice_and_of_zero_its_absence():
    features, labels = problem(n=20)
    counts = np.array([2, 0] + [1] * 18)
    rows = [0, 0, *range(2, 20)]
    counted = fit_linear_head(features, labels, 0.5, 3, counts)
    listed = fit_linear_head(features[rows], labels[rows], 0.5, 3)
    np.testing.assert_allclose(counted.weights, listed.weights, atol=1e-10)


def test_separable_and_badly_scaled_data_still_converge():
    features = np.array([[-3e4], [-2e4], [2e4], [3e4]])
    head = fit_linear_head(features, np.array([0, 0, 1, 1]), l2=1e-3)
    assert head.losses(features, np.array([0, 0, 1, 1])).max() < 1e-3


@pytest.mark.parametrize(
    ("features", "labels", "l2", "classes", "message"),
    [
        (np.ones((3, 2)), [0, 1], 1.0, None, r"shape \(3, 2\), the labels \(2,\)"),
        (np.ones((0, 2)), [], 1.0, None, r"shape \(0, 2\)"),
        ([[1.0], [np.nan]], [0, 1], 1.0, None, "not finite"),
        (np.ones((2, 1)), [0.0, 1.0], 1.0, None, "labels are float64 from 0.0"),
        (np.ones((2, 1)), [-1, 1], 1.0, None, "labels are int64 from -1"),
        (np.ones((2, 1)), [0, 1], 0.0, None, "l2 is 0.0; give a number above 0"),
        (np.ones((2, 1)), [0, 0], 1.0, None, "go up to 0 for 1 classes"),
        (np.ones((2, 1)), [0, 3], 1.0, 3, "go up to 3 for 3 classes"),
    ],
)
def test_wrong_input_is_an_error(features, labels, l2, classes, message):
    with pytest.raises(InputError, match=message):
        fit_linear_head(features, labels, l2, classes)


def test_a_hessian_that_is_singular_up_to_rounding_is_an_error():
    features = np.random.default_rng(0).normal(size=(3, 8)) * 1e8
    with pytest.raises(InputError, match="singular up to rounding; give a larger l2"):
        fit_linear_head(features, np.array([0, 1, 1]), l2=1e-12)


# Leaving examples out


@pytest.mark.parametrize("classes", [2, 3])
def test_a_single_examples_newton_step_is_its_rescaled_influence(classes):
    influence, features, _ = fitted(classes=classes)
    for row in (0, 7):
        counts = without(len(features), row)
        step = influence.newton_step(counts)
        np.testing.assert_allclose(influence.rescaled_influence(counts), step, rtol=1e-9)


def test_with_two_classes_rescaling_divides_by_one_minus_the_leverage():
    influence, features, labels = fitted(classes=2)
    p = influence.head.probabilities(features)[:, 1]
    inverse = np.linalg.inv(influence.head.hessian(features))
    leverage = p * (1 - p) * np.einsum("nd,de,ne->n", features, inverse, features)
    np.testing.assert_allclose(influence.leverages()[:, 0, 0], leverage)
    gradients = influence.head.gradients(features, labels)
    for row in (3, 11):
        expected = inverse @ gradients[row] / (1 - leverage[row])
        found = influence.rescaled_influence(without(len(features), row))
        np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("classes", [2, 4])
def test_leverages_add_up_to_the_effective_dimension(classes):
    influence, features, _ = fitted(classes=classes)
    hessian = influence.head.hessian(features)
    data = hessian - influence.head.l2 * np.eye(len(hessian))
    total = np.trace(influence.leverages(), axis1=1, axis2=2).sum()
    assert total == pytest.approx(np.trace(data @ np.linalg.inv(hessian)))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 4), st.integers(1, 12), st.integers(0, 1000))
def test_woodbury_is_the_dense_newton_step(classes, size, seed):
    influence, features, labels = fitted(n=40, d=5, classes=classes, seed=seed)
    rng = np.random.default_rng(seed)
    counts = np.ones(40)
    changed = rng.choice(40, size, replace=False)
    counts[changed] = rng.choice([0, 0.5, 3], size)
    # From the definition: the weighted objective's gradient and Hessian.
    head = influence.head
    hessian = head.l2 * np.eye(head.weights.size)
    for x, a, count in zip(features, head.curvatures(features), counts, strict=True):
        hessian += count * np.kron(a, np.outer(x, x))
    gradient = counts @ head.gradients(features, labels) + head.l2 * head.weights.ravel()
    expected = np.linalg.solve(hessian, -gradient)
    np.testing.assert_allclose(influence._woodbury(np.sort(changed), counts), expected, atol=1e-8)
    np.testing.assert_allclose(influence._dense(counts), expected, atol=1e-8)


def test_small_and_large_groups_take_both_ways_and_agree(monkeypatch):
    influence, *_ = fitted(n=200, d=40, classes=2)
    taken = []
    for name in ("_woodbury", "_dense"):
        way = getattr(influence, name)
        monkeypatch.setattr(
            influence, name, lambda *args, name=name, way=way: (taken.append(name), way(*args))[1]
        )
    influence.newton_step(without(200, 0, 1))
    influence.newton_step(without(200, *range(30)))
    assert taken == ["_woodbury", "_dense"]


@pytest.mark.parametrize("classes", [2, 3])
def test_leaving_one_out_errs_by_the_stated_orders(classes):
    """Errors of single examples: influence ~ 1/n^2, Newton step ~ 1/n^2 and smaller.

    Four times the data leave about a sixteenth of the error.
    """
    errors = {name: [] for name in ("influence", "newton_step")}
    for n in (100, 400):
        influence, features, labels = fitted(n=n, d=6, classes=classes, l2=0.01 * n)
        rows = np.random.default_rng(0).choice(n, 30, replace=False)
        for name, found in errors.items():
            differences = []
            for row in rows:
                counts = without(n, row)
                estimate = getattr(influence, name)(counts)
                truth = refitted(influence, features, labels, counts)
                differences.append(np.linalg.norm(estimate - truth))
            found.append(np.mean(differences))
    for small, large in errors.values():
        assert 8 < small / large < 32
    assert errors["newton_step"][1] < errors["influence"][1] / 2


def test_loss_changes_are_what_each_rows_change_does_to_the_targets():
    influence, features, labels = fitted(classes=3)
    others, other_labels = problem(n=5, seed=3)
    gradients = influence.head.gradients(others, other_labels)
    plain = influence.loss_changes(gradients, influence.residuals)
    rescaled = influence.loss_changes(gradients, influence.rescaled_residuals)
    for row in range(0, len(features), 7):
        counts = without(len(features), row)
        np.testing.assert_allclose(plain[:, row], gradients @ influence.influence(counts))
        np.testing.assert_allclose(rescaled[:, row], gradients @ influence.newton_step(counts))
    # They are nats: refitting without a row changes the losses by about as much.
    counts = without(len(features), 0)
    refit = influence.head.moved(refitted(influence, features, labels, counts))
    change = refit.losses(others, other_labels) - influence.head.losses(others, other_labels)
    np.testing.assert_allclose(rescaled[:, 0], change, atol=0.1 * np.abs(change).max())


@pytest.mark.parametrize("name", ESTIMATES)
def test_nothing_left_out_changes_nothing(name):
    influence, features, _ = fitted()
    np.testing.assert_allclose(getattr(influence, name)(np.ones(len(features))), 0, atol=1e-9)


def test_blocks_of_rows_change_nothing(monkeypatch):
    whole, features, labels = fitted(n=30)
    expected = whole.head.hessian(features), whole.rescaled_residuals
    gradients = whole.head.gradients(features, labels)
    changes = whole.loss_changes(gradients, whole.residuals)
    monkeypatch.setattr("airrep.gradients.linear_head.BLOCK", 50)
    np.testing.assert_allclose(whole.head.hessian(features), expected[0])
    again = HeadInfluence(whole.head, features, labels)
    np.testing.assert_allclose(again.rescaled_residuals, expected[1])
    np.testing.assert_allclose(whole.loss_changes(gradients, whole.residuals), changes)


# The attributors

COLOURS = ("red", "green", "blue")


def example(side, number):
    thing = ("apple", "river", "sky", "garden")[number % 4]
    return Example(
        f"{side}-{number}", f"Which colour is {thing} {number}?", COLOURS[number * 7 % 3]
    )


POOL = [example("pool", number) for number in range(24)]
TARGETS = [example("target", number) for number in range(50, 56)]
UNSEEN = Example("unseen", "Which colour is the snow?", "white")


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return str(save_tiny_lm(tmp_path_factory.mktemp("lm"), layers=2, seed=3))


@pytest.fixture(scope="module")
def methods(lm):
    return {cls.name: cls(lm, dimensions=6, device="cpu").fit(POOL) for cls in METHODS}


def test_features_are_the_models_hidden_states_in_front_of_the_response(lm):
    one = InfluenceAttributor(lm, device="cpu", batch_tokens=70)
    opened = one._open()
    hidden = one._hidden(POOL)
    tokens = one._tokenize(POOL, opened.tokenizer)
    for row in (0, 9):
        ids = torch.from_numpy(tokens[row].ids[: tokens[row].response_start]).long()
        with torch.no_grad():
            states = opened.model(input_ids=ids[None], output_hidden_states=True).hidden_states[-1]
        np.testing.assert_allclose(hidden[row], states[0, -1], atol=1e-5)


def test_features_are_centred_principal_components_of_size_one_and_an_intercept(methods):
    features = methods["influence"].influence_.features
    assert features.shape == (len(POOL), 7)
    np.testing.assert_allclose(features[:, :-1].mean(axis=0), 0, atol=1e-9)
    assert (features[:, :-1] ** 2).mean() == pytest.approx(1)
    between = features[:, :-1].T @ features[:, :-1]
    np.testing.assert_allclose(between, np.diag(np.diag(between)), atol=1e-6)
    assert (features[:, -1] == 1).all()


def test_single_scores_are_the_rises_of_the_targets_losses(methods):
    influence = methods["newton_step"].influence_
    features, labels, _ = methods["newton_step"]._targets(TARGETS)
    before = influence.head.losses(features, labels)
    truth = []
    for row in range(len(POOL)):
        counts = without(len(POOL), row)
        change = refitted(influence, influence.features, methods["influence"].labels_, counts)
        truth.append(influence.head.moved(change).losses(features, labels) - before)
    truth = np.stack(truth, axis=1)
    errors = {
        name: np.abs(one.score(TARGETS) - truth).mean() / np.abs(truth).mean()
        for name, one in methods.items()
    }
    assert errors["newton_step"] < 0.2
    assert errors["newton_step"] < 0.5 * errors["influence"]
    np.testing.assert_array_equal(
        methods["newton_step"].score(TARGETS), methods["rescaled_influence"].score(TARGETS)
    )


def test_newton_steps_rank_subsets_better_than_sums(methods):
    rng = np.random.default_rng(0)
    subsets = [rng.choice(len(POOL), 8, replace=False) for _ in range(40)]
    influence = methods["influence"].influence_
    features, labels, _ = methods["influence"]._targets(TARGETS)
    losses = np.empty((len(TARGETS), len(subsets)))
    for column, subset in enumerate(subsets):
        counts = np.bincount(subset, minlength=len(POOL))
        change = refitted(influence, influence.features, methods["influence"].labels_, counts)
        losses[:, column] = influence.head.moved(change).losses(features, labels)
    lds = {
        name: lds_per_target(one.score_subsets(TARGETS, subsets), losses)[0].mean()
        for name, one in methods.items()
    }
    assert lds["newton_step"] > 0.9
    assert lds["newton_step"] > max(lds["influence"], lds["rescaled_influence"])


def test_a_subset_score_is_the_loss_after_one_newton_step(methods):
    one = methods["newton_step"]
    influence = one.influence_
    features, labels, _ = one._targets(TARGETS)
    found = one.score_subsets(TARGETS, [[1, 2, 2, 5], range(24)])
    counts = np.zeros(24)
    counts[[1, 2, 5]] = 1, 2, 1
    moved = influence.head.moved(influence.newton_step(counts))
    expected = influence.head.losses(features, labels) - moved.losses(features, labels)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-5)
    # Training on the whole pool is what has been done.
    np.testing.assert_allclose(found[:, 1], 0, atol=1e-6)
    with pytest.raises(InputError, match="Subset 0 has row 24"):
        one.score_subsets(TARGETS, [[24]])


def test_newton_steps_pool_by_attention_where_asked(lm):
    one = NewtonStepAttributor(lm, dimensions=6, device="cpu", pooling="attention").fit(POOL)
    found = one.score_subsets(TARGETS, [[4], [0, 1]])
    np.testing.assert_allclose(found[:, 0], one.score(TARGETS)[:, 4], rtol=1e-4)


def test_a_target_with_an_unseen_response_scores_zero(methods):
    for one in methods.values():
        alone = one.score([TARGETS[0]])
        both = one.score([TARGETS[0], UNSEEN])
        np.testing.assert_allclose(both[:1], alone, rtol=1e-4, atol=1e-6)
        assert not both[1].any()
        assert not one.score_subsets([UNSEEN], [[0, 3], [1]]).any()


@pytest.mark.parametrize("cls", METHODS)
def test_saved_methods_come_back_the_same(cls, methods, tmp_path):
    one = methods[cls.name]
    one.save(tmp_path)
    loaded = Attributor.load(tmp_path)
    assert type(loaded) is cls
    np.testing.assert_allclose(loaded.score(TARGETS), one.score(TARGETS), rtol=1e-4, atol=1e-6)
    found = loaded.score_subsets(TARGETS, [[0, 1, 2]])
    expected = one.score_subsets(TARGETS, [[0, 1, 2]])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_scoring_with_other_weights_than_the_pools_is_refused(methods, tmp_path):
    folder = save_tiny_lm(tmp_path / "lm", layers=2, seed=4)
    other = InfluenceAttributor(str(folder), dimensions=6, device="cpu")
    other._restore(methods["influence"]._state())
    other.pool_size_ = len(POOL)
    with pytest.raises(InputError, match="has other weights .* fit again"):
        other.score(TARGETS)


@pytest.mark.parametrize("responses", [("yes", "no"), ("yes", "no", "no", "maybe")])
def test_few_examples_and_two_classes_work(lm, responses):
    pool = [Example(str(n), f"Number {n}?", text) for n, text in enumerate(responses)]
    scores = InfluenceAttributor(lm, device="cpu").fit(pool).score(pool)
    # Leaving an example out raises its own loss.
    assert (np.diag(scores) > 0).all()


def test_pools_it_is_not_for_are_refused(lm):
    same = [Example(str(n), f"Number {n}?", "yes ") for n in range(3)]
    with pytest.raises(NotApplicableError, match="all of them are the same"):
        InfluenceAttributor(lm).fit(same)
    blind = [Example(str(n), "Which number?", f"{n}") for n in range(4)]
    with pytest.raises(NotApplicableError, match="states in front of the responses are all the"):
        InfluenceAttributor(lm, device="cpu").fit(blind)
    many = [Example(str(n), f"Number {n}?", f"answer {n}") for n in range(200)]
    with pytest.raises(NotApplicableError, match="200 of them with 64 dimensions make 13,000"):
        RescaledInfluenceAttributor(lm).fit(many)
    with pytest.raises(InputError, match="got dimensions = 0"):
        InfluenceAttributor(lm, dimensions=0).fit(POOL)


def test_a_response_with_nothing_in_front_is_an_error(lm):
    pool = [*POOL, Example("bare", "", "red")]
    with pytest.raises(InputError, match="'bare' has no token in front of its response"):
        InfluenceAttributor(lm, template="{prompt}{response}", device="cpu").fit(pool)
