"""What quality costs."""

import math

from airrep.examples import InputError


def break_even(
    prepare_seconds: float, examples_per_second: float, other_examples_per_second: float
) -> int | None:
    """Pool size from which a method's preparation has paid for itself against a slower one.

    `prepare_seconds` go by before the method fits its first example (labels, training); rates
    are pool examples fitted a second. None where the method is not faster, so that it never
    pays. Raises InputError for negative seconds and rates that are not positive.
    """
    rates = (examples_per_second, other_examples_per_second)
    if not (0 <= prepare_seconds < math.inf and all(0 < rate < math.inf for rate in rates)):
        raise InputError(
            f"break_even got {prepare_seconds} seconds of preparation and rates {rates[0]} and "
            f"{rates[1]}; give seconds of at least 0 and rates above 0."
        )
    saved = 1 / other_examples_per_second - 1 / examples_per_second
    return math.ceil(prepare_seconds / saved) if saved > 0 else None
