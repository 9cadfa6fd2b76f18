"""The folder of one run: which file is where."""

from dataclasses import dataclass
from pathlib import Path

from airrep.examples import Example, InputError, fingerprint_examples
from airrep.label_store import LabelStore
from airrep.reading import read_examples


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run's folder, and what is read from them."""

    path: Path

    @property
    def pool_file(self) -> Path:
        return self.path / "pool.jsonl"

    def targets_file(self, split: str) -> Path:
        """`split` is "train" or "test"."""
        return self.path / f"{split}_targets.jsonl"

    def labels(self, split: str) -> Path:
        return self.path / f"{split}_labels"

    @property
    def encoder(self) -> Path:
        return self.path / "encoder"

    @property
    def warm_up(self) -> Path:
        return self.path / "warm_up"

    def method(self, name: str) -> Path:
        """The folder of a method that `airrep fit` saved."""
        return self.path / "methods" / name

    @property
    def results_file(self) -> Path:
        return self.path / "results.json"

    @property
    def page_file(self) -> Path:
        return self.path / "index.html"

    @property
    def scores(self) -> Path:
        return self.path / "scores"

    def scores_file(self, method: str) -> Path:
        return self.scores / f"{method}.npy"

    def read_pool(self) -> list[Example]:
        return self._read(self.pool_file)

    def read_targets(self, split: str) -> list[Example]:
        return self._read(self.targets_file(split))

    def read_labelled(self, split: str, store: LabelStore) -> tuple[list[Example], list[Example]]:
        """The pool and a split's targets; raises InputError unless `store` is of these examples."""
        pool, targets = self.read_pool(), self.read_targets(split)
        file = self.foreign_file(split, store, pool, targets)
        if file is not None:
            raise InputError(
                f"{file} does not hold the examples that the labels in {store.path} are of; "
                "run `airrep subsets` to write it again."
            )
        return pool, targets

    def foreign_file(
        self, split: str, store: LabelStore, pool: list[Example], targets: list[Example]
    ) -> Path | None:
        """The file, of the pool's and the split's targets', that `store` is not of; else None."""
        for key, path, examples in (
            ("examples", self.pool_file, pool),
            ("targets", self.targets_file(split), targets),
        ):
            if store.fingerprint.get(key) != fingerprint_examples(examples):
                return path
        return None

    def open_labels(self, split: str) -> LabelStore:
        """The store of a split; raises InputError naming the command that makes it."""
        if not self.labels(split).is_dir():
            raise InputError(f"{self.labels(split)} is not there yet; run `airrep labels` first.")
        return LabelStore.open(self.labels(split))

    def _read(self, path: Path) -> list[Example]:
        if not path.is_file():
            raise InputError(f"{path} is not there yet; run `airrep subsets` first.")
        return read_examples(path)
