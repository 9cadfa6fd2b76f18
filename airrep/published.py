"""The test sets published with AirRep (arXiv 2505.18513), read into a benchmark folder.

train.jsonl   the pool, a row an example
test.jsonl    the targets
lds.jsonl     a line a label: train_subset (rows of train.jsonl, from 0) and test_loss (a loss
              a row of test.jsonl, in nats); test_score is another name for it
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from airrep.benchmark import describe_benchmark
from airrep.examples import Example, InputError, fingerprint_examples, write_examples
from airrep.label_store import LabelStore
from airrep.provenance import hash_files
from airrep.reading import read_jsonl
from airrep.run_folder import RunFolder

PROMPTS = ("inputs", "prompt", "instruction")
RESPONSES = ("response", "targets", "output")
LOSSES = ("test_loss", "test_score")


def import_published(
    folder: str | Path,
    output: str | Path,
    *,
    name: str | None = None,
    lm: str = "not stated",
    description: str = "",
    source: str = "",
    licence: str = "",
) -> dict[str, Any]:
    """Makes a benchmark in `output` from a folder of the published format; returns its about.

    Examples are called train-0, test-0 and so on, by their rows. Rows with an empty response are
    left out, of the subsets too: a language model learns nothing from them and has no loss on
    them. Losses that are null or not finite stay missing. `lm` names the model behind the losses.
    Raises InputError for missing files, rows of other shapes, and an output that holds another
    benchmark.
    """
    folder = Path(folder)
    files = {part: folder / f"{part}.jsonl" for part in ("train", "test", "lds")}
    for file in files.values():
        if not file.is_file():
            raise InputError(f"There is no file {file}; train, test and lds.jsonl are needed.")
    pool, targets = _read_examples(files["train"]), _read_examples(files["test"])
    subsets, losses = _read_labels(files["lds"], len(pool), len(targets))
    learned, judged = _with_response(pool), _with_response(targets)
    plan = [_rows_among(learned, subset) for subset in subsets]
    run = RunFolder(Path(output))
    _create_store(
        run,
        [pool[row] for row in learned],
        [targets[row] for row in judged],
        plan,
        losses[:, judged],
        {"lm": lm, "recipe": "of the published labels"},
        hash_files([files["lds"]]),
    )
    left_out = len(pool) - len(learned), len(targets) - len(judged)
    if any(left_out):
        print(f"left out for an empty response: {left_out[0]} of the pool, {left_out[1]} targets")
    return describe_benchmark(
        run.path,
        name=name or folder.resolve().name,
        description=description,
        source=source,
        licence=licence,
    )


def _create_store(
    run: RunFolder,
    pool: list[Example],
    targets: list[Example],
    plan: list[np.ndarray],
    losses: np.ndarray,
    about: Mapping[str, Any],
    labels_hash: str,
) -> None:
    """Writes pool, targets and the label store; losses (subsets, targets), NaN where missing."""
    # Whoever made the labels knows the model and the recipe; the file stands for both here.
    fingerprint = {
        "examples": fingerprint_examples(pool),
        "targets": fingerprint_examples(targets),
        "lm": labels_hash,
        "recipe": labels_hash,
    }
    store = LabelStore.create(run.labels("test"), fingerprint, plan, len(targets), about)
    known = np.flatnonzero(np.isfinite(losses).any(axis=1)).tolist()
    if known:
        store.add_merged({number: losses[number] for number in known})
    write_examples(run.pool_file, pool)
    write_examples(run.targets_file("test"), targets)


def _read_examples(file: Path) -> list[Example]:
    return [
        _to_example(place, f"{file.stem}-{number}", row)
        for number, (place, row) in enumerate(read_jsonl(file))
    ]


def _to_example(place: str, name: str, row: Mapping[str, Any]) -> Example:
    prompt, response = _first(row, PROMPTS), _first(row, RESPONSES)
    if prompt is not None and row.get("input"):
        prompt = f"{prompt}\n{row['input']}"
    pair = row.get("data")
    if isinstance(pair, list) and len(pair) >= 2:
        prompt = pair[0] if prompt is None else prompt
        response = pair[1] if response is None else response
    if not isinstance(prompt, str) or not isinstance(response, str):
        raise InputError(
            f"{place} has no text for {'a response' if isinstance(prompt, str) else 'a prompt'}; "
            f"its columns are {', '.join(row)}, and {', '.join((*PROMPTS, *RESPONSES))} or data "
            "are read."
        )
    task = row.get("task")
    return Example(name, prompt, response, None if task is None else str(task))


def _first(row: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((row[key] for key in keys if key in row), None)


def _with_response(examples: Sequence[Example]) -> list[int]:
    return [row for row, example in enumerate(examples) if example.response.strip()]


def _rows_among(kept: Sequence[int], subset: np.ndarray) -> np.ndarray:
    """The places among the kept rows (ascending) of those of a subset that are kept."""
    return np.searchsorted(kept, subset[np.isin(subset, kept)])


def _read_labels(
    file: Path, pool_size: int, target_count: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Subsets of pool rows, and losses (subsets, targets) with NaN where they are missing."""
    subsets, losses = [], []
    for place, row in read_jsonl(file):
        rows, values = row.get("train_subset"), _first(row, LOSSES)
        if not isinstance(rows, list) or not rows or not all(type(one) is int for one in rows):
            raise InputError(f"{place} has no train_subset that is a list of rows of train.jsonl.")
        if not 0 <= min(rows) <= max(rows) < pool_size:
            raise InputError(
                f"{place} names the rows {min(rows)} to {max(rows)}, and train.jsonl has "
                f"{pool_size}; they belong to another file."
            )
        if not isinstance(values, list) or len(values) != target_count:
            found = f"{len(values)} losses" if isinstance(values, list) else "no list of losses"
            raise InputError(
                f"{place} has {found} in {' or '.join(LOSSES)}; one a row of test.jsonl "
                f"({target_count}) is needed."
            )
        subsets.append(np.asarray(rows, dtype=np.int64))
        losses.append([_loss(place, value) for value in values])
    if not subsets:
        raise InputError(f"{file} holds no labels; give at least two lines.")
    return subsets, np.asarray(losses, dtype=np.float32)


def _loss(place: str, value: Any) -> float:
    """A loss as a number, NaN where it is missing: null, NaN or infinite."""
    if value is None:
        return np.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(
            f"{place} has the loss {value!r}; give a number, or null where it is missing."
        )
    return float(value) if np.isfinite(value) else np.nan
