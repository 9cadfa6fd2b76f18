"""The stages of a run after its labels: train, evaluate, report; and all of them at once.

Each stage reads the run's folder and adds to it; one that has nothing left to do says so.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from airrep.config import RunConfig, check_methods
from airrep.device import pick_device
from airrep.examples import InputError
from airrep.label_stages import make_labels
from airrep.label_store import Labels, LabelStore, fingerprint_labels
from airrep.provenance import git_revision, hash_files, installed_versions
from airrep.run_folder import RunFolder
from airrep.weights import fingerprint_weights, resolve_model

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
    encoder = AirRepEncoder.from_base(resolve_model(config.encoder))
    pool, targets = folder.read_labelled("train", store)
    result = train_encoder(encoder, pool, targets, labels, config.train, folder.path, accelerator)
    if accelerator.is_main_process:
        held_out = (
            "nothing was held out"
            if result.validation_lds is None
            else f"LDS {result.validation_lds:.3f} on held-out training subsets and targets"
        )
        print(f"{folder.encoder}: the encoder of step {result.best_step}; {held_out}")


def evaluate(config: RunConfig, methods: str | None = None) -> dict[str, Any]:
    """Compares methods (a,b,c; those configured when None) and the configured files of scores on
    the test labels.

    Writes results.json and the scores. Results of the same code, labels, models and settings that
    are there already are returned as they are.
    """
    from airrep.attributors import make_attributor
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
    device = pick_device(config.device)
    arguments: dict[str, dict[str, Any]] = {"random": {"seed": config.seed}}
    if "airrep" in names:
        if not folder.encoder.is_dir():
            raise InputError(f"{folder.encoder} is not there yet; run `airrep train` first.")
        arguments["airrep"] = {"encoder": folder.encoder, "device": device}
    if "embedding" in names:
        arguments["embedding"] = {"encoder": resolve_model(config.encoder), "device": device}
    attributors = with_given(
        {name: make_attributor(name, **arguments.get(name, {})) for name in names},
        config.evaluate.scores,
        pool,
        targets,
        store.subsets,
    )
    inputs = _evaluation_inputs(config, names, store, (labels, again), arguments)
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
        show_progress=True,
    )
    results["inputs"] = inputs
    write_results(folder, results, scores, pool, targets)
    return results


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
        "encoders": {
            name: fingerprint_weights(options["encoder"])
            for name, options in arguments.items()
            if "encoder" in options
        },
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
    whole = all(folder.scores_file(row["name"]).exists() for row in results["methods"])
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
    from airrep.report import write_report

    folder = RunFolder(Path(config.output))
    results = _read_results(folder)
    if results is None:
        raise InputError(f"{folder.results_file} is not there yet; run `airrep evaluate` first.")
    scores = {row["name"]: _read_scores(folder, row["name"]) for row in results["methods"]}
    store = folder.open_labels("test")
    pool, targets = folder.read_labelled("test", store)
    write_report(folder.page_file, results, pool, targets, store.read(), scores)
    return folder.page_file


def run(config: RunConfig) -> Path:
    """All stages, one after the other, in this process; returns the page's path."""
    resolve_model(config.encoder)  # before the slow stages, not after them
    make_labels(config)
    train(config)
    evaluate(config)
    return report(config)
