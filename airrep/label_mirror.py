"""A copy of a label store behind any fsspec URL, for workers that share no disk.

The mirror holds single shards under the names they have in the store, and the files that say what
they belong to. An object store writes a file whole or not at all; elsewhere fsspec writes under a
temporary name first.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from airrep.examples import InputError
from airrep.label_files import Shard, is_whole, parse_shard_name, shard_bytes, shard_name
from airrep.label_manifest import check_same, read_manifest
from airrep.label_store import LabelStore
from airrep.provenance import write_bytes_atomic

ABOUT = ("subsets.safetensors", "manifest.json")  # the manifest last: with it, a mirror is one


class LabelMirror:
    """The labels of one store at a URL such as s3://bucket/run/train_labels.

    Raises InputError for a URL whose file system is unknown, not installed or not to be reached,
    for a folder of this machine whose parent does not exist, and for a URL that holds labels of
    something else.
    """

    def __init__(self, store: LabelStore, url: str) -> None:
        self.store, self.url = store, url.rstrip("/")
        try:
            from fsspec.core import url_to_fs

            self.files, self.root = url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise InputError(f"The mirror {url!r} cannot be used: {error}.") from None
        self._check_parent()
        with self._reached():
            self._join()

    def sync(self, repeats: Sequence[int] = (0, 1)) -> int:
        """Takes the labels that only the mirror has and gives it those that only the store has;
        returns how many were taken."""
        taken = 0
        with self._reached():
            there = self._names()
            for repeat in repeats:
                mirrored = {number for number, other in there if other == repeat}
                local = self.store.done(repeat)
                taken += sum(self._take(number, repeat) for number in sorted(mirrored - local))
                self._give(sorted(local - mirrored), repeat)
        return taken

    def put(self, number: int, repeat: int) -> None:
        """Gives the mirror a label that was just made."""
        name = shard_name(number, repeat)
        with self._reached():
            self._write(f"losses/{name}", (self.store.path / "losses" / name).read_bytes())

    def _check_parent(self) -> None:
        """Refuses a folder of this machine in one that is not there: mistyped, or not mounted."""
        from fsspec.implementations.local import LocalFileSystem

        parent = Path(self.root).parent
        if isinstance(self.files, LocalFileSystem) and not parent.is_dir():
            raise InputError(
                f"The mirror {self.url} would be in {parent}, which is not a folder that exists; "
                "check the path (a file URL is file:///folder), or make that folder first."
            )

    def _join(self) -> None:
        """Checks that the mirror is of this store's labels, or makes it so when it is new."""
        if self.files.exists(f"{self.root}/manifest.json"):
            with TemporaryDirectory() as folder:
                copy = Path(folder)
                (copy / "manifest.json").write_bytes(self._read("manifest.json"))
                manifest = read_manifest(copy)
            mine = self.store.manifest
            check_same(self.url, manifest, mine["fingerprint"], mine["target_count"], mine["about"])
            return
        for name in ABOUT:
            self._write(name, (self.store.path / name).read_bytes())

    def _names(self) -> set[tuple[int, int]]:
        """(number, repeat) of every label in the mirror."""
        self.files.invalidate_cache()
        try:
            found = self.files.ls(f"{self.root}/losses", detail=False)
        except FileNotFoundError:
            return set()
        names = {parse_shard_name(str(path).rpartition("/")[2]) for path in found}
        return {name for name in names if name and name[0] < len(self.store.subsets)}

    def _take(self, number: int, repeat: int) -> bool:
        """Whether the mirror's label could be taken; one that is not whole stays there."""
        name = shard_name(number, repeat)
        content = self._read(f"losses/{name}")
        with TemporaryDirectory() as folder:
            copy = Path(folder) / name
            copy.write_bytes(content)
            if not is_whole(copy):
                return False
        write_bytes_atomic(self.store.path / "losses" / name, content)
        return True

    def _give(self, numbers: Sequence[int], repeat: int) -> None:
        if not numbers:
            return
        labels = self.store.read(repeat)
        attempts, seconds = self.store.attempts(repeat), self.store.seconds(repeat)
        columns = {number: column for column, number in enumerate(labels.numbers.tolist())}
        for number in numbers:
            shard = Shard(
                np.asarray([number], dtype=np.int64),
                labels.losses[:, columns[number]][None],
                {number: attempts[number]} if number in attempts else {},
                {number: seconds[number]} if number in seconds else {},
            )
            self._write(f"losses/{shard_name(number, repeat)}", shard_bytes(shard))

    def _read(self, name: str) -> bytes:
        return self.files.cat_file(f"{self.root}/{name}")

    def _write(self, name: str, content: bytes) -> None:
        path = f"{self.root}/{name}"
        self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
        with self.files.transaction:
            self.files.pipe_file(path, content)

    @contextmanager
    def _reached(self) -> Iterator[Any]:
        """Whatever a file system raises becomes an InputError that names the mirror."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # every file system has kinds of its own
            raise InputError(
                f"The mirror {self.url} cannot be reached ({type(error).__name__}: {error}); "
                "labels made so far are kept here, and the same command goes on."
            ) from error
