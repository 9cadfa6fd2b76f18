"""What came before a run's methods: seconds of labels, training and the warm-up model."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from airrep.run_folder import RunFolder


def preparing_seconds(
    folder: RunFolder, others: Sequence[str], arguments: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """What came before a method is fitted, by its name: labels (of the `others` too, folders of
    runs) and training behind the run's encoder; the warm-up model. What has members has what these
    have too.

    Without those for which it is not known: labels that were imported, or made before it was
    recorded.
    """
    warm_up_model = folder.warm_up / "final"
    warming = _seconds_in(folder.warm_up / "warm_up.json")
    found: dict[str, float] = {}
    for name, own in arguments.items():
        parts = _parts(name, own)
        spent = []
        if "airrep" in [part for part, _ in parts]:
            spent.append(learning_seconds(folder, others))
        elif any(given.get("labels") is not None for _, given in parts):
            spent.append(label_seconds([folder]))
        if any(given.get("lm") == warm_up_model for _, given in parts):
            spent.append(warming)
        known = [seconds for seconds in spent if seconds is not None]
        if known and len(known) == len(spent):
            found[name] = sum(known)
    return found


def _parts(name: str, own: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """A method's name and arguments, and those of its members, and of theirs."""
    members = [part for member in own.get("members", []) for part in _parts(*member)]
    return [(name, own), *members]


def learning_seconds(folder: RunFolder, others: Sequence[str]) -> float | None:
    """Of the training labels, other runs' too, and of training on them and a teacher's scores."""
    parts = [_seconds_in(folder.path / "train.json")]
    distilled = folder.path / "distilled"
    if distilled.is_dir():
        parts += [_seconds_in(distilled / name) for name in ("teacher.json", "train.json")]
    parts.append(label_seconds([folder, *(RunFolder(Path(path)) for path in others)]))
    known = [seconds for seconds in parts if seconds is not None]
    return sum(known) if len(known) == len(parts) else None


def label_seconds(folders: Sequence[RunFolder]) -> float | None:
    """Of the training labels of some runs; None where it is not known."""
    total = 0.0
    for run in folders:
        if not run.labels("train").is_dir():
            return None
        store = run.open_labels("train")
        labels = store.seconds()
        if not store.done() <= labels.keys():
            return None
        total += sum(labels.values())
    return total


def _seconds_in(file: Path) -> float | None:
    """The key `seconds` of a JSON file; None where there is none."""
    try:
        return float(json.loads(file.read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
