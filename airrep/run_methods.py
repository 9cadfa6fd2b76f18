"""The attribution methods of a run, each with what the run's configuration and folder give it."""

import inspect
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from airrep.attributor import Attributor
from airrep.attributors import check_params, make_attributor, method_class
from airrep.config import RunConfig, check_methods
from airrep.device import pick_device
from airrep.examples import Example, InputError, fingerprint_examples
from airrep.holdout import TrainingLabels
from airrep.provenance import write_bytes_atomic, write_json_atomic
from airrep.run_folder import RunFolder
from airrep.tuning import check_same, tuned_params
from airrep.weights import fingerprint_weights, resolve_model

if TYPE_CHECKING:
    from airrep.distillation import Lesson

MODELS = ("encoder", "lm")  # parameters that name one model
ENSEMBLE = "ensemble"


def needs_warm_up(config: RunConfig, names: Sequence[str]) -> bool:
    """Whether one of the methods asks the run's warm-up model."""
    every = _with_members(config, names)
    return any("lm" in _takes(name) and "lm" not in _own(own, name) for name, own in every)


def method_arguments(
    config: RunConfig, names: Sequence[str], tuned: bool = True
) -> dict[str, dict[str, Any]]:
    """Each method's arguments: what it takes of the run's; over it what `airrep tune` chose
    (unless `tuned` is false); over both `evaluate.params`.

    Members of an ensemble and of kernels are names there, and get the arguments that they have by
    themselves; {name: {parameter: value}} changes some.
    Raises InputError where a model is needed that is not there yet, and for an ensemble whose
    weights were fitted to other scores.
    """
    folder = Path(config.output)
    checkpoints = cache(lambda: _checkpoints(config))
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        own = _own(config, name)
        given = {
            key: value()
            for key, value in _from_run(config, name, checkpoints).items()
            if key in _takes(name) and key not in _settled(own)
        }
        chosen = tuned_params(folder, name, own) if tuned else {}
        found[name] = given | chosen | own
        if "members" in _takes(name):
            found[name]["members"] = [
                (member, method_arguments(own_config, [member])[member])
                for member, own_config in _members(config, name)
            ]
        # Weights that were fitted to other scores would be wrong.
        if name == ENSEMBLE and chosen and "weights" not in own:
            made = make_methods({name: found[name]})[name]
            check_same(folder, name, made, fingerprint_models({name: found[name]}))
    return found


def check_methods_params(config: RunConfig) -> None:
    """Raises InputError for parameters in `evaluate.params` that a method does not take, and for
    members that cannot be; opens nothing."""
    for name, own in _with_members(config, list(config.evaluate.params)):
        check_params(name, _own(own, name))


def check_trained(config: RunConfig, names: Sequence[str]) -> None:
    """Raises InputError when a method needs the run's encoder and there is none."""
    if "airrep" in [name for name, _ in _with_members(config, names)]:
        _trained(config)


def make_methods(arguments: Mapping[str, Mapping[str, Any]]) -> dict[str, Attributor]:
    """The unfitted attributors of these arguments."""
    return {name: make_attributor(name, **own) for name, own in arguments.items()}


def fingerprint_models(arguments: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What `fingerprint_weights` says of the model of each method that has one."""
    found: dict[str, str] = {}
    for name, own in arguments.items():
        for number, (member, given) in enumerate(own.get("members", [])):
            for key, digest in fingerprint_models({member: given}).items():
                # The same method may be a member twice, asking two models.
                same = found.get(f"{name}/{key}", digest) == digest
                found[f"{name}/{key}" if same else f"{name}/{number}/{key}"] = digest
        for key in MODELS:
            if own.get(key) is not None:
                found[name] = fingerprint_weights(resolve_model(str(own[key])))
    return found


def teacher_scores(
    config: RunConfig, name: str, pool: Sequence[Example], lesson: "Lesson"
) -> np.ndarray:
    """A method's scores (targets, pool) of a lesson, kept in the run's folder for as long as they
    are its; `pool` is the whole pool, which the method is fitted to."""
    folder = Path(config.output) / "distilled"
    arguments = method_arguments(config, [name])
    inputs = {
        "arguments": arguments,
        "models": fingerprint_models(arguments),
        "pool": fingerprint_examples(pool),
        "lesson": [fingerprint_examples(some) for some in (lesson.targets, lesson.pool)],
    }
    inputs = json.loads(json.dumps(inputs, default=str))
    file, about = folder / "teacher.npy", folder / "teacher.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # not there, or damaged
        if json.loads(about.read_text("utf-8"))["inputs"] == inputs:
            return np.load(file, allow_pickle=False)
    started = time.perf_counter()
    scores = lesson.scores(make_methods(arguments)[name].fit(pool))
    folder.mkdir(parents=True, exist_ok=True)
    about.unlink(missing_ok=True)
    content = io.BytesIO()
    np.save(content, scores)
    write_bytes_atomic(file, content.getvalue())
    seconds = time.perf_counter() - started
    write_json_atomic(about, {"inputs": inputs, "seconds": seconds})
    return scores


def _from_run(
    config: RunConfig, name: str, checkpoints: Callable[[], Sequence[Any]]
) -> dict[str, Callable[[], Any]]:
    """What gives an argument of that name; called for arguments that are taken."""
    recipe = config.recipe
    return {
        "seed": lambda: config.seed,
        "labels": lambda: _training_labels(config),
        "device": lambda: pick_device(config.device),
        "encoder": lambda: _trained(config) if name == "airrep" else resolve_model(config.encoder),
        "lm": lambda: checkpoints()[-1].path,
        "checkpoints": lambda: [one.path for one in checkpoints()],
        "learning_rates": lambda: [one.mean_learning_rate for one in checkpoints()],
        "layers": lambda: checkpoints()[-1].layers,
        "template": lambda: recipe.template,
        "max_length": lambda: recipe.max_length,
        "precision": lambda: recipe.precision,
        "show_progress": lambda: True,
    }


def _settled(own: Mapping[str, Any]) -> set[str]:
    """The arguments that the run does not give: the warm-up's are of no other model."""
    settled = set(own)
    if "lm" in own:
        settled |= {"checkpoints", "layers", "learning_rates"}
    if "checkpoints" in own:
        settled.add("learning_rates")
    return settled


def _trained(config: RunConfig) -> Path:
    encoder = RunFolder(Path(config.output)).encoder
    if not encoder.is_dir():
        raise InputError(f"{encoder} is not there yet; run `airrep train` first.")
    return encoder


def _training_labels(config: RunConfig) -> TrainingLabels:
    folder = RunFolder(Path(config.output))
    store = folder.open_labels("train")
    return TrainingLabels(folder.read_labelled("train", store)[1], store.read(), config.train)


def _checkpoints(config: RunConfig) -> Sequence[Any]:
    from data_builders.warm_up import open_warm_up

    return open_warm_up(config)


def _with_members(config: RunConfig, names: Sequence[str]) -> list[tuple[str, RunConfig]]:
    """The methods, and their members, and those of these, with configurations as `_members`."""
    found = []
    for name in names:
        found.append((name, config))
        for member, own in _members(config, name):
            found += _with_members(own, [member])
    return found


def _members(config: RunConfig, name: str) -> list[tuple[str, RunConfig]]:
    """A method's members by name, each with the configuration that has its own parameters; none of
    a method that is not made of others."""
    if "members" not in _takes(name):
        return []
    given = _own(config, name).get("members", None if name == ENSEMBLE else [])
    entries = [_entry(one) for one in given] if isinstance(given, list) else [None]
    found = [entry for entry in entries if entry is not None]
    if len(found) < len(entries):
        raise InputError(
            f"evaluate.params.{name}.members is {given!r}; name methods, of an ensemble the one "
            "whose units count first, such as [airrep, logra], or [airrep, {logra: {layers: mlp}}]."
        )
    members = [member for member, _ in found]
    for member in members:
        check_methods([member])
    if twice := [member for member, own in found if found.count((member, own)) > 1]:
        raise InputError(f"{twice[0]} is a member of {name} twice; leave one out.")
    if name in members:
        raise InputError(f"{name} cannot be its own member; leave it out of its members.")
    learned = [one for one in members if method_class(one).learns]
    if learned and name != ENSEMBLE:
        raise InputError(
            f"{learned[0]} cannot be a member of {name}: it has seen the labels that {name} learns "
            "from. Make both members of an ensemble."
        )
    params = config.evaluate.params
    changed = [params | {member: params.get(member, {}) | own} for member, own in found]
    return [
        (member, replace(config, evaluate=replace(config.evaluate, params=own)))
        for member, own in zip(members, changed, strict=True)
    ]


def _entry(given: Any) -> tuple[str, dict[str, Any]] | None:
    """A member's name and what it has of its own, of a name or {name: parameters}; else None."""
    if isinstance(given, str):
        return given, {}
    if isinstance(given, dict) and len(given) == 1:
        ((name, own),) = given.items()
        return (name, own) if isinstance(name, str) and isinstance(own, dict) else None
    return None


def members_first(config: RunConfig, names: Sequence[str]) -> list[list[str]]:
    """The methods in groups: the members of a group's methods are in groups before it."""

    def depth(name: str, own: RunConfig = config) -> int:
        return 1 + max((depth(*member) for member in _members(own, name)), default=0)

    return [list(group) for _, group in groupby(sorted(names, key=depth), key=depth)]


def _takes(name: str) -> set[str]:
    return set(inspect.signature(method_class(name)).parameters)


def _own(config: RunConfig, name: str) -> dict[str, Any]:
    return dict(config.evaluate.params.get(name, {}))
