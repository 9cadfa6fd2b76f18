"""Tuning methods' parameters by LDS on held-out training labels: test labels are never seen.

Every method gets the same number of trials (fewer where its grid is smaller), the first with the
parameters it comes with. tuned.json in a run's folder holds all trials and each method's best.
"""

import copy
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from airrep.attributor import Attributor
from airrep.attributors.ensemble import (
    PERCENTILES,
    EnsembleAttributor,
    fit_weights,
    standardise,
)
from airrep.examples import Example, InputError, fingerprint_examples
from airrep.holdout import (
    LEAST_SUBSETS,
    LEAST_TARGETS,
    check_labels,
    held_out_labels,
    is_little,
)
from airrep.label_store import Labels
from airrep.metrics import bootstrap_lds, lds_per_target
from airrep.provenance import git_revision, installed_versions, write_json_atomic
from airrep.train_settings import TrainSettings
from airrep.tuning_grids import GRIDS, Grid, Params

FILE = "tuned.json"
METHOD_KEYS = {"identity", "budget", "chosen", "trials"}
# These change how fast a method is, or where it writes, not its scores.
WITHOUT_EFFECT = {"device", "batch_size", "batch_tokens", "show_progress", "store"}
# What ends a trial and not the tuning: it does not go with this model or machine, or at all.
CANNOT_RUN = (InputError, ImportError, torch.OutOfMemoryError)


@dataclass(frozen=True)
class Trials:
    """What trials are judged on: held-out targets, labels (targets, subsets), and how."""

    pool: Sequence[Example]
    targets: Sequence[Example]
    labels: Labels
    draws: int
    seed: int

    def inputs(self) -> dict[str, Any]:
        """All that decides a trial's LDS and interval, beside the method."""
        return {
            "pool": fingerprint_examples(self.pool),
            "targets": fingerprint_examples(self.targets),
            "labels": self.labels.fingerprint,
            "held_out_targets": len(self.targets),
            "held_out_subsets": len(self.labels.subsets),
            "draws": self.draws,
            "seed": self.seed,
        }

    def run(
        self, attributor: Attributor, grid: Grid, wanted: Sequence[Params], scratch: Path
    ) -> Iterator[dict[str, Any]]:
        """Tries points of a grid and yields a row for each, in the order that computes least.

        What several points share is computed once and counts in the seconds of the first.
        Features are in the folder `scratch` for as long as points share them; where all do, they
        are in the attributor's own `store`, if it has one, and stay.
        """
        worker = copy.copy(attributor)  # one for all, so that a model is loaded once
        takes = worker.params()
        stays = not grid.features and takes.get("store") is not None
        ordered = sorted(wanted, key=grid.stages)
        by_features = itertools.groupby(ordered, key=lambda params: grid.stages(params)[0])
        for features, some in by_features:
            if "store" in takes and not stays:
                _set(worker, {"store": scratch / _sha256(features)[:12]})
            yield from self._run_some(worker, grid, some)
            shutil.rmtree(scratch, ignore_errors=True)

    def _run_some(
        self, worker: Attributor, grid: Grid, some: Iterable[Params]
    ) -> Iterator[dict[str, Any]]:
        """Tries points that share their features."""
        fitted, scored, scores = "", "", np.empty(0)
        for params in some:
            start = time.perf_counter()
            _, fit, score = grid.stages(params)
            _set(worker, params)
            try:
                if fit != fitted:
                    worker.fit(self.pool)
                if score != scored:
                    scores = worker.score(self.targets)
            except CANNOT_RUN as error:
                fitted = scored = ""
                yield {"params": params, "error": str(error)}
                continue
            fitted, scored = fit, score
            judged = self._judge(worker, scores)
            yield {"params": params, **judged, "seconds": time.perf_counter() - start}

    def weigh(self, ensemble: EnsembleAttributor) -> dict[str, Any]:
        """The one trial of an ensemble: weights fitted to these labels."""
        start = time.perf_counter()
        try:
            ensemble.fit(self.pool)
            given = ensemble.member_subset_scores(self.targets, self.labels.subsets)
        except CANNOT_RUN as error:
            return {"params": {}, "error": str(error)}
        ensemble.weights_ = fit_weights(list(map(standardise, *given)), self.labels.losses)
        judged = self._judge(ensemble, ensemble.score(self.targets))
        params = {"weights": [round(weight, 6) for weight in ensemble.weights_.tolist()]}
        return {"params": params, **judged, "seconds": time.perf_counter() - start}

    def _judge(self, attributor: Attributor, scores: np.ndarray) -> dict[str, Any]:
        """LDS, and its 95% interval over resamples that all trials share."""
        losses = self.labels.losses
        pooled = attributor.score_subsets(self.targets, self.labels.subsets, scores)
        lds, _ = lds_per_target(pooled, losses)
        interval = bootstrap_lds(pooled, losses, self.draws, np.random.default_rng(self.seed))
        return {"lds": float(lds.mean()), "ci95": list(interval)}


