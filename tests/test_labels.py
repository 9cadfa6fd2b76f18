"""Making labels: the same store whoever makes them, in whatever order, however often killed."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from airrep.examples import InputError
from airrep.label_mirror import LabelMirror
from airrep.label_store import LabelStore
from data_builders.finetune import FineTuner
from data_builders.labels import LabelJob, make_labels, parse_shard
from data_builders.recipes import Recipe
from tests.test_finetune import make_tuner
from tests.tiny_lm import save_tiny_lm

PLAN = [np.sort(np.random.default_rng(j).permutation(16)[:6]) for j in range(5)]
FINGERPRINT = {"examples": "a", "targets": "b", "lm": "c", "recipe": "d"}
RECIPE = Recipe(learning_rate=1e-2, batch_size=4, warmup_steps=1, max_length=64)


@pytest.fixture(scope="module")
def tuner(tmp_path_factory: pytest.TempPathFactory) -> FineTuner:
    return make_tuner(save_tiny_lm(tmp_path_factory.mktemp("lm") / "model"), RECIPE)


def new_job(path: Path, repeats: int = 2) -> LabelJob:
    store = LabelStore.create(path, FINGERPRINT, PLAN, 6, {})
    return LabelJob(store, np.arange(6), repeats)


def make(job: LabelJob, tuner: FineTuner, shard: str = "1/1") -> int:
    return make_labels([job], lambda: tuner, seed=3, shard=shard, show_progress=False)


def read(job: LabelJob) -> tuple[np.ndarray, np.ndarray]:
    return job.store.read().losses, job.store.read(repeat=1).losses


def test_every_label_and_every_repeat_is_made_once(tmp_path: Path, tuner: FineTuner) -> None:
    job = new_job(tmp_path / "store")
    started = time.perf_counter()
    assert make(job, tuner) == 7
    wall = time.perf_counter() - started
    losses, again = read(job)
    assert losses.shape == (6, 5)
    assert again.shape == (6, 2)
    assert np.abs(losses[:, :2] - again).max() > 1e-5
    assert set(job.store.seconds()) == {0, 1, 2, 3, 4}
    assert set(job.store.seconds(repeat=1)) == {0, 1}
    spent = [*job.store.seconds().values(), *job.store.seconds(repeat=1).values()]
    assert min(spent) > 0
    assert sum(spent) < wall
    expected = tuner.losses(PLAN[3], np.arange(6), np.random.default_rng([3, 3, 0]))
    np.testing.assert_array_equal(losses[:, 3], expected)


def test_nothing_missing_means_no_model_is_loaded(tmp_path: Path, tuner: FineTuner) -> None:
    job = new_job(tmp_path / "store")
    make(job, tuner)

    def refuse() -> FineTuner:
        raise AssertionError("the model was loaded for nothing")

    assert make_labels([job], refuse, seed=3, show_progress=False) == 0


def test_workers_share_the_plan_and_agree(tmp_path: Path, tuner: FineTuner) -> None:
    whole, shared = new_job(tmp_path / "whole"), new_job(tmp_path / "shared")
    make(whole, tuner)
    assert [make(shared, tuner, shard) for shard in ("2/3", "3/3", "1/3")] == [3, 2, 2]
    for one, other in zip(read(whole), read(shared), strict=True):
        np.testing.assert_array_equal(one, other)


Diverge = Callable[[int, int], bool]


@pytest.fixture
def diverging(monkeypatch: pytest.MonkeyPatch) -> Callable[[Diverge], None]:
    """Makes the n-th training of a subset of PLAN give a NaN where a function says so."""

    def install(diverges: Diverge) -> None:
        losses_of, seen = FineTuner.losses_of, Counter[int]()

        def some(self: FineTuner, subsets: Sequence[np.ndarray], *rest: Any) -> np.ndarray:
            found = losses_of(self, subsets, *rest)
            for row, subset in enumerate(subsets):
                number = next(n for n, known in enumerate(PLAN) if np.array_equal(known, subset))
                if diverges(number, seen[number]):
                    found[row, 4] = np.nan
                seen[number] += 1
            return found

        monkeypatch.setattr(FineTuner, "losses_of", some)

    return install


def test_a_subset_that_diverges_is_trained_once_more(
    tmp_path: Path, tuner: FineTuner, diverging: Callable[[Diverge], None]
) -> None:
    diverging(lambda number, trainings: number == 2 and trainings == 0)
    job = new_job(tmp_path / "store")
    assert make(job, tuner) == 7
    assert job.store.attempts() == {2: 1}
    expected = tuner.losses(PLAN[2], np.arange(6), np.random.default_rng([3, 2, 0, 1]))
    np.testing.assert_allclose(read(job)[0][:, 2], expected, rtol=1e-5)
    job.store.merge()
    assert job.store.attempts() == {2: 1}
    job.store.write(2, expected)
    assert job.store.attempts() == {}


def test_what_diverges_twice_is_missing_and_named_after_the_rest_is_made(
    tmp_path: Path, tuner: FineTuner, diverging: Callable[[Diverge], None]
) -> None:
    diverging(lambda number, trainings: number == 2)
    job = new_job(tmp_path / "store")
    found = (
        "1 of 7 labels are missing: training diverged, twice. "
        r"Subset 2 has losses that are not finite for 1 of 6 targets \(rows 4\)"
    )
    with pytest.raises(InputError, match=found):
        make(job, tuner)
    assert job.store.done() == {0, 1, 3, 4}
    assert job.store.done(repeat=1) == {0, 1}


def test_a_model_that_answers_everything_alike_has_diverged(tmp_path: Path) -> None:
    recipe = replace(RECIPE, learning_rate=1e30)
    tuner = make_tuner(save_tiny_lm(tmp_path / "model"), recipe)
    with pytest.raises(InputError, match="3 of 7 labels are missing: training diverged, twice"):
        make(new_job(tmp_path / "store"), tuner)


def test_a_recipe_that_always_diverges_is_given_up_early(
    tmp_path: Path, tuner: FineTuner, diverging: Callable[[Diverge], None]
) -> None:
    trained = []
    diverging(lambda number, trainings: trained.append(number) is None)
    with pytest.raises(InputError, match="3 of 7 labels are missing"):
        make(new_job(tmp_path / "store"), tuner)
    assert trained == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "-1/2", "1/0", "²/³", "1/2\n"])
def test_impossible_shards_are_refused(shard: str) -> None:
    with pytest.raises(InputError, match='give "i/n" with i from 1 to n'):
        parse_shard(shard)


WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.test_labels import make, new_job, RECIPE
from tests.test_finetune import make_tuner
import time
tuner = make_tuner(Path({lm!r}), RECIPE)
losses_of = tuner.losses_of
def slowly(*arguments):
    time.sleep(0.3)
    return losses_of(*arguments)
tuner.losses_of = slowly
make(new_job(Path({store!r})), tuner)
"""


