"""What a run's folder holds for its page beside results.json, each checked to be of its labels."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from airrep.examples import InputError
from airrep.label_store import fingerprint_labels
from airrep.learning_curve import FILE, read_curve
from airrep.run_folder import RunFolder


def further_findings(folder: RunFolder) -> dict[str, Any]:
    """Interventions, verification and the points of the learning curve, by name, where they are.

    Those of other labels than are there now are left out, and a line says so. Raises InputError
    for a file that is damaged.
    """
    found: dict[str, Any] = {}
    if interventions := _read_object(folder.path / "interventions.json"):
        found["interventions"] = interventions
    verification = _read_object(folder.path / "verification.json")
    if verification:
        split = verification["settings"]["split"]
        if _are_of(folder, split, (0, 1), verification.get("labels_sha256"), "verification.json"):
            found["verification"] = verification
    curve = read_curve(folder.path / FILE)
    if curve and _are_of(folder, "train", (0,), curve["inputs"]["labels"], FILE):
        found["learning_curve"] = curve["points"]
    return found


def _are_of(
    folder: RunFolder, split: str, repeats: Iterable[int], sha256: str | None, file: str
) -> bool:
    """Whether a file is of the labels that are there now; says so where it is not."""
    store = folder.open_labels(split)
    is_same = fingerprint_labels(store, map(store.read, repeats)) == sha256
    if not is_same:
        print(f"{file} is of other {split} labels than are there now: left out of the page")
    return is_same


def _read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object, None when there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a JSON object; delete it, or make it again.")
    return found