def tune(
    folder: str | Path,
    methods: Mapping[str, Attributor],
    pool: Sequence[Example],
    targets: Sequence[Example],
    labels: Labels,
    settings: TrainSettings,
    *,
    sources: Mapping[str, Any] | None = None,
    fixed: Mapping[str, Collection[str]] | None = None,
    trials: int = 12,
    draws: int = 1000,
    seed: int = 0,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Tries `trials` settings of each method and writes tuned.json into the folder; returns it.

    `methods` are unfitted, with what is not to be tuned (models, seeds) as it shall be; the grid
    of a method is in `airrep.tuning_grids`. Targets and labels are those of training; what
    `settings` hold out of them judges (`airrep.holdout`). `sources` say by method what else its
    scores depend on: the fingerprint of its model's weights; `fixed` which parameters stay as they
    are. Trials of the same data, labels and method that are in tuned.json are not run again.
    Prints a warning, before the first trial of a tuned.json, where few labels are held out.
    Raises InputError where nothing is held out, and for fewer than one trial.
    """
    if trials < 1:
        raise InputError(f"trials is {trials}; give at least 1.")
    check_labels(pool, targets, labels, None)
    rows, held = held_out_labels(labels, settings)
    judge = Trials(pool, [targets[row] for row in rows], held, draws, seed)
    file = Path(folder) / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    found = _open(file, judge.inputs())
    if methods and not found["methods"] and is_little(len(held.subsets), len(rows)):
        print(
            f"Parameters are chosen on {len(held.subsets)} held-out subsets and {len(rows)} "
            f"targets, which is little: hold out at least {LEAST_SUBSETS} and {LEAST_TARGETS} "
            "(make more labels, or raise validation_subsets and validation_targets)"
        )
    for name, attributor in methods.items():
        grid = GRIDS.get(name, Grid()).without((fixed or {}).get(name, ()))
        identity = _identity(attributor, grid, (sources or {}).get(name))
        done = _known_trials(found["methods"].get(name), identity)
        method = {"identity": identity, "budget": trials, "chosen": None, "trials": done}
        found["methods"][name] = method
        if isinstance(attributor, EnsembleAttributor):
            done += [] if done else [judge.weigh(attributor)]  # the trial finds its parameters
            wanted = [row["params"] for row in done]
        else:
            wanted = grid.draw(attributor, trials, seed)
        missing = [params for params in wanted if params not in [row["params"] for row in done]]
        # What a stopped tuning left there is of the same pool and method, or not found.
        scratch = file.parent / "tuning" / _sha256(f"{found['inputs']} {identity}")[:12]
        run = judge.run(attributor, grid, missing, scratch)
        shown = show_progress and len(missing) > 0
        for row in tqdm(run, name, len(missing), unit="trial", disable=not shown):
            done.append(row)
            write_json_atomic(file, found)
        method["chosen"] = _best(done, wanted)
        write_json_atomic(file, found)
    shutil.rmtree(file.parent / "tuning", ignore_errors=True)
    return found


def tuned_params(folder: str | Path, method: str, own: Mapping[str, Any] | None = None) -> Params:
    """The constructor's parameters that tuning chose; none for a method that was not tuned, or
    with another value than its `own` of something that stayed as it was (its model, say, or an
    ensemble's members, by name).

    Raises InputError for a tuning that stopped in the middle, unless all that it tunes is `own`,
    and a damaged tuned.json.
    """
    file = Path(folder) / FILE
    found = (_read(file) or {"methods": {}})["methods"].get(method)
    if found is None:
        return {}
    fixed = found["identity"]["params"]
    own = {key: _names(value) if key == "members" else value for key, value in (own or {}).items()}
    if "members" in fixed:
        fixed = fixed | {"members": _names(fixed["members"])}
    if any(fixed[key] != value for key, value in own.items() if key in fixed):
        return {}
    going = [row["params"] for row in found["trials"] if "error" not in row]
    if found["chosen"] is None and any(not params.keys() <= own.keys() for params in going):
        raise InputError(
            f"The tuning of {method} in {file} has stopped in the middle; run `airrep tune` again, "
            f"or delete {file}."
        )
    return dict(found["chosen"] or {})


def check_same(folder: str | Path, method: str, ensemble: Attributor, source: Any) -> None:
    """Raises InputError where an ensemble's weights were fitted to other scores than those of its
    members: with other models (`source`, as `tune` takes it) or parameters."""
    found = (_read(Path(folder) / FILE) or {"methods": {}})["methods"].get(method)
    if found is None:
        return
    now = _identity(ensemble, Grid(), source)
    if any(_scores_of(found["identity"])[key] != value for key, value in _scores_of(now).items()):
        raise InputError(
            f"The weights of {method} in {Path(folder) / FILE} were fitted to other scores than "
            f"its members' now; run `airrep tune --methods {method}` again."
        )


def describe(found: Mapping[str, Any]) -> list[str]:
    """What was chosen, in lines: LDS on the held-out labels, and how many trials it took."""
    about, methods = found["inputs"], found["methods"]
    lines = [
        f"judged on {about['held_out_targets']} held-out targets x {about['held_out_subsets']} "
        "held-out subsets of the training labels"
        + (
            ", which is little"
            if is_little(about["held_out_subsets"], about["held_out_targets"])
            else ""
        )
    ]
    lines += [f"{name}: {_describe_method(method)}" for name, method in methods.items()]
    budgets = sorted({method["budget"] for method in methods.values()})
    if len(budgets) > 1:
        lines.append(
            f"Not all methods had the same budget ({', '.join(map(str, budgets))} trials): tune "
            "them with the same number of trials to compare them."
        )
    return lines


def _describe_method(method: Mapping[str, Any]) -> str:
    trials, chosen = method["trials"], method["chosen"]
    if chosen is None:
        errors = [row["error"] for row in trials if "error" in row]
        if len(errors) < len(trials):
            return f"stopped after {len(trials)} trials; tune it again to go on"
        return f"no trial could run: {errors[0]}"
    best = next(row for row in trials if row["params"] == chosen)
    params = ", ".join(f"{key}={value}" for key, value in chosen.items()) or "nothing to tune"
    failed = sum("error" in row for row in trials)
    count = f"{len(trials)} trials" if len(trials) > 1 else "1 trial"
    return (
        f"LDS {best['lds']:.3f} ({best['ci95'][0]:.3f} to {best['ci95'][1]:.3f}), {params}; "
        f"{count}" + (f", {failed} of them failed" if failed else "")
    )


def _known_trials(method: Mapping[str, Any] | None, identity: Any) -> list[dict[str, Any]]:
    """The trials of the same method that need not run again; those that failed may do better."""
    if method is None or method["identity"] != identity:
        return []
    return [row for row in method["trials"] if "error" not in row]


def _best(trials: Sequence[Mapping[str, Any]], wanted: Sequence[Params]) -> Params | None:
    """The parameters with the highest LDS, the first of equals; None where no trial could run."""
    ran = [row for row in trials if row["params"] in wanted and "error" not in row]
    order = sorted(ran, key=lambda row: (-row["lds"], wanted.index(row["params"])))
    return order[0]["params"] if order else None


def _set(attributor: Attributor, params: Params) -> None:
    for key, value in params.items():
        setattr(attributor, key, value)


def _identity(attributor: Attributor, grid: Grid, source: Any) -> dict[str, Any]:
    """What a method's trials depend on, beside what they try."""
    fixed = {
        key: value
        for key, value in attributor.params().items()
        if key not in grid.values and key not in WITHOUT_EFFECT
    }
    about = {"params": fixed, "source": source, "versions": installed_versions()}
    if isinstance(attributor, EnsembleAttributor):
        about["percentiles"] = PERCENTILES  # that scale what its weights are fitted to
    return json.loads(json.dumps(about, default=_as_json))


def _names(members: Iterable[Any]) -> list[str]:
    """Of members as names, (name, parameters) or {name: parameters}."""
    return [one if isinstance(one, str) else next(iter(one)) for one in members]


def _scores_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What an ensemble's members' scores depend on."""
    members = [
        [name, {key: value for key, value in params.items() if key not in WITHOUT_EFFECT}]
        for name, params in identity["params"]["members"]
    ]
    about = {key: identity.get(key) for key in ("source", "percentiles")}
    return {"members": members, **about}


def _as_json(value: Any) -> Any:
    """An attributor as its name and parameters; anything else as text."""
    return [value.name, value.params()] if isinstance(value, Attributor) else str(value)


def _open(file: Path, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """tuned.json as it is, or a new one where it is of other labels."""
    found = _read(file)
    if found is not None and found["inputs"] == inputs:
        return found
    if found is not None:
        print(f"{file} is of other labels or settings; all trials run again")
    return {"inputs": dict(inputs), "git_revision": git_revision(), "methods": {}}


def _read(file: Path) -> dict[str, Any] | None:
    """tuned.json, None where there is none; raises InputError for one that is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        lacking = [METHOD_KEYS - method.keys() for method in found["methods"].values()]
        if any(lacking) or "inputs" not in found:
            raise ValueError("keys are missing")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{file} cannot be read ({error}); delete it and run `airrep tune` again."
        ) from None
    return found


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
