"""Files of scores that any tool may give: read, checked, matched by id, and written.

FILE.safetensors    scores (targets, pool) or subset_scores (targets, subsets), or both;
                    target_ids and pool_ids, the UTF-8 bytes of a JSON list of ids;
                    method, pooling and sign in its metadata
FILE.npy            one matrix; FILE.npy.json says which, with the ids and the rest
"""

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from airrep.attributor import POOLINGS, pack_text, unpack_text
from airrep.examples import Example, InputError
from airrep.provenance import write_bytes_atomic, write_json_atomic

SIGN = "higher is more helpful"
MATRICES = ("scores", "subset_scores")
IDS = ("target_ids", "pool_ids")


@dataclass(frozen=True)
class GivenScores:
    """What a file holds: scores (T, N) and subset scores (T, M), float32, one of them or both.

    The columns of `subset_scores` are the subsets of a plan, in its order. `pooling` says how
    the tool pools `scores` inside a subset, None that it does not say. Ids that are None mean:
    in the benchmark's order.
    """

    source: str
    scores: np.ndarray | None = None
    subset_scores: np.ndarray | None = None
    target_ids: list[str] | None = None
    pool_ids: list[str] | None = None
    method: str | None = None
    pooling: str | None = None

    @property
    def has_ids(self) -> bool:
        """Whether rows and columns are matched by id, and not by their order."""
        return self.target_ids is not None and (self.scores is None or self.pool_ids is not None)

    def target_rows(self, targets: Sequence[Example]) -> np.ndarray:
        """The row of each target; raises InputError for one that is not there."""
        matrix = self.subset_scores if self.scores is None else self.scores
        assert matrix is not None
        return _places(self.source, "target", self.target_ids, len(matrix), targets)

    def of_pool(self, pool: Sequence[Example]) -> "GivenScores":
        """The same with the columns of `scores` in the pool's order; InputError for a gap."""
        if self.scores is None:
            return self
        columns = _places(self.source, "pool", self.pool_ids, self.scores.shape[1], pool)
        return replace(
            self, scores=self.scores[:, columns], pool_ids=[example.id for example in pool]
        )

    def check_exact(self, targets: Sequence[Example], pool: Sequence[Example]) -> None:
        """Raises InputError unless the file is of exactly these targets and this pool."""
        self.target_rows(targets)
        self.of_pool(pool)
        for side, ids, known in (
            ("target", self.target_ids, targets),
            ("pool", self.pool_ids, pool),
        ):
            extra = sorted(set(ids or ()) - {example.id for example in known})
            if extra:
                raise InputError(
                    f"{self.source} has {len(extra)} {side} ids that the benchmark has not "
                    f"(first: {extra[0]!r}); give scores of this benchmark alone."
                )


