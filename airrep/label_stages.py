"""The stages of a run that need the language model: subsets, plan, labels, interventions."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from airrep.config import RunConfig
from airrep.device import pick_device
from airrep.examples import (
    Example,
    InputError,
    TokenizedExample,
    lm_template,
    tokenize_examples,
)
from airrep.label_mirror import LabelMirror
from airrep.label_store import LabelStore
from airrep.weights import plain_weights, resolve_model
from data_builders.run_data import SPLITS, RunData, create_stores, read_run_data

if TYPE_CHECKING:
    from data_builders.finetune import FineTuner
    from data_builders.plan import LabelPlan


def make_subsets(config: RunConfig) -> None:
    """Writes the pool, the targets and the subset plans into the run's folder."""
    _prepare(config)


def _prepare(config: RunConfig) -> tuple[RunData, dict[str, LabelStore]]:
    data = read_run_data(config)
    stores = create_stores(config, data)
    for split in SPLITS:
        sizes = [len(subset) for subset in data.subsets[split]]
        print(
            f"{split}: {len(sizes)} subsets of {_range(sizes)} out of {len(data.pool)} examples, "
            f"{len(data.targets[split])} targets"
        )
    return data, stores


def make_labels(
    config: RunConfig,
    shard: str = "1/1",
    merge: bool = False,
    ray: str | None = None,
    mirror: str | None = None,
) -> None:
    """Fine-tunes the language model on every subset that has no label yet.

    `ray` is auto, local or HOST:PORT: a Ray cluster trains instead of this process. Labels at the
    fsspec URL `mirror` are taken and not made again; those made here go there.
    """
    from data_builders.labels import LabelJob
    from data_builders.labels import make_labels as make

    data, stores = _prepare(config)
    train, test = data.targets["train"], data.targets["test"]
    mirrors = {split: open_mirror(store, mirror, split) for split, store in stores.items()}
    test_rows = len(train) + np.arange(len(test))
    jobs = [
        LabelJob(stores["train"], np.arange(len(train)), mirror=mirrors["train"]),
        LabelJob(stores["test"], test_rows, config.subsets.repeats, mirrors["test"]),
    ]
    if config.imported is not None:
        jobs = []  # whatever is missing in imported labels stays missing

    def tuner(device: str = config.device) -> FineTuner:
        make_tuner, tokens = _load_lm(dataclasses.replace(config, device=device), data)
        return make_tuner(tokens["pool"], [*tokens["train"], *tokens["test"]])

    if ray is None:
        made = make(jobs, tuner, config.seed, shard)
    else:
        from data_builders.cluster import make_labels_on_ray

        made = make_labels_on_ray(jobs, tuner, config.lm, config.seed, ray, config.device, shard)
    for copy in filter(None, mirrors.values()):
        copy.sync()  # others have gone on meanwhile
    if merge:
        for store in stores.values():
            store.merge()
    for split, store in stores.items():
        print(f"{split} labels: {len(store.done())} of {len(store.subsets)} are there")
    again = len(stores["test"].done(repeat=1))
    print(f"{made} made now; {again} test subsets were trained twice for the noise ceiling")


def open_mirror(store: LabelStore, url: str | None, split: str) -> LabelMirror | None:
    """The mirror of a split's labels, with what it has taken over; None without a URL.

    Raises InputError for an empty one, which a variable that is not set leaves behind.
    """
    if url is None:
        return None
    if not url.strip():
        raise InputError("--mirror is empty; give a URL, or leave it out to keep no copy.")
    mirror = LabelMirror(store, f"{url.rstrip('/')}/{split}_labels")
    print(f"{mirror.url}: {mirror.sync()} labels taken from there")
    return mirror


def benchmark(
    config: RunConfig, description: str = "", source: str = "", licence: str = ""
) -> None:
    """Makes the labels that are missing, and describes the run's folder as a benchmark."""
    from airrep.benchmark import describe_benchmark

    make_labels(config)
    about = describe_benchmark(
        config.output,
        name=config.name,
        description=description,
        source=source or config.data.examples or "made from facts in pip packages",
        licence=licence,
    )
    print(
        f"{config.output}: the benchmark {about['name']!r}, {about['labels']} test labels of "
        f"{about['targets']} targets"
    )


