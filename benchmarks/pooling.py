"""What does attention pooling of many subsets of a large pool cost, forward and backward?

    OMP_NUM_THREADS=1 python benchmarks/pooling.py
    python benchmarks/pooling.py --pool 100000 --targets 1000 --subsets 1000 --size 1000 \
        --device cuda --designs streaming dense

Each design pools the same random embeddings, in a process of its own, as a training step does:
memberships made, all subsets pooled, gradients taken. `streaming` is the library's. `dense` holds
all scores and a membership matrix, `csr` blocks of targets' scores and a sparse matrix, `gather`
blocks of the scores of every subset. The floor is the four matrix products of scores and gradients
at the rate of a large square one in the same process. Memory is what the step adds: on a CPU from
the process's largest resident size. CPU seconds, of all threads, say something on a machine that
does other work too.
"""

import argparse
import resource
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from airrep.pooling import membership, softmax_pool
from airrep.streaming_pool import attention_pool_embeddings

SQUARE = 2048
SPREAD = 0.5  # standard deviation of the scores


def main() -> None:
    """Prints a row a design."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", type=int, default=20_000)
    parser.add_argument("--targets", type=int, default=200)
    parser.add_argument("--subsets", type=int, default=200)
    parser.add_argument("--size", type=int, default=500, help="rows of a subset")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--max-mb", type=int, default=64, help="of a block's numbers")
    parser.add_argument("--designs", nargs="+", choices=DESIGNS, default=list(DESIGNS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of so many counts")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(
        f"{options.targets:,} targets, {options.subsets:,} subsets of {options.size:,} out of "
        f"{options.pool:,}, d = {options.dim}, {options.device}\n"
    )
    print("| design | s | times the floor | CPU s | times | MB added | differs by |")
    print("|---|---|---|---|---|---|---|", flush=True)
    first = None
    for design in options.designs:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            seconds, floor, added, sample = process.submit(measure, design, options).result()
        first = sample if first is None else first
        error = np.abs(sample - first).max() / np.abs(first).max()
        print(
            f"| {design} | {seconds[0]:.3f} | {seconds[0] / floor[0]:.1f} | {seconds[1]:.3f} "
            f"| {seconds[1] / floor[1]:.1f} | {added:,.0f} | {error:.1e} |",
            flush=True,
        )


def measure(
    design: str, options: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
    """Seconds of a step, its floor, the memory it adds, and numbers that it came to.

    Seconds are (2,): by the clock and of the processor.
    """
    warnings.filterwarnings("ignore", "Sparse")
    generator = np.random.default_rng(options.seed)
    scale = SPREAD**0.5 / options.dim**0.25
    targets, pool = (
        torch.from_numpy(scale * generator.standard_normal((count, options.dim), dtype=np.float32))
        .to(options.device)
        .requires_grad_()
        for count in (options.targets, options.pool)
    )
    subsets = [
        generator.choice(options.pool, options.size, replace=False) for _ in range(options.subsets)
    ]

    def step() -> np.ndarray:
        pooled = DESIGNS[design](targets, pool, subsets, options.max_mb * 2**20)
        weights = torch.linspace(-1, 1, pooled.numel(), device=pooled.device).view_as(pooled)
        gradients = torch.autograd.grad((pooled * weights).sum(), (targets, pool))
        return torch.cat([part[:3].flatten() for part in gradients]).cpu().numpy()

    before = used_mb(options.device)
    sample = step()
    added = used_mb(options.device) - before
    seconds = fastest(step, options.repeats)
    square = torch.randn(SQUARE, SQUARE, device=options.device)
    operations = 8 * options.targets * options.pool * options.dim
    each = fastest(lambda: (square @ square)[0, 0].item(), 5) / (2 * SQUARE**3)
    return seconds, operations * each, added, sample


def used_mb(device: str) -> float:
    """The most memory in use so far."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def fastest(work: Callable[[], object], repeats: int) -> np.ndarray:
    """The least seconds of several runs, by the clock and of the processor.

    `work` ends with its numbers on the CPU.
    """
    seconds = []
    for _ in range(repeats):
        start = np.asarray([time.perf_counter(), time.process_time()])
        work()
        seconds.append(np.asarray([time.perf_counter(), time.process_time()]) - start)
    return np.min(seconds, axis=0)


def streaming(
    targets: torch.Tensor, pool: torch.Tensor, subsets: list[np.ndarray], max_bytes: int
) -> torch.Tensor:
    return attention_pool_embeddings(targets, pool, membership(subsets, len(pool)), max_bytes)


def dense(
    targets: torch.Tensor, pool: torch.Tensor, subsets: list[np.ndarray], max_bytes: int
) -> torch.Tensor:
    members = torch.zeros(len(pool), len(subsets))
    for column, subset in enumerate(subsets):
        members[torch.from_numpy(subset), column] = 1.0
    members = members.to(pool.device)
    return product_pool(lambda terms: terms @ members, targets @ pool.T)


def csr(
    targets: torch.Tensor, pool: torch.Tensor, subsets: list[np.ndarray], max_bytes: int
) -> torch.Tensor:
    rows, size = torch.from_numpy(np.concatenate(subsets)), len(subsets[0])
    starts = torch.arange(0, len(rows) + 1, size)
    shape = (len(subsets), len(pool))
    members = torch.sparse_csr_tensor(starts, rows, torch.ones(len(rows)), shape).to(pool.device)

    def block(some: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        return product_pool(lambda terms: (members @ terms.T).T, some @ pool.T)

    return by_targets(block, targets, pool, max_bytes // (32 * len(pool)))


def gather(
    targets: torch.Tensor, pool: torch.Tensor, subsets: list[np.ndarray], max_bytes: int
) -> torch.Tensor:
    rows = torch.from_numpy(np.stack(subsets)).to(pool.device)  # (M, size)

    def block(some: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        inside = (some @ pool.T)[:, rows]  # (T, M, size)
        return softmax_pool(inside.flatten(0, 1)).view(len(some), len(rows))

    return by_targets(block, targets, pool, max_bytes // (16 * rows.numel()))


def product_pool(
    product: Callable[[torch.Tensor], torch.Tensor], scores: torch.Tensor
) -> torch.Tensor:
    """Attention pooling with `product` as the product with the membership matrix."""
    magnitude = scores.abs()
    weights = torch.exp(magnitude - magnitude.detach().amax(dim=1, keepdim=True))
    return product(weights * scores) / product(weights)


def by_targets(
    block: Callable[..., torch.Tensor], targets: torch.Tensor, pool: torch.Tensor, width: int
) -> torch.Tensor:
    """`block` of so many targets at a time, made again in the backward pass."""
    again = partial(checkpoint, block, use_reentrant=False)
    return torch.cat([again(some, pool) for some in targets.split(max(1, width))])


DESIGNS = {"streaming": streaming, "dense": dense, "csr": csr, "gather": gather}


if __name__ == "__main__":
    main()
