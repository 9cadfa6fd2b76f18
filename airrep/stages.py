"""The stages of a run after its labels: train, evaluate, report; and all of them at once.

Each stage reads the run's folder and adds to it; one that has nothing left to do says so.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from airrep.config import RunConfig
from airrep.device import pick_device
from airrep.examples import InputError
from airrep.label_stages import make_labels
from airrep.label_store import Labels, LabelStore
from airrep.provenance import git_revision, installed_versions, write_json_atomic
from airrep.run_folder import RunFolder
from airrep.weights import fingerprint_weights, resolve_model


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
    result = train_encoder(
        encoder,
        folder.read_pool(),
        folder.read_targets("train"),
        labels,
        config.train,
        folder.path,
        accelerator,
    )
    if accelerator.is_main_process:
        held_out = (
            "nothing was held out"
            if result.validation_lds is None
            else f"LDS {result.validation_lds:.3f} on held-out training subsets and targets"
        )
        print(f"{folder.encoder}: the encoder of step {result.best_step}; {held_out}")


def evaluate(config: RunConfig, methods: str | None = None) -> dict[str, Any]:
    """Compares the methods (a,b,c; those configured when None) on the test labels.

    Writes results.json and the scores. Results of the same code, labels, models and settings that
    are there already are returned as they are.
    """
    from airrep.attributors import make_attributor
    from airrep.evaluation import evaluate as run

    folder = RunFolder(Path(config.output))
    store = folder.open_labels("test")
    labels, again = store.read(), store.read(repeat=1)
    if not len(labels.subsets):
        raise InputError(f"{store.path} has no labels yet; run `airrep labels` first.")
    names = config.evaluate.methods if methods is None else methods.split(",")
    device = pick_device(config.device)
    arguments: dict[str, dict[str, Any]] = {"random": {"seed": config.seed}}
    if "airrep" in names:
        if not folder.encoder.is_dir():
            raise InputError(f"{folder.encoder} is not there yet; run `airrep train` first.")
        arguments["airrep"] = {"encoder": folder.encoder, "device": device}
    if "embedding" in names:
        arguments["embedding"] = {"encoder": resolve_model(config.encoder), "device": device}
    inputs = _evaluation_inputs(config, names, store, (labels, again), arguments)
    known = _known_results(folder, inputs)
    if known is not None:
        print(f"{folder.results_file} is of these labels and models; delete it to measure again")
        return known
    results, scores = run(
        {name: make_attributor(name, **arguments.get(name, {})) for name in names},
        folder.read_pool(),
        folder.read_targets("test"),
        labels,
        benchmark=config.name or folder.path.name,
        repeat_labels=again if len(again.subsets) > 1 else None,
        draws=config.evaluate.draws,
        seed=config.seed,
        config=dataclasses.asdict(config),
        show_progress=True,
    )
    for name, matrix in scores.items():
        folder.scores_file(name).parent.mkdir(exist_ok=True)
        np.save(folder.scores_file(name), matrix.astype(np.float32))
    results["inputs"] = inputs
    write_json_atomic(folder.results_file, results)
    return results


def _evaluation_inputs(
    config: RunConfig,
    names: list[str],
    store: LabelStore,
    labels: Iterable[Labels],
    arguments: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """All that decides results.json: hashes of the labels and the encoders, settings, code."""
    losses = hashlib.sha256()
    for read in labels:
        losses.update(read.numbers.tobytes() + read.losses.tobytes())
    return {
        "methods": names,
        "draws": config.evaluate.draws,
        "seed": config.seed,
        "device": pick_device(config.device),
        "labels": {**store.fingerprint, "losses": losses.hexdigest()},
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
        results = json.loads(folder.results_file.read_text(encoding="utf-8"))
        ran = [row["name"] for row in results["methods"]]
        same = results["inputs"] == json.loads(json.dumps(inputs))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return results if same and all(folder.scores_file(name).exists() for name in ran) else None


def report(config: RunConfig) -> Path:
    """Writes the run's page from results.json and the scores; returns its path."""
    from airrep.report import write_report

    folder = RunFolder(Path(config.output))
    try:
        results = json.loads(folder.results_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{folder.results_file} is not there yet; run `airrep evaluate` first."
        ) from None
    scores = {
        row["name"]: np.load(folder.scores_file(row["name"]), allow_pickle=False)
        for row in results["methods"]
    }
    write_report(
        folder.page_file,
        results,
        folder.read_pool(),
        folder.read_targets("test"),
        folder.open_labels("test").read(),
        scores,
    )
    return folder.page_file


def run(config: RunConfig) -> Path:
    """All stages, one after the other, in this process; returns the page's path."""
    make_labels(config)
    train(config)
    evaluate(config)
    return report(config)
