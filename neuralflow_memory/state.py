"""`State`: the state of a session. Each method is a line or two onto `pipeline/states.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ._offload import Workers, offload
from .pipeline import states
from .rules.states import as_fields
from .types import Life, StateDiff, StateVersion

if TYPE_CHECKING:
    from .session import Session


class State:
    """What an agent carries beside the words: fields of yours, where they are in a transition table, and the session's life.

    Every change is a version, with who, when and why; the newest `state.max_states` are kept. A change that fails, for whatever
    reason, leaves the state as it was. What is valid is said by `StateRules`.

    A session's life is "active"; without a write for `context.expiry_time` seconds it is "idle", after twice that "expired", and
    with the next write "active" again: time alone makes no version. What is "closed" takes no change until
    `transition(life="active")`.

    Every method has an async twin: `update` / `aupdate`, and so on.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def _workers(self) -> Workers:
        return self._session._workers

    def __repr__(self) -> str:
        return f"State({self._session!r})"

    def get(self) -> StateVersion:
        """The state now. Before the first change it is version 0, with the fields that the rules begin with."""
        return states.get(self._session._parts, self._session._ref)

    def update(
        self,
        fields: Mapping[str, Any] | None = None,
        /,
        *,
        expect: int | None = None,
        why: str | None = None,
        **named: Any,
    ) -> StateVersion:
        """Merge fields into the state: `state.update(city="Lisbon")`. Values are put in place whole, also lists and mappings.

        Args:
            fields: By name, or a model, of which those count that were set.
            expect: The version that the change was made from. None: it is merged into whichever is the newest.
            why: The reason, for the history.
            **named: Fields whose names are no arguments' names.

        Raises:
            StateError: The state would not be valid.
            InvalidTransition: The table does not lead to the status given, or the session is closed.
            ConflictError: The state is not at version *expect*.
            StatePersistenceError: It could not be written.
        """
        given = fields if not named else {**({} if fields is None else as_fields(fields)), **named}
        return states.update(
            self._session._parts, self._session._ref, {} if given is None else given, expect=expect, why=why
        )

    def change(self, make: Callable[[dict[str, Any]], Mapping[str, Any]], *, why: str | None = None) -> StateVersion:
        """Put what *make* returns, given the fields, in their place, and try again when somebody else was faster.

        `state.change(lambda fields: {**fields, "seats": fields["seats"] + 1})` counts right, whoever else counts. *make* may
        be called several times. Errors are those of `update`.
        """
        return states.change(self._session._parts, self._session._ref, make, why=why)

    def transition(
        self,
        to: str | None = None,
        fields: Mapping[str, Any] | None = None,
        /,
        *,
        life: Life | None = None,
        expect: int | None = None,
        why: str | None = None,
    ) -> StateVersion:
        """Move to another status, merging *fields* with it, or move the session's life, or both.

        Raises:
            InvalidTransition: The table does not lead there. From a status to itself it leads only where it says so.
            StateError: There is no table, or the state would not be valid.
            ConflictError: The state is not at version *expect*.
            StatePersistenceError: It could not be written.
        """
        return states.transition(
            self._session._parts, self._session._ref, to, fields, life=life, expect=expect, why=why
        )

    def history(self, *, last: int | None = None) -> list[StateVersion]:
        """The versions that are kept, oldest first; only the newest *last* of them."""
        return states.history(self._session._parts, self._session._ref, last=last)

    def rollback(self, version: int, *, expect: int | None = None, why: str | None = None) -> StateVersion:
        """Write the fields of an earlier version again, as a new version. It undoes, so the transition table is not asked.

        Raises:
            NotFound: The version is not in the history.
            StateError: It is not valid by the rules of now.
            ConflictError: The state is not at version *expect*.
        """
        return states.rollback(self._session._parts, self._session._ref, version, expect=expect, why=why)

    def diff(self, a: int, b: int | None = None) -> StateDiff:
        """What differs between the fields of versions *a* and *b*, or of *a* and now; `NotFound` for one that is not kept."""
        return states.diff(self._session._parts, self._session._ref, a, b)

    aget = offload(get)
    aupdate = offload(update)
    achange = offload(change)
    atransition = offload(transition)
    ahistory = offload(history)
    arollback = offload(rollback)
    adiff = offload(diff)


__all__ = ["State"]
