"""The contract every attribution method keeps: fit a pool, score targets against it."""

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike

from airrep.examples import Example, InputError, fingerprint_examples
from airrep.provenance import installed_versions, write_bytes_atomic, write_json_atomic

POOLINGS = ("sum", "attention")
FORMAT = 1
ATTENTION_BLOCK = 2**24  # scores pooled at once: bounds the memory of the attention weights


class NotApplicableError(InputError):
    """A method that has nothing to go by here: examples without tasks, a package not installed."""


@dataclass(frozen=True)
class Ranking:
    """The ends of every target's ranking of the pool; all arrays are (targets, k).

    Helpful rows come highest score first, harmful rows lowest score first; equal scores keep
    pool order. Rows are int64 pool rows, scores float32.
    """

    helpful_rows: np.ndarray
    helpful_scores: np.ndarray
    harmful_rows: np.ndarray
    harmful_scores: np.ndarray


class Attributor(ABC):
    """Scores how much each pool example helps each target: higher = lowers the target's loss.

    A method writes `_fit`, `_score`, `_state` and `_restore`; this class checks what goes in and
    out. Constructors only store their arguments, `fit` sets names ending in `_`.
    """

    name: ClassVar[str]
    oracle: ClassVar[bool] = False  # knows something (the task) that text methods have to infer
    learns: ClassVar[bool] = False  # from labels: fine-tuning runs that gradients do without
    poolings: ClassVar[Sequence[str]] = POOLINGS
    pooling: str = "sum"

    pool_size_: int
    pool_fingerprint_: str

    def fit(self, pool: Sequence[Example]) -> Self:
        """Learns the pool, in its order; returns self.

        Raises InputError for an empty pool or an unknown `pooling`.
        """
        if len(pool) == 0:
            raise InputError(f"{self.name} got an empty pool; give it at least one example.")
        if self.pooling not in self.poolings:
            known = ", ".join(self.poolings)
            raise InputError(f"{self.name} got pooling {self.pooling!r}; choose one of {known}.")
        self._fit(pool)
        self.pool_size_ = len(pool)
        self.pool_fingerprint_ = fingerprint_examples(pool)
        return self

    def score(self, targets: Sequence[Example]) -> np.ndarray:
        """Scores (targets, pool), float32; higher = more helpful.

        Raises InputError before `fit`, for no targets, and for scores that are not finite.
        """
        self._check_fitted()
        if len(targets) == 0:
            raise InputError(f"{self.name} got no targets; give it at least one example.")
        scores = np.asarray(self._score(targets), dtype=np.float32)
        assert scores.shape == (len(targets), self.pool_size_), scores.shape
        broken = np.flatnonzero(~np.isfinite(scores).all(axis=1))
        if len(broken):
            raise InputError(
                f"{self.name} gave scores that are not finite for {len(broken)} of {len(targets)} "
                f"targets (first: {targets[broken[0]].id!r}); check the weights it was built with."
            )
        return scores

    def score_subsets(
        self,
        targets: Sequence[Example],
        subsets: Sequence[ArrayLike],
        scores: np.ndarray | None = None,
    ) -> np.ndarray:
        """Scores (targets, subsets), float32, of training on each subset of pool rows.

        Additive by default, a row that occurs twice counts twice; `pooling="attention"` weighs
        rows by softmax |score| inside the subset. Give `scores` (what `score(targets)` returned)
        to save scoring again. Raises InputError for empty subsets and rows outside the pool.
        """
        self._check_fitted()
        rows = check_subsets(subsets, self.pool_size_)
        if scores is None:
            scores = self.score(targets)
        return _pool_attention(scores, rows) if self.pooling == "attention" else _sum(scores, rows)

    def rank(self, targets: Sequence[Example], k: int, scores: np.ndarray | None = None) -> Ranking:
        """The k most and least helpful pool rows of each target (all rows when k > pool)."""
        self._check_fitted()
        if k < 1:
            raise InputError(f"rank got k = {k}; ask for at least one row.")
        if scores is None:
            scores = self.score(targets)
        helpful = np.stack([top_rows(row, k) for row in scores])
        harmful = np.stack([top_rows(-row, k) for row in scores])
        return Ranking(
            helpful,
            np.take_along_axis(scores, helpful, axis=1),
            harmful,
            np.take_along_axis(scores, harmful, axis=1),
        )

    @property
    def fits_late(self) -> bool:
        """Whether the work on the pool is done when targets are scored, each time again."""
        return False

    @property
    def bytes_per_example(self) -> int:
        """Bytes of fitted state per pool example, rounded up; model weights are not counted."""
        self._check_fitted()
        return -(-sum(array.nbytes for array in self._state().values()) // self.pool_size_)

    def params(self) -> dict[str, Any]:
        """The constructor's arguments by name."""
        return {key: getattr(self, key) for key in inspect.signature(type(self)).parameters}

    def save(self, path: str | Path) -> None:
        """Writes the folder `path`: attributor.json and state.safetensors."""
        self._check_fitted()
        from safetensors.numpy import save

        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        # attributor.json goes first and comes back last: with it, the folder is complete.
        (folder / "attributor.json").unlink(missing_ok=True)
        state = {key: np.ascontiguousarray(array) for key, array in self._state().items()}
        write_bytes_atomic(folder / "state.safetensors", save(state))
        self._save_parts(folder)
        about = {
            "format": FORMAT,
            "name": type(self).name,
            "params": self._saved_params(),
            "pool_size": self.pool_size_,
            "pool_fingerprint": self.pool_fingerprint_,
            "versions": installed_versions(),
        }
        write_json_atomic(folder / "attributor.json", about)

    @classmethod
    def load(cls, path: str | Path, **changes: Any) -> Self:
        """Reads a folder written by `save`; on the base class, of whichever method wrote it.

        `changes` (device, batch_size, show_progress) go before the arguments that were saved, for
        the method and for its members, where they take them. Raises InputError when the folder is
        not one, is damaged, or holds another method.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        from airrep.attributors import make_attributor

        folder = Path(path)
        about = _read_about(folder)
        attributor = make_attributor(
            about["name"], **_changed(about["name"], about["params"], changes)
        )
        if not isinstance(attributor, cls):
            raise InputError(
                f"{folder} holds the method {about['name']!r}, not {cls.name!r}; "
                "load it with Attributor.load."
            )
        try:
            attributor._restore(load_file(folder / "state.safetensors"))
        except (OSError, KeyError, SafetensorError) as error:
            raise InputError(
                f"{folder / 'state.safetensors'} cannot be read ({error}); fit and save again."
            ) from error
        attributor._load_parts(folder)
        attributor.pool_size_ = int(about["pool_size"])
        attributor.pool_fingerprint_ = str(about["pool_fingerprint"])
        return attributor

    @abstractmethod
    def _fit(self, pool: Sequence[Example]) -> None:
        """Sets the state `_score` needs from a pool that is not empty."""

    @abstractmethod
    def _score(self, targets: Sequence[Example]) -> np.ndarray:
        """Scores (targets, pool) of targets that are not empty."""

    @abstractmethod
    def _state(self) -> dict[str, np.ndarray]:
        """All that `_fit` learned, as arrays."""

    @abstractmethod
    def _restore(self, state: dict[str, np.ndarray]) -> None:
        """Takes back what `_state` gave."""

    def _saved_params(self) -> dict[str, Any]:
        """The arguments worth keeping in attributor.json."""
        return self.params()

    def _save_parts(self, folder: Path) -> None:
        """Writes what is not an array (an encoder) into the folder."""

    def _load_parts(self, folder: Path) -> None:
        """Reads back what `_save_parts` wrote."""

    def _check_fitted(self) -> None:
        if not hasattr(self, "pool_size_"):
            raise InputError(f"{self.name} is not fitted; call fit(pool) first.")


def subset_scores_of(name: str) -> str:
    """What the subset scores of a method are called that pools in a way of its own."""
    return f"{name}@subsets"  # no method or file of scores has such a name


def check_subsets(subsets: Sequence[ArrayLike], pool_size: int) -> list[np.ndarray]:
    """Subsets as int64 arrays of pool rows; InputError for none, empty ones and rows outside."""
    if len(subsets) == 0:
        raise InputError("There are no subsets; give at least one list of pool rows.")
    checked = []
    for number, subset in enumerate(subsets):
        rows = np.asarray(subset)
        if rows.ndim != 1 or rows.size == 0:
            raise InputError(
                f"Subset {number} has shape {rows.shape}; give a list with at least one pool row."
            )
        if not np.issubdtype(rows.dtype, np.integer):
            raise InputError(f"Subset {number} holds {rows.dtype} values; give integer pool rows.")
        outside = rows[(rows < 0) | (rows >= pool_size)]
        if outside.size:
            raise InputError(
                f"Subset {number} has row {outside[0]}, outside the pool of {pool_size}; "
                f"rows go from 0 to {pool_size - 1}."
            )
        checked.append(rows.astype(np.int64))
    return checked


def pack_text(texts: Sequence[str]) -> np.ndarray:
    """Strings as UTF-8 JSON bytes (uint8): a safetensors file holds only arrays."""
    return np.frombuffer(json.dumps(list(texts), ensure_ascii=False).encode(), dtype=np.uint8)


def unpack_text(packed: np.ndarray) -> list[str]:
    """The strings `pack_text` packed."""
    return json.loads(packed.tobytes().decode())


def _changed(name: str, params: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a method with those of `changes` that it takes, and its members likewise."""
    from airrep.attributors import method_class

    takes = inspect.signature(method_class(name)).parameters
    changed = params | {key: value for key, value in changes.items() if key in takes}
    if "members" in changed:
        changed["members"] = [
            (member, _changed(member, own, changes)) for member, own in changed["members"]
        ]
    return changed


def _read_about(folder: Path) -> dict[str, Any]:
    path = folder / "attributor.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{folder} has no attributor.json; give a folder that `airrep fit` wrote."
        ) from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); fit and save again.") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else None
        raise InputError(f"{path} has format {found!r}, this version reads {FORMAT}; save again.")
    return about