def plan(config: RunConfig, price: float | None = None, hours: float | None = None) -> LabelPlan:
    """Says what the labels of this run will cost, by training on one subset now.

    `price` is that of an hour of this machine, `hours` a budget. Writes nothing.
    """
    from data_builders.plan import plan_labels

    data = read_run_data(config)
    start = time.perf_counter()
    make_tuner, tokens = _load_lm(config, data)
    loading = time.perf_counter() - start
    wanted = [len(data.subsets[split]) for split in SPLITS]
    wanted[-1] += min(config.subsets.repeats, wanted[-1])
    found = plan_labels(
        make_tuner,
        tokens["pool"],
        [tokens[split] for split in SPLITS],
        data.subsets["train"][0],
        wanted,
        loading,
        config.seed,
    )
    print(found.describe(price, hours))
    return found


def _load_lm(
    config: RunConfig, data: RunData
) -> tuple[
    Callable[[Sequence[TokenizedExample], Sequence[TokenizedExample]], FineTuner],
    dict[str, list[TokenizedExample]],
]:
    """What makes the tuner of some pool and targets, once; and all of them as tokens, by part."""
    from airrep.lm import load_lm
    from data_builders.finetune import FineTuner

    model, tokenizer = load_lm(plain_weights(resolve_model(config.lm)), pick_device(config.device))
    template = lm_template(tokenizer, config.recipe.template)
    tokens = {
        part: tokenize_examples(examples, tokenizer, template, config.recipe.max_length)
        for part, examples in {"pool": data.pool, **data.targets}.items()
    }

    def make_tuner(
        pool: Sequence[TokenizedExample], targets: Sequence[TokenizedExample]
    ) -> FineTuner:
        engine = config.engine
        return FineTuner(
            model,
            pool,
            targets,
            config.recipe,
            True,
            config.seed,
            engine.name,
            engine.models,
            engine.compile,
        )

    return make_tuner, tokens


def intervene(
    config: RunConfig, shard: str = "1/1", plan_only: bool = False, **settings: Any
) -> None:
    """Trains the language model without, or only on, the examples that methods name.

    Takes the fields of `InterventionSettings`; writes interventions.json into the run's folder.
    """
    from data_builders.interventions import InterventionSettings
    from data_builders.interventions import intervene as run

    run(
        config,
        InterventionSettings(**settings),
        _tuner_loader(config),
        shard=shard,
        plan_only=plan_only,
    )


def verify(config: RunConfig, **settings: Any) -> bool:
    """Verifies labels and claims about scores by training again; says whether they are accepted.

    Takes the fields of `VerifySettings`; writes verification.json into the run's folder.
    """
    from data_builders.verify import VerifySettings
    from data_builders.verify import verify as run

    return run(config, VerifySettings(**settings), _tuner_loader(config))["accepted"]


def warm_up(
    config: RunConfig, checkpoints: int = 1, moments: bool = False, examples: int | None = None
) -> None:
    """Trains the language model on a part of the pool: gradients are taken there."""
    from data_builders.warm_up import warm_up as run

    _prepare(config)
    print(f"{run(config, checkpoints, moments, examples)}: the warm-up model")


def _tuner_loader(
    config: RunConfig,
) -> Callable[[Sequence[Example], Sequence[Example]], FineTuner]:
    """What loads the language model and makes the tuner of some pool and targets."""

    def load_tuner(pool: Sequence[Example], targets: Sequence[Example]) -> FineTuner:
        make_tuner, tokens = _load_lm(config, RunData(list(pool), {"test": list(targets)}, {}))
        return make_tuner(tokens["pool"], tokens["test"])

    return load_tuner


def _range(sizes: list[int]) -> str:
    low, high = min(sizes), max(sizes)
    return str(low) if low == high else f"{low} to {high}"
