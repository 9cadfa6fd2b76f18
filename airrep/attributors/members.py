"""What methods that are made of other methods share: making, saving and loading their members."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from airrep.attributor import Attributor
from airrep.attributors import make_attributor
from airrep.examples import InputError

# A member as given: an attributor, a method's name, or its name and parameters.
Member = Attributor | str | tuple[str, Mapping[str, Any]]


def make_members(members: Sequence[Member]) -> list[Attributor]:
    """The members as attributors of their own; InputError where they are no list of methods."""
    if not isinstance(members, Sequence) or isinstance(members, str):
        raise InputError(f"The members are {members!r}; give a list of methods.")
    return [_made(member) for member in members]


def members_state(members: Sequence[Attributor]) -> dict[str, np.ndarray]:
    """All that fitted members learned, as arrays of one state."""
    state: dict[str, np.ndarray] = {}
    for number, member in enumerate(members):
        state |= {f"{number}/{key}": array for key, array in member._state().items()}
    return state


def restore_members(
    members: Sequence[Member], state: Mapping[str, np.ndarray], pool_size: int
) -> list[Attributor]:
    """The members with what `members_state` gave; `load_members` gives them the rest."""
    made = make_members(members)
    for number, member in enumerate(made):
        prefix = f"{number}/"
        own = {key: array for key, array in state.items() if key.startswith(prefix)}
        member._restore({key.removeprefix(prefix): array for key, array in own.items()})
        member.pool_size_ = pool_size
    return made


def members_params(members: Sequence[Attributor]) -> list[tuple[str, dict[str, Any]]]:
    """The members by name and the arguments worth keeping."""
    return [(member.name, member._saved_params()) for member in members]


def save_members(members: Sequence[Attributor], folder: Path) -> None:
    """Writes what is not an array, in a folder for each member."""
    for number, member in enumerate(members):
        (folder / str(number)).mkdir(exist_ok=True)
        member._save_parts(folder / str(number))


def load_members(members: Sequence[Attributor], folder: Path) -> None:
    """Reads back what `save_members` wrote."""
    for number, member in enumerate(members):
        member._load_parts(folder / str(number))


def _made(member: Member) -> Attributor:
    if isinstance(member, Attributor):
        return copy.copy(member)
    try:
        name, params = (member, {}) if isinstance(member, str) else member
        return make_attributor(name, **params)
    except InputError:  # says what that method needs
        raise
    except (TypeError, ValueError):
        raise InputError(
            f"A member is {member!r}; give an attributor, a method's name, or a name and a "
            "mapping of its parameters."
        ) from None
