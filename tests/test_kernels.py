"""Kernels: weights that depend on the target are learned from training labels alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_models import tiny_encoder
from training_task import TOPICS, planted_answers, planted_labels

from airrep.attributor import Attributor
from airrep.attributors import kernels
from airrep.attributors.kernel_texts import GATE_SPREAD
from airrep.attributors.kernels import KERNELS, KernelsAttributor
from airrep.attributors.tfidf import TfidfAttributor
from airrep.encoder import AirRepEncoder
from airrep.examples import Example, InputError
from airrep.holdout import TrainingLabels, hold_out
from airrep.label_store import Labels
from airrep.metrics import lds_per_target
from airrep.train_settings import TrainSettings

POOL, TARGETS = planted_answers(60, 0), planted_answers(40, 1)
LABELS = planted_labels(POOL, TARGETS, 40, 20)
TESTS = planted_answers(20, 2)
TEST_LABELS = planted_labels(POOL, TESTS, 30, 20, seed=1)
SETTINGS = TrainSettings()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("base"))


def fitted(base: Path | AirRepEncoder, labels: Labels = LABELS, **params) -> KernelsAttributor:
    given = TrainingLabels(TARGETS, labels, params.pop("settings", SETTINGS))
    encoder = str(base) if isinstance(base, Path) else base
    return KernelsAttributor(encoder, given, **params).fit(POOL)


def lds_of(attributor: Attributor, labels: Labels = TEST_LABELS) -> float:
    pooled = attributor.score_subsets(TESTS, labels.subsets)
    return float(lds_per_target(pooled, labels.losses)[0].mean())


def turned(labels: Labels, targets: list[Example]) -> Labels:
    """The same labels, where the same topic harms half of the topics."""
    harmed = np.asarray([target.response in TOPICS[:2] for target in targets])
    losses = np.where(harmed[:, None], -labels.losses, labels.losses)
    return replace(labels, losses=losses)


def test_what_labels_say_of_other_targets_and_subsets_is_learned(base: Path) -> None:
    assert lds_of(fitted(base)) > 0.9


def test_a_likeness_that_helps_some_targets_can_harm_others(base: Path) -> None:
    labels, tests = turned(LABELS, TARGETS), turned(TEST_LABELS, TESTS)
    assert lds_of(fitted(base, labels), tests) > 0.9
    # One weight for all targets cannot say it.
    assert lds_of(fitted(base, labels, components=0), tests) < 0.5


def test_kernels_are_what_the_docstring_says(base: Path) -> None:
    made = fitted(base, members=["tfidf"])
    targets, mine = (
        made._place_texts(made._read(some, made.encoder_.tokenize(some)))
        for some in (TARGETS, POOL)
    )
    found = list(made._kernels(targets, [made.members_[0].score(TARGETS)]))
    assert len(found) == len(made.weights_) == KERNELS + 2
    text, words = found[0], found[3]
    np.testing.assert_allclose(found[1], text**3, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found[2], text**9, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found[5], words**9, rtol=1e-4, atol=1e-7)
    same = np.asarray([[x.response == z.response for z in POOL] for x in TARGETS])
    np.testing.assert_array_equal(found[8], same)  # the whole response
    np.testing.assert_allclose(found[12], same * text, atol=1e-6)
    np.testing.assert_allclose(found[6], same, atol=1e-5)  # one token each: their cosine
    np.testing.assert_allclose(found[15], np.maximum(text, 0) * words, atol=1e-6)
    for row, size in ((18, 1), (19, 2), (20, 4)):  # each filler is one token
        opens = [
            [x.prompt.split()[:size] == z.prompt.split()[:size] for z in POOL] for x in TARGETS
        ]
        np.testing.assert_array_equal(found[row], opens)
    np.testing.assert_allclose(found[23], found[20] * same, atol=1e-6)
    np.testing.assert_allclose(found[24], found[20] * words, atol=1e-6)
    np.testing.assert_allclose((mine.text * mine.text).sum(axis=1), 1, atol=1e-5)
    weights = targets.gates @ made.weights_.T
    by_hand = sum(weights[:, [row]] * kernel for row, kernel in enumerate(found))
    np.testing.assert_allclose(made.score(TARGETS), by_hand, rtol=1e-4, atol=1e-4)


def test_lengths_count_as_the_docstring_says(base: Path) -> None:
    long = np.arange(len(POOL)) // len(TOPICS) % 2
    pool = [
        replace(one, response=" ".join([one.response] * (1 + 4 * is_long)))
        for one, is_long in zip(POOL, long.tolist(), strict=True)
    ]
    alike = np.asarray([[x.response == z.response for z in POOL] for x in TARGETS + TESTS])
    effects = alike * np.where(long, -1.0, 1.0)  # long answers of the same topic harm

    def labels(rows: slice, seed: int) -> Labels:
        rng = np.random.default_rng(seed)
        subsets = [rng.choice(len(pool), 20, replace=False) for _ in range(40)]
        losses = np.stack([-effects[rows][:, subset].sum(axis=1) for subset in subsets], axis=1)
        return Labels(subsets, losses.astype(np.float32), np.arange(40))

    given = TrainingLabels(TARGETS, labels(slice(len(TARGETS)), 0), SETTINGS)
    made = KernelsAttributor(str(base), given).fit(pool)
    assert lds_of(made, labels(slice(len(TARGETS), None), 1)) > 0.9

    tokenized = made.encoder_.tokenize(pool)
    texts = made._place_texts(made._read(pool, tokenized))
    logs = np.log1p(
        [[len(text), 1 + 4 * is_long] for text, is_long in zip(tokenized, long, strict=True)]
    )
    lengths = GATE_SPREAD * (logs - logs.mean(axis=0)) / logs.std(axis=0)
    np.testing.assert_allclose(texts.lengths, lengths, atol=1e-4)
    np.testing.assert_array_equal(texts.gates[:, -2:], texts.lengths)
    found = list(made._kernels(texts, []))
    for place, plain in enumerate((0, 3, 6, 8, 9), start=25):
        np.testing.assert_allclose(found[place], found[plain] * lengths[:, 1], atol=1e-4)


def test_labels_outside_the_training_block_and_the_held_out_one_do_not_count(base: Path) -> None:
    split = hold_out(LABELS, SETTINGS)
    changed = LABELS.losses.copy()
    rng = np.random.default_rng(0)
    for rows, columns in (
        (split.train_targets, split.held_subsets),
        (split.held_targets, split.train_subsets),
    ):
        changed[np.ix_(rows, columns)] = rng.normal(size=(len(rows), len(columns)))
    same = fitted(base, replace(LABELS, losses=changed))
    np.testing.assert_array_equal(same.weights_, fitted(base).weights_)
    changed[np.ix_(split.train_targets, split.train_subsets)] *= -1
    assert not np.allclose(fitted(base, replace(LABELS, losses=changed)).weights_, same.weights_)


def test_held_out_labels_choose_the_step(base: Path) -> None:
    split = hold_out(LABELS, SETTINGS)
    held = np.ix_(split.held_targets, split.held_subsets)
    losses = LABELS.losses.copy()
    losses[held] *= -1  # the opposite of what trains: the first step is the best
    first = fitted(base, replace(LABELS, losses=losses)).weights_
    assert (first[:, 1:] == 0).all()
    assert (first[:, 0] >= 0).all()
    last = fitted(base, settings=replace(SETTINGS, validation_subsets=0)).weights_
    assert (last[:, 1:] != 0).any()


def test_members_are_fitted_again_only_when_something_differs(base: Path) -> None:
    class Counting(TfidfAttributor):
        fits = 0

        def _fit(self, pool):
            Counting.fits += 1
            super()._fit(pool)

    made = fitted(base, members=[Counting()])
    expected = made.score(TESTS)
    assert Counting.fits == 1
    made.penalty = 1.0
    assert not np.allclose(made.fit(POOL).score(TESTS), expected)
    assert Counting.fits == 1
    made.penalty = 0.01
    np.testing.assert_allclose(made.fit(list(POOL)).score(TESTS), expected, rtol=1e-5, atol=1e-5)
    made.members[0].sublinear_tf = True
    made.fit(POOL)
    assert Counting.fits == 2
    made.labels = None
    made.fit(POOL[:30])
    assert Counting.fits == 3


def test_missing_losses_are_left_out(base: Path) -> None:
    losses = LABELS.losses.copy()
    losses[::5, 3], losses[7] = np.nan, np.nan
    assert lds_of(fitted(base, replace(LABELS, losses=losses))) > 0.85


def test_a_sample_of_many_labels_is_enough(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LABELS_AT_ONCE", 15 * KERNELS * len(LABELS.subsets))
    monkeypatch.setattr(kernels, "PRODUCTS_AT_ONCE", 7 * len(POOL))
    assert lds_of(fitted(base)) > 0.9


def test_loaded_weights_go_with_another_pool(base: Path, tmp_path: Path) -> None:
    made = fitted(base)
    made.save(tmp_path)
    loaded = Attributor.load(tmp_path)
    expected = made.score(TESTS)[:, :25]
    np.testing.assert_allclose(loaded.fit(POOL[:25]).score(TESTS), expected, rtol=1e-4, atol=1e-5)


def test_a_given_encoder_stays_as_it_is(base: Path) -> None:
    encoder = AirRepEncoder.from_base(base)
    fitted(encoder)
    assert encoder.words_projector is None
    assert encoder.means is None


def test_examples_in_the_pool_of_equal_texts_are_no_fault(base: Path) -> None:
    same = [replace(one, prompt="what", response="red") for one in POOL]
    made = KernelsAttributor(str(base), TrainingLabels(TARGETS, LABELS, SETTINGS)).fit(same)
    assert np.isfinite(made.score(TESTS)).all()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"members": "tfidf"}, "give a list of methods"),
        ({"members": ["logra"]}, "The method 'logra': missing a required argument: 'lm'"),
        ({"members": ["tfid"]}, "did you mean 'tfidf'"),
        ({"components": -1}, "give at least 0"),
        ({"penalty": -1.0}, "give at least 0"),
    ],
)
def test_bad_parameters_are_refused(base: Path, params: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fitted(base, **params)


def test_a_member_that_has_seen_the_labels_is_refused(base: Path) -> None:
    learned = KernelsAttributor(str(base))
    with pytest.raises(InputError, match="has seen the labels"):
        fitted(base, members=[learned])


def test_labels_are_needed_and_must_be_of_the_pool(base: Path) -> None:
    with pytest.raises(InputError, match="learns from labels"):
        KernelsAttributor(str(base)).fit(POOL)
    with pytest.raises(InputError, match="outside the pool"):
        KernelsAttributor(str(base), TrainingLabels(TARGETS, LABELS, SETTINGS)).fit(POOL[:9])


def test_training_labels_as_text_tell_what_they_hold() -> None:
    given = TrainingLabels(TARGETS, LABELS, SETTINGS)
    assert str(given).startswith("40 targets x 40 subsets, ")
    others = (
        replace(given, settings=replace(SETTINGS, seed=1)),
        replace(given, labels=replace(LABELS, losses=LABELS.losses + 1)),
        replace(given, targets=[*TARGETS[:-1], TESTS[0]]),
    )
    assert len({str(given), *map(str, others)}) == 4
    assert str(replace(given, settings=replace(SETTINGS, max_steps=3))) == str(given)
