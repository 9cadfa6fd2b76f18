"""Distillation fits a teacher's pairwise scores, through the trainer that labels go through."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_task import TOPICS, planted_examples, planted_labels

from airrep import distillation
from airrep.attributors.tfidf import TfidfAttributor
from airrep.distillation import (
    Lesson,
    distil_encoder,
    distil_settings,
    read_teacher_scores,
    taught_settings,
)
from airrep.encoder import AirRepEncoder
from airrep.examples import InputError
from airrep.holdout import hold_out
from airrep.metrics import lds_per_target
from airrep.pooling import membership, pool_scores
from airrep.score_files import write_scores
from airrep.train_settings import DistilSettings, TrainSettings
from airrep.trainer import TrainResult, train_encoder

pytestmark = pytest.mark.usefixtures("on_cpu")

POOL, TARGETS = planted_examples(40, seed=1), planted_examples(20, seed=2)
SETTINGS = TrainSettings(
    learning_rate=3e-3,
    warmup_steps=2,
    max_steps=32,
    evaluate_every=4,
    marks=False,  # 32 numbers are too few for them
    show_progress=False,
)
# The planted examples' topics go round, so a teacher who knows them is a matrix of places.
PLACES = np.arange(40)[None, :] - np.arange(20)[:, None]
TEACHER = (PLACES % len(TOPICS) == 0).astype(np.float32)


LESSON = Lesson(
    TARGETS,
    POOL,
    np.arange(20),
    np.arange(40),
    [np.sort(np.random.default_rng(number).permutation(40)[:12]) for number in range(60)],
)
DISTIL = DistilSettings("a teacher", steps=40, targets_per_step=16, subsets_per_step=48)


def distil(
    base: Path,
    scores: np.ndarray = TEACHER,
    settings: TrainSettings = SETTINGS,
    how: DistilSettings = DISTIL,
    output: Path | None = None,
) -> TrainResult:
    encoder = AirRepEncoder.from_base(base)
    return distil_encoder(encoder, LESSON, scores, settings, how, output)


def test_the_teachers_ranking_is_learned(base: Path) -> None:
    result = distil(base)
    assert result.validation_lds is not None
    assert result.validation_lds > result.history[0]["validation_lds"] + 0.2
    start = AirRepEncoder.from_base(base)
    # Of subsets that nobody has seen, too.
    labels = planted_labels(POOL, TARGETS, subsets=40, size=12)
    members = membership(labels.subsets, len(POOL))
    found = []
    for encoder in (start, result.encoder):
        scores = encoder.encode(TARGETS) @ encoder.encode(POOL).T
        pooled = pool_scores(scores, members, "attention").numpy()
        wanted = pool_scores(torch.from_numpy(TEACHER), members, "sum").numpy()
        found.append(lds_per_target(pooled, -wanted)[0].mean())
    assert found[1] > found[0] + 0.2


def test_a_higher_score_of_the_teacher_becomes_a_higher_score(base: Path) -> None:
    """The sign: the gradient's first step goes towards the teacher, not away from it."""
    settings, how = replace(SETTINGS, learning_rate=1e-3, warmup_steps=0), replace(DISTIL, steps=3)
    toward, away = distil(base, TEACHER, settings, how), distil(base, -TEACHER, settings, how)
    for result in (toward, away):
        assert result.history[-1]["loss"] < result.history[1]["loss"]
    assert toward.history[0]["train_lds"] == pytest.approx(-away.history[0]["train_lds"])


def test_a_subset_is_labelled_by_the_mean_of_its_scores() -> None:
    scores = np.array([[1.0, 2.0, 6.0], [0.0, -1.0, 3.0]])
    subsets = [np.array([0, 2]), np.array([1]), np.array([0, 1, 2])]
    lesson = Lesson(TARGETS[:2], POOL[:3], np.arange(2), np.arange(3), subsets)
    labels = lesson.labels(scores)
    np.testing.assert_allclose(labels.losses, [[-3.5, -2, -3], [-1.5, 1, -2 / 3]], rtol=1e-6)
    assert labels.subsets == subsets


def test_the_labels_settings_hold_where_a_teacher_has_none_of_its_own(base: Path) -> None:
    """The objective is that of the labels; weights by reliability are not: there is no noise."""
    how = replace(DISTIL, steps=2)
    losses = [
        [entry["loss"] for entry in distil(base, TEACHER, settings, how).history]
        for settings in (
            SETTINGS,
            replace(SETTINGS, target_weighting="reliability"),
            replace(SETTINGS, objective="pairwise_ranking"),
        )
    ]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_labels_are_learned_on_top(base: Path, tmp_path: Path) -> None:
    """A distilled encoder is where training by labels starts, and a stopped run goes on there."""
    labels = planted_labels(POOL, TARGETS, subsets=40, size=12)
    distilled, again = distil(base, output=tmp_path), distil(base, output=tmp_path)
    assert again.history == distilled.history
    starts = (AirRepEncoder.from_base(base), again.encoder)
    results = [
        train_encoder(encoder, POOL, TARGETS, labels, replace(SETTINGS, max_steps=4), None)
        for encoder in starts
    ]
    assert results[1].history[0]["validation_lds"] > results[0].history[0]["validation_lds"] + 0.2


def test_teacher_scores_are_read_by_id(tmp_path: Path) -> None:
    write_scores(tmp_path / "t.safetensors", TEACHER[::-1], TARGETS[::-1], POOL)
    read = read_teacher_scores(tmp_path / "t.safetensors", POOL[::-1], TARGETS[:7])
    np.testing.assert_array_equal(read, TEACHER[:7, ::-1])
    write_scores(tmp_path / "s.npy", None, TARGETS, POOL, subset_scores=TEACHER[:, :3])
    with pytest.raises(InputError, match="s.npy has subset_scores alone; a teacher needs scores"):
        read_teacher_scores(tmp_path / "s.npy", POOL, TARGETS)