def test_killed_and_run_again_ends_in_the_same_labels(tmp_path: Path, tuner: FineTuner) -> None:
    lm = save_tiny_lm(tmp_path / "lm")
    root = str(Path(__file__).parents[1])
    script = WORKER.format(root=root, lm=str(lm), store=str(tmp_path / "killed"))
    process = subprocess.Popen([sys.executable, "-c", script])
    shards = tmp_path / "killed" / "losses"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if shards.is_dir() and any(shards.glob("0*.safetensors")):
            break
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    killed = new_job(tmp_path / "killed")
    made = len(killed.store.done())
    assert 1 <= made < 5
    assert make(killed, tuner) == 7 - made
    undisturbed = new_job(tmp_path / "undisturbed")
    make(undisturbed, tuner)
    for one, other in zip(read(killed), read(undisturbed), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_workers_without_a_common_disk_make_no_label_twice(
    tmp_path: Path, tuner: FineTuner
) -> None:
    url = f"file://{tmp_path}/mirror"
    jobs = []
    for name in ("one", "two"):
        job = new_job(tmp_path / name)
        jobs.append(replace(job, mirror=LabelMirror(job.store, url)))
    assert make(jobs[0], tuner, shard="1/2") == 4
    assert jobs[1].mirror is not None
    assert jobs[1].mirror.sync() == 4
    assert make(jobs[1], tuner) == 3
    assert jobs[0].mirror is not None
    assert jobs[0].mirror.sync() == 3
    assert make(jobs[0], tuner) == 0
    for mine, theirs in zip(read(jobs[0]), read(jobs[1]), strict=True):
        np.testing.assert_array_equal(mine, theirs)
