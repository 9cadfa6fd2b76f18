"""The files of an embedding index: what it is of, the texts by row, the embeddings.

index/index.json        what the index is of; written after the texts, before the embeddings
index/texts.jsonl       the examples, a line each
index/offsets.npy       where each line begins and the last one ends, (count + 1,) int64
index/embeddings.npy    (count, dimension); its length tells which rows are written
index/lists.faiss       only for approximate search
"""

import hashlib
import io
import json
import mmap
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from airrep.examples import Example, InputError
from airrep.provenance import write_bytes_atomic

FORMAT = 1
ABOUT, TEXTS, OFFSETS, EMBEDDINGS = "index.json", "texts.jsonl", "offsets.npy", "embeddings.npy"
LISTS, LOCK = "lists.faiss", "lock"
_KEYS = {"count": int, "dimension": int, "dtype": str, "encoder": dict, "examples": dict}
_AGAIN = "delete the folder and run the same index command again"


def damaged(path: Path, reason: str) -> InputError:
    """The error for a file that is not what was written."""
    return InputError(f"{path} is damaged ({reason}); {_AGAIN}.")


def read_about(folder: Path) -> dict[str, Any]:
    """index.json of an index; raises InputError when the folder is none."""
    path = folder / ABOUT
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{folder} is not an index (it has no {ABOUT}); give the folder that `airrep index` "
            "wrote."
        ) from None
    except ValueError as error:
        raise damaged(path, str(error)) from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else None
        raise InputError(f"{path} has format {found!r}, but this version reads {FORMAT}; {_AGAIN}.")
    for key, kind in _KEYS.items():
        if not isinstance(about.get(key), kind):
            raise damaged(path, f"it has no usable {key!r}")
    return about


def check_unused(folder: Path) -> None:
    """Raises InputError when the folder holds what no unfinished index leaves behind."""
    ours = {TEXTS, OFFSETS, EMBEDDINGS, LOCK}
    others = [name for name in sorted(os.listdir(folder)) if name not in ours]
    others = [name for name in others if not name.endswith(".tmp")]
    if others:
        raise InputError(
            f"{folder} holds other files (first: {others[0]}); give a new or empty folder for the "
            "index."
        )


def hash_texts(examples: Iterable[Example]) -> tuple[int, str]:
    """How many examples there are, and the sha256 of the file that `write_texts` would write."""
    digest, count = hashlib.sha256(), 0
    for line in _lines(examples):
        digest.update(line)
        count += 1
    return count, digest.hexdigest()


def write_texts(folder: Path, examples: Iterable[Example]) -> tuple[int, str]:
    """Writes the texts and their offsets, one example in memory at a time; as `hash_texts`."""
    digest, offsets = hashlib.sha256(), array("q", [0])
    unfinished = folder / f"{TEXTS}.tmp"
    with unfinished.open("wb") as file:
        for line in _lines(examples):
            file.write(line)
            digest.update(line)
            offsets.append(offsets[-1] + len(line))
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, folder / TEXTS)
    packed = io.BytesIO()
    np.save(packed, np.asarray(offsets, dtype="<i8"))
    write_bytes_atomic(folder / OFFSETS, packed.getvalue())
    return len(offsets) - 1, digest.hexdigest()


class Texts:
    """The examples of an index, read one by one from the disk."""

    def __init__(self, folder: Path, count: int) -> None:
        """Raises InputError when a file is missing or not as long as it should be."""
        self.path = folder / TEXTS
        try:
            self.offsets = np.load(folder / OFFSETS, mmap_mode="r", allow_pickle=False)
            with self.path.open("rb") as file:
                self.content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise InputError(
                f"The texts of the index {folder} cannot be read ({error}); {_AGAIN}."
            ) from None
        if self.offsets.shape != (count + 1,) or self.offsets.dtype != np.int64:
            raise damaged(folder / OFFSETS, f"{self.offsets.shape} offsets for {count} examples")
        if len(self.content) != self.offsets[-1]:
            raise damaged(self.path, f"{len(self.content)} bytes, not {self.offsets[-1]}")

    def __getitem__(self, row: int) -> Example:
        line = self.content[self.offsets[row] : self.offsets[row + 1]]
        try:
            return Example(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise damaged(self.path, f"row {row}: {error}") from None


class EmbeddingFile:
    """embeddings.npy while it grows: a .npy file of (count, dimension) that rows are added to."""

    def __init__(self, path: Path, dtype: str, shape: tuple[int, int]) -> None:
        self.path = path
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.shape = shape
        header = io.BytesIO()
        about = {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, about)
        self.header = header.getvalue()
        self.row_bytes = self.dtype.itemsize * shape[1]

    def create(self) -> None:
        """Writes the file with no rows."""
        write_bytes_atomic(self.path, self.header)

    def written(self) -> int:
        """How many rows are there, the first ones; raises InputError for another file."""
        try:
            with self.path.open("rb") as file:
                header = file.read(len(self.header))
            rows = (self.path.stat().st_size - len(self.header)) // self.row_bytes
        except OSError as error:
            raise damaged(self.path, str(error.strerror)) from None
        if header != self.header or rows > self.shape[0]:
            raise damaged(self.path, f"it is not a {self.dtype} array of shape {self.shape}")
        return rows

    def append(self, start: int, rows: np.ndarray) -> None:
        """Writes rows (n, dimension) from row `start` on; they last when this returns."""
        with self.path.open("r+b") as file:
            file.truncate(len(self.header) + start * self.row_bytes)
            file.seek(0, os.SEEK_END)
            file.write(rows.astype(self.dtype).tobytes())
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> np.ndarray:
        """All rows, memory-mapped; raises InputError when some are missing."""
        rows = self.written()
        if rows < self.shape[0]:
            raise InputError(
                f"The index {self.path.parent} is not finished: {rows:,} of {self.shape[0]:,} "
                "embeddings are written; run the same index command again."
            )
        if self.path.stat().st_size != len(self.header) + rows * self.row_bytes:
            raise damaged(self.path, "it is too long")
        return np.asarray(np.load(self.path, mmap_mode="c", allow_pickle=False))


def _lines(examples: Iterable[Example]) -> Iterator[bytes]:
    for example in examples:
        row = vars(example) | {"meta": dict(example.meta)}
        text = json.dumps(row, ensure_ascii=False, default=str) + "\n"
        # Ids may hold what UTF-8 cannot write; json reads it back.
        yield text.encode("utf-8", "surrogatepass")
