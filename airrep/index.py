"""An index of embeddings on disk: which of millions of examples help or harm a target most."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike
from tqdm.auto import tqdm

from airrep.attributor import Ranking
from airrep.examples import Example, InputError
from airrep.index_files import (
    ABOUT,
    EMBEDDINGS,
    FORMAT,
    LISTS,
    EmbeddingFile,
    Texts,
    check_unused,
    hash_texts,
    read_about,
    write_texts,
)
from airrep.index_search import best_rows, build_lists, search_lists
from airrep.provenance import folder_lock, installed_versions, write_json_atomic

if TYPE_CHECKING:
    from airrep.encoder import AirRepEncoder

DTYPES = ("float32", "float16")
BLOCK_ROWS = 4096  # embeddings written at once: a kill loses at most these


class EmbeddingIndex:
    """Embeddings e(z) of a pool in a folder; the score of a target x is the dot product e(x)·e(z).

    Embeddings are memory-mapped and texts read by row, so the pool may be larger than memory.
    """

    def __init__(
        self, folder: Path, about: dict[str, Any], embeddings: np.ndarray, texts: Texts
    ) -> None:
        self.folder = folder
        self.about = about
        self.embeddings = embeddings
        self.texts = texts

    @classmethod
    def build(
        cls,
        folder: str | Path,
        encoder: AirRepEncoder,
        examples: Iterable[Example],
        *,
        fingerprint: str,
        source: str = "",
        dtype: str | None = None,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> Self:
        """Writes the index of `examples`, or goes on where an earlier call was stopped.

        `examples` may be an iterator: it is read once, one example at a time. `fingerprint` is the
        sha256 of the encoder's weights (`airrep.weights.fingerprint_weights`), `source` says where
        the examples came from. `dtype` is float32 or float16, which halves the file; None is what
        the folder has, or float32. Raises InputError when the folder holds something else, or an
        index of other examples or of another encoder, and for embeddings that are not finite.
        """
        folder = Path(folder)
        wanted: dict[str, Any] = {
            "dimension": encoder.projector.out_features,
            "encoder": {"name": encoder.name_or_path, "sha256": fingerprint},
        }
        if dtype is not None:
            wanted["dtype"] = dtype
        _make_folder(folder, dtype)
        examples = tqdm(examples, desc="texts", unit=" examples", disable=not show_progress)
        with folder_lock(folder):
            if (folder / ABOUT).exists():
                count, digest = hash_texts(examples)
                wanted |= {"count": count, "examples": {"name": source, "sha256": digest}}
                _check_same(folder, read_about(folder), wanted)
            else:
                count, digest = write_texts(folder, examples)
                wanted |= {"count": count, "examples": {"name": source, "sha256": digest}}
                _write_start(folder, {"dtype": DTYPES[0]} | wanted)
            _encode_missing(folder, encoder, batch_size, show_progress)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Opens a finished index; raises InputError for another folder, and a damaged one."""
        folder = Path(folder)
        about = read_about(folder)
        embeddings = _embedding_file(folder, about).read()
        return cls(folder, about, embeddings, Texts(folder, about["count"]))

    def __len__(self) -> int:
        return len(self.embeddings)

    def check_encoder(self, fingerprint: str, name: str) -> None:
        """Raises InputError unless the embeddings were made by the encoder of this fingerprint."""
        _check_same(self.folder, self.about, {"encoder": {"name": name, "sha256": fingerprint}})

    def examples(self, rows: ArrayLike) -> list[Example]:
        """The examples of these rows (n,), in the order asked for."""
        asked = np.asarray(rows, dtype=np.int64)
        outside = asked[(asked < 0) | (asked >= len(self))]
        if outside.size:
            raise InputError(
                f"There is no row {outside[0]} in the index {self.folder}; rows go from 0 to "
                f"{len(self) - 1}."
            )
        return [self.texts[row] for row in asked.tolist()]

    def search(self, targets: ArrayLike, k: int) -> Ranking:
        """The k most helpful and most harmful rows of target embeddings (targets, d), exactly.

        All rows when k > pool. Targets are best given together: the pool is read once a call.
        Raises InputError for k < 1, a wrong shape, and embeddings that are not finite.
        """
        wanted = self._check_targets(targets, k)
        helpful, harmful = best_rows(self.embeddings, wanted, min(k, len(self)))
        return Ranking(*helpful, *harmful)

    def build_lists(self, lists: int | None = None) -> None:
        """Prepares `search_lists`: clusters the pool into `lists` (default: its square root).

        Needs faiss (`pip install faiss-cpu`). Writes a second copy of the embeddings.
        """
        build_lists(self.folder / LISTS, self.embeddings, lists)

    def search_lists(self, targets: ArrayLike, k: int, probes: int = 16) -> Ranking:
        """As `search`, but looks only into the `probes` clusters nearest to each target.

        What it misses is measured by `recall`. Where the clusters hold fewer than k examples, the
        last rows are -1 with score 0. Raises InputError before `build_lists`, and without faiss.
        """
        wanted = self._check_targets(targets, k)
        path = self.folder / LISTS
        helpful, harmful = search_lists(path, self.embeddings, wanted, min(k, len(self)), probes)
        return Ranking(*helpful, *harmful)

    def recall(self, targets: ArrayLike, k: int, probes: int = 16) -> tuple[float, float]:
        """Share of the k truly most (helpful, harmful) rows that `search_lists` finds, 0 to 1."""
        exact, found = self.search(targets, k), self.search_lists(targets, k, probes)
        return (
            _share_found(exact.helpful_rows, found.helpful_rows),
            _share_found(exact.harmful_rows, found.harmful_rows),
        )

    def _check_targets(self, targets: ArrayLike, k: int) -> np.ndarray:
        if k < 1:
            raise InputError(f"search got k = {k}; ask for at least one row.")
        wanted = np.asarray(targets, dtype=np.float32)
        dimension = self.embeddings.shape[1]
        if wanted.ndim != 2 or len(wanted) == 0 or wanted.shape[1] != dimension:
            raise InputError(
                f"search got target embeddings of shape {wanted.shape}; the index {self.folder} "
                f"needs (targets, {dimension}) with at least one target."
            )
        if not np.isfinite(wanted).all():
            raise InputError(
                "search got target embeddings that are not finite; check the encoder's weights."
            )
        return wanted


