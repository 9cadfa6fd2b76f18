"""Making labels on a Ray cluster: its workers train and return losses, this process stores them.

A group of labels is a plain Ray task. Who trains it, when, and again after a worker's death is
Ray's business, so nodes may join and leave. Workers need the package and the language model, and
no access to the label store.
"""

import os
import platform
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import Any

from airrep.examples import InputError
from airrep.weights import fingerprint_weights, resolve_model
from data_builders.finetune import FineTuner
from data_builders.labels import (
    Group,
    LabelJob,
    TrainedGroup,
    groups,
    missing_labels,
    store_labels,
)

RETRIES = 5  # of a group whose worker died
GROUPS_PER_WORKER = 2  # one in training, and one that waits for it to end
LOOK_SECONDS = 2.0  # between looks at how many workers there are
CONNECT_SECONDS = 5.0
RESOURCES = {"cpu": "CPU", "cuda": "GPU"}  # what Ray calls them


@dataclass(frozen=True)
class Work:
    """What every worker is told once.

    `tuner` builds the tuner on the device it is given; `lm` is the model's name on every node,
    and `fingerprint` what `fingerprint_weights` says of it.
    """

    tuner: Callable[[str], FineTuner]
    device: str
    lm: str
    fingerprint: str

    def build(self) -> FineTuner:
        """The tuner; raises InputError where the node has not this model."""
        path = resolve_model(self.lm)
        if fingerprint_weights(path) != self.fingerprint:
            raise InputError(
                f"{path} is not the model that the labels are of; put the same {self.lm}, and the "
                "same version of this package, on every node."
            )
        return self.tuner(self.device)


def make_labels_on_ray(
    jobs: Sequence[LabelJob],
    tuner: Callable[[str], FineTuner],
    lm: str,
    seed: int,
    address: str = "auto",
    device: str = "auto",
    shard: str = "1/1",
    show_progress: bool = True,
) -> int:
    """Makes the labels that are missing as `make_labels` does, on a cluster; returns how many.

    `tuner` gets "cpu" or "cuda"; it is sent to the workers with all that it holds, and each calls
    it once. `lm` names the model on every node. `address` is "auto" (the cluster that this
    machine belongs to), "local" (a new one of this machine alone) or HOST:PORT. Every worker has
    one GPU, or one CPU core with device "cpu" and where there is no GPU. Raises InputError without
    Ray or a cluster, for a device that no node has, a node without the model, and a group whose
    workers die again and again; what was stored before stays.
    """
    wanted = missing_labels(jobs, shard)
    if not wanted:
        return 0
    with _cluster(address) as ray:
        device = _pick_device(device, ray.cluster_resources())
        work = Work(tuner, device, lm, jobs[0].store.fingerprint["lm"])
        remote = ray.remote(
            num_cpus=1,
            num_gpus=int(device == "cuda"),
            max_retries=RETRIES,
            max_calls=0,  # or else a worker with a GPU ends after one task, and its tuner with it
        )(_on_worker)
        start = partial(remote.remote, ray.put(ray.cloudpickle.dumps(work)))
        models, notes = _answer(ray, start(_most_models))
        for note in notes:
            print(note)
        trained = _trained(ray, start, groups(wanted, models), seed, RESOURCES[device])
        return store_labels(trained, len(wanted), show_progress)


def _trained(
    ray: Any,
    start: Callable[[Callable[[FineTuner], Any]], Any],
    waiting: Iterator[tuple[LabelJob, Group]],
    seed: int,
    resource: str,
) -> Iterator[TrainedGroup]:
    """Every group as it is done, with a bounded number of them under way."""
    running: dict[Any, tuple[LabelJob, Group]] = {}
    while True:
        # Asked every time: workers come and go.
        workers = int(ray.cluster_resources().get(resource, 0))
        room = GROUPS_PER_WORKER * max(1, workers) - len(running)
        for job, group in islice(waiting, max(0, room)):
            running[start(partial(group.train, seed=seed))] = job, group
        if not running:
            return
        done, _ = ray.wait(list(running), timeout=LOOK_SECONDS)
        for task in done:
            yield *running.pop(task), _answer(ray, task)


def _most_models(tuner: FineTuner) -> tuple[int, list[str]]:
    return tuner.most_models, tuner.notes


def _on_worker(work: bytes, use: Callable[[FineTuner], Any]) -> Any:
    """What `use` makes of the worker's tuner; an InputError names the node."""
    try:
        return use(_tuner(work))
    except InputError as error:
        import ray

        node = f"{platform.node()} ({ray.util.get_node_ip_address()})"
        raise InputError(f"On the node {node}: {error}") from None


@lru_cache(maxsize=1)
def _tuner(work: bytes) -> FineTuner:
    """The tuner of pickled `Work`, kept for as long as the worker gets the same."""
    import ray

    return ray.cloudpickle.loads(work).build()


def _answer(ray: Any, task: Any) -> Any:
    """A task's result; raises InputError for its own InputError and for one that Ray gave up."""
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise InputError(
            f"Ray gave up a group of labels after {RETRIES} retries ({_one_line(error)}); see "
            "whether the nodes have memory enough. What is stored stays, and the same command "
            "goes on from there."
        ) from None


def _pick_device(device: str, resources: Mapping[str, float]) -> str:
    """The workers' device, cpu or cuda; a cluster with these resources must have one."""
    if device == "auto":
        device = "cuda" if resources.get("GPU", 0) >= 1 else "cpu"
    if device not in RESOURCES:
        raise InputError(
            f"device is {device!r}; with a Ray cluster give auto, cpu or cuda: Ray chooses which."
        )
    if resources.get(RESOURCES[device], 0) < 1:
        raise InputError(
            f"device is {device!r}, and no node of the Ray cluster offers a {RESOURCES[device]}; "
            "start one that does, or give another device."
        )
    return device


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """Ray, connected to a cluster until the end of the block."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        # What makes Ray listen on 127.0.0.1 only, as it does on these systems. Read on import.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        options["include_dashboard"] = False
    try:
        import ray
    except ImportError:
        raise InputError("--ray needs Ray; install it: pip install 'ray[default]'") from None
    try:
        if address not in ("auto", "local"):
            host, _, port = address.rpartition(":")
            # Ray itself would try for minutes.
            socket.create_connection((host.strip("[]"), port), CONNECT_SECONDS).close()
        ray.init(address=address, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"The Ray cluster {address!r} cannot be used: {_one_line(error)}; start one with "
            "`ray start --head`, or give local for one of this machine alone."
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).removesuffix(".")
