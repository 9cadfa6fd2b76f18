"""What an evaluation left in a run's folder: results.json and the scores beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from airrep.attributor import POOLINGS, subset_scores_of
from airrep.examples import InputError
from airrep.provenance import is_dirty
from airrep.run_folder import RunFolder

# What a page is made from.
RESULT_KEYS = {"methods", "benchmark", "targets", "subsets", "noise_ceiling", "differences"}
ROW_KEYS = {"name", "lds", "ci95", "pooling", "fit_seconds"}


def known_results(folder: RunFolder, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """results.json of these very inputs, with all its scores; None when there are none."""
    if is_dirty(inputs["git_revision"]):
        return None
    try:
        results = read_results(folder)
    except InputError:
        return None
    if results is None or results.get("inputs") != json.loads(json.dumps(inputs)):
        return None
    whole = all(folder.scores_file(name).exists() for name in score_names(results))
    return results if whole else None


def read_results(folder: RunFolder) -> dict[str, Any] | None:
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


def score_names(results: Mapping[str, Any]) -> list[str]:
    """The names of all scores that `evaluate` wrote with these results."""
    rows = results["methods"]
    own = [row["name"] for row in rows if row["pooling"] not in POOLINGS]
    return [*(row["name"] for row in rows), *map(subset_scores_of, own)]


def read_scores(folder: RunFolder, method: str) -> np.ndarray:
    path = folder.scores_file(method)
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, str(error)) from None


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path} cannot be read ({reason}); delete results.json and run `airrep evaluate` again."
    )
