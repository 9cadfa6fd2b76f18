"""The stages of a run after its labels: train, evaluate, report; and all of them at once.

Each stage reads the run's folder and adds to it; one that has nothing left to do says so.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from airrep.config import RunConfig, check_methods
from airrep.device import pick_device
from airrep.examples import Example, InputError
from airrep.known_runs import KnownRuns
from airrep.label_stages import make_labels, warm_up
from airrep.label_store import Labels, LabelStore, fingerprint_labels
from airrep.provenance import git_revision, hash_files, installed_versions, is_dirty
from airrep.run_costs import preparing_seconds
from airrep.run_folder import RunFolder
from airrep.run_methods import (
    ENSEMBLE,
    check_trained,
    fingerprint_models,
    make_methods,
    members_first,
    method_arguments,
    needs_warm_up,
    teacher_scores,
)
from airrep.run_results import known_results, read_results, read_scores, score_names
from airrep.train_settings import DistilSettings
from airrep.verdict import describe
from airrep.weights import fingerprint_weights, resolve_model

if TYPE_CHECKING:
    from accelerate import Accelerator

    from airrep.encoder import AirRepEncoder


def train(config: RunConfig) -> None:
    """Trains the encoder on the training labels that exist."""
    from accelerate import Accelerator

    from airrep.distillation import taught_settings
    from airrep.encoder import AirRepEncoder
    from airrep.trainer import train_encoder

    folder = RunFolder(Path(config.output))
    store = folder.open_labels("train")
    labels = store.read()
    accelerator = Accelerator(cpu=pick_device(config.device) == "cpu")
    others = []
    for path in config.more_labels:
        other, read = _labels_of(path, store)
        others.append(read)
        if accelerator.is_main_process:
            _say_missing(other, read)
    if accelerator.is_main_process:
        _say_missing(store, labels)
    encoder = AirRepEncoder.from_base(resolve_model(config.encoder))
    pool, targets = folder.read_labelled("train", store)
    settings = config.train
    if config.distil is not None:
        encoder = _distil(config, config.distil, encoder, pool, targets, labels, accelerator)
        settings = taught_settings(settings)
    result = train_encoder(
        encoder, pool, targets, labels, settings, folder.path, accelerator, others=others
    )
    if accelerator.is_main_process:
        held_out = (
            "nothing was held out"
            if result.validation_lds is None
            else f"LDS {result.validation_lds:.3f} on held-out training subsets and targets"
        )
        print(f"{folder.encoder}: the encoder of step {result.best_step}; {held_out}")


def _labels_of(path: str, own: LabelStore) -> tuple[LabelStore, Labels]:
    """Another run's training labels; InputError unless they are of the same examples."""
    store = RunFolder(Path(path)).open_labels("train")
    for key, what in (("examples", "pool"), ("targets", "training targets")):
        if store.fingerprint.get(key) != own.fingerprint.get(key):
            raise InputError(
                f"The training labels in {store.path} are of another {what} than those in "
                f"{own.path}; more_labels takes runs of the same data."
            )
    labels = store.read()
    if not labels.subsets:
        raise InputError(f"{store.path} holds no labels yet; make them with `airrep labels`.")
    return store, labels


def _say_missing(store: LabelStore, labels: Labels) -> None:
    missing = len(store.subsets) - len(labels.subsets)
    if missing:
        where = f"training labels in {store.path}"
        print(f"{missing} of {len(store.subsets)} {where} are missing; training without")


def _distil(
    config: RunConfig,
    distil: DistilSettings,
    encoder: AirRepEncoder,
    pool: list[Example],
    targets: list[Example],
    labels: Labels,
    accelerator: Accelerator,
) -> AirRepEncoder:
    """The encoder after learning the teacher's scores."""
    from airrep.attributors import available
    from airrep.distillation import Lesson, distil_encoder, read_teacher_scores

    is_method = distil.teacher in available()
    own = distil if is_method else dataclasses.replace(distil, pool_targets=0)
    lesson = Lesson.choose(pool, targets, labels, config.train, own)
    if is_method:
        with accelerator.main_process_first():  # the others read what it has stored
            _warm_up(config, [distil.teacher])
            scores = teacher_scores(config, distil.teacher, pool, lesson)
    elif Path(distil.teacher).exists():
        given = read_teacher_scores(distil.teacher, pool, targets)
        scores = given[np.ix_(lesson.target_rows, lesson.pool_rows)]
    else:
        check_methods([distil.teacher])  # says which names are near
    result = distil_encoder(
        encoder,
        lesson,
        scores,
        config.train,
        distil,
        RunFolder(Path(config.output)).path / "distilled",
        accelerator,
    )
    if accelerator.is_main_process and result.validation_lds is not None:
        print(
            f"distilled from {distil.teacher}: rank correlation {result.validation_lds:.3f} with "
            "it on held-out subsets and targets"
        )
    return result.encoder


