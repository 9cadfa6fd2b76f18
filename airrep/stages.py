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

from airrep.attributor import POOLINGS, subset_scores_of
from airrep.config import DistilConfig, RunConfig, check_methods
from airrep.device import pick_device
from airrep.examples import Example, InputError
from airrep.label_stages import make_labels, warm_up
from airrep.label_store import Labels, LabelStore, fingerprint_labels
from airrep.provenance import git_revision, hash_files, installed_versions
from airrep.run_folder import RunFolder
from airrep.run_methods import (
    ENSEMBLE,
    check_trained,
    fingerprint_models,
    make_methods,
    method_arguments,
    needs_warm_up,
    teacher_scores,
)
from airrep.verdict import describe
from airrep.weights import fingerprint_weights, resolve_model

if TYPE_CHECKING:
    from accelerate import Accelerator

    from airrep.encoder import AirRepEncoder

# What a page is made from.
RESULT_KEYS = {"methods", "benchmark", "targets", "subsets", "noise_ceiling", "differences"}
ROW_KEYS = {"name", "lds", "ci95", "pooling", "fit_seconds"}


def train(config: RunConfig) -> None:
    """Trains the encoder on the training labels that exist."""
    from accelerate import Accelerator

    from airrep.encoder import AirRepEncoder
    from airrep.trainer import train_encoder

    folder = RunFolder(Path(config.output))
    store = folder.open_labels("train")
    labels = store.read()
    missing = len(store.subsets) - len(labels.subsets)
    accelerator = Accelerator(cpu=pick_device(config.device) == "cpu")
    if missing and accelerator.is_main_process:
        print(f"{missing} of {len(store.subsets)} training labels are missing; training without")
    others = [_labels_of(path, store) for path in config.more_labels]
    encoder = AirRepEncoder.from_base(resolve_model(config.encoder))
    pool, targets = folder.read_labelled("train", store)
    if config.distil is not None:
        encoder = _distil(config, config.distil, encoder, pool, targets, accelerator)
    result = train_encoder(
        encoder, pool, targets, labels, config.train, folder.path, accelerator, others=others
    )
    if accelerator.is_main_process:
        held_out = (
            "nothing was held out"
            if result.validation_lds is None
            else f"LDS {result.validation_lds:.3f} on held-out training subsets and targets"
        )
        print(f"{folder.encoder}: the encoder of step {result.best_step}; {held_out}")


def _labels_of(path: str, own: LabelStore) -> Labels:
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
    return labels


def _distil(
    config: RunConfig,
    distil: DistilConfig,
    encoder: AirRepEncoder,
    pool: list[Example],
    targets: list[Example],
    accelerator: Accelerator,
) -> AirRepEncoder:
    """The encoder after learning the teacher's scores of the training targets."""
    from airrep.attributors import available
    from airrep.distillation import distil_encoder, read_teacher_scores

    if distil.teacher in available():
        with accelerator.main_process_first():  # the others read what it has stored
            _warm_up(config, [distil.teacher])
            scores = teacher_scores(config, distil.teacher, pool, targets)
    elif Path(distil.teacher).exists():
        scores = read_teacher_scores(distil.teacher, pool, targets)
    else:
        check_methods([distil.teacher])  # says which names are near
    settings = dataclasses.replace(config.train, max_steps=distil.steps)
    output = RunFolder(Path(config.output)).path / "distilled"
    result = distil_encoder(encoder, pool, targets, scores, settings, output, accelerator)
    if accelerator.is_main_process and result.validation_lds is not None:
        print(
            f"distilled from {distil.teacher}: rank correlation {result.validation_lds:.3f} with "
            "it on held-out targets"
        )
    return result.encoder


def evaluate(config: RunConfig, methods: str | None = None) -> dict[str, Any]:
    """Compares methods (a,b,c; those configured when None) and the configured files of scores on
    the test labels.

    Writes results.json and the scores. Results of the same code, labels, models and settings that
    are there already are returned as they are.
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
    preparing = _preparing_seconds(config, arguments)
    inputs = _evaluation_inputs(config, names, store, (labels, again), arguments)
    inputs["prepare_seconds"] = preparing
    known = _known_results(folder, inputs)
    if known is not None:
        print(f"{folder.results_file} is of these labels and models; delete it to measure again")
        return known
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
        show_progress=True,
    )
    results["inputs"] = inputs
    write_results(folder, results, scores, pool, targets)
    print(*describe(results), sep="\n")
    return results


def tune(config: RunConfig, methods: str | None = None, trials: int = 12) -> None:
    """Chooses the parameters of methods (a,b,c; those configured that have any when None) on
    held-out training labels, `trials` settings each; `evaluate` then uses them.
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
    check_methods(names)
    _warm_up(config, names)
    found: dict[str, Any] = {}
    # An ensemble's members are tuned before it.
    for some in ([n for n in names if n != ENSEMBLE], [n for n in names if n == ENSEMBLE]):
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


