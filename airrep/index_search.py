"""The best rows of many embeddings by dot product: exactly, or nearly and faster with faiss."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from airrep.examples import InputError

BLOCK_SCORES = 2**18  # scores at once: they and their block of the pool stay in the cache
LEAST_BLOCK_ROWS = 1024
TRAINING_ROWS_PER_LIST = 64
ADDED_ROWS = 2**16


def best_rows(
    embeddings: np.ndarray, targets: np.ndarray, k: int, signs: Sequence[int] = (1, -1)
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each sign, rows and scores (targets, k) of the k highest sign * score; k <= pool.

    `embeddings` (pool, d) float32 or float16, memory-mapped or not, are read once, in blocks;
    `targets` is (targets, d) float32. Rows are int64, best first, equal scores in pool order;
    scores are float32 dot products.
    """
    columns = np.ascontiguousarray(targets.T)
    best = [_Best(len(targets), k) for _ in signs]
    block_rows = max(BLOCK_SCORES // len(targets), LEAST_BLOCK_ROWS)
    for start in range(0, len(embeddings), block_rows):
        block = torch.from_numpy(embeddings[start : start + block_rows])
        # torch reads float16 several times faster than numpy.
        scores = block.float().numpy() @ columns
        for sign, found in zip(signs, best, strict=True):
            found.add(scores if sign > 0 else -scores, start)
    ends = zip(signs, (found.finish() for found in best), strict=True)
    return [(rows, sign * scores) for sign, (rows, scores) in ends]


class _Best:
    """The k highest scores of each target among the rows seen so far.

    Rows come in pool order, so a score has to be above a target's k-th best to count: one that
    equals it comes later. What is above is only collected, and sorted when much has gathered.
    """

    def __init__(self, targets: int, k: int) -> None:
        self.k = k
        self.bar = np.full(targets, -np.inf, dtype=np.float32)
        self.most = 2 * k * targets
        self.waiting = 0
        # Parallel arrays: target, pool row and score of every candidate, in pool order.
        self.parts: list[tuple[np.ndarray, ...]] = []

    def add(self, scores: np.ndarray, start: int) -> None:
        """Takes scores (block, targets) of the pool rows from `start` on."""
        above = scores > self.bar
        places = np.flatnonzero(above)
        if len(places) > self.most:  # the first block, or a pool sorted by score
            last = max(len(scores) - self.k, 0)
            above &= scores >= np.partition(scores, last, axis=0)[last]
            places = np.flatnonzero(above)
        row, target = np.divmod(places, len(self.bar))
        self.parts.append((target, row + start, scores.ravel()[places]))
        self.waiting += len(places)
        if self.waiting > self.most:
            self._sort()

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and scores, (targets, k) each."""
        self._sort()
        _, row, score = self.parts[0]
        return row.reshape(len(self.bar), -1), score.reshape(len(self.bar), -1)

    def _sort(self) -> None:
        target, row, score = (np.concatenate(part) for part in zip(*self.parts, strict=True))
        # A stable sort: equal scores of a target stay in pool order.
        order = np.lexsort((-score, target))
        counts = np.bincount(target, minlength=len(self.bar))
        place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        order, place = order[place < self.k], place[place < self.k]
        self.parts = [(target[order], row[order], score[order])]
        self.waiting = 0
        kth = order[place == self.k - 1]
        self.bar[target[kth]] = score[kth]


def build_lists(path: Path, embeddings: np.ndarray, lists: int | None = None) -> None:
    """Writes a faiss inverted file of the embeddings: `lists` clusters by inner product.

    Raises InputError when faiss is not installed, or for more lists than embeddings.
    """
    faiss = _faiss()
    count, dimension = embeddings.shape
    lists = max(1, round(count**0.5)) if lists is None else lists
    if not 1 <= lists <= count:
        raise InputError(f"There cannot be {lists} lists of {count} embeddings.")
    index = faiss.index_factory(dimension, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1  # small pools are no reason for a warning
    sample = np.linspace(0, count - 1, min(count, TRAINING_ROWS_PER_LIST * lists)).astype(np.int64)
    index.train(embeddings[sample].astype(np.float32))
    for start in range(0, count, ADDED_ROWS):
        index.add(embeddings[start : start + ADDED_ROWS].astype(np.float32))
    unfinished = path.with_name(f"{path.name}.tmp")
    faiss.write_index(index, str(unfinished))
    os.replace(unfinished, path)


def search_lists(
    path: Path, embeddings: np.ndarray, targets: np.ndarray, k: int, probes: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """As `best_rows`, in the `probes` clusters nearest to each target; -1 where none is left."""
    faiss = _faiss()
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    except RuntimeError:
        raise InputError(
            f"{path} is missing or damaged; make it with EmbeddingIndex.build_lists."
        ) from None
    if (index.ntotal, index.d) != embeddings.shape:
        raise InputError(f"{path} is of other embeddings; make it again with build_lists.")
    parameters = faiss.SearchParametersIVF(nprobe=probes)
    ends = []
    for sign in (1, -1):
        scores, rows = index.search(sign * targets, k, params=parameters)
        ends.append((rows, np.where(rows < 0, 0, sign * scores).astype(np.float32)))
    return ends


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise InputError("Approximate search needs faiss; run `pip install faiss-cpu`.") from None
    return faiss
