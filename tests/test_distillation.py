"""Distillation fits a teacher's pairwise scores, through the trainer that labels go through."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from training_task import TOPICS, planted_examples, planted_labels

from airrep import distillation
from airrep.attributors.tfidf import TfidfAttributor
from airrep.distillation import (
    Lesson,
    distil_encoder,
    distil_settings,
    read_teacher_scores,
)
from airrep.encoder import AirRepEncoder
from airrep.examples import InputError
from airrep.holdout import hold_out
from airrep.label_store import Labels
from airrep.metrics import lds_per_target
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


def distil(base: Path, settings: TrainSettings = SETTINGS, **others) -> TrainResult:
    arguments = {"pool": POOL, "targets": TARGETS, "teacher_scores": TEACHER, "output": None}
    encoder = AirRepEncoder.from_base(base)
    return distil_encoder(encoder, settings=settings, **(arguments | others))


def test_the_teachers_ranking_is_learned(base: Path) -> None:
    result = distil(base)
    start = AirRepEncoder.from_base(base)
    found = [
        lds_per_target((encoder.encode(TARGETS) @ encoder.encode(POOL).T).numpy(), -TEACHER)[0]
        for encoder in (start, result.encoder)
    ]
    assert found[1].mean() > found[0].mean() + 0.2
    assert result.validation_lds is not None
    assert result.validation_lds > result.history[0]["validation_lds"] + 0.2


def test_a_higher_score_of_the_teacher_becomes_a_higher_score(base: Path) -> None:
    """The sign: the gradient's first step goes towards the teacher, not away from it."""
    settings = replace(SETTINGS, learning_rate=1e-3, warmup_steps=0, max_steps=3)
    toward, away = distil(base, settings), distil(base, settings, teacher_scores=-TEACHER)
    for result in (toward, away):
        assert result.history[-1]["loss"] < result.history[1]["loss"]
    assert toward.history[0]["train_lds"] == pytest.approx(-away.history[0]["train_lds"])


def test_the_loss_is_the_correlation_over_the_pool(base: Path) -> None:
    as_it_comes = {"start_scale": None, "response_words": False}
    settings = replace(
        SETTINGS, max_steps=1, validation_subsets=0.0, validation_targets=0.0, **as_it_comes
    )
    encoder = AirRepEncoder.from_base(base)
    scores = (encoder.encode(TARGETS) @ encoder.encode(POOL).T).numpy().astype(np.float64)
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(scores, TEACHER, strict=True)]
    assert distil(base, settings).history[1]["loss"] == pytest.approx(1 - np.mean(r), abs=1e-4)


def test_held_out_pool_examples_do_not_train(base: Path) -> None:
    singles = Labels(list(np.arange(40)[:, None]), -TEACHER, np.arange(40))
    split = hold_out(singles, SETTINGS)
    changed = TEACHER.copy()
    changed[:, split.held_subsets] = 1 - changed[:, split.held_subsets]
    settings = replace(SETTINGS, max_steps=2)
    losses = [
        [entry["loss"] for entry in distil(base, settings, teacher_scores=scores).history]
        for scores in (TEACHER, changed)
    ]
    assert losses[0] == losses[1]


def test_labels_are_learned_on_top(base: Path, tmp_path: Path) -> None:
    """A distilled encoder is where training by labels starts, and a stopped run goes on there."""
    labels = planted_labels(POOL, TARGETS, subsets=40, size=12)
    distilled = distil(base, replace(SETTINGS, target_weighting="reliability"), output=tmp_path)
    again = distil(base, replace(SETTINGS, target_weighting="reliability"), output=tmp_path)
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
        distil(base, teacher_scores=TEACHER[1:])


def test_held_out_targets_are_no_part_of_a_lesson() -> None:
    """As targets nor as pool examples: they stay as unseen as test targets are."""
    pool = [*POOL, *TARGETS]  # targets drawn from the pool, as they often are
    labels = planted_labels(pool, TARGETS, subsets=40, size=12)
    held = {
        (TARGETS[row].prompt, TARGETS[row].response)
        for row in hold_out(labels, SETTINGS).held_targets
    }
    for count in (0, 5, 1000):
        lesson = Lesson.choose(pool, TARGETS, labels, SETTINGS, count)
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
    teacher = TfidfAttributor().fit(POOL)
    whole = Lesson.choose(POOL, TARGETS, labels, SETTINGS, 5)
    assert len(whole.pool) == len(POOL)
    asked, score = [], TfidfAttributor.score
    monkeypatch.setattr(
        TfidfAttributor,
        "score",
        lambda self, targets: (asked.append(len(targets)), score(self, targets))[1],
    )
    monkeypatch.setattr(distillation, "MOST_SCORES", 12 * len(whole.targets))
    lesson = Lesson.choose(POOL, TARGETS, labels, SETTINGS, 5)
    assert lesson.targets == whole.targets
    assert len(lesson.pool) == 12
    assert lesson.pool == [POOL[row] for row in lesson.pool_rows]
    # Blocks of targets, none of which has more scores for the whole pool.
    found = lesson.scores(teacher)
    assert sum(asked) == len(whole.targets)
    assert max(asked) * len(POOL) <= 12 * len(whole.targets)
    expected = score(teacher, whole.targets)[:, lesson.pool_rows]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_how_an_example_helps_itself_does_not_decide(base: Path) -> None:
    """Scores far above all others count as ten standard deviations, whatever they are."""
    mean, spread = TEACHER[0].mean(), TEACHER[0].std()
    wide = np.tile(TEACHER, (1, 10))
    pool = [replace(one, id=f"{one.id}-{copy}") for copy in range(10) for one in POOL]
    far, farther = wide.copy(), wide.copy()
    far[:, 0], farther[:, 0] = mean + 1e4 * spread, mean + 1e6 * spread
    settings = replace(SETTINGS, max_steps=2)
    losses = [
        [one["loss"] for one in distil(base, settings, pool=pool, teacher_scores=scores).history]
        for scores in (far, farther)
    ]
    assert losses[0][1:] == pytest.approx(losses[1][1:], abs=1e-4)
    assert losses[0][1] != pytest.approx(1.0, abs=0.02)


def test_what_lies_on_top_alone_learns_faster_from_a_teacher_than_from_labels() -> None:
    distil = DistilSettings("logra", steps=7, pool_per_step=50)
    for layers, rate in ((0, 3e-2), (1, 3e-3), (None, 3e-3)):
        settings = distil_settings(replace(SETTINGS, trainable_layers=layers), distil)
        assert settings.learning_rate == pytest.approx(rate)
        assert (settings.max_steps, settings.subsets_per_step) == (7, 50)
    own = replace(distil, learning_rate=0.5)
    assert distil_settings(SETTINGS, own).learning_rate == 0.5
