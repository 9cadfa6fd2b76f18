"""What a run is about: its pool, its targets and its subset plans, from the configuration."""

import hashlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from airrep.config import DataConfig, RunConfig
from airrep.examples import Example, InputError, fingerprint_examples, write_examples
from airrep.label_files import read_npz
from airrep.label_store import LabelStore, import_npz
from airrep.provenance import hash_files
from airrep.reading import read_examples
from airrep.run_folder import RunFolder
from airrep.weights import fingerprint_weights, resolve_model
from data_builders.subsets import make_plan, split_targets

SPLITS = ("train", "test")


@dataclass(frozen=True)
class RunData:
    """The pool, and the targets and the subsets (int64 pool rows) of each split."""

    pool: list[Example]
    targets: Mapping[str, list[Example]]
    subsets: Mapping[str, Sequence[np.ndarray]]


def read_run_data(config: RunConfig) -> RunData:
    """Reads or makes the examples and draws the subsets; targets are never inside a subset.

    Raises InputError when the configuration names no data, or data that do not fit together.
    """
    if config.imported is not None:
        return _imported_data(config)
    pool, targets = _pool_and_targets(config)
    ids = {example.id for example in pool}
    _refuse_overlap(ids, targets)
    train = _plan(config, len(pool), config.subsets.train, stream=0)
    test = _plan(config, len(pool), config.subsets.test, stream=1, known=train)
    return RunData(pool, targets, {"train": train, "test": test})


def create_stores(config: RunConfig, data: RunData) -> dict[str, LabelStore]:
    """Makes the run's folder with its examples and empty label stores, or opens what is there.

    Raises InputError, before anything is written, when the folder holds labels of other data,
    another model or another recipe.
    """
    folder = RunFolder(Path(config.output))
    if config.imported is None:
        model = resolve_model(config.lm)
        lm, recipe = fingerprint_weights(model), config.recipe.fingerprint()
        about: dict[str, Any] = {"lm": config.lm, "recipe": config.recipe.relevant()}
    else:
        # Whoever made them knows the model and the recipe; the files stand for both here.
        lm = recipe = hash_files(map(Path, (config.imported.train, config.imported.test)))
        about = {"lm": "of the imported labels", "recipe": asdict(config.imported)}
    stores, pool = {}, fingerprint_examples(data.pool)
    for split in SPLITS:
        fingerprint = {
            "examples": pool,
            "targets": fingerprint_examples(data.targets[split]),
            "lm": lm,
            "recipe": recipe,
            "seed": hashlib.sha256(str(config.seed).encode()).hexdigest(),
        }
        about = about | {
            "examples": f"{len(data.pool)} examples",
            "targets": f"{len(data.targets[split])} {split} targets",
            "plan": f"{len(data.subsets[split])} {split} subsets",
            "seed": config.seed,
        }
        stores[split] = _create_store(config, folder, split, fingerprint, about, data)
    write_examples(folder.pool_file, data.pool)
    for split in SPLITS:
        write_examples(folder.targets_file(split), data.targets[split])
    return stores


def _create_store(
    config: RunConfig,
    folder: RunFolder,
    split: str,
    fingerprint: Mapping[str, str],
    about: Mapping[str, Any],
    data: RunData,
) -> LabelStore:
    path = folder.labels(split)
    if config.imported is not None:
        return import_npz(getattr(config.imported, split), path, fingerprint, about)
    return LabelStore.create(
        path, fingerprint, data.subsets[split], len(data.targets[split]), about
    )


def _pool_and_targets(config: RunConfig) -> tuple[list[Example], dict[str, list[Example]]]:
    data = config.data
    if (data.corpus is None) == (data.examples is None):
        raise InputError(
            "The configuration must name either data.examples (a file, folder or hub id) or "
            f"data.corpus (the demo corpus), and names {'none' if data.corpus is None else 'both'}."
        )
    if data.corpus is not None:
        from data_builders.corpora import make_corpus

        corpus = make_corpus(**asdict(data.corpus), seed=config.seed)
        pool, targets = corpus.pool, corpus.targets
    else:
        assert data.examples is not None
        pool = _read(data, data.examples)
        if data.targets is not None:
            targets = _read(data, data.targets)
        else:
            pool, targets = _draw_targets(pool, data.target_count, config.seed)
    if data.test_targets is not None:
        return pool, {"train": targets, "test": _read(data, data.test_targets)}
    if not 0 < data.test_share < 1:
        raise InputError(f"data.test_share is {data.test_share}; give a share between 0 and 1.")
    shares = {"train": 1 - data.test_share, "test": data.test_share}
    rows = split_targets(len(targets), shares, config.seed)
    return pool, {split: [targets[row] for row in rows[split]] for split in SPLITS}


