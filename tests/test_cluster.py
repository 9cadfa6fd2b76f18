"""Labels on a Ray cluster are those made locally, whoever joins, dies or stops meanwhile."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from airrep.examples import InputError
from airrep.label_store import LabelStore
from airrep.lm import load_lm
from airrep.weights import fingerprint_weights
from data_builders import cluster
from data_builders.cluster import Work, make_labels_on_ray
from data_builders.finetune import FineTuner
from data_builders.labels import LabelJob, make_labels
from tests.test_finetune import RECIPE, tokens
from tests.test_labels import PLAN
from tests.tiny_lm import save_tiny_lm, tiny_tokenizer

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[default]'")
SEED = 3


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster on this machine, of one node with one worker."""
    from ray.cluster_utils import Cluster

    quiet = {"include_dashboard": False, "include_log_monitor": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **quiet})
        yield made
        made.shutdown()


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_lm(tmp_path_factory.mktemp("lm") / "model")


def new_job(path: Path, lm: Path) -> LabelJob:
    fingerprint = {"lm": fingerprint_weights(lm), "recipe": "r", "examples": "e", "targets": "t"}
    return LabelJob(LabelStore.create(path, fingerprint, PLAN, 6, {}), np.arange(6), repeats=2)


def slow_tuner(lm: Path, diary: Path, nodes: int = 1) -> Callable[[str], FineTuner]:
    """Builds tuners that tell the diary what they do, and wait for so many nodes after the first.

    Subset 2 diverges in its first training and subset 4 in all of them. Workers import nothing of
    the tests: that would take longer than all that they do.
    """
    tokenizer = tiny_tokenizer()
    pool, targets = tokens(tokenizer, 16), tokens(tokenizer, 6, 50)
    first = np.random.default_rng([SEED, 2, 0]).bit_generator.state

    def note(what: str) -> None:
        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "here"
        with diary.open("a") as file:
            file.write(f"{what} {node} {os.getpid()}\n")

    def waits() -> bool:
        lines = [line.split() for line in diary.read_text().splitlines()]
        return len({node for what, node, _ in lines if what == "builds"}) < nodes

    def build(device: str) -> FineTuner:
        model, _ = load_lm(lm, device)
        tuner = FineTuner(model, pool, targets, RECIPE, engine="eager")
        losses_of = tuner.losses_of

        def slowly(
            subsets: Sequence[np.ndarray],
            rows: np.ndarray,
            generators: Sequence[np.random.Generator],
        ) -> np.ndarray:
            state = generators[0].bit_generator.state
            note("begins")
            if nodes > 1 and diary.read_text().count("begins") > 1:
                while waits():
                    time.sleep(0.01)
                time.sleep(0.3)
            losses = losses_of(subsets, rows, generators)
            if state == first or np.array_equal(subsets[0], PLAN[4]):
                losses[0, 1] = np.nan
            note("ends")
            return losses

        tuner.losses_of = slowly  # type: ignore[method-assign]
        note("builds")
        return tuner

    return build


def entries(diary: Path, what: str) -> list[tuple[str, int]]:
    """(node, process) of what the diary tells, in order."""
    lines = [line.split() for line in diary.read_text().splitlines()]
    return [(node, int(process)) for kind, node, process in lines if kind == what]


def on_ray(job: LabelJob, tuner: Any, lm: Path, address: str) -> int:
    return make_labels_on_ray([job], tuner, str(lm), SEED, address, show_progress=False)


def test_labels_are_those_made_here_though_a_node_joins_and_a_worker_is_killed(
    tmp_path: Path, lm: Path, nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, remote = new_job(tmp_path / "local", lm), new_job(tmp_path / "remote", lm)
    lost = r"1 of 7 labels are missing: training diverged, twice. Subset 4 .* \(rows 1\)"
    here = slow_tuner(lm, tmp_path / "here")
    with pytest.raises(InputError, match=lost):
        make_labels([local], lambda: here("cpu"), SEED, show_progress=False)

    diary = tmp_path / "diary"
    writes: list[tuple[int, int]] = []
    killed: list[tuple[str, int]] = []
    write = LabelStore.write

    def interfere(self: LabelStore, number: int, losses: Any, repeat: int, *more: Any) -> None:
        writes.append((number, repeat))
        if len(writes) == 1:
            nodes.add_node(num_cpus=1)
        elif len(writes) == 3:
            begun = len(entries(diary, "begins"))
            while len(entries(diary, "begins")) == begun:
                time.sleep(0.01)
            killed.append(entries(diary, "begins")[-1])
            os.kill(killed[0][1], signal.SIGKILL)
        write(self, number, losses, repeat, *more)

    monkeypatch.setattr(LabelStore, "write", interfere)
    with pytest.raises(InputError, match=lost):
        on_ray(remote, slow_tuner(lm, diary, nodes=2), lm, nodes.address)
    for repeat in (0, 1):
        expected, found = local.store.read(repeat), remote.store.read(repeat)
        np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-6)
        np.testing.assert_array_equal(found.numbers, expected.numbers)
    assert remote.store.attempts() == local.store.attempts() == {2: 1}
    assert set(remote.store.seconds()) == {0, 1, 2, 3}
    assert sorted(writes) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 0), (4, 0)]
    assert len({node for node, _ in entries(diary, "begins")}) == 2
    assert Counter(entries(diary, "begins")) - Counter(entries(diary, "ends")) == Counter(killed)
    assert max(Counter(entries(diary, "builds")).values()) == 1


