"""How long does the search for the best of many embeddings take, and how long must it take?

    OMP_NUM_THREADS=2 python benchmarks/index_search.py --rows 1000000 --dim 384

Writes random and clustered embeddings into a temporary folder and prints, for each, the time a
target of the exact search in batches, and of faiss with its recall (helpful, harmful). The floor
is the longer of the matrix product at the rate of a large square one and of reading all bytes at
the rate of a sum, both measured in the same run. CPU time, of all threads, says something on a
machine that does other work too.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from airrep.index_search import best_rows, build_lists, search_lists

SQUARE = 2048
CLUSTERS = 1000
SPREAD = 0.5  # of a cluster, in units of the spread of the centres
WRITTEN_ROWS = 2**16


def main() -> None:
    """Runs the searches and prints a row each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--batch", type=int, default=32, help="targets searched together")
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--kinds", nargs="+", default=["random", "clustered"])
    parser.add_argument("--probes", type=int, nargs="*", default=[4, 16, 64], help="none: no faiss")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of so many counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where to put the temporary folder")
    options = parser.parse_args()
    print(
        f"{options.rows:,} x {options.dim} {options.dtype}, targets in batches of {options.batch}, "
        f"k = {options.k}\n"
    )
    print("| embeddings | search | ms/target | CPU ms/target | times the floor | recall@k |")
    print("|---|---|---|---|---|---|", flush=True)
    for kind in options.kinds:
        with TemporaryDirectory(dir=options.folder) as folder:
            compare(kind, Path(folder), options)


def compare(kind: str, folder: Path, options: argparse.Namespace) -> None:
    """Prints the rows of one kind of embeddings."""
    generator = np.random.default_rng(options.seed)
    targets, embeddings = write_embeddings(kind, folder / "embeddings.npy", generator, options)
    operations = 2 * options.batch * options.rows * options.dim
    product, reading = product_seconds(operations), reading_seconds(embeddings)
    floor = max(product[0], reading[0])

    def show(what: str, seconds: np.ndarray, *recall: float) -> None:
        each, own = 1000 * seconds / options.batch
        found = ", ".join(f"{share:.3f}" for share in recall)
        times = seconds[0] / floor
        print(f"| {kind} | {what} | {each:.2f} | {own:.2f} | {times:.1f} | {found} |", flush=True)

    show(f"floor: {operations / 1e9:.1f} G operations", product)
    show(f"floor: {embeddings.nbytes / 1e9:.2f} GB read", reading)
    for ends, signs in (("helpful only", (1,)), ("both ends", (1, -1))):
        search = partial(best_rows, embeddings, targets, options.k, signs)
        show(f"exact, {ends}", fastest(search, options.repeats))
    if not options.probes:
        return
    exact, lists = best_rows(embeddings, targets, options.k), folder / "lists.faiss"
    show("faiss: making the lists", fastest(partial(build_lists, lists, embeddings), 1))
    for probes in options.probes:
        search = partial(search_lists, lists, embeddings, targets, options.k, probes)
        recall = [
            np.mean([np.isin(one, other).mean() for one, other in zip(rows, found, strict=True)])
            for (rows, _), (found, _) in zip(exact, search(), strict=True)
        ]
        show(f"faiss, both ends, {probes} probes", fastest(search, options.repeats), *recall)


def write_embeddings(
    kind: str, path: Path, generator: np.random.Generator, options: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray]:
    """Targets (batch, dim) and memory-mapped embeddings (rows, dim) of the same distribution."""
    centres = generator.standard_normal((CLUSTERS, options.dim), dtype=np.float32)

    def draw(count: int) -> np.ndarray:
        noise = generator.standard_normal((count, options.dim), dtype=np.float32)
        if kind == "random":
            return noise
        return centres[generator.integers(CLUSTERS, size=count)] + np.float32(SPREAD) * noise

    shape = (options.rows, options.dim)
    written = np.lib.format.open_memmap(path, mode="w+", dtype=options.dtype, shape=shape)
    for start in range(0, options.rows, WRITTEN_ROWS):
        stop = min(start + WRITTEN_ROWS, options.rows)
        written[start:stop] = draw(stop - start)
    written.flush()
    return draw(options.batch), np.asarray(np.load(path, mmap_mode="c"))


def product_seconds(operations: int) -> np.ndarray:
    """What so many operations take in a large square matrix product."""
    square = np.random.default_rng(0).standard_normal((SQUARE, SQUARE), dtype=np.float32)
    return fastest(lambda: square @ square, 5) * operations / (2 * SQUARE**3)


def reading_seconds(embeddings: np.ndarray) -> np.ndarray:
    """What reading all embeddings takes, from the sum of up to 256 MB of them in memory."""
    rows = np.array(embeddings[: 2**28 // (embeddings.itemsize * embeddings.shape[1])])
    return fastest(torch.from_numpy(rows).sum, 5) * embeddings.nbytes / rows.nbytes


def fastest(work: Callable[[], Any], repeats: int) -> np.ndarray:
    """The least seconds of several runs: by the clock, and of all this process's threads."""
    seconds = []
    for _ in range(repeats):
        start = np.asarray([time.perf_counter(), time.process_time()])
        work()
        seconds.append(np.asarray([time.perf_counter(), time.process_time()]) - start)
    return np.min(seconds, axis=0)


if __name__ == "__main__":
    main()
