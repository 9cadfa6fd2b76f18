"""How long do the intervals of LDS and of calibration take, and how near the floor is that?

    python benchmarks/metrics_speed.py --targets 1000 10000 --subsets 1000 --draws 1000

Prints a row a size and metric: seconds with the drawing of the resamples, processor seconds of
all threads without it, operations of the matrix products (multiplications and additions), and
the share of the seconds that these products would take alone at the speed of one large float64
product, measured first.
"""

import argparse
import time

import numpy as np

from airrep.metrics import Resamples, calibration, calibration_bins, interval, resampled_lds


def main() -> None:
    """Runs the measurement and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--subsets", type=int, nargs="+", default=[1000])
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--methods", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    rate = product_rate(rng)
    print(f"float64 products: {rate / 1e9:.0f} GFLOP/s")
    print(
        "targets  subsets  draws  methods  metric            seconds  processor  operations  "
        "floor share"
    )
    for targets in options.targets:
        for subsets in options.subsets:
            losses = rng.normal(size=(targets, subsets))
            noise = rng.normal(size=(options.methods, targets, subsets))
            scores = -losses + noise
            measure(scores, losses, options.draws, rate, rng)


def measure(
    scores: np.ndarray, losses: np.ndarray, draws: int, rate: float, rng: np.random.Generator
) -> None:
    """Prints the rows of one size; seconds hold the drawing of the resamples."""
    methods, targets, subsets = scores.shape
    start = time.perf_counter()
    resamples = Resamples.draw(losses.shape, draws, rng)
    drawing = time.perf_counter() - start
    for name, products, run in (
        # A method's score, its square and its product with the loss; the loss and its square.
        ("lds", 3 * methods + 2, lambda: lds_intervals(scores, losses, resamples)),
        ("calibration", 5, lambda: calibration(scores[0], losses, resamples)),
        ("calibration_bins", 20, lambda: calibration_bins(scores[0], losses, resamples)),
    ):
        start, start_busy = time.perf_counter(), time.process_time()
        run()
        seconds = time.perf_counter() - start + drawing
        busy = time.process_time() - start_busy
        operations = products * 2 * targets * subsets * draws
        print(
            f"{targets:7d}  {subsets:7d}  {draws:5d}  {methods:7d}  {name:16s}  {seconds:7.2f}  "
            f"{busy:9.2f}  {operations:10.2e}  {operations / rate / seconds:11.0%}",
            flush=True,
        )


def lds_intervals(
    scores: np.ndarray, losses: np.ndarray, resamples: Resamples
) -> list[tuple[float, float]]:
    """Intervals over targets, subsets and both of every method."""
    drawn = resampled_lds(list(scores), losses, resamples)
    return [interval(row) for over in drawn.values() for row in over]


def product_rate(rng: np.random.Generator, size: int = 2000) -> float:
    """Operations a second of the best of three float64 products."""
    a, b = rng.normal(size=(2, size, size))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


if __name__ == "__main__":
    main()