def _fixed(config: RunConfig, name: str, arguments: Mapping[str, Any]) -> set[str]:
    """What is not tuned: what the configuration says, and layers where only some have trained."""
    fixed = set(config.evaluate.params.get(name, {}))
    return fixed | {"layers"} if arguments.get("layers") is not None else fixed


def _warm_up(config: RunConfig, names: list[str]) -> None:
    """Trains the warm-up model, if one of the methods asks it and there is none."""
    check_trained(config, names)  # before, not after hours
    if needs_warm_up(config, names) and not RunFolder(Path(config.output)).warm_up.exists():
        warm_up(config)


def _preparing_seconds(
    config: RunConfig, arguments: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """What came before a method is fitted, by its name: labels and training behind the run's
    encoder; the warm-up model. An ensemble has what its members have.

    Without those for which it is not known: labels that were imported, or made before it was
    recorded.
    """
    folder = RunFolder(Path(config.output))
    warm_up_model = folder.warm_up / "final"
    warming = _seconds_in(folder.warm_up / "warm_up.json")
    found: dict[str, float] = {}
    for name, own in arguments.items():
        parts = dict(own["members"]) if name == ENSEMBLE else {name: own}
        spent = [_learning_seconds(folder, config.more_labels)] if "airrep" in parts else []
        if any(part.get("lm") == warm_up_model for part in parts.values()):
            spent.append(warming)
        known = [seconds for seconds in spent if seconds is not None]
        if known and len(known) == len(spent):
            found[name] = sum(known)
    return found


def _learning_seconds(folder: RunFolder, others: Sequence[str]) -> float | None:
    """Of the training labels, other runs' too, and of training on them and a teacher's scores."""
    parts = [_seconds_in(folder.path / "train.json")]
    distilled = folder.path / "distilled"
    if distilled.is_dir():
        parts += [_seconds_in(distilled / name) for name in ("teacher.json", "train.json")]
    for run in (folder, *(RunFolder(Path(path)) for path in others)):
        if not run.labels("train").is_dir():
            return None
        store = run.open_labels("train")
        labels = store.seconds()
        parts.append(sum(labels.values()) if store.done() <= labels.keys() else None)
    known = [seconds for seconds in parts if seconds is not None]
    return sum(known) if len(known) == len(parts) else None


def _seconds_in(file: Path) -> float | None:
    """The key `seconds` of a JSON file; None where there is none."""
    try:
        return float(json.loads(file.read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def learning_curve(config: RunConfig, counts: str | None = None, seeds: int = 3) -> None:
    """Trains encoders on parts of the training labels, judged on held-out training labels.

    `counts` are numbers of labels, a,b,c. Writes learning_curve.json into the run's folder.
    """
    from accelerate import Accelerator

    from airrep import learning_curve as curve
    from airrep.encoder import AirRepEncoder

    folder = RunFolder(Path(config.output))
    store = folder.open_labels("train")
    labels = store.read()
    data = curve.split_for_curve(*folder.read_labelled("train", store), labels, config.train)
    base = resolve_model(config.encoder)
    accelerator = Accelerator(cpu=pick_device(config.device) == "cpu")
    found = curve.learning_curve(
        folder.path / curve.FILE,
        lambda: AirRepEncoder.from_base(base),
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


def _known_results(folder: RunFolder, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """results.json of these very inputs, with all its scores; None when there are none."""
    if str(inputs["git_revision"]).endswith("-dirty"):
        return None  # the revision does not say which code that is
    try:
        results = _read_results(folder)
    except InputError:
        return None
    if results is None or results.get("inputs") != json.loads(json.dumps(inputs)):
        return None
    whole = all(folder.scores_file(name).exists() for name in _score_names(results))
    return results if whole else None


def _read_results(folder: RunFolder) -> dict[str, Any] | None:
    """results.json, None when there is none; raises InputError when it is not one."""
    try:
        results = json.loads(folder.results_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise _damaged(folder.results_file, str(error)) from None
    rows = results.get("methods") if isinstance(results, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise _damaged(folder.results_file, "it has no list of methods")
    if not results.keys() >= RESULT_KEYS or not all(row.keys() >= ROW_KEYS for row in rows):
        raise _damaged(folder.results_file, "keys are missing")
    return results


def _score_names(results: Mapping[str, Any]) -> list[str]:
    """The names of all scores that `evaluate` wrote with these results."""
    rows = results["methods"]
    own = [row["name"] for row in rows if row["pooling"] not in POOLINGS]
    return [*(row["name"] for row in rows), *map(subset_scores_of, own)]


def _read_scores(folder: RunFolder, method: str) -> np.ndarray:
    path = folder.scores_file(method)
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, str(error)) from None


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path} cannot be read ({reason}); delete results.json and run `airrep evaluate` again."
    )


def report(config: RunConfig) -> Path:
    """Writes the run's page from results.json and the scores; returns its path."""
    from airrep.findings import further_findings
    from airrep.report import write_report

    folder = RunFolder(Path(config.output))
    results = _read_results(folder)
    if results is None:
        raise InputError(f"{folder.results_file} is not there yet; run `airrep evaluate` first.")
    scores = {name: _read_scores(folder, name) for name in _score_names(results)}
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