def evaluate(config: RunConfig, methods: str | None = None) -> dict[str, Any]:
    """Compares methods (a,b,c; those configured when None) and the configured files of scores on
    the test labels.

    Writes results.json and the scores. Results of the same code, labels, models and settings that
    are there already are returned as they are, and methods that a stopped or an earlier evaluation
    ran with the same are not run again.
    """
    from airrep.benchmark import with_given, write_results
    from airrep.evaluation import evaluate as run

    folder = RunFolder(Path(config.output))
    store = folder.open_labels("test")
    pool, targets = folder.read_labelled("test", store)
    labels, again = store.read(), store.read(repeat=1)
    if not len(labels.subsets):
        raise InputError(f"{store.path} has no labels yet; run `airrep labels` first.")
    names = config.evaluate.methods if methods is None else methods.split(",")
    check_methods(names)
    _warm_up(config, names)
    arguments = method_arguments(config, names)
    attributors = with_given(
        make_methods(arguments),
        config.evaluate.scores,
        pool,
        targets,
        store.subsets,
    )
    preparing = preparing_seconds(folder, config.more_labels, arguments)
    inputs = _evaluation_inputs(config, names, store, (labels, again), arguments)
    inputs["prepare_seconds"] = preparing
    known = known_results(folder, inputs)
    if known is not None:
        print(
            f"{folder.results_file} is of these labels and models; delete it and {folder.scores} "
            "to measure again"
        )
        return known
    runs = _known_runs(folder, names, inputs)
    results, scores = run(
        attributors,
        pool,
        targets,
        labels,
        benchmark=config.name or folder.path.name,
        repeat_labels=again if len(again.subsets) > 1 else None,
        draws=config.evaluate.draws,
        seed=config.seed,
        config=dataclasses.asdict(config),
        prepare_seconds=preparing,
        known=runs,
        show_progress=True,
    )
    results["inputs"] = inputs
    write_results(folder, results, scores, pool, targets)
    if runs is not None:
        runs.settle()
    print(*describe(results), sep="\n")
    return results


def tune(config: RunConfig, methods: str | None = None, trials: int = 12) -> bool:
    """Chooses the parameters of methods (a,b,c; those configured that have any when None) on
    held-out training labels, `trials` settings each; `evaluate` then uses them.

    Returns whether each of the methods had a trial that could run.
    """
    from airrep.tuning import describe as describe_tuning
    from airrep.tuning import tune as run
    from airrep.tuning_grids import GRIDS

    folder = RunFolder(Path(config.output))
    store = folder.open_labels("train")
    pool, targets = folder.read_labelled("train", store)
    if methods is None:
        names = [name for name in config.evaluate.methods if name in (*GRIDS, ENSEMBLE)]
    else:
        names = methods.split(",")
    if not names:
        raise InputError("No method of evaluate.methods can be tuned; name some with --methods.")
    check_methods(names)
    _warm_up(config, names)
    found: dict[str, Any] = {}
    for some in members_first(config, names):
        arguments = method_arguments(config, some, tuned=False)
        found = run(
            folder.path,
            make_methods(arguments),
            pool,
            targets,
            store.read(),
            config.train,
            sources={name: fingerprint_models({name: own}) for name, own in arguments.items()},
            fixed={name: _fixed(config, name, own) for name, own in arguments.items()},
            trials=trials,
            draws=config.evaluate.draws,
            seed=config.seed,
        )
    print(*describe_tuning(found), sep="\n")
    return all(found["methods"][name]["chosen"] is not None for name in names)


def fit(config: RunConfig, methods: str) -> None:
    """Fits methods (a,b,c) to the run's pool and saves each in its folder. Prints where.

    What `tune` chose is taken, as by `evaluate`.
    """
    folder = RunFolder(Path(config.output))
    names = methods.split(",")
    check_methods(names)
    pool = folder.read_pool()
    _warm_up(config, names)
    for name, method in make_methods(method_arguments(config, names)).items():
        method.fit(pool).save(folder.method(name))
        print(folder.method(name))


