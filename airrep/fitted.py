"""Where scores come from: a trained encoder, or a method that `airrep fit` saved."""

from collections.abc import Sequence
from typing import Any

from airrep.attributor import Attributor
from airrep.attributors.airrep import AirRepAttributor
from airrep.device import pick_device
from airrep.examples import Example, InputError, fingerprint_examples
from airrep.weights import resolve_model


def check_source(encoder: str | None, method: str | None) -> None:
    """Raises InputError unless scores come from one of the two."""
    if (encoder is None) == (method is None):
        found = "neither --encoder nor --method" if encoder is None else "--encoder and --method"
        raise InputError(
            f"There are {found}; give one: a trained encoder, or the folder of a method that "
            "`airrep fit` saved."
        )


def fitted(
    encoder: str | None,
    method: str | None,
    pool: Sequence[Example],
    batch_size: int | None,
    device: str,
) -> Attributor:
    """A trained encoder's attributor, or the method saved in a folder, with this pool.

    The saved one is fitted again where its pool was another.
    """
    options: dict[str, Any] = {"device": pick_device(device), "show_progress": True}
    if batch_size is not None:
        options["batch_size"] = batch_size
    if method is None:
        return AirRepAttributor(resolve_model(str(encoder)), **options).fit(pool)
    saved = Attributor.load(method, **options)
    if fingerprint_examples(pool) == saved.pool_fingerprint_:
        return saved
    print(f"{method} was fitted to another pool; fitting it to this one")
    return saved.fit(pool)