def test_ctrl_c_keeps_what_is_stored_and_leaves_the_cluster(
    tmp_path: Path,
    lm: Path,
    nodes: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = new_job(tmp_path / "store", lm)
    write = LabelStore.write

    def stop(self: LabelStore, *arguments: Any) -> None:
        write(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(LabelStore, "write", stop)
    tuner = SimpleNamespace(
        most_models=2, notes=["a note"], losses_of=lambda subsets, *rest: np.ones((len(subsets), 6))
    )
    with pytest.raises(KeyboardInterrupt):
        on_ray(job, lambda device: tuner, lm, nodes.address)
    assert len(job.store.done()) == 1
    assert not ray.is_initialized()
    assert capsys.readouterr().out == "a note\n"


def test_a_node_with_another_model_is_named(tmp_path: Path, lm: Path, nodes: Any) -> None:
    other = save_tiny_lm(tmp_path / "other", seed=1)
    found = r"On the node .* \([\d.]+\): .*other is not the model that the labels are of"
    with pytest.raises(InputError, match=found):
        on_ray(new_job(tmp_path / "store", lm), None, other, nodes.address)


def test_a_node_without_the_model_is_named() -> None:
    work = ray.cloudpickle.dumps(Work(lambda device: None, "cpu", "/nowhere/model", "f"))
    with pytest.raises(InputError, match=r"On the node .* \(.*\): /nowhere/model is not a model"):
        cluster._on_worker(work, lambda tuner: None)


@pytest.mark.parametrize(
    ("device", "resources", "found"),
    [
        ("auto", {"CPU": 4, "GPU": 2}, "cuda"),
        ("auto", {"CPU": 4}, "cpu"),
        ("cpu", {"CPU": 4, "GPU": 2}, "cpu"),
        ("cuda", {"CPU": 4, "GPU": 2}, "cuda"),
    ],
)
def test_the_device_is_one_that_the_cluster_has(
    device: str, resources: dict[str, float], found: str
) -> None:
    assert cluster._pick_device(device, resources) == found


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:1", "device is 'cuda:1'; with a Ray cluster give auto, cpu or cuda"),
        ("cuda", "device is 'cuda', and no node of the Ray cluster offers a GPU"),
    ],
)
def test_devices_that_no_worker_can_have_are_refused(device: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        cluster._pick_device(device, {"CPU": 4})


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (
            ray.exceptions.WorkerCrashedError(),
            InputError,
            "Ray gave up a group of labels after 5 retries (.*);",
        ),
        (ray.exceptions.RayTaskError("f", "where", InputError("wrong")), InputError, "^wrong$"),
        (
            ray.exceptions.RayTaskError("f", "a bug", KeyError()),
            ray.exceptions.RayTaskError,
            "a bug",
        ),
    ],
)
def test_what_goes_wrong_on_a_worker(
    error: Exception, expected: type[Exception], message: str
) -> None:
    def get(task: None) -> None:
        raise error

    with pytest.raises(expected, match=message):
        cluster._answer(SimpleNamespace(get=get, exceptions=ray.exceptions), None)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_a_cluster_that_is_not_there(tmp_path: Path, lm: Path, address: str) -> None:
    with pytest.raises(InputError, match=f"The Ray cluster '{address}' cannot be used: .*; start"):
        on_ray(new_job(tmp_path / "store", lm), None, lm, address)


def test_without_ray(tmp_path: Path, lm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"--ray needs Ray; .*pip install 'ray\[default\]'"):
        on_ray(new_job(tmp_path / "store", lm), None, lm, "auto")


LISTENERS = """
import psutil
from data_builders.cluster import _cluster
with _cluster("local"):
    for process in psutil.Process().children(recursive=True):
        for connection in process.net_connections("tcp"):
            if connection.status == "LISTEN":
                print(connection.laddr.ip)
"""


@pytest.mark.slow
def test_a_cluster_of_this_machine_alone_listens_to_itself_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LISTENERS], capture_output=True, text=True, check=True
    )
    assert done.stdout
    assert set(done.stdout.split()) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