def _fixed(config: RunConfig, name: str, arguments: Mapping[str, Any]) -> set[str]:
    """What is not tuned: what the configuration says, and layers where only some have trained."""
    fixed = set(config.evaluate.params.get(name, {}))
    return fixed | {"layers"} if arguments.get("layers") is not None else fixed


def _warm_up(config: RunConfig, names: list[str]) -> None:
    """Trains the warm-up model, if one of the methods asks it and there is none."""
    check_trained(config, names)  # before, not after hours
    if needs_warm_up(config, names) and not RunFolder(Path(config.output)).warm_up.exists():
        warm_up(config)


def learning_curve(config: RunConfig, counts: str | None = None, seeds: int = 3) -> None:
    """Trains encoders on parts of the training labels, judged on held-out training labels.

    `counts` are numbers of labels, a,b,c. Writes learning_curve.json into the run's folder.
    """
    from accelerate import Accelerator

    from airrep import learning_curve as curve
    from airrep.encoder import sharing_means

    folder = RunFolder(Path(config.output))
    store = folder.open_labels("train")
    labels = store.read()
    data = curve.split_for_curve(*folder.read_labelled("train", store), labels, config.train)
    base = resolve_model(config.encoder)
    accelerator = Accelerator(cpu=pick_device(config.device) == "cpu")
    if config.more_labels and accelerator.is_main_process:
        print("The curve is of the run's own labels: more_labels are left out.")
    found = curve.learning_curve(
        folder.path / curve.FILE,
        sharing_means(base),
        data,
        config.train,
        curve.pick_counts(data, config.train, counts),
        seeds,
        config.evaluate.draws,
        {
            "labels": fingerprint_labels(store, [labels]),
            "encoder": fingerprint_weights(base),
            "train": config.train.deciding(),
            "draws": config.evaluate.draws,
        },
        accelerator,
    )
    if accelerator.is_main_process:
        print(*curve.describe_curve(found), sep="\n")


def _evaluation_inputs(
    config: RunConfig,
    names: list[str],
    store: LabelStore,
    labels: Iterable[Labels],
    arguments: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """All that decides results.json: hashes of the labels and the encoders, settings, code."""
    folder = RunFolder(Path(config.output))
    return {
        "methods": names,
        "draws": config.evaluate.draws,
        "seed": config.seed,
        "device": pick_device(config.device),
        # Of the files: tasks and proponents count too.
        "examples": hash_files([folder.pool_file, folder.targets_file("test")]),
        "labels": fingerprint_labels(store, labels),
        "scores": {name: hash_files([Path(path)]) for name, path in config.evaluate.scores.items()},
        "arguments": json.loads(json.dumps(arguments, default=str)),
        "models": fingerprint_models(arguments),
        "versions": installed_versions(),
        "git_revision": git_revision(),
    }


def _known_runs(
    folder: RunFolder, names: Sequence[str], inputs: Mapping[str, Any]
) -> KnownRuns | None:
    """Where methods' runs are kept; None where the revision does not say which code runs."""
    if is_dirty(inputs["git_revision"]):
        return None
    shared = {
        key: inputs[key] for key in ("device", "examples", "labels", "versions", "git_revision")
    }
    own = {
        name: {
            **shared,
            "arguments": inputs["arguments"][name],
            "models": {
                key: digest
                for key, digest in inputs["models"].items()
                if key.partition("/")[0] == name
            },
        }
        for name in names
    }
    return KnownRuns(folder, json.loads(json.dumps(own)))


def report(config: RunConfig) -> Path:
    """Writes the run's page from results.json and the scores; returns its path."""
    from airrep.findings import further_findings
    from airrep.report import write_report

    folder = RunFolder(Path(config.output))
    results = read_results(folder)
    if results is None:
        raise InputError(f"{folder.results_file} is not there yet; run `airrep evaluate` first.")
    scores = {name: read_scores(folder, name) for name in score_names(results)}
    store = folder.open_labels("test")
    pool, targets = folder.read_labelled("test", store)
    shown = results | further_findings(folder)
    write_report(folder.page_file, shown, pool, targets, store.read(), scores)
    return folder.page_file


def run(config: RunConfig) -> Path:
    """All stages, one after the other, in this process; returns the page's path."""
    resolve_model(config.encoder)  # before the slow stages, not after them
    for path in config.more_labels:
        RunFolder(Path(path)).open_labels("train")
    make_labels(config)
    train(config)
    evaluate(config)
    return report(config)