def _embedding_file(folder: Path, about: dict[str, Any]) -> EmbeddingFile:
    return EmbeddingFile(folder / EMBEDDINGS, about["dtype"], (about["count"], about["dimension"]))


def _make_folder(folder: Path, dtype: str | None) -> None:
    if dtype not in (None, *DTYPES):
        raise InputError(f"The index got dtype {dtype!r}; choose one of {', '.join(DTYPES)}.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{folder} is not a folder; give another for the index.") from None
    if not (folder / ABOUT).exists():
        check_unused(folder)


def _write_start(folder: Path, about: dict[str, Any]) -> None:
    """Writes embeddings.npy without rows, then index.json: from here on a build can go on."""
    if about["count"] == 0:
        raise InputError("The index got no examples; give at least one.")
    _embedding_file(folder, about).create()
    about = {"format": FORMAT} | about | {"versions": installed_versions()}
    write_json_atomic(folder / ABOUT, about)


def _encode_missing(
    folder: Path, encoder: AirRepEncoder, batch_size: int | None, show_progress: bool
) -> None:
    about = read_about(folder)
    count, file = about["count"], _embedding_file(folder, about)
    texts, written = Texts(folder, count), file.written()
    # Whole blocks only: examples encoded together with others give the same bytes again.
    first = written if written == count else written - written % BLOCK_ROWS
    with tqdm(
        total=count, initial=first, desc="encode", unit=" examples", disable=not show_progress
    ) as bar:
        for start in range(first, count, BLOCK_ROWS):
            block = [texts[row] for row in range(start, min(start + BLOCK_ROWS, count))]
            with np.errstate(over="ignore"):  # what is too large for float16 is named below
                rows = encoder.encode(block, batch_size=batch_size).numpy().astype(about["dtype"])
            broken = np.flatnonzero(~np.isfinite(rows).all(axis=1))
            if len(broken):
                raise InputError(
                    f"The embedding of example {block[broken[0]].id!r} is not finite as "
                    f"{about['dtype']}; check the encoder's weights, or store float32."
                )
            file.append(start, rows)
            bar.update(len(block))


def _check_same(folder: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises InputError with both sides of everything that differs."""
    differences = [
        f"{key} is {_side(stored[key])} in the folder, {_side(value)} now"
        for key, value in wanted.items()
        if _identity(stored[key]) != _identity(value)
    ]
    if differences:
        raise InputError(
            f"The index {folder} was made for something else: {'; '.join(differences)}. Give "
            "another folder, or the same examples and encoder as before."
        )


def _identity(value: Any) -> Any:
    # A moved file is the same file.
    return value.get("sha256") if isinstance(value, dict) else value


def _side(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value.get('name') or 'unnamed'} (sha256 {str(value.get('sha256'))[:12]})"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _share_found(exact: np.ndarray, found: np.ndarray) -> float:
    pairs = zip(exact, found, strict=True)
    return float(np.mean([np.isin(one, other).mean() for one, other in pairs]))