def _draw_targets(
    examples: list[Example], count: int, seed: int
) -> tuple[list[Example], list[Example]]:
    if not 0 < count < len(examples):
        raise InputError(
            f"data.target_count is {count}, of {len(examples)} examples; leave some for the pool, "
            "or name a file of targets in data.targets."
        )
    drawn = set(np.random.default_rng([seed, 2]).permutation(len(examples))[:count].tolist())
    pool = [example for row, example in enumerate(examples) if row not in drawn]
    return pool, [examples[row] for row in sorted(drawn)]


def _plan(
    config: RunConfig, pool_size: int, count: int, stream: int, known: Sequence[np.ndarray] = ()
) -> list[np.ndarray]:
    subsets = config.subsets
    return make_plan(
        range(pool_size),
        count,
        size=subsets.size,
        fraction=subsets.fraction,
        kind=subsets.kind,
        seed=2 * config.seed + stream,
        exclude_plans=[known],
    )


def _imported_data(config: RunConfig) -> RunData:
    """The data of labels made elsewhere, whose subsets are rows of data.examples."""
    assert config.imported is not None
    data = config.data
    if data.examples is None or data.test_targets is None:
        raise InputError(
            "imported labels need data.examples (the pool they are rows of) and data.test_targets."
        )
    pool, test = _read(data, data.examples), _read(data, data.test_targets)
    train_file, test_file = config.imported.train, config.imported.test
    rows = _imported_rows(train_file, len(pool))
    plans = {
        "train": _imported_plan(train_file, len(pool), len(rows)),
        "test": _imported_plan(test_file, len(pool), len(test)),
    }
    inside = np.intersect1d(rows, plans["train"])
    if len(inside):
        raise InputError(
            f"Row {inside[0]} of {data.examples} is a target and inside a subset; "
            "its loss would be that of training on it."
        )
    targets = {"train": [pool[row] for row in rows], "test": test}
    return RunData(pool, targets, {split: list(plan) for split, plan in plans.items()})


def _imported_plan(file: str, pool_size: int, target_count: int) -> np.ndarray:
    """The subsets (subsets, size) of a .npz file whose losses are of `target_count` targets."""
    with _clear_npz_errors(file):
        subsets, losses = read_npz(Path(file), "subsets", "losses")
    if losses.shape[1] != target_count:
        raise InputError(
            f"{file} has losses of {losses.shape[1]} targets, but {target_count} targets are "
            "named; give the targets of these losses, in their order."
        )
    if not np.isfinite(losses).any():
        raise InputError(f"{file} has no finite loss; give labels that were made.")
    return _check_rows(file, "a subset", subsets, pool_size)


def _imported_rows(file: str, pool_size: int) -> np.ndarray:
    """The pool rows (targets,) that a .npz file of training labels uses as targets."""
    with _clear_npz_errors(file), np.load(file, allow_pickle=False) as arrays:
        rows = arrays["target_rows"]
    if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
        raise InputError(
            f"{file} has target_rows of shape {rows.shape} and type {rows.dtype}; "
            "integer pool rows (targets,) are needed."
        )
    return _check_rows(file, "target_rows", rows[None], pool_size)[0]


def _check_rows(file: str, name: str, rows: np.ndarray, pool_size: int) -> np.ndarray:
    """Sets of pool rows (sets, size) as int64; InputError for wrong and repeated ones."""
    outside = rows[(rows < 0) | (rows >= pool_size)]
    if len(outside):
        raise InputError(
            f"{file} names row {outside[0]} in {name}, but the pool has {pool_size} examples; "
            "give the pool that these labels were made with."
        )
    ordered = np.sort(rows, axis=1)
    twice = ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]]
    if len(twice):
        raise InputError(f"{file} names row {twice[0]} twice in {name}; name it once.")
    return rows.astype(np.int64)


@contextmanager
def _clear_npz_errors(file: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"There is no file {file}; check `imported` in the config.") from None
    except KeyError as error:
        raise InputError(f"{file} lacks an array ({error.args[0]}); add it.") from None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        raise InputError(
            f"{file} is not a .npz file of plain arrays; write it with numpy.savez."
        ) from None


def _refuse_overlap(pool_ids: set[str], targets: Mapping[str, Sequence[Example]]) -> None:
    seen: dict[str, str] = {}
    for split, examples in targets.items():
        for example in examples:
            where = "the pool" if example.id in pool_ids else seen.get(example.id)
            if where:
                raise InputError(
                    f"The {split} target {example.id!r} is also among {where}; give targets ids "
                    "of their own and keep them out of the pool."
                )
            seen[example.id] = f"the {split} targets"


def _read(data: DataConfig, source: str) -> list[Example]:
    return read_examples(source, data.columns, data.split)
