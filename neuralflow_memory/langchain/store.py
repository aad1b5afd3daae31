"""Keyed values as LangGraph's long-term memory: `create_agent(store=...)`, `graph.compile(store=...)`."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any

from neuralflow_memory import ClosedError, ConfigError, Memory, MissingDependency, open_memory
from neuralflow_memory._json import copied
from neuralflow_memory.errors import brief
from neuralflow_memory.types import Value
from neuralflow_memory.values import Get, Namespaces, Put, Search, Values
from neuralflow_memory.values import Op as OwnOp

try:
    from langgraph.store.base import (
        BaseStore,
        GetOp,
        IndexConfig,
        Item,
        ListNamespacesOp,
        Op,
        PutOp,
        Result,
        SearchItem,
        SearchOp,
        TTLConfig,
        get_text_at_path,
        tokenize_path,
        validate_op_namespace,
    )
except ImportError as error:
    raise MissingDependency("langgraph", "langgraph", "NeuralFlowStore") from error

_SWEEP_MINUTES = 5.0


class NeuralFlowStore(BaseStore):
    """A tenant's or a user's values as a LangGraph store, safe to use from any thread and any event loop.

    Namespaces live inside that tenant or user: two stores of different ones share nothing, and the empty prefix means all
    of one. Values must be JSON. What is indexed is found by its meaning and by its words, without further configuration.

    Args:
        memory: The memory that holds the values; by default `open_memory()`.
        values: What `memory.values(...)` returned, in place of `memory` and the ids.
        user_id: Whose values they are; None means the memory's default user, or nobody: values of the tenant.
        tenant: Keeps the values of one organisation from those of another.
        index: `{"fields": [...]}` says which fields of a value are indexed, by default `["$"]`, all of it as one text.
            Embedding is the memory's affair.
        ttl: `{"default_ttl": minutes, "refresh_on_read": bool, "sweep_interval_minutes": minutes}`. Values that have expired
            are never returned, swept or not.
    """

    supports_ttl = True

    def __init__(
        self,
        memory: Memory | None = None,
        *,
        values: Values | None = None,
        user_id: str | None = None,
        tenant: str | None = None,
        index: IndexConfig | None = None,
        ttl: TTLConfig | None = None,
    ) -> None:
        if index is not None and index.get("embed") is not None:
            raise ConfigError(
                "the memory embeds what this store holds: pass the embedder to open_memory(embedder=...), and here only "
                "index={'fields': [...]}"
            )
        self._values = _values(memory, values, user_id, tenant)
        self._fields = tuple((index or {}).get("fields") or ("$",))
        self.ttl_config = ttl
        self._stop = threading.Event()
        self._sweeper: Future[None] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._values!r}, fields={list(self._fields)})"

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        """Do several operations: reads see what was there before, and the writes are one transaction."""
        given = list(ops)
        return _results(given, self._values.batch(map(self._own, given)))

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        """Async twin of `batch`."""
        given = list(ops)
        return _results(
            given, await self._values.abatch(map(self._own, given))
        )  # converted on the worker, not the loop

    def _own(self, op: Op) -> OwnOp:
        validate_op_namespace(op)
        match op:
            case GetOp():
                return Get(op.namespace, op.key, op.refresh_ttl)
            case SearchOp():
                query = op.query if op.query and op.query.strip() else None
                return Search(op.namespace_prefix, query, op.filter, op.limit, op.offset, op.refresh_ttl)
            case PutOp():
                return Put(op.namespace, op.key, op.value, self._texts(op), op.ttl)
            case ListNamespacesOp():
                paths = op.match_conditions or ()
                prefixes = [c.path for c in paths if c.match_type == "prefix"]
                suffixes = [c.path for c in paths if c.match_type == "suffix"]
                if len(prefixes) + len(suffixes) < len(paths):
                    raise ValueError(f"namespaces are matched by prefix or suffix, not by {paths!r:.200}")
                return Namespaces(prefixes, suffixes, op.max_depth, op.limit, op.offset)
        raise ValueError(f"an operation is a GetOp, PutOp, SearchOp or ListNamespacesOp, not {brief(op)}")

    def _texts(self, op: PutOp) -> list[str]:
        if op.value is None or op.index is False:
            return []
        value = copied(op.value, what="a value")
        fields = self._fields if op.index is None else op.index
        return [
            text
            for field in fields
            for text in get_text_at_path(value, field if field == "$" else tokenize_path(field))
        ]

    # -- expiry, under the names that the SQL stores of LangGraph have

    def sweep_ttl(self) -> int:
        """Delete the values that have expired; how many."""
        return self._values.sweep()

    def start_ttl_sweeper(self, sweep_interval_minutes: float | None = None) -> Future[None]:
        """Sweep in the background, until `stop_ttl_sweeper` or the memory's end; the future is done then.

        Args:
            sweep_interval_minutes: By default that of `ttl`, or 5.
        """
        if self._sweeper is not None and not self._sweeper.done():
            return self._sweeper
        configured = (self.ttl_config or {}).get("sweep_interval_minutes")
        minutes = float(sweep_interval_minutes or configured or _SWEEP_MINUTES)
        self._stop = stop = threading.Event()
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # it is ended by stop_ttl_sweeper alone
        self._sweeper = done

        def work() -> None:
            try:
                while not stop.wait(60 * minutes):
                    self.sweep_ttl()
                done.set_result(None)
            except ClosedError:
                done.set_result(None)
            except BaseException as trouble:  # told by the future
                done.set_exception(trouble)

        threading.Thread(target=work, name="neuralflow-ttl-sweeper", daemon=True).start()
        return done

    def stop_ttl_sweeper(self, timeout: float | None = None) -> bool:
        """Stop the sweeper; whether it has ended, after waiting *timeout* seconds for that (None: as long as it takes)."""
        self._stop.set()
        if self._sweeper is None:
            return True
        try:
            self._sweeper.exception(timeout)
        except TimeoutError:
            return False
        return True


def _values(memory: Memory | None, values: Values | None, user_id: str | None, tenant: str | None) -> Values:
    for name, given, kind in (("memory", memory, Memory), ("values", values, Values)):
        if given is not None and not isinstance(given, kind):
            raise ConfigError(
                f"{name}= takes a {kind.__name__}, not {brief(given)}: open_memory(folder), memory.values()"
            )
    if values is None:
        return (open_memory() if memory is None else memory).values(user_id=user_id, tenant=tenant)
    if memory is not None or user_id is not None or tenant is not None:
        raise ConfigError("give values=, or a memory with user_id= and tenant=, not both")
    return values


def _results(ops: list[Op], results: list[Any]) -> list[Result]:
    return [
        [_found(v) for v in result] if isinstance(op, SearchOp) else _item(result) if isinstance(op, GetOp) else result
        for op, result in zip(ops, results, strict=True)
    ]


def _item(value: Value | None) -> Item | None:
    if value is None:
        return None
    return Item(
        value=value.value,
        key=value.key,
        namespace=value.namespace,
        created_at=value.created_at,
        updated_at=value.updated_at,
    )


def _found(value: Value) -> SearchItem:
    return SearchItem(value.namespace, value.key, value.value, value.created_at, value.updated_at, value.score)


__all__ = ["NeuralFlowStore"]
