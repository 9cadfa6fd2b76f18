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


class WithMembers(Attributor):
    """A method that is made of others: `members` as they were given, `members_` fitted.

    Its `_fit` sets `members_`, its `_state` has `_members_state` in it, and its `_restore` calls
    `_restore_members`; the rest of saving and loading is here.
    """

    learns = True

    members: Sequence[Member]
    members_: list[Attributor]

    @property
    def oracle(self) -> bool:  # type: ignore[override]
        """Whether one of the members is an oracle."""
        return any(member.oracle for member in self._make_members())

    def _make_members(self) -> list[Attributor]:
        """The members as attributors of their own; InputError where they are no list of methods."""
        if not isinstance(self.members, Sequence) or isinstance(self.members, str):
            raise InputError(f"The members are {self.members!r}; give a list of methods.")
        return [_made(member) for member in self.members]

    def _members_state(self) -> dict[str, np.ndarray]:
        """All that the members learned, as arrays of one state."""
        state: dict[str, np.ndarray] = {}
        for number, member in enumerate(self.members_):
            state |= {f"{number}/{key}": array for key, array in member._state().items()}
        return state

    def _restore_members(self, state: Mapping[str, np.ndarray], pool_size: int) -> None:
        self.members_ = self._make_members()
        for number, member in enumerate(self.members_):
            prefix = f"{number}/"
            own = {key: array for key, array in state.items() if key.startswith(prefix)}
            member._restore({key.removeprefix(prefix): array for key, array in own.items()})
            member.pool_size_ = pool_size

    def _saved_params(self) -> dict[str, Any]:
        saved = [(member.name, member._saved_params()) for member in self.members_]
        return super()._saved_params() | {"members": saved}

    def _save_parts(self, folder: Path) -> None:
        super()._save_parts(folder)
        for number, member in enumerate(self.members_):
            (folder / str(number)).mkdir(exist_ok=True)
            member._save_parts(folder / str(number))

    def _load_parts(self, folder: Path) -> None:
        super()._load_parts(folder)
        for number, member in enumerate(self.members_):
            member._load_parts(folder / str(number))
        # Kept as the argument too, so that fitting again needs no other way of making them.
        self.members = self.members_


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
