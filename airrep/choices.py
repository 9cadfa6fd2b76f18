"""Settings that are one of a few words."""

from collections.abc import Iterable

from airrep.examples import InputError


def check_choice(what: str, value: str, known: Iterable[str]) -> None:
    """Raises InputError for a value that is not among the known ones."""
    if value not in known:
        raise InputError(f"{what} is {value!r}; choose one of {', '.join(known)}.")
