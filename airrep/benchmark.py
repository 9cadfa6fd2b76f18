"""Benchmarks as folders: a run's folder whose parts benchmark.json names and vouches for.

Pool, targets and label stores lie where a run has them (`RunFolder`), so a run becomes a
benchmark by being described, and a benchmark is trained and evaluated on as a run is.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from airrep.attributor import POOLINGS, Attributor, subset_scores_of
from airrep.attributors.given import GivenAttributor
from airrep.evaluation import evaluate
from airrep.examples import Example, InputError
from airrep.label_store import Labels, LabelStore, fingerprint_labels
from airrep.provenance import git_revision, hash_files, installed_versions, write_json_atomic
from airrep.run_folder import RunFolder
from airrep.score_files import read_scores, write_scores

FORMAT = 1
FILE = "benchmark.json"
LOSS = "mean cross-entropy over the response's tokens, in nats"
NEAREST = "attention"  # pooling of scores whose method pools in a way of its own
_AGAIN = "describe the folder again with `airrep benchmark make`"


@dataclass(frozen=True)
class Benchmark:
    """What attributors are judged by: the test labels of targets under subsets of a pool.

    `repeat_labels` are those of the same subsets with a second seed, None where fewer than two
    are there; `about` is benchmark.json; `plan` holds all subsets (pool rows), labelled or not.
    """

    folder: RunFolder
    about: dict[str, Any]
    pool: list[Example]
    targets: list[Example]
    plan: list[np.ndarray]
    labels: Labels
    repeat_labels: Labels | None


def describe_benchmark(
    folder: str | Path,
    *,
    name: str | None = None,
    description: str = "",
    source: str = "",
    licence: str = "",
) -> dict[str, Any]:
    """Makes a run's folder a benchmark: writes benchmark.json, and returns it.

    It holds what the labels are of (language model, recipe, seed), how much there is of what, and
    a sha256 of every part. `source` and `licence` are those of the examples. Training targets and
    labels are parts where they are there. Raises InputError for parts that are missing or do not
    belong together.
    """
    run = RunFolder(Path(folder))
    parts = _read_parts(run)
    _check_fit(run, parts)
    store = parts.stores["test"]
    done = len(store.done())
    if done < 2:
        raise InputError(f"{store.path} has {done} labels; a benchmark needs at least two.")
    made_of = store.manifest["about"]
    about = {
        "format": FORMAT,
        "name": name or run.path.resolve().name,
        "description": description,
        "source": source,
        "licence": licence,
        "lm": made_of.get("lm"),
        "recipe": made_of.get("recipe"),
        "seed": made_of.get("seed"),
        "loss": LOSS,
        "pool": len(parts.pool),
        "targets": len(parts.targets["test"]),
        "subsets": len(store.subsets),
        "labels": done,
        "repeat_labels": len(store.done(repeat=1)),
        "targets_with_proponents": sum(
            bool(one.meta.get("proponents")) for one in parts.targets["test"]
        ),
        "flipped_examples": sum(bool(one.meta.get("flipped")) for one in parts.pool),
        "parts": parts.hashes,
        "versions": installed_versions(),
        "git_revision": git_revision(),
    }
    write_json_atomic(run.path / FILE, about)
    return about


def open_benchmark(folder: str | Path) -> Benchmark:
    """Reads a benchmark, after checking every part against benchmark.json.

    Raises InputError when the folder is none, or a part is missing, changed, or of another pool
    or other targets.
    """
    run = RunFolder(Path(folder))
    about = _read_about(run.path / FILE)
    for part in about["parts"]:
        if not (run.path / part).exists():
            raise InputError(f"{run.path / part} is missing; get the whole benchmark again.")
    parts = _read_parts(run)
    for part, promised in about["parts"].items():
        found = parts.hashes.get(part, "nothing")
        if found != promised:
            raise InputError(
                f"{run.path / part} is not what {FILE} describes (sha256 {promised[:12]} there, "
                f"{found[:12]} now); get the benchmark again or, if the change is meant, {_AGAIN}."
            )
    _check_fit(run, parts)
    store = parts.stores["test"]
    again = store.read(repeat=1)
    return Benchmark(
        run,
        about,
        parts.pool,
        parts.targets["test"],
        store.subsets,
        store.read(),
        again if len(again.subsets) > 1 else None,
    )


def evaluate_benchmark(
    folder: str | Path,
    methods: Mapping[str, Attributor],
    *,
    scores: Mapping[str, str | Path] | None = None,
    output: str | Path | None = None,
    draws: int = 1000,
    seed: int = 0,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Judges unfitted methods and files of scores, by name, on a benchmark; returns the results.

    Writes results.json and scores/ into `output`, the benchmark's own folder when None. Files of
    scores (`read_scores`) must be of exactly the benchmark's targets and pool. Raises InputError
    as `open_benchmark`, `read_scores` and `evaluate` do, and for names used twice.
    """
    benchmark = open_benchmark(folder)
    pool, targets = benchmark.pool, benchmark.targets
    files = scores or {}
    results, found = evaluate(
        with_given(methods, files, pool, targets, benchmark.plan),
        pool,
        targets,
        benchmark.labels,
        benchmark=benchmark.about["name"],
        repeat_labels=benchmark.repeat_labels,
        draws=draws,
        seed=seed,
        config=benchmark.about,
        show_progress=show_progress,
    )
    results["inputs"] = {
        "benchmark": benchmark.about["parts"],
        "scores": {name: hash_files([Path(path)]) for name, path in files.items()},
    }
    run = benchmark.folder if output is None else RunFolder(Path(output))
    write_results(run, results, found, pool, targets)
    return results


