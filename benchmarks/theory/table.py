"""Tables of the studies, in Markdown."""

from collections.abc import Iterable, Sequence

import numpy as np


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Mean and standard deviation over seeds."""
    found = np.asarray(list(values))
    return f"{found.mean():.{digits}f} ± {found.std(ddof=1):.{digits}f}"


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints rows as they come."""
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)
