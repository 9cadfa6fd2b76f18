"""Gradient features of many examples: rows on disk or in memory, written in any order.

folder/manifest.json   format, shape, dtype, and what the features depend on
folder/features.bin    one record a row: two float32 (scale, doubt), then the numbers
folder/written.bin     one byte a row: 1 once its record is safe on disk

A killed writer loses the rows it was making. Several processes of one machine may write rows of
their own at the same time.
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from airrep.choices import check_choice
from airrep.examples import InputError
from airrep.provenance import folder_lock, fsync, write_bytes_atomic, write_json_atomic

FORMAT = 1
HEADER = 8  # bytes of a record before its numbers
BLOCK_BYTES = 2**26  # of float32 features read at once
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}


class GradientStore:
    """Features (rows, width) with one more number a row, `doubt` (see `BatchGradients`).

    Stored as `dtype`: float32, float16, bfloat16, or int8 with a scale of each row's largest
    number / 127, so that a number is off by at most half of that. Without a folder the rows are in
    memory; `records` are then those of a finished store. `about` is all that the features depend
    on, in words or hashes.

    Raises InputError for an unknown dtype, and for a folder that is damaged or was made for
    something else, with both sides of what differs.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        about: Mapping[str, Any],
        folder: Path | None = None,
        dtype: str = "float32",
        records: np.ndarray | None = None,
    ) -> None:
        check_choice("store_dtype", dtype, DTYPES)
        self.rows, self.width, self.dtype, self.folder = rows, width, dtype, folder
        self.about = json.loads(json.dumps(dict(about), default=str))
        self.row_bytes = HEADER + width * DTYPES[dtype].itemsize
        if folder is None:
            empty = np.zeros((rows, self.row_bytes), dtype=np.uint8)
            self.records = empty if records is None else records
            self._written = np.full(rows, records is not None, dtype=np.uint8)
            return
        if not (folder / "manifest.json").is_file():
            self._create(folder)
        self._check_manifest(folder)
        self.records = _map(folder / "features.bin", (rows, self.row_bytes))
        self._written = _map(folder / "written.bin", (rows,))

    def keep(self, name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Arrays that the features depend on: made once, and kept beside them in the folder.

        Raises InputError for a damaged file.
        """
        if self.folder is None:
            return make()
        path = self.folder / f"{name}.safetensors"
        with folder_lock(self.folder):  # of several processes one makes them
            if not path.is_file():
                # safetensors takes the bytes as they lie.
                arrays = {key: np.ascontiguousarray(array) for key, array in make().items()}
                write_bytes_atomic(path, save(arrays))
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise _damaged(path, str(error)) from None

    def missing(self) -> np.ndarray:
        """The rows (n,) that are not written yet."""
        return np.flatnonzero(self._written == 0)

    def write(self, rows: np.ndarray, features: torch.Tensor, doubt: torch.Tensor) -> None:
        """Stores features (n, width) and doubts (n,) as these rows; they last when this returns.

        Raises InputError for features that are not finite, or too large for the dtype.
        """
        records = self._encode(features, doubt)
        if self.folder is None:
            self.records[rows], self._written[rows] = records, 1
            return
        _write_rows(self.folder / "features.bin", rows, records)
        _write_rows(self.folder / "written.bin", rows, np.ones((len(rows), 1), dtype=np.uint8))

    def blocks(self, device: str | torch.device = "cpu") -> Iterator[tuple[slice, torch.Tensor]]:
        """All features in blocks: which rows, and their float32 features (n, width).

        Raises InputError when rows are missing.
        """
        if len(self.missing()):
            raise InputError(
                f"The features in {self.folder} are not finished: {len(self.missing()):,} of "
                f"{self.rows:,} rows are missing; fit the same method again."
            )
        step = max(1, BLOCK_BYTES // (4 * self.width))
        for start in range(0, self.rows, step):
            rows = slice(start, min(start + step, self.rows))
            values = _numbers(self.records[rows, HEADER:], DTYPES[self.dtype]).to(device).float()
            if self.dtype == "int8":
                values *= _numbers(self.records[rows, :4], torch.float32).to(device)
            yield rows, values

    def row(self, number: int) -> torch.Tensor:
        """One row's features (width,), as they were stored."""
        return _numbers(self.records[number : number + 1, HEADER:], DTYPES[self.dtype])[0]

    def products(self, queries: torch.Tensor) -> np.ndarray:
        """Dot products (n, rows) float32 of queries (n, width) with every row, on their device."""
        found = np.empty((len(queries), self.rows), dtype=np.float32)
        for rows, values in self.blocks(queries.device):
            found[:, rows] = (queries @ values.T).cpu().numpy()
        return found

    def doubts(self) -> np.ndarray:
        """The doubt (rows,) float32 of every row."""
        return _numbers(self.records[:, 4:HEADER], torch.float32).numpy()[:, 0]

    def _encode(self, features: torch.Tensor, doubt: torch.Tensor) -> np.ndarray:
        """Records (n, row_bytes) of rows."""
        values = features.detach().float().cpu()
        scale = torch.ones(len(values))
        if self.dtype == "int8":
            scale = values.abs().amax(1) / 127
            values = (values / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round()
        stored = values.to(DTYPES[self.dtype]).contiguous()
        if not (stored.isfinite().all() and scale.isfinite().all()):
            raise InputError(
                f"Gradient features are not finite as {self.dtype}; check the model's weights, or "
                "store them as float32."
            )
        header = torch.stack([scale, doubt.float().cpu()], dim=1)
        record = torch.cat([header.view(torch.uint8), stored.view(torch.uint8)], dim=1)
        return record.numpy()

    def _create(self, folder: Path) -> None:
        """Makes an empty store under a temporary name; the first of several processes wins."""
        new = folder.with_name(f".{folder.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
        try:
            new.mkdir(parents=True)
            for name, size in (("features", self.rows * self.row_bytes), ("written", self.rows)):
                with (new / f"{name}.bin").open("wb") as file:
                    file.truncate(size)
            write_json_atomic(new / "manifest.json", self._manifest())
            new.rename(folder)
            fsync(folder.parent)
        except OSError as error:
            if not (folder / "manifest.json").is_file():
                raise InputError(
                    f"{folder} cannot be made a folder of features ({error.strerror}); give "
                    "another."
                ) from error
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def _manifest(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "rows": self.rows,
            "width": self.width,
            "dtype": self.dtype,
            "about": self.about,
        }

    def _check_manifest(self, folder: Path) -> None:
        path, mine = folder / "manifest.json", self._manifest()
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            there = {**found, **found["about"]}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise _damaged(path, str(error)) from None
        now = {**mine, **self.about}
        differences = [
            f"{key} is {there.get(key)} in the folder, {now.get(key)} now"
            for key in sorted({*there, *now} - {"about"})
            if there.get(key) != now.get(key)
        ]
        if differences:
            raise InputError(
                f"The features in {folder} are of something else: {'; '.join(differences)}. Give "
                "another folder, or the same model, data and settings as before."
            )


def _numbers(records: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """A part of records (n, bytes) as the numbers it is."""
    return torch.from_numpy(np.array(records, order="C")).view(dtype)


def _map(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A file of bytes, memory-mapped for reading; it shows what other processes write."""
    try:
        if path.stat().st_size != np.prod(shape):
            raise _damaged(path, f"it has {path.stat().st_size:,} bytes, not {np.prod(shape):,}")
        return np.memmap(path, dtype=np.uint8, mode="r", shape=shape)
    except OSError as error:
        raise _damaged(path, str(error.strerror)) from None


def _write_rows(path: Path, rows: np.ndarray, records: np.ndarray) -> None:
    """Writes bytes (n, size) as these rows of a file; not through the map, which would crash on a
    full disk."""
    with path.open("r+b") as file:
        for row, record in zip(rows.tolist(), records, strict=True):
            file.seek(row * records.shape[1])
            file.write(record.tobytes())
        file.flush()
        os.fsync(file.fileno())


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path} is damaged ({reason}); delete the folder {path.parent} and fit again."
    )