def with_given(
    methods: Mapping[str, Attributor],
    files: Mapping[str, str | Path],
    pool: Sequence[Example],
    targets: Sequence[Example],
    plan: Sequence[np.ndarray],
) -> dict[str, Attributor]:
    """The methods, and one for every file of scores, by name; says which files have no ids.

    `plan` holds the subsets that columns of subset scores stand for. Raises InputError as
    `read_scores` does, for a file that is not of exactly this pool and these targets, and for
    names that come twice or cannot name a file.
    """
    every = dict(methods)
    for name, path in files.items():
        if name in every:
            raise InputError(f"Two methods are called {name!r}; give the scores another name.")
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise InputError(
                f"{name!r} cannot name a file of scores; use letters, digits, '-', '_' and '.'."
            )
        given = read_scores(path)
        given.check_exact(targets, pool)
        if not given.has_ids:
            print(f"{path} has no ids: its rows and columns are taken in the benchmark's order")
        every[name] = GivenAttributor(given, given.pooling or "sum", plan)
    return every


def write_results(
    run: RunFolder,
    results: Mapping[str, Any],
    scores: Mapping[str, np.ndarray],
    pool: Sequence[Example],
    targets: Sequence[Example],
) -> None:
    """Writes what `evaluate` returned: results.json, and scores that `read_scores` reads."""
    # Results go first and come back last: they never stand beside scores of another evaluation.
    run.results_file.unlink(missing_ok=True)
    for row in results["methods"]:
        name, pooling = row["name"], row["pooling"]
        if pooling not in POOLINGS:
            own, pooling = subset_scores_of(name), NEAREST
            write_scores(
                run.scores_file(own), None, targets, pool, subset_scores=scores[own], method=name
            )
        file = run.scores_file(name)
        write_scores(file, scores[name], targets, pool, method=name, pooling=pooling)
    write_json_atomic(run.results_file, results)


@dataclass(frozen=True)
class _Parts:
    """What lies in a folder: the pool, targets and labels by split, and sha256 by file name."""

    pool: list[Example]
    targets: dict[str, list[Example]]
    stores: dict[str, LabelStore]
    hashes: dict[str, str]


def _read_parts(run: RunFolder) -> _Parts:
    """Test targets and labels must be there; those for training count only together."""
    splits = ["test"]
    if run.targets_file("train").is_file() and run.labels("train").is_dir():
        splits.append("train")
    files = [run.pool_file, *map(run.targets_file, splits)]
    pool = run.read_pool()
    targets = {split: run.read_targets(split) for split in splits}
    stores = {split: run.open_labels(split) for split in splits}
    hashes = {file.name: hash_files([file]) for file in files}
    hashes |= {
        store.path.name: fingerprint_labels(store, map(store.read, (0, 1)))
        for store in stores.values()
    }
    return _Parts(pool, targets, stores, hashes)


def _check_fit(run: RunFolder, parts: _Parts) -> None:
    """Raises InputError unless the labels are of this pool and these targets."""
    for split, store in parts.stores.items():
        file = run.foreign_file(split, store, parts.pool, parts.targets[split])
        if file is not None:
            raise InputError(
                f"{store.path} holds labels of other examples than those in {file}; put "
                "labels and examples of one run together."
            )


def _read_about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{path.parent} is not a benchmark (it has no {FILE}); make a run's folder one with "
            "`airrep benchmark make`."
        ) from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); {_AGAIN}.") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else None
        raise InputError(f"{path} has format {found!r}, but this version reads {FORMAT}.")
    if not isinstance(about.get("parts"), dict) or not isinstance(about.get("name"), str):
        raise InputError(f"{path} names no parts, or has no name; {_AGAIN}.")
    return about
