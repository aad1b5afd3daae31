"""`Thread`: a host's own list of messages. Each method is a line or two onto `pipeline/threads.py` and `prompts.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._offload import Workers, offload
from .pipeline import prompts, threads
from .pipeline.ingest import Messages
from .pipeline.parts import Parts
from .types import Context

if TYPE_CHECKING:
    from .session import Session


class Thread:
    """A host's own list of messages, kept in step with a session. Made by `Session.thread`.

    ```python
    thread = session.thread("agent-7")
    chat = [Message("user", "My dog is called Biscuit.", id="m1")]
    thread.update(chat)
    answer = model(thread.prompt(chat).messages)
    thread.update([*chat, answer])
    ```

    The list may be an agent's state or the chat that a front end sends each time. What is new at its end is written down,
    each message once, by its id. What says something else under its id replaces the turn. Turns that have left the list's end,
    since the user edited a question or asked for another answer, leave the window and the prompt; they stay in the
    transcript and in search, and a branch that was left comes back when the list does. What was cut off the list's front
    stays. So does what was edited in the memory, or folded into the summary.

    Of a list without ids, the part with which the window ends is recognized, and what follows is new; edits are not.

    `metadata["neuralflow"]` of a message says what is no turn: "context" (what memory put into a prompt, a summary or a
    reminder of the host's own) is not written down, and is sent as it stands; "recalled" (a tool's result that quotes the
    memory) is shown until its question is answered, and written down without its content.

    It holds no data of its own: make one whenever you need it. Every method has an async twin.
    """

    def __init__(self, session: Session, id: str | None = None) -> None:
        self._session = session
        self.id = threads.checked_id(id)

    @property
    def _workers(self) -> Workers:
        return self._session._workers

    @property
    def _parts(self) -> Parts:
        return self._session._parts

    def __repr__(self) -> str:
        return f"Thread({self.id!r}, {self._session!r})"

    def update(self, messages: Messages, *, written: str | None = None) -> str | None:
        """Bring the session up to the list. Doing so again writes nothing.

        Args:
            messages: The list as it is now.
            written: What this method returned for an earlier state of the list, if the host has kept it beside that state:
                what was deleted from memory since then does not come back from the list.

        Returns:
            The id of the newest turn in the list.

        Raises:
            InputError: Two messages have one id, or an option is wrong; nothing was written.
            MessageError: A message is malformed; nothing was written.
            StorageFull: No space is left.
        """
        s = self._session
        return threads.update(self._parts, s.scope, self.id, messages, principal=s.principal, written=written)

    def prompt(
        self,
        messages: Messages,
        *,
        max_tokens: int | None = None,
        reserve_tokens: int = 0,
        search: bool = True,
        older: bool = True,
    ) -> Context:
        """The messages for the next call of the model: what `Session.context` gives, in the host's own words and order.

        It searches once for each user turn, until that is answered. A newest turn that is too long is cut.

        Args:
            messages: The list, after `update`; other parts of the host may have changed or added messages since then. These
                are sent as they are, in their places; older ones that the window does not have are left to the summary.
            max_tokens: The budget; None means `budget.total`.
            reserve_tokens: Tokens of it that the caller will add: a system prompt, tool schemas.
            search: Whether to look into the memory beyond the window.
            older: Whether turns that have left the list are sent. False, if the list has a summary of its own for them.

        Returns:
            Messages to send. Those that are sent as the list has them are the list's own objects; those that memory made up
            have `metadata["neuralflow"] == "context"`.

        Raises:
            BudgetError: Nothing is left beside what is reserved, with the numbers.
            InputError: An option is wrong.
        """
        s = self._session
        return prompts.prompt(
            self._parts,
            s.scope,
            messages,
            principal=s.principal,
            max_tokens=max_tokens,
            reserve_tokens=reserve_tokens,
            search=search,
            older=older,
        )

    def fold(self, messages: Messages) -> str:
        """Fold messages that are to leave the list into the session's summary, now; that summary, "" if there is none.

        Raises:
            InputError: A message has no id.
        """
        s = self._session
        return threads.fold(self._parts, s.scope, self.id, messages, principal=s.principal)

    aupdate = offload(update)
    aprompt = offload(prompt)

    async def afold(self, messages: Messages) -> str:
        """Async twin of `fold`."""
        # It may wait long for a model, and must not hold a storage worker.
        return await self._session.memory._patient_workers.run(lambda: self.fold(messages))


__all__ = ["Thread"]
