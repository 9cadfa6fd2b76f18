"""The binary files of a label store: the plan, shards of losses, and imported arrays."""

import errno
import hashlib
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from airrep.examples import InputError

_SHARD_NAME = re.compile(r"(\d{6,})-r(\d+)\.safetensors")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class Shard:
    """Losses (labels, targets) float32 of the subsets `numbers` (labels,) int64.

    `attempts` counts, by number, the trainings that had diverged before this one; `seconds` is
    what making a label took, where that is known.
    """

    numbers: np.ndarray
    losses: np.ndarray
    attempts: Mapping[int, int] = field(default_factory=dict)
    seconds: Mapping[int, float] = field(default_factory=dict)

    def checksum(self) -> str:
        return _checksum(self.numbers, self.losses)


def shard_name(number: int, repeat: int) -> str:
    """The file name of one label: a subset's number and its repeat."""
    return f"{number:06d}-r{repeat}.safetensors"


def parse_shard_name(name: str) -> tuple[int, int] | None:
    """(number, repeat) of a file name; None for any other file (leftovers of a kill, merged)."""
    match = _SHARD_NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def shard_bytes(shard: Shard) -> bytes:
    """A safetensors file that carries its own checksum."""
    arrays = {"numbers": shard.numbers, "losses": np.ascontiguousarray(shard.losses)}
    about = {"sha256": shard.checksum(), "attempts": shard.attempts, "seconds": shard.seconds}
    # One key: safetensors writes several in an order of its own, another in every process.
    return save(arrays, metadata={"about": json.dumps(about, sort_keys=True)})


def is_whole(path: Path) -> bool:
    """Whether the file is there and as long as its header says; contents are not read."""
    try:
        with safe_open(path, framework="numpy") as file:
            return set(file.keys()) == {"numbers", "losses"}
    except (OSError, SafetensorError):
        return False


def read_shard(path: Path, target_count: int) -> Shard | None:
    """A shard, None when there is no such file; raises InputError when it is damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            sha256, attempts, seconds = _read_about(file.metadata() or {})
            shard = Shard(file.get_tensor("numbers"), file.get_tensor("losses"), attempts, seconds)
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, str(error)) from None
    if sha256 != shard.checksum():
        raise _damaged(path, "its checksum does not match")
    if shard.losses.shape != (len(shard.numbers), target_count):
        raise _damaged(path, f"losses {shard.losses.shape} for {target_count} targets")
    return shard


def _read_about(metadata: Mapping[str, str]) -> tuple[str, dict[int, int], dict[int, float]]:
    """The checksum, and the attempts and the seconds by number, that a shard names."""
    if "about" in metadata:
        about = json.loads(metadata["about"])
        sha256, attempts = about["sha256"], about["attempts"]
    else:  # as earlier shards have it
        about = {}
        sha256, attempts = metadata["sha256"], json.loads(metadata.get("attempts", "{}"))
    return (
        sha256,
        {int(number): int(count) for number, count in attempts.items()},
        {int(number): float(spent) for number, spent in about.get("seconds", {}).items()},
    )


def fingerprint_plan(subsets: Sequence[np.ndarray]) -> str:
    """sha256 of the subsets, their rows and their order."""
    return _checksum(*_flat_plan(subsets))


def plan_bytes(subsets: Sequence[np.ndarray]) -> bytes:
    """The plan as a safetensors file: all rows in a line, and the length of each subset."""
    rows, lengths = _flat_plan(subsets)
    return save({"rows": rows, "lengths": lengths})


def read_plan(path: Path) -> list[np.ndarray]:
    """What `plan_bytes` packed; raises InputError when the file is missing or damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            rows, lengths = file.get_tensor("rows"), file.get_tensor("lengths")
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); make the labels again in an empty folder."
        ) from None
    return np.split(rows, np.cumsum(lengths)[:-1])


def read_npz(path: Path, subsets_key: str, losses_key: str) -> tuple[np.ndarray, np.ndarray]:
    """Subsets (subsets, size) and losses (subsets, targets) of a .npz file; never unpickles.

    Raises InputError for a missing file, missing arrays and wrong shapes.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = [key for key in (subsets_key, losses_key) if key not in arrays]
            if missing:
                raise InputError(
                    f"{path} has no array {missing[0]!r}; it has {', '.join(arrays)}. "
                    "Name the arrays with subsets_key and losses_key."
                )
            subsets, losses = arrays[subsets_key], arrays[losses_key]
    except FileNotFoundError:
        raise InputError(f"There is no file {path}; check the path.") from None
    except InputError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not a .npz file of plain arrays ({error}).") from None
    if subsets.ndim != 2 or not np.issubdtype(subsets.dtype, np.integer):
        raise InputError(
            f"{path} has {subsets_key} of shape {subsets.shape} and type {subsets.dtype}; "
            "integer pool rows (subsets, size) are needed."
        )
    if losses.ndim != 2 or len(losses) != len(subsets) or losses.dtype.kind != "f":
        raise InputError(
            f"{path} has {losses_key} of shape {losses.shape} and type {losses.dtype}; "
            f"float losses ({len(subsets)} subsets, targets) are needed."
        )
    return subsets, losses


@contextmanager
def clear_disk_errors(folder: Path) -> Iterator[None]:
    """Turns a full disk and missing rights into an InputError."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise InputError(
                f"The disk is full: {folder} took no more ({error.strerror}). Labels that were "
                "finished are kept; free some space and run the same labels command again."
            ) from error
        if error.errno in _CLOSED:
            raise InputError(
                f"{folder} cannot be written ({error.strerror}); give a folder you may write to."
            ) from error
        raise


def _flat_plan(subsets: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.asarray([len(subset) for subset in subsets], dtype=np.int64)
    rows = np.concatenate([np.asarray(subset, dtype=np.int64) for subset in subsets])
    return rows, lengths


def _checksum(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path} is damaged ({reason}); delete it and run the same labels command again."
    )