def _sum(scores: np.ndarray, subsets: Sequence[np.ndarray]) -> np.ndarray:
    from scipy import sparse

    rows = np.concatenate(subsets)
    columns = np.repeat(np.arange(len(subsets)), [len(subset) for subset in subsets])
    # Building from coordinates adds up repeated rows, so this is the matrix of counts (N, M).
    counts = sparse.csr_array(
        (np.ones(len(rows), dtype=np.float64), (rows, columns)),
        shape=(scores.shape[1], len(subsets)),
    )
    return np.asarray((counts.T @ scores.T).T, dtype=np.float32)


def _pool_attention(scores: np.ndarray, subsets: Sequence[np.ndarray]) -> np.ndarray:
    import torch

    from airrep.pooling import attention_pool, membership

    members = membership(subsets, scores.shape[1])
    block = max(1, ATTENTION_BLOCK // scores.shape[1])
    pooled = [
        attention_pool(torch.from_numpy(scores[start : start + block]), members).numpy()
        for start in range(0, len(scores), block)
    ]
    return np.concatenate(pooled).astype(np.float32, copy=False)


def top_rows(scores: np.ndarray, k: int) -> np.ndarray:
    """The k highest of (N,) scores, highest first, equal scores in pool order, in O(N)."""
    k = min(k, len(scores))
    kth = np.partition(scores, len(scores) - k)[len(scores) - k]
    candidates = np.flatnonzero(scores >= kth)
    order = np.argsort(-scores[candidates], kind="stable")[:k]
    return candidates[order]