def read_scores(path: str | Path) -> GivenScores:
    """Reads a .safetensors or .npy file of scores; nothing is ever unpickled.

    Raises InputError for a file that is not there or not one, ids that come twice or do not fit
    the matrix, scores that are not finite, and any sign but "higher is more helpful".
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no file {path}; check the path.")
    readers = {".safetensors": _read_safetensors, ".npy": _read_npy}
    if path.suffix not in readers:
        raise _wrong_suffix(path)
    return check_scores(str(path), *readers[path.suffix](path))


def write_scores(
    path: str | Path,
    scores: np.ndarray | None,
    targets: Sequence[Example],
    pool: Sequence[Example],
    *,
    subset_scores: np.ndarray | None = None,
    method: str | None = None,
    pooling: str = "sum",
) -> None:
    """Writes what `read_scores` reads; higher = more helpful.

    `scores` are (targets, pool), `subset_scores` (targets, subsets of a plan); a .npy file holds
    only one of them. Raises InputError as `read_scores` does.
    """
    path = Path(path)
    found = {
        "scores": scores,
        "subset_scores": subset_scores,
        "target_ids": [example.id for example in targets],
        "pool_ids": [example.id for example in pool],
    }
    about = {"pooling": pooling, "sign": SIGN} | ({} if method is None else {"method": method})
    arrays = pack_scores(check_scores(str(path), found, about))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        write_bytes_atomic(path, save(arrays, metadata=about))
    elif path.suffix == ".npy":
        matrices = [key for key in MATRICES if key in arrays]
        if len(matrices) > 1:
            raise InputError(f"{path} holds one matrix, and got two; write a .safetensors file.")
        content = io.BytesIO()
        np.save(content, arrays[matrices[0]])
        ids = {key: found[key] for key in IDS}
        write_json_atomic(_sidecar(path), {"matrix": matrices[0], **about, **ids})
        write_bytes_atomic(path, content.getvalue())
    else:
        raise _wrong_suffix(path)


Found = tuple[dict[str, Any], Mapping[str, Any]]  # matrices and lists of ids; method, pooling, sign


def _read_safetensors(path: Path) -> Found:
    try:
        with safe_open(path, framework="numpy") as file:
            keys = {*MATRICES, *IDS}.intersection(file.keys())
            return unpack_scores({key: file.get_tensor(key) for key in keys}), file.metadata() or {}
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise InputError(f"{path} cannot be read as scores ({error}); write it again.") from None


def _read_npy(path: Path) -> Found:
    about: Any = {}
    try:
        matrix = np.load(path, allow_pickle=False)
        if not isinstance(matrix, np.ndarray):
            raise ValueError("it holds several arrays")
        if _sidecar(path).is_file():
            about = json.loads(_sidecar(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read as scores ({error}); write it again.") from None
    if not isinstance(about, dict) or about.get("matrix", "scores") not in MATRICES:
        raise InputError(
            f"{_sidecar(path)} must be a JSON object whose `matrix`, where it has one, is "
            f"{' or '.join(MATRICES)}."
        )
    return {about.get("matrix", "scores"): matrix, **{key: about.get(key) for key in IDS}}, about


def check_scores(source: str, found: Mapping[str, Any], about: Mapping[str, Any]) -> GivenScores:
    """Scores of matrices, ids, method, pooling and sign by name, once they are usable.

    Raises InputError for the first thing that makes them not so.
    """
    for key, known in (("sign", (SIGN,)), ("pooling", POOLINGS)):
        if about.get(key, known[0]) not in known:
            raise InputError(f"{source} has {key} {about[key]!r}; it must be {' or '.join(known)}.")
    matrices = {
        key: _matrix(source, key, found[key]) for key in MATRICES if found.get(key) is not None
    }
    if not matrices:
        raise InputError(f"{source} has no array {' or '.join(MATRICES)}; give one of them.")
    counts = {len(matrix) for matrix in matrices.values()}
    if len(counts) > 1:
        raise InputError(f"{source} has scores and subset_scores of different targets: {counts}.")
    scores = matrices.get("scores")
    return GivenScores(
        source,
        scores,
        matrices.get("subset_scores"),
        _ids(source, "target_ids", found.get("target_ids"), counts.pop()),
        None
        if scores is None
        else _ids(source, "pool_ids", found.get("pool_ids"), scores.shape[1]),
        about.get("method"),
        about.get("pooling"),
    )


def _matrix(source: str, key: str, matrix: Any) -> np.ndarray:
    shape, kind = np.shape(matrix), getattr(matrix, "dtype", np.dtype(object))
    if len(shape) != 2 or 0 in shape or kind.kind not in "fiu":
        raise InputError(
            f"{source} has {key} of shape {shape} and type {kind}; a matrix of numbers with a row "
            "a target is needed."
        )
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(matrix, dtype=np.float32)
    broken = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(broken):
        raise InputError(
            f"{source} has {key} that are not finite in {len(broken)} of {len(values)} rows "
            f"(first: row {broken[0]}); give every pair a finite score."
        )
    return values


def _ids(source: str, key: str, ids: Any, count: int) -> list[str] | None:
    if ids is None:
        return None
    if not isinstance(ids, list) or not all(isinstance(name, str | int) for name in ids):
        raise InputError(f"{source} has {key} that are no list of ids; give a list of strings.")
    names = [str(name) for name in ids]
    if len(names) != count:
        raise InputError(
            f"{source} has {len(names)} {key} for {count} places in its matrix; give one a place."
        )
    doubled = [name for name, times in Counter(names).items() if times > 1]
    if doubled:
        raise InputError(
            f"{source} has {len(doubled)} {key} more than once (first: {doubled[0]!r}); give each "
            "one place."
        )
    return names


def _places(
    source: str, side: str, ids: list[str] | None, count: int, wanted: Sequence[Example]
) -> np.ndarray:
    """Where in a file's rows or columns the wanted examples are."""
    if ids is None:
        if len(wanted) != count:
            raise InputError(
                f"{source} has no {side} ids, and {count} places for {len(wanted)} {side} "
                "examples; add the ids, or give a matrix of exactly the benchmark's shape."
            )
        return np.arange(count)
    places = {name: place for place, name in enumerate(ids)}
    missing = [example.id for example in wanted if example.id not in places]
    if missing:
        raise InputError(
            f"{source} has no scores of {len(missing)} of {len(wanted)} {side} ids (first: "
            f"{missing[0]!r}); add them."
        )
    return np.asarray([places[example.id] for example in wanted], dtype=np.int64)


def pack_scores(given: GivenScores) -> dict[str, np.ndarray]:
    """Matrices and ids as arrays."""
    arrays = {key: getattr(given, key) for key in MATRICES}
    arrays |= {key: pack_text(ids) for key in IDS if (ids := getattr(given, key)) is not None}
    return {key: array for key, array in arrays.items() if array is not None}


def unpack_scores(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Matrices, and lists of ids, of the arrays that `pack_scores` made."""
    return {key: unpack_text(array) if key in IDS else array for key, array in arrays.items()}


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _wrong_suffix(path: Path) -> InputError:
    return InputError(f"{path} ends in {path.suffix!r}; scores are .safetensors or .npy files.")
