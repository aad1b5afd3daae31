"""`Session`: one conversation's view of the memory. Each method is a line or two onto `pipeline/`."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from ._offload import Workers, offload
from .pipeline import archive, assemble, compact, edit, episodes, extract, ingest, search, snapshots, states, versions
from .pipeline import consolidate as consolidation
from .pipeline.ingest import Messages
from .pipeline.parts import Parts
from .pipeline.search import Conditions, Within
from .protocols import OnConflict
from .rules.states import StateRules
from .state import State
from .task import Task
from .thread import Thread
from .types import CompactionReport, Context, Entry, Hit, MemoryType, Merged, Message, Scope

if TYPE_CHECKING:
    from .memory import Memory


class Session:
    """A view bound to a scope and a principal. It holds no data of its own: make one whenever you need it.

    Every method has an async twin: `add` / `aadd`, `search` / `asearch`, and so on.
    """

    def __init__(
        self, memory: Memory, scope: Scope, *, principal: str | None, state_rules: StateRules | None = None
    ) -> None:
        self.memory = memory
        self.scope = scope
        self.principal = principal
        self._state_rules = state_rules

    @property
    def session_id(self) -> str:
        assert self.scope.session_id is not None
        return self.scope.session_id

    @property
    def user_id(self) -> str | None:
        return self.scope.user_id

    @property
    def entries(self) -> Entries:
        """The entries behind the session: list, get, update, delete, count."""
        return Entries(self)

    @property
    def state(self) -> State:
        """What an agent carries beside the words: where in a form, which step, what was agreed."""
        return State(self)

    @property
    def _parts(self) -> Parts:
        return self.memory._ready_parts()

    @property
    def _ref(self) -> states.Ref:
        rules = self._parts.state_rules if self._state_rules is None else self._state_rules
        return states.Ref(self.scope, self.principal, rules)

    @property
    def _workers(self) -> Workers:
        return self.memory._workers

    def __repr__(self) -> str:
        return f"Session({self.session_id!r}, user_id={self.user_id!r})"

    def add(
        self,
        messages: Messages,
        *,
        on_conflict: OnConflict = "raise",
        state: Mapping[str, Any] | None = None,
        expect: int | None = None,
    ) -> list[str]:
        """Write messages down, all or none; when this returns they survive a killed process.

        Args:
            messages: A text (a user turn), a `Message`, or several. Messages that `context` made up are left out.
            on_conflict: What to do with an id that stands for other content. An equal id and content is no error.
            state: Fields to merge into the session's state, as `state.update` does, together with the messages or not at
                all. Repeated with the same messages, it is not merged again.
            expect: The version of the state that *state*, or the messages, were made from.

        Returns:
            The messages' ids, in order.

        Raises:
            MessageError: A message is empty or malformed.
            ConflictError: An id is taken by other content, or the state is not at version *expect*.
            StateError: The state would not be valid, or can't go there.
            StorageFull: No space is left.
        """
        if state is not None or expect is not None:
            return states.add(self._parts, self._ref, messages, state or {}, on_conflict=on_conflict, expect=expect)
        return ingest.add(self._parts, self.scope, messages, principal=self.principal, on_conflict=on_conflict)

    def add_many(
        self,
        messages: Iterable[str | Message],
        *,
        on_conflict: OnConflict = "raise",
        progress: Callable[[int], object] | None = None,
    ) -> list[str]:
        """Write many messages down, 500 in a transaction: a whole history, read as it is needed.

        Give them ids, and repeating it after an interruption writes none twice.

        Args:
            messages: As for `add`.
            on_conflict: As for `add`; what was written before an error stays.
            progress: Called after each transaction with the number of messages in it, e.g. `tqdm(total=...).update`.
        """
        return ingest.in_batches(messages, lambda batch: self.add(batch, on_conflict=on_conflict), progress=progress)

    def messages(self, *, view: Literal["all", "window"] = "all", last: int | None = None) -> list[Message]:
        """The turns in order: everything ever said ("all"), or what is kept verbatim for the prompt ("window")."""
        return edit.transcript(self._parts, self.scope, principal=self.principal, view=view, last=last)

    def clear(self) -> None:
        """Delete this session's turns, summaries, tasks and state. What was remembered about the user stays."""
        edit.clear(self._parts, self.scope, principal=self.principal)

    def replace(self, messages: Messages) -> None:
        """Make *messages* the window.

        Turns that are matched are kept: by id, or else, up to the first message that is new, by being equal and in order. The
        others leave `view="window"`, and stay in `view="all"` and in search.
        """
        edit.set_window(self._parts, self.scope, messages, principal=self.principal)

    def remember(
        self,
        text: str,
        *,
        type: MemoryType = MemoryType.LONG_TERM,
        importance: float | None = None,
        tags: Sequence[str] = (),
        category: str | None = None,
        source: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        created_at: datetime | None = None,
        expires_at: datetime | None = None,
        valid_from: datetime | None = None,
        supersedes: str | Iterable[str] = (),
    ) -> str:
        """Keep a piece of knowledge. It belongs to the user (or to this session where none is known); `clear` keeps it.

        LONG_TERM knowledge that is known already, word for word, is not kept twice: what is known is strengthened (the
        greater importance, the tags and metadata of both), and its id is returned.

        Args:
            text: What to remember.
            type: What kind of memory it is; not SHORT_TERM, which `add` writes.
            importance: 0..1; without one, what its text is worth, and 0.5 at least.
            tags: Labels to filter by.
            category: A path such as "travel/visa"; filters match it by prefix.
            source: Where it is from.
            metadata: JSON values to filter by.
            created_at: When it was said, if that was not now.
            expires_at: When search stops finding it; sweeps then archive it, or delete it if `retention.delete`.
            valid_from: Since when it holds, if that is not since *created_at*.
            supersedes: Ids of knowledge that it stands for from then on: kept, with `valid_to` and `superseded_by`, and no
                hit of a search for what holds now.

        Returns:
            Its id.

        Raises:
            NotFound: There is no such knowledge to supersede.
            ConflictError: Something else has superseded it.
        """
        item = {
            "text": text,
            "type": type,
            "importance": importance,
            "tags": tags,
            "category": category,
            "source": source,
            "metadata": metadata,
            "created_at": created_at,
            "expires_at": expires_at,
            "valid_from": valid_from,
            "supersedes": supersedes,
        }
        return ingest.remember(self._parts, self.scope, [item], principal=self.principal)[0]

    def remember_many(
        self,
        /,
        items: Iterable[str | Mapping[str, Any]],
        *,
        progress: Callable[[int], object] | None = None,
        **fields: Any,
    ) -> list[str]:
        """Keep many pieces of knowledge, 500 in a transaction; repeating it after an interruption keeps nothing twice.

        Args:
            items: Texts, or mappings of the arguments of `remember` with their "text". Any iterable: it is read as needed.
            progress: Called after each transaction with the number of items in it, e.g. `tqdm(total=...).update`.
            fields: Arguments of `remember` for those items that have none of their own.

        Returns:
            Their ids, in order.
        """
        return ingest.in_batches(
            ingest.as_items(items, fields),
            lambda batch: ingest.remember(self._parts, self.scope, batch, principal=self.principal),
            progress=progress,
        )

    def search(
        self,
        query: str,
        *,
        k: int = 8,
        types: Iterable[MemoryType] | None = None,
        filter: Mapping[str, Any] | None = None,
        since: datetime | str | None = None,
        until: datetime | str | None = None,
        within: Within | None = None,
        as_of: datetime | str | None = None,
    ) -> list[Hit]:
        """Find entries by meaning and by words, best first.

        Args:
            query: What to look for, at most 10,000 characters.
            k: How many hits.
            types: Only these kinds of memory; by default all but running summaries, which repeat what their turns say.
            filter: Conditions on fields and metadata, e.g. `{"role": "user", "importance": {"$gte": 0.5}}`.
            since: Only what was said at or after this time.
            until: Only what was said at or before this time.
            within: "user" (the default where a user is known), "session", or "agent" (what this agent wrote).
            as_of: Only what had been said, and held, at this time; None: what holds now, so that nothing superseded is a
                hit; "ever": that, too.

        Raises:
            QueryError: The query is empty or too long, or an option is wrong.
            FilterError: The filter is wrong.
        """
        conditions = Conditions(types, filter, since, until, within, as_of)
        return search.search(self._parts, self.scope, query, principal=self.principal, k=k, conditions=conditions)

    def context(
        self,
        query: str | None = None,
        *,
        max_tokens: int | None = None,
        reserve_tokens: int = 0,
        search: bool = True,
        overflow: Literal["raise", "truncate"] = "raise",
        pending_calls: bool = False,
    ) -> Context:
        """The messages for the next call of the model: tasks, summary, recent turns, what search finds.

        Args:
            query: What to search for; it is not among the messages. None means the newest user turn.
            max_tokens: The budget; None means `budget.total`.
            reserve_tokens: Tokens of it that the caller will add: pending input, tool schemas.
            search: Whether to look into the memory beyond the window.
            overflow: What to do when the newest user turn alone is too long: raise, or cut it.
            pending_calls: Include a tool call at the very end whose results the caller is about to add.

        Returns:
            Messages that together with *reserve_tokens* never exceed *max_tokens*, and a report on every candidate; print
            it, or show it in a notebook.

        Raises:
            BudgetError: The newest user turn does not fit, with the numbers.
        """
        return assemble.context(
            self._parts,
            self.scope,
            query,
            principal=self.principal,
            max_tokens=max_tokens,
            reserve_tokens=reserve_tokens,
            search=search,
            overflow=overflow,
            pending_calls=pending_calls,
        )

    def compact(self, *, max_tokens: int | None = None) -> CompactionReport:
        """Fold old turns into the summary now, if the window is over its limits or over *max_tokens*.

        This happens by itself in the background; the folded turns stay in `messages(view="all")` and in search.
        """
        report = compact.compact(self._parts, self.scope, principal=self.principal, max_tokens=max_tokens)
        if report.folded and self._parts.extractor is not None:
            self._parts.full(self.scope)  # what was folded is looked through in the background
        return report

    def episodes(self, *, by: Literal["hour", "day", "session"] = "day") -> list[Entry]:
        """What was said in each hour, on each day (UTC), or in all of the session, as EPISODIC entries, in order.

        Each names its turns in `sources` and is written by the summarizer, in a transaction of its own. What has not changed
        since the last call is not written again, but for what a model was to write and could not. When a turn is changed or
        deleted, its episodes go, and the next call makes them anew. This may wait for a model.
        """
        return episodes.episodes(self._parts, self.scope, by=by, principal=self.principal)

    def extract(self) -> list[Entry]:
        """Look through the folded turns for knowledge now, those that were not looked through yet; what was written.

        With `extractor=` this happens by itself in the background, after each fold. It is within `gemini.spend_cap`; turns for
        which it has failed five times wait for this call. This waits for the model.

        Raises:
            ConfigError: The memory was opened without an extractor.
            ExtractionError: It failed for some of the turns; what it found in others is kept.
        """
        return extract.extract(self._parts, self.scope, principal=self.principal, attempts=None)

    def summary(self) -> str:
        """The running summary of what was folded, with what is pinned beside it; empty while nothing was."""
        return compact.summary(self._parts, self.scope, principal=self.principal)

    def pin(self, id: str) -> None:
        """Keep a turn of this session in the window, whatever is folded, and in every prompt that has room for it.

        With it stay its tool call's messages and the user turn before it, without which no provider takes it. One that
        was folded comes back.
        """
        edit.pin(self._parts, self.scope, id, principal=self.principal, to=True)

    def unpin(self, id: str) -> None:
        """Undo `pin`: the next fold takes the turn as any other."""
        edit.pin(self._parts, self.scope, id, principal=self.principal, to=False)

    def report_usage(self, model: str, tokens: int) -> float:
        """Say how many tokens *model* was charged for the prompt that `context` built last, to keep its budgets exact.

        Models count otherwise than the configured tokenizer does. From what is reported of a model a safety margin is
        learned, and from then on `context` of the sessions that use it divides `max_tokens` by it. What the caller added
        to the prompt counts as *reserve_tokens* of that call, so reserve it.

        Args:
            model: The model's name.
            tokens: Input tokens, as the provider counted them.

        Returns:
            The margin of *model* now, 1.0 or more. Without a prompt built since the memory was opened nothing is learned.
        """
        return assemble.report_usage(self._parts, self.scope, model, tokens, principal=self.principal)

    def task(self, name: str) -> Task:
        """The working memory of a task: `with session.task("book flight") as task: ...`. No I/O until it is started.

        Args:
            name: What the task is called, up to 200 characters; starting it resumes the open task of this name.
        """
        return Task(self, name)

    def tasks(self, *, status: Literal["open", "completed", "failed"] | None = None) -> list[Task]:
        """The session's tasks, oldest first: open ones, and ended ones until `tasks.completed_max_age` is over."""
        return Task._listed(self, status)

    def thread(self, id: str | None = None) -> Thread:
        """A host's own list of messages, such as an agent's state or the chat that a front end sends. No I/O.

        Args:
            id: Names the list, which is always passed whole, or without its beginning: turns of it that are gone from its
                end leave the window. None: what is not in the list stays, so that it may be the new messages only.
        """
        return Thread(self, id)

    def snapshot(self) -> dict[str, Any]:
        """The session as of one moment, as JSON: its window, summary, open tasks and state.

        What was folded is not in it, only the summary. "format" is the version of its shape.
        """
        return snapshots.take(self._parts, self._ref)

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Make this session what `snapshot` gave, of this memory or of another, all or nothing.

        The snapshot's turns become the window, and are written if they are not there; later ones stay in the transcript. Its
        tasks are open as they were then, and its state is a new version. A session that has a summary keeps it.

        Raises:
            InputError: It is no snapshot, or one of a newer version.
            StateError: Its state is not valid by the rules of now.
        """
        snapshots.restore(self._parts, self._ref, snapshot)

    aadd = offload(add)
    asnapshot = offload(snapshot)
    arestore = offload(restore)
    aadd_many = offload(add_many)
    amessages = offload(messages)
    aclear = offload(clear)
    areplace = offload(replace)
    aremember = offload(remember)
    aremember_many = offload(remember_many)
    asearch = offload(search)
    acontext = offload(context)
    asummary = offload(summary)
    apin = offload(pin)
    aunpin = offload(unpin)
    areport_usage = offload(report_usage)
    atasks = offload(tasks)

    async def acompact(self, *, max_tokens: int | None = None) -> CompactionReport:
        """Async twin of `compact`."""
        # It may wait long for a model, and must not hold a storage worker.
        return await self.memory._patient_workers.run(lambda: self.compact(max_tokens=max_tokens))

    async def aepisodes(self, *, by: Literal["hour", "day", "session"] = "day") -> list[Entry]:
        """Async twin of `episodes`."""
        return await self.memory._patient_workers.run(lambda: self.episodes(by=by))

    async def aextract(self) -> list[Entry]:
        """Async twin of `extract`."""
        return await self.memory._patient_workers.run(self.extract)


class Entries:
    """A session's entries, and those of its user. Turns are addressed by their message's id, any entry by its key."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def _workers(self) -> Workers:
        return self._session._workers

    def list(
        self,
        *,
        filter: Mapping[str, Any] | None = None,
        types: Iterable[MemoryType] | None = None,
        since: datetime | None = None,
        limit: int | None = None,
        after: str | None = None,
        within: Literal["user", "session"] = "user",
        as_of: datetime | str | None = None,
    ) -> builtins.list[Entry]:
        """Entries in the order they were written. *after*: the id or key of the last one of the page before.

        *as_of*: only what had been said, and held, at this time; without it, what was superseded is listed, too.
        """
        s = self._session
        return edit.listing(
            s._parts,
            s.scope,
            principal=s.principal,
            limit=limit,
            filter=filter,
            types=types,
            since=since,
            after=after,
            within=within,
            as_of=as_of,
        )

    def get(self, id: str) -> Entry:
        """One entry, by id or key; `NotFound` when this scope has none. It counts as a use of it."""
        s = self._session
        return edit.read(s._parts, s.scope, id, principal=s.principal)

    def update(self, id: str, /, **changes: Any) -> Entry:
        """Change `content`, `metadata`, `tags`, `category`, `source`, `importance`, `expires_at`, `valid_from` or `valid_to`.

        Returns the new version. With `valid_to=None` an entry holds again, whatever superseded it.
        """
        s = self._session
        return edit.update(s._parts, s.scope, id, changes, principal=s.principal)

    def history(self, id: str) -> builtins.list[Entry]:
        """Every version of an entry that is kept, oldest first, the last as it is now; by id or key.

        Of turns and knowledge the last 100 versions are kept, until the entry is deleted.
        """
        s = self._session
        return versions.history(s._parts, s.scope, id, principal=s.principal)

    def restore(self, id: str, version: int) -> Entry:
        """Make an entry what it was at *version*; the new version that this writes. If nothing superseded it then, it holds."""
        s = self._session
        return versions.restore(s._parts, s.scope, id, version, principal=s.principal)

    def similar(self, text: str | None = None, *, id: str | None = None, k: int = 5) -> builtins.list[Hit]:
        """The knowledge that is most alike to a text, or to the entry *id*, best first: what it may supersede.

        Only what holds. `score` is how alike two texts are by their vectors and words; of the signals, "cosine" and "words"
        are its parts, and "agree" is 1 if they say the same, 0 if other words, numbers, negations or names tell them apart.
        """
        s = self._session
        return consolidation.similar(s._parts, s.scope, text, id=id, k=k, principal=s.principal)

    def consolidate(self, *, dry_run: bool = False) -> builtins.list[Merged]:
        """Merge the user's knowledge that says the same, or say what would be merged.

        Nothing is deleted: what was merged is superseded by what is kept, which has the tags, sources and metadata of all.
        `restore` takes it out again, for good; with what is kept, it is deleted.
        """
        s = self._session
        return consolidation.consolidate(s._parts, s.scope, dry_run=dry_run, principal=s.principal)

    def delete(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        filter: Mapping[str, Any] | None = None,
        within: Literal["user", "session"] = "session",
    ) -> int:
        """Delete entries for good, by id or by filter (in this session unless *within* is "user"); how many."""
        s = self._session
        return edit.delete(s._parts, s.scope, ids, principal=s.principal, filter=filter, within=within)

    def archive(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        filter: Mapping[str, Any] | None = None,
        label: str | None = None,
        within: Literal["user", "session"] = "session",
    ) -> int:
        """Move entries into the archive now, by id or by filter (in this session unless *within* is "user"); how many.

        They stay in the transcript and are found by their words; one that is used comes back with the next sweep. Turns in
        the window, pinned ones, tasks and running summaries stay where they are. *label* is what they can be listed by:
        `list(filter={"archive_label": ...})`.
        """
        s = self._session
        return archive.archive(s._parts, s.scope, ids, principal=s.principal, filter=filter, label=label, within=within)

    def count(self, *, filter: Mapping[str, Any] | None = None, within: Literal["user", "session"] = "session") -> int:
        """How many entries fulfil *filter*, in this session unless *within* is "user"."""
        s = self._session
        return edit.count(s._parts, s.scope, principal=s.principal, filter=filter, within=within)

    alist = offload(list)
    aget = offload(get)
    aupdate = offload(update)
    ahistory = offload(history)
    arestore = offload(restore)
    asimilar = offload(similar)
    aconsolidate = offload(consolidate)
    adelete = offload(delete)
    aarchive = offload(archive)
    acount = offload(count)


__all__ = ["Entries", "Session"]
