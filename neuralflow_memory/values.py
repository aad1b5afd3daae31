"""`Values`: JSON objects under namespaces and keys. Each method is a line or two onto `pipeline/values.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from ._offload import Workers, offload
from .pipeline import values
from .pipeline.parts import Parts
from .pipeline.values import Get, Namespaces, Op, Put, Result, Search
from .protocols import Namespace
from .types import Scope, Value

if TYPE_CHECKING:
    from .memory import Memory


class Values:
    """JSON objects under namespaces and keys, of one user or of one tenant. Made by `Memory.values`.

    ```python
    values = memory.values(user_id="ada")
    values.put(("preferences",), "travel", {"seat": "aisle"}, texts=["Ada likes aisle seats"])
    values.get(("preferences",), "travel").value["seat"]
    values.search(("preferences",), "where to sit on a plane")
    ```

    A namespace is a tuple of labels, as folders in folders; a prefix means whole labels, and `()` all there is. It holds no
    data of its own: make one whenever you need it.

    What a value is found by is kept as knowledge, an entry for each text: a user's sessions find it, too, and a tenant's
    values are found here alone. An entry that is deleted or changed in `session.entries` leaves the value as it is; it is
    found by what is left, until it is put again.

    Every method has an async twin: `put` / `aput`, `search` / `asearch`, and so on.
    """

    def __init__(self, memory: Memory, scope: Scope, *, principal: str | None) -> None:
        self.memory = memory
        self.scope = scope
        self.principal = principal

    @property
    def _parts(self) -> Parts:
        return self.memory._ready_parts()

    @property
    def _workers(self) -> Workers:
        return self.memory._workers

    def __repr__(self) -> str:
        return f"Values(tenant={self.scope.tenant!r}, user_id={self.scope.user_id!r})"

    def put(
        self,
        namespace: Namespace,
        key: str,
        value: Mapping[str, Any],
        *,
        texts: Iterable[str] = (),
        ttl: float | None = None,
    ) -> None:
        """Keep a JSON object under a key, in place of the one before.

        Args:
            namespace: Labels from the root, none of them empty.
            key: Unique in its namespace.
            value: Any mapping of JSON values with texts as keys; it reads back equal.
            texts: What `search` finds it by; the best of them counts. A text that it had before is not embedded again.
            ttl: Minutes that it lives after it was last put, or read with *refresh*; None for ever.

        Raises:
            InputError: Something can't be kept; nothing was written.
        """
        self.batch([Put(namespace, key, value, texts, ttl)])

    def get(self, namespace: Namespace, key: str, *, refresh: bool = True) -> Value | None:
        """The value under a key, None when there is none. *refresh*: one with a time to live begins to live anew."""
        return cast("Value | None", self.batch([Get(namespace, key, refresh)])[0])

    def delete(self, namespace: Namespace, key: str) -> None:
        """Delete what is under a key, with what it is found by; no error when there is nothing."""
        self.batch([Put(namespace, key, None)])

    def search(
        self,
        prefix: Namespace = (),
        query: str | None = None,
        *,
        filter: Mapping[str, Any] | None = None,
        limit: int = 10,
        offset: int = 0,
        refresh: bool = True,
    ) -> list[Value]:
        """Find values in the namespaces that begin with *prefix*.

        Args:
            prefix: Labels from the root; `()` means all.
            query: What to look for, best first; those without a text come last. None: those changed last come first.
            filter: Conditions on the value: `{"kind": "note", "stars": {"$gte": 3}}`. Equality, `$eq $ne $gt $gte $lt $lte`;
                mappings are compared by the keys that the filter names, lists item by item.
            limit: How many; *offset*: how many of the first to leave out.
            offset: See *limit*.
            refresh: Those found with a time to live begin to live anew.

        Raises:
            QueryError: The query is empty or too long, or an option is wrong.
            FilterError: The filter is wrong.
        """
        return cast("list[Value]", self.batch([Search(prefix, query, filter, limit, offset, refresh)])[0])

    def namespaces(
        self,
        *,
        prefix: Namespace = (),
        suffix: Namespace = (),
        max_depth: int | None = None,
        limit: int = 100,
        offset: int = 0,
    ) -> list[Namespace]:
        """The namespaces that hold values, sorted; `*` in *prefix* or *suffix* stands for any label.

        With *max_depth* each is cut to so many labels, and named once.
        """
        return cast("list[Namespace]", self.batch([Namespaces([prefix], [suffix], max_depth, limit, offset)])[0])

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        """Do several operations (`Get`, `Put`, `Search`, `Namespaces`); a result for each, None for a `Put`.

        Reads see what was there before. All puts are one transaction; of two for one key the last counts.
        """
        return values.run(self._parts, self.scope, ops, principal=self.principal)

    def sweep(self) -> int:
        """Delete the values that have expired; how many. They are never shown, and puts delete them little by little."""
        return values.sweep(self._parts, self.scope, principal=self.principal)

    aput = offload(put)
    aget = offload(get)
    adelete = offload(delete)
    asearch = offload(search)
    anamespaces = offload(namespaces)
    abatch = offload(batch)
    asweep = offload(sweep)


__all__ = ["Get", "Namespaces", "Op", "Put", "Result", "Search", "Values"]
