"""Labels on disk: what the losses of the targets were after fine-tuning on each subset.

    store/manifest.json                     what the labels belong to
    store/subsets.safetensors               the plan: pool rows of every subset
    store/losses/000012-r0.safetensors      one label: subset 12, repeat (seed) 0
    store/losses/merged-r0.safetensors      many labels in one file, after `merge`

A file is there whole or not at all, so the file names say which labels exist, whatever was
killed. Any number of processes may write at once.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from airrep.examples import InputError
from airrep.label_files import (
    Shard,
    clear_disk_errors,
    fingerprint_plan,
    is_whole,
    parse_shard_name,
    plan_bytes,
    read_npz,
    read_plan,
    read_shard,
    shard_bytes,
    shard_name,
)
from airrep.label_manifest import check_same, read_manifest, refuse_losses, write_manifest
from airrep.provenance import folder_lock, remove_leftovers, write_bytes_atomic

__all__ = ["LabelStore", "Labels", "fingerprint_plan", "import_npz"]


@dataclass(frozen=True)
class Labels:
    """The labels that exist, in plan order.

    losses (targets, subsets) float32 is the mean response-token cross-entropy of a target under
    the language model fine-tuned on a subset, NaN where it is missing. `numbers` (subsets,) are
    the columns' places in the plan.
    """

    subsets: list[np.ndarray]
    losses: np.ndarray
    numbers: np.ndarray

    @property
    def fingerprint(self) -> str:
        """sha256 of the losses, their places in the plan and the subsets."""
        digest = hashlib.sha256(self.losses.tobytes() + self.numbers.tobytes())
        for subset in self.subsets:
            digest.update(subset.tobytes() + b"|")
        return digest.hexdigest()


class NotFiniteError(InputError):
    """Losses that cannot be labels: NaN or infinite."""


class LabelStore:
    """A folder of labels that belong to one pool, target list, plan, model and recipe."""

    def __init__(self, path: Path, manifest: dict[str, Any], subsets: list[np.ndarray]) -> None:
        self.path = path
        self.manifest = manifest
        self.subsets = subsets

    @classmethod
    def create(
        cls,
        path: str | Path,
        fingerprint: Mapping[str, str],
        subsets: Sequence[ArrayLike],
        target_count: int,
        about: Mapping[str, Any],
    ) -> Self:
        """Makes the folder, or opens it when it was made for the same things.

        `fingerprint` holds hashes by name (examples, targets, lm, recipe); the plan's is added.
        `about` says the same in readable values, for people and for the message of the InputError
        raised when the folder holds labels of other data, another model or another recipe. Losses
        without a manifest.json are an InputError too.
        """
        path = Path(path)
        plan = [np.asarray(subset, dtype=np.int64) for subset in subsets]
        if not plan or target_count < 1:
            raise InputError(
                f"The label store {path} got {len(plan)} subsets and {target_count} targets; "
                "give at least one of each."
            )
        wanted = {**fingerprint, "plan": fingerprint_plan(plan)}
        if fingerprint.get("plan", wanted["plan"]) != wanted["plan"]:
            raise InputError(f"The fingerprint given for {path} is of another plan; leave it out.")
        _make_folder(path)
        with clear_disk_errors(path), folder_lock(path):
            if (path / "manifest.json").exists():
                _check_same(path, wanted, target_count, about)
            else:
                refuse_losses(path)
                write_bytes_atomic(path / "subsets.safetensors", plan_bytes(plan))
                write_manifest(path, wanted, len(plan), target_count, about)
            for folder in (path, path / "losses"):
                remove_leftovers(folder)
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Opens an existing store; raises InputError when the folder is not one or is damaged."""
        path = Path(path)
        manifest = read_manifest(path)
        subsets = read_plan(path / "subsets.safetensors")
        if fingerprint_plan(subsets) != manifest["fingerprint"].get("plan"):
            raise InputError(
                f"{path / 'subsets.safetensors'} is not the plan that manifest.json names; "
                "make the labels again in an empty folder."
            )
        return cls(path, manifest, subsets)

    @property
    def fingerprint(self) -> dict[str, str]:
        """sha256 of the examples, targets, plan, lm and recipe."""
        return dict(self.manifest["fingerprint"])

    @property
    def target_count(self) -> int:
        return int(self.manifest["target_count"])

    def write(
        self,
        number: int,
        losses: ArrayLike,
        repeat: int = 0,
        attempt: int = 0,
        seconds: float | None = None,
    ) -> None:
        """Stores the losses (targets,) of one subset; writing a label again replaces it.

        `attempt` counts the trainings that had diverged before this one; `seconds` is what all of
        them took, where that is known.

        Raises InputError for a number outside the plan, a wrong length, losses that are not
        finite (NotFiniteError), and a full disk.
        """
        if not 0 <= number < len(self.subsets):
            raise InputError(
                f"There is no subset {number} in {self.path}; numbers go from 0 to "
                f"{len(self.subsets) - 1}."
            )
        if repeat < 0:
            raise InputError(f"Repeat {repeat} of subset {number} is negative; count from 0.")
        values = np.asarray(losses, dtype=np.float32)
        if values.shape != (self.target_count,):
            raise InputError(
                f"Subset {number} got losses of shape {values.shape}; the store {self.path} has "
                f"{self.target_count} targets, so give ({self.target_count},)."
            )
        broken = np.flatnonzero(~np.isfinite(values))
        if len(broken):
            rows = ", ".join(map(str, broken[:5].tolist()))
            raise NotFiniteError(
                f"Subset {number} has losses that are not finite for {len(broken)} of "
                f"{len(values)} targets (rows {rows}{', ...' if len(broken) > 5 else ''}); lower "
                "the learning rate or check those targets. Nothing was stored for it."
            )
        attempts = {number: attempt} if attempt else {}
        spent = {} if seconds is None else {number: seconds}
        shard = Shard(np.asarray([number], dtype=np.int64), values[None, :], attempts, spent)
        with clear_disk_errors(self.path):
            write_bytes_atomic(self._shard_path(number, repeat), shard_bytes(shard))

    def done(self, repeat: int = 0) -> set[int]:
        """Numbers of the labels that exist; a shard that is not whole does not count.

        Raises InputError when the merged file is damaged.
        """
        single = {number for number, path in self._shard_paths(repeat).items() if is_whole(path)}
        # Shards first: one that is merged away meanwhile is then in the merged file.
        merged = self._read_merged(repeat)
        return single if merged is None else single | set(merged.numbers.tolist())

    def missing(self, repeat: int = 0) -> list[int]:
        """Numbers of the plan without a label, in plan order."""
        done = self.done(repeat)
        return [number for number in range(len(self.subsets)) if number not in done]

    def attempts(self, repeat: int = 0) -> dict[int, int]:
        """By number, how many trainings had diverged before the label that is there; not 0."""
        return self._notes(repeat)[0]

    def seconds(self, repeat: int = 0) -> dict[int, float]:
        """By number, what making the label that is there took, where that is known."""
        return self._notes(repeat)[1]

    def _notes(self, repeat: int) -> tuple[dict[int, int], dict[int, float]]:
        attempts: dict[int, int] = {}
        seconds: dict[int, float] = {}
        for path in (self._merged_path(repeat), *self._shard_paths(repeat).values()):
            shard = read_shard(path, self.target_count)
            if shard is not None:
                for number in shard.numbers.tolist():
                    attempts.pop(number, None)
                    seconds.pop(number, None)
                attempts |= shard.attempts
                seconds |= shard.seconds
        return attempts, seconds

    def read(self, repeat: int = 0) -> Labels:
        """The labels that exist, in plan order; raises InputError naming a damaged file."""
        rows = self._read_rows(repeat)
        numbers = sorted(rows)
        losses = np.empty((self.target_count, len(numbers)), dtype=np.float32)
        for column, number in enumerate(numbers):
            losses[:, column] = rows[number]
        subsets = [self.subsets[number] for number in numbers]
        return Labels(subsets, losses, np.asarray(numbers, dtype=np.int64))

    def merge(self) -> None:
        """Puts the shards of every repeat into one file each, which reads faster.

        Shards go only after the merged file is on disk, so a kill at any moment loses nothing,
        and calling it again finishes the work. Raises InputError naming a damaged file.
        """
        with clear_disk_errors(self.path), folder_lock(self.path):
            for repeat in self._repeats():
                shards = self._shard_paths(repeat)
                before = {path: _identity(path) for path in shards.values()}
                if before:
                    self._write_merged(repeat, self._read_rows(repeat))
                for path, identity in before.items():
                    # A label written again meanwhile is newer than the merged one: it stays.
                    if _identity(path) == identity:
                        path.unlink()

    def add_merged(self, losses: Mapping[int, np.ndarray], repeat: int = 0) -> None:
        """Adds many labels in one file; losses (targets,) by number, NaN where missing."""
        with clear_disk_errors(self.path), folder_lock(self.path):
            self._write_merged(repeat, self._read_rows(repeat) | dict(losses))

    def _write_merged(self, repeat: int, rows: Mapping[int, np.ndarray]) -> None:
        numbers = np.asarray(sorted(rows), dtype=np.int64)
        losses = np.stack([rows[number] for number in numbers.tolist()])
        shard = Shard(numbers, losses, *self._notes(repeat))
        write_bytes_atomic(self._merged_path(repeat), shard_bytes(shard))

    def _read_rows(self, repeat: int) -> dict[int, np.ndarray]:
        """Losses (targets,) by number. A shard wins over the merged file: it can only be newer."""
        single = {}
        for number, path in self._shard_paths(repeat).items():
            shard = read_shard(path, self.target_count)
            if shard is None:  # merged away since it was listed
                continue
            if shard.numbers.tolist() != [number]:
                raise InputError(
                    f"{path} holds another subset's losses; delete it and run the same labels "
                    "command again."
                )
            single[number] = shard.losses[0]
        merged = self._read_merged(repeat)
        if merged is None:
            return single
        return dict(zip(merged.numbers.tolist(), merged.losses, strict=True)) | single

    def _read_merged(self, repeat: int) -> Shard | None:
        return read_shard(self._merged_path(repeat), self.target_count)

    def _merged_path(self, repeat: int) -> Path:
        return self.path / "losses" / f"merged-r{repeat}.safetensors"

    def _shard_path(self, number: int, repeat: int) -> Path:
        return self.path / "losses" / shard_name(number, repeat)

    def _shards(self) -> dict[tuple[int, int], Path]:
        """Single shards by (number, repeat), in plan order; other files are passed over."""
        named = {parse_shard_name(path.name): path for path in (self.path / "losses").iterdir()}
        return {
            name: named[name] for name in sorted(filter(None, named)) if name[0] < len(self.subsets)
        }

    def _shard_paths(self, repeat: int) -> dict[int, Path]:
        """Single shards of one repeat by number, in plan order."""
        return {number: path for (number, own), path in self._shards().items() if own == repeat}

    def _repeats(self) -> list[int]:
        return sorted({repeat for _, repeat in self._shards()})


