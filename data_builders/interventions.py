"""Interventions: what really happens when the examples that a method names are left out, or kept.

The language model is trained again without them (tail removal, leave-one-out) or on them alone
(data selection), beside random examples, with the same seeds and order of examples.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from airrep.config import RunConfig
from airrep.examples import Example, InputError
from airrep.provenance import git_revision, installed_versions, write_json_atomic
from airrep.run_folder import RunFolder
from data_builders.finetune import FineTuner
from data_builders.intervention_plan import (
    Plan,
    draw_base,
    group_targets,
    parse_sizes,
    plan_choices,
    plan_leave_one_out,
)
from data_builders.intervention_results import (
    describe,
    summarise_leave_one_out,
    summarise_removal,
    summarise_selection,
)
from data_builders.retraining import Retraining, open_retraining, retrain

Kind = Literal["removal", "leave_one_out", "selection"]
# What `k`, `by` and `random` are when they are not given.
DEFAULTS: dict[str, tuple[str, str, int]] = {
    "removal": ("5,20,5%", "target", 5),
    "leave_one_out": ("1", "target", 20),
    "selection": ("10%", "all", 5),
}


@dataclass(frozen=True)
class InterventionSettings:
    """What is left out or kept, and for which targets.

    Args:
        kind: "removal": train without the top k; "leave_one_out": without one example, the top
            k ones and random ones; "selection": train on the top k alone.
        methods: a,b,c: methods with scores in the run's folder, or .npy files of scores
            (targets, pool), higher = more helpful; those evaluated but "random" when not given.
        k: numbers of examples, or shares of the base: 5,20,5%.
        targets: how many single targets, or tasks, get a choice of their own; not used by "all".
        by: a choice for each "target", for each "task", or one for "all" targets.
        seeds: how often each model is trained, with another order of examples.
        random: random choices of each size; random examples for leave_one_out.
        base: size of the random part of the pool that all this is done on; all when not given.
    """

    kind: Kind
    methods: str | None = None
    k: str | None = None
    targets: int = 5
    by: str | None = None
    seeds: int = 3
    random: int | None = None
    base: int | None = None

    def choices(self) -> tuple[str, str, int]:
        """k, by and random, the kind's own where they are not given.

        Raises InputError for values out of range.
        """
        if self.kind not in DEFAULTS:
            raise InputError(f"kind is {self.kind!r}; choose one of {', '.join(DEFAULTS)}.")
        k, by, random = DEFAULTS[self.kind]
        random = random if self.random is None else self.random
        least = 2 if self.kind == "leave_one_out" else 1
        for name, value, lowest in (("seeds", self.seeds, 1), ("random", random, least)):
            if value < lowest:
                raise InputError(f"{name} is {value}; give at least {lowest}.")
        return self.k or k, self.by or by, random


def intervene(
    config: RunConfig,
    settings: InterventionSettings,
    load_tuner: Callable[[Sequence[Example], Sequence[Example]], FineTuner],
    *,
    shard: str = "1/1",
    plan_only: bool = False,
    show_progress: bool = True,
) -> dict[str, Any] | None:
    """Trains the models that an intervention needs and puts what they show in interventions.json.

    Needs a run's folder with scores. `load_tuner` gives the language model, ready for a pool and
    targets; it is called once, and only when a model is to be trained. Losses are kept in label
    stores in `interventions/`, so a killed run goes on, other settings reuse what they share, and
    workers take shards. Returns the summary, with the 95% intervals of `airrep.metrics`, or None
    while models are missing. `plan_only` trains one model, says how long the rest takes, and
    stops. Raises InputError for settings that do not fit the run, scores that are not there, and
    training that diverges.
    """
    k, by, random = settings.choices()
    folder = RunFolder(Path(config.output))
    pool, targets = folder.read_pool(), folder.read_targets("test")
    scores = _read_scores(folder, config, settings.methods, (len(targets), len(pool)))
    groups = group_targets(targets, by, settings.targets)
    base = draw_base(len(pool), settings.base, config.seed)
    plan = _plan(settings.kind, base, scores, groups, k, random, config.seed)
    is_selection = settings.kind == "selection"
    job = open_retraining(
        config,
        settings.kind,
        pool,
        targets,
        plan.subsets,
        settings.seeds,
        keep_steps=not is_selection,
        exact_match=is_selection,
    )
    models, left = len(plan.subsets) * settings.seeds, len(job.missing())
    print(
        f"{settings.kind}: {len(plan.subsets)} parts of {len(plan.base)} examples x "
        f"{settings.seeds} seeds = {models} models to train; {models - left} are there, {left} left"
    )
    retrain(
        job,
        lambda: load_tuner(pool, targets),
        config.seed,
        shard,
        plan_only,
        show_progress,
    )
    left = len(job.missing())
    if left:
        without = " without --plan-only" if plan_only else ""
        print(f"{left} models are missing; the same command{without} goes on")
        return None
    found = _summarise(settings.kind, config, plan, groups, scores, job)
    about = {
        "settings": asdict(settings) | {"k": k, "by": by, "random": random},
        "base": len(plan.base),
        "groups": {name: [targets[row].id for row in rows] for name, rows in groups.items()},
        "trials": [asdict(trial) for trial in plan.trials],
        "stores": [store.path.name for store in job.stores],
        "draws": config.evaluate.draws,
        "lm": config.lm,
        "recipe": config.recipe.relevant(),
        "versions": installed_versions(),
        "git_revision": git_revision(),
    }
    print(*describe(found), sep="\n")
    _write(folder.path / "interventions.json", settings.kind, found | about)
    return found | about


def _plan(
    kind: Kind,
    base: np.ndarray,
    scores: Mapping[str, np.ndarray],
    groups: Mapping[str, np.ndarray],
    k: str,
    random: int,
    seed: int,
) -> Plan:
    sizes = parse_sizes(k, len(base))
    if kind != "leave_one_out":
        return plan_choices(base, scores, groups, sizes, random, seed, kind == "selection")
    if len(sizes) > 1 or random > len(base):
        raise InputError(
            f"leave_one_out takes one k and at most {len(base)} random examples, and got k = {k} "
            f"and random = {random}."
        )
    return plan_leave_one_out(base, scores, groups, sizes[0], random, seed)


def _summarise(
    kind: Kind,
    config: RunConfig,
    plan: Plan,
    groups: Mapping[str, np.ndarray],
    scores: Mapping[str, np.ndarray],
    job: Retraining,
) -> dict[str, Any]:
    losses, draws, seed = job.read(job.losses), config.evaluate.draws, config.seed
    if kind == "leave_one_out":
        return summarise_leave_one_out(plan, scores, losses, draws, seed)
    if job.matches is None:
        return summarise_removal(plan, groups, losses, draws, seed)
    return summarise_selection(plan, groups, losses, job.read(job.matches), draws, seed)


def _read_scores(
    folder: RunFolder, config: RunConfig, methods: str | None, shape: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Scores (targets, pool) by method; raises InputError for those that are not there."""
    names: Sequence[str] = (methods or "").split(",")
    if methods is None:
        names = [name for name in config.evaluate.methods if name != "random"]
        # A method that cannot run here (no tasks) was left out by the evaluation too.
        names = [name for name in names if folder.scores_file(name).is_file()]
        if not names:
            raise InputError(
                f"{folder.path} has no scores of the configured methods yet; "
                "run `airrep evaluate` first."
            )
    scores = {Path(name).stem: _read_matrix(folder, name, shape) for name in names}
    if len(scores) < len(names):
        raise InputError(f"Two of the methods {', '.join(names)} have one name; rename a file.")
    return scores


def _read_matrix(folder: RunFolder, name: str, shape: tuple[int, int]) -> np.ndarray:
    path = Path(name) if name.endswith(".npy") else folder.scores_file(name)
    try:
        scores = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise InputError(
            f"There are no scores {path}; run `airrep evaluate --methods {name}` first, or give "
            "a .npy file of scores (targets, pool)."
        ) from None
    except (ValueError, EOFError) as error:
        raise InputError(f"{path} is not a .npy file of numbers ({error}).") from None
    if scores.shape != shape or scores.dtype.kind not in "fiu" or not np.isfinite(scores).all():
        raise InputError(
            f"{path} holds {scores.dtype} of shape {scores.shape}; give finite scores of shape "
            f"{shape} (test targets, pool), as `airrep evaluate` writes them."
        )
    return scores


def _write(path: Path, kind: str, found: dict[str, Any]) -> None:
    """Puts one kind's results into the file; those of other kinds stay."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = {}
    write_json_atomic(path, known | {kind: found})
