"""Same task: the label a dataset's author knows and a text method has to infer."""

from collections.abc import Sequence

import numpy as np

from airrep.attributor import Attributor, NotApplicableError, pack_text, unpack_text
from airrep.examples import Example


class SameTaskAttributor(Attributor):
    """score(x, z) = 1 where x and z have the same task, else 0; an oracle, since it reads labels.

    Raises NotApplicableError when an example has no task.
    """

    name = "same_task"
    oracle = True

    def __init__(self, pooling: str = "sum") -> None:
        self.pooling = pooling

    def _fit(self, pool: Sequence[Example]) -> None:
        self.tasks_, codes = np.unique(_tasks(pool, "pool examples"), return_inverse=True)
        self.codes_ = codes.astype(np.int32)

    def _score(self, targets: Sequence[Example]) -> np.ndarray:
        same = np.asarray(_tasks(targets, "targets"))[:, None] == self.tasks_[None, :]
        return same[:, self.codes_].astype(np.float32)

    def _state(self) -> dict[str, np.ndarray]:
        return {"tasks": pack_text(self.tasks_.tolist()), "codes": self.codes_}

    def _restore(self, state: dict[str, np.ndarray]) -> None:
        self.tasks_ = np.asarray(unpack_text(state["tasks"]))
        self.codes_ = state["codes"]


def _tasks(examples: Sequence[Example], noun: str) -> list[str]:
    unknown = [example.id for example in examples if example.task is None]
    if unknown:
        raise NotApplicableError(
            f"same_task needs tasks, but {len(unknown)} of {len(examples)} {noun} have none "
            f"(first: {unknown[0]!r}); add a task to each or leave the method out."
        )
    return [example.task for example in examples if example.task is not None]
