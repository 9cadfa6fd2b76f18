"""Distillation: the encoder learns another method's scores before it sees any label.

The score of a pair costs no fine-tuning run, so a teacher that is slow to ask, such as a gradient
method, can give many more of them than there are labels. The encoder learns the teacher's faults
too, and the labels that come after may be too few to undo them: compare with training from the
untrained encoder by LDS on held-out labels.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from airrep.encoder import AirRepEncoder
from airrep.examples import Example, InputError
from airrep.label_store import Labels
from airrep.score_files import read_scores
from airrep.train_settings import TrainSettings
from airrep.trainer import TrainResult, train_encoder


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
    rank correlation with the teacher. Targets all weigh the same. Raises InputError for scores
    of another shape, and where `train_encoder` does.
    """
    if teacher_scores.shape != (len(targets), len(pool)):
        raise InputError(
            f"The teacher's scores have shape {teacher_scores.shape} for {len(targets)} targets "
            f"and {len(pool)} pool examples; give a row a target and a column a pool example."
        )
    singles = Labels(
        list(np.arange(len(pool))[:, None]),
        -np.asarray(teacher_scores, dtype=np.float32),  # a loss is low where an example helps
        np.arange(len(pool)),
    )
    settings = replace(settings, target_weighting=None)
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