def test_scores_of_another_shape_are_refused(base: Path) -> None:
    with pytest.raises(InputError, match=r"shape \(19, 40\) for 20 targets and 40 pool examples"):
        distil(base, TEACHER[1:])


def test_held_out_targets_are_no_part_of_a_lesson() -> None:
    """As targets nor as pool examples: they stay as unseen as test targets are."""
    pool = [*POOL, *TARGETS]  # targets drawn from the pool, as they often are
    labels = planted_labels(pool, TARGETS, subsets=40, size=12)
    held = {
        (TARGETS[row].prompt, TARGETS[row].response)
        for row in hold_out(labels, SETTINGS).held_targets
    }
    for count in (0, 5, 1000):
        lesson = Lesson.choose(pool, TARGETS, labels, SETTINGS, replace(DISTIL, pool_targets=count))
        asked, own = lesson.targets, len(lesson.target_rows)
        assert asked[:own] == [TARGETS[row] for row in lesson.target_rows]
        assert own == 16
        assert len({one.id for one in asked[own:]}) == len(asked[own:])
        assert len(asked[own:]) == min(count, len(asked[own:]))
        assert lesson.pool == [pool[row] for row in lesson.pool_rows]
        texts = {(one.prompt, one.response) for one in (*asked, *lesson.pool)}
        assert not texts & held
        rest = {(one.prompt, one.response) for one in pool} - held
        assert {(pool[row].prompt, pool[row].response) for row in lesson.pool_rows} == rest
        if count == 1000:
            assert {(one.prompt, one.response) for one in asked} == rest


def test_a_lesson_of_a_large_pool_is_a_sample_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = planted_labels(POOL, TARGETS, subsets=40, size=12)
    how = replace(DISTIL, pool_targets=5, subsets=7)
    whole = Lesson.choose(POOL, TARGETS, labels, SETTINGS, how)
    assert len(whole.pool) == len(POOL)
    assert [len(subset) for subset in whole.subsets] == [12] * 7
    lesson = Lesson.choose(POOL, TARGETS, labels, SETTINGS, replace(how, pool_examples=16))
    assert lesson.targets == whole.targets
    assert lesson.pool == [POOL[row] for row in lesson.pool_rows]
    assert len(lesson.pool) == 16
    assert [len(np.unique(subset)) for subset in lesson.subsets] == [8] * 7  # half of the pool
    assert max(subset.max() for subset in lesson.subsets) < 16
    # The teacher is asked for blocks of targets, none of which has too many scores.
    teacher, asked, score = TfidfAttributor().fit(POOL), [], TfidfAttributor.score
    monkeypatch.setattr(
        TfidfAttributor,
        "score",
        lambda self, targets: (asked.append(len(targets)), score(self, targets))[1],
    )
    monkeypatch.setattr(distillation, "MOST_SCORES", 300)
    found = lesson.scores(teacher)
    assert sum(asked) == len(whole.targets)
    assert max(asked) * len(POOL) <= 300
    expected = score(teacher, whole.targets)[:, lesson.pool_rows]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_how_an_example_helps_itself_does_not_decide() -> None:
    """Scores far above all others count as ten standard deviations, whatever they are."""
    pool = POOL * 10
    subsets = [np.array([0, 1]), np.array([2, 3]), np.arange(400)]
    lesson = Lesson(TARGETS, pool, np.arange(20), np.arange(400), subsets)
    wide = np.tile(TEACHER, (1, 10))
    mean, spread = TEACHER[0].mean(), TEACHER[0].std()
    far, farther = wide.copy(), wide.copy()
    far[0, 0], farther[0, 0] = mean + 1e4 * spread, mean + 1e6 * spread
    for scores in (far, farther):
        losses = lesson.labels(scores).losses
        # In units of the deviation that such a score makes the most of: ten against the mean.
        row = scores[0]
        assert losses[0, 0] == pytest.approx(-(row.mean() + 10 * row.std() + row[1]) / 2, rel=1e-4)
        np.testing.assert_allclose(losses[1:], lesson.labels(wide).losses[1:])


def test_what_lies_on_top_alone_learns_faster_from_a_teacher_than_from_labels() -> None:
    distil = DistilSettings("logra", steps=7, subsets_per_step=50)
    for layers, rate in ((0, 9e-3), (1, 3e-3), (None, 3e-3)):
        settings = distil_settings(replace(SETTINGS, trainable_layers=layers), distil)
        assert settings.learning_rate == pytest.approx(rate)
        assert (settings.max_steps, settings.subsets_per_step) == (7, 50)
    own = replace(distil, learning_rate=0.5)
    assert distil_settings(SETTINGS, own).learning_rate == 0.5


def test_labels_leave_the_scale_that_a_teacher_taught(base: Path) -> None:
    taught = distil(base, how=replace(DISTIL, steps=4)).encoder
    before = taught.encode(POOL)
    labels = planted_labels(POOL, TARGETS, subsets=40, size=12)
    settings = replace(SETTINGS, max_steps=1, learning_rate=1e-9, scale_learning_rate=None)
    after = train_encoder(taught, POOL, TARGETS, labels, taught_settings(settings), None).encoder
    torch.testing.assert_close(after.encode(POOL), before, rtol=1e-4, atol=1e-5)