def fingerprint_labels(store: LabelStore, labels: Iterable[Labels]) -> str:
    """sha256 of what a store's labels are of and of some of them, merged into one file or not."""
    digest = hashlib.sha256(json.dumps(store.fingerprint, sort_keys=True).encode())
    for read in labels:
        digest.update(read.numbers.tobytes() + read.losses.tobytes())
    return digest.hexdigest()


def import_npz(
    npz_path: str | Path,
    store_path: str | Path,
    fingerprint: Mapping[str, str],
    about: Mapping[str, Any],
    losses_key: str = "losses",
    subsets_key: str = "subsets",
) -> LabelStore:
    """A label store from a .npz file: subsets (subsets, size) of pool rows and losses
    (subsets, targets); losses that are not finite are missing labels.

    Raises InputError for a file that is not one, missing arrays, wrong shapes, and a store made
    for something else.
    """
    subsets, losses = read_npz(Path(npz_path), subsets_key, losses_key)
    store = LabelStore.create(store_path, fingerprint, list(subsets), losses.shape[1], about)
    losses = np.where(np.isfinite(losses), losses, np.nan).astype(np.float32)
    store.add_merged(dict(enumerate(losses)))
    return store


def _check_same(
    path: Path, wanted: Mapping[str, str], target_count: int, about: Mapping[str, Any]
) -> None:
    try:
        check_same(path, read_manifest(path), wanted, target_count, about)
    except InputError as error:
        if any((path / "losses").glob("*.safetensors")):
            raise
        raise InputError(f"{error} It has no labels yet: delete it, if you like.") from None


def _make_folder(path: Path) -> None:
    try:
        with clear_disk_errors(path):
            (path / "losses").mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{path} is not a folder; give another for the labels.") from None


def _identity(path: Path) -> tuple[int, int]:
    """Tells a file from one that replaced it."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns
