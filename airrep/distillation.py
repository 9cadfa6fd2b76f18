"""Distillation: the encoder learns another method's scores before it sees any label.

The score of a pair costs no fine-tuning run, so a teacher that is slow to ask, such as a gradient
method, can give many more of them than there are labels. The encoder learns the teacher's faults
too, and the labels that come after may be too few to undo them: compare with training from the
untrained encoder by LDS on held-out labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from accelerate import Accelerator

from airrep.attributor import Attributor
from airrep.encoder import AirRepEncoder
from airrep.examples import Example, InputError
from airrep.holdout import hold_out
from airrep.label_store import Labels
from airrep.score_files import read_scores
from airrep.train_settings import DistilSettings, TrainSettings
from airrep.trainer import TrainResult, train_encoder

LESSON = 4  # keeps the random numbers of a lesson's targets apart from those of training
CLIP = 10.0  # standard deviations of a target's scores
EVALUATE_EVERY = 10  # steps
MOST_SCORES = 2**28  # of a lesson: 1 GiB


@dataclass(frozen=True)
class Lesson:
    """What a teacher is asked: the scores of `targets` for `pool`.

    The targets are the training targets of `target_rows`, then examples of the pool; `pool` is the
    whole pool's `pool_rows`, which are drawn at random where all would make more than `MOST_SCORES`
    scores. Targets whose labels training holds out are not among them, in the
    pool either, so that what is measured on those labels stays true of targets that nobody has
    seen.
    """

    targets: list[Example]
    pool: list[Example]
    target_rows: np.ndarray
    pool_rows: np.ndarray

    @classmethod
    def choose(
        cls,
        pool: Sequence[Example],
        targets: Sequence[Example],
        labels: Labels,
        settings: TrainSettings,
        pool_targets: int,
    ) -> Self:
        """All training targets that `settings` do not hold out, and at most `pool_targets` others
        of the pool."""
        own = hold_out(labels, settings).train_targets
        held = {_text(targets[row]) for row in np.setdiff1d(np.arange(len(targets)), own)}
        known = held | {_text(targets[row]) for row in own}
        rows = np.flatnonzero([_text(one) not in held for one in pool])
        others = rows[[_text(pool[row]) not in known for row in rows.tolist()]]
        rng = np.random.default_rng([settings.seed, LESSON])
        chosen = np.sort(others[rng.permutation(len(others))[:pool_targets]])
        asked = [*(targets[row] for row in own), *(pool[row] for row in chosen.tolist())]
        most = max(1, MOST_SCORES // len(asked))
        if len(rows) > most:
            rows = np.sort(rng.choice(rows, most, replace=False))
        return cls(asked, [pool[row] for row in rows.tolist()], own, rows)

    def scores(self, teacher: Attributor) -> np.ndarray:
        """What a method that is fitted to the whole pool says: (targets, pool), float32."""
        size = max(1, MOST_SCORES // teacher.pool_size_)
        starts = range(0, len(self.targets), size)
        blocks = (teacher.score(self.targets[start : start + size]) for start in starts)
        return np.concatenate([block[:, self.pool_rows] for block in blocks])


def distil_settings(settings: TrainSettings, distil: DistilSettings) -> TrainSettings:
    """How the encoder learns from a teacher where it learns from labels by `settings`."""
    rate = distil.learning_rate
    if rate is None:
        rate = settings.learning_rate * (10 if settings.trainable_layers == 0 else 1)
    return replace(
        settings,
        target_weighting=None,
        learning_rate=rate,
        max_steps=distil.steps,
        targets_per_step=distil.targets_per_step,
        subsets_per_step=distil.pool_per_step,
        evaluate_every=EVALUATE_EVERY,
    )


def distil_encoder(
    encoder: AirRepEncoder,
    pool: Sequence[Example],
    targets: Sequence[Example],
    teacher_scores: np.ndarray,
    settings: TrainSettings,
    output: Path | None,
    accelerator: Accelerator | None = None,
) -> TrainResult:
    """Trains the encoder, in place, to score pool examples as a teacher does.

    `teacher_scores` (targets, pool), higher = more helpful, may come from any attributor, and the
    targets may be any examples. This is `train_encoder` with subsets of one pool example each,
    whose label is the teacher's score: the objective runs over the pool, `subsets_per_step` is
    the pool examples a step, held-out pool examples and targets choose the step, and LDS is the
    rank correlation with the teacher. Targets all weigh the same. A score that is further than
    `CLIP` standard deviations from its target's mean counts as one that is as far: a target that
    is itself in the pool is most of what it helps. Raises InputError for scores of another shape,
    and where `train_encoder` does.
    """
    if teacher_scores.shape != (len(targets), len(pool)):
        raise InputError(
            f"The teacher's scores have shape {teacher_scores.shape} for {len(targets)} targets "
            f"and {len(pool)} pool examples; give a row a target and a column a pool example."
        )
    scores = np.asarray(teacher_scores, dtype=np.float32)
    mean, spread = scores.mean(axis=1, keepdims=True), scores.std(axis=1, keepdims=True)
    scores = np.clip(scores, mean - CLIP * spread, mean + CLIP * spread)
    singles = Labels(
        list(np.arange(len(pool))[:, None]),
        -scores,  # a loss is low where an example helps
        np.arange(len(pool)),
    )
    return train_encoder(encoder, pool, targets, singles, settings, output, accelerator)


def read_teacher_scores(
    path: str | Path, pool: Sequence[Example], targets: Sequence[Example]
) -> np.ndarray:
    """Scores (targets, pool) of a .safetensors or .npy file, matched by id where it has ids.

    Raises InputError where `read_scores` does, for a pair without a score, and for a file of
    subset scores alone.
    """
    given = read_scores(path).of_pool(pool)
    if given.scores is None:
        raise InputError(f"{path} has subset_scores alone; a teacher needs scores of pairs.")
    return given.scores[given.target_rows(targets)]


def _text(example: Example) -> tuple[str, str]:
    return example.prompt, example.response
