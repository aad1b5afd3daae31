"""`RedisCache`: what the processes of a folder keep together, on a Redis or Valkey server. The only file that imports redis.

A partition is one hash with an expiry: so it goes with one command, and the server gives up whole partitions when it is full.
Nothing that fails here reaches anybody: what can't be asked has nothing, is left alone for a while, and counted.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

from ..config import Redis as Options
from ..errors import ConfigError, MissingDependency
from ..rules.breaker import Breaker

if TYPE_CHECKING:
    import redis

T = TypeVar("T")

_TIMEOUT = 0.04  # seconds: to connect, and for each answer
_PAUSE, _LONGEST_PAUSE = 1.0, 30.0  # seconds for which a server that failed is left alone
_HEAD = b"\0head"  # the field that names the head which the others were made from
_MOST_VALUES = 256  # set in one partition under one head; then it is begun anew
_PARTITIONS = 10_000  # that are kept in mind


class RedisCache:
    """A `Cache` on a Redis or Valkey server. No call raises or waits for long; all are thread-safe."""

    def __init__(self, options: Options, *, prefix: str) -> None:
        """Nothing is connected before the first call. *prefix* begins every key, so that two ledgers never meet."""
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise MissingDependency("redis", "redis", "A cache in Redis (redis.url)") from error
        assert options.url is not None
        url = options.url.get_secret_value()
        self._errors = redis.RedisError
        self._refusals = (redis.exceptions.NoPermissionError, redis.exceptions.ResponseError)
        try:  # protocol 2 needs no greeting that a server might not know
            self._client: redis.Redis = redis.Redis.from_url(
                url, socket_connect_timeout=_TIMEOUT, socket_timeout=_TIMEOUT, protocol=2
            )
        except ValueError as error:
            raise ConfigError(f"redis.url: {error}") from None
        self._client.connection_pool.connection_kwargs |= {
            "retry": Retry(NoBackoff(), 0),  # by default, a dead server would cost seconds
            "driver_info": None,  # nor CLIENT, which managed servers refuse
            "decode_responses": False,
        }
        self._options = options
        self._prefix = prefix
        self._address = _plain(url)
        self._breaker = Breaker(failures=1, pause=_PAUSE, longest_pause=_LONGEST_PAUSE)
        self._lock = threading.Lock()
        self._tally: Counter[str] = Counter()
        self._error: str | None = None
        self._heads: OrderedDict[str, tuple[str, int]] = OrderedDict()
        """The head that a partition has there, as far as is known, and how many values were set under it."""
        self._owed: OrderedDict[str, None] = OrderedDict()
        """Partitions that are to be deleted, as soon as the server answers."""
        self._settled = False
        """Whether the server's memory and policy were looked at since it was connected."""
        self._advice: str | None = None

    def get(self, partition: str, names: Sequence[str], *, head: str) -> list[bytes | None]:
        """The values that were set under *head*, in the order of *names*; None for those that are not there."""
        found = self._asked(
            lambda: cast("list[bytes | None]", self._client.hmget(self._key(partition), [_HEAD, *names]))
        )
        values: list[bytes | None] = [None] * len(names)
        if found is not None:
            if found[0] == head.encode():
                values = found[1:]
            if found[0] is not None:
                self._seen(partition, found[0].decode(errors="replace"))
        with self._lock:
            self._tally["hits"] += sum(value is not None for value in values)
            self._tally["misses"] += sum(value is None for value in values)
        return values

    def set(self, partition: str, values: Mapping[str, bytes], *, head: str, ttl: float) -> None:
        """Keep *values* by name for *ttl* seconds at most, in place of what was set under another head."""
        with self._lock:
            known, count = self._heads.get(partition, (head, 0))
        anew = known != head or count + len(values) > _MOST_VALUES
        key = self._key(partition)

        def write() -> bool:
            with self._client.pipeline(transaction=True) as pipeline:  # no key is ever there without its expiry
                if anew:
                    pipeline.unlink(key)
                pipeline.hset(
                    key, mapping={_HEAD: head.encode(), **{name.encode(): value for name, value in values.items()}}
                )
                pipeline.expire(key, max(1, int(ttl)))
                pipeline.execute()
            return True

        if self._asked(write):
            self._seen(partition, head, count=len(values) if anew else count + len(values))

    def delete(self, partition: str) -> None:
        """Remove everything of a partition: at once, or when the server answers again; else it goes when its time is over."""
        with self._lock:
            self._owed[partition] = None
            self._heads.pop(partition, None)
            if len(self._owed) > _PARTITIONS:
                self._owed.popitem(last=False)
        self._asked(lambda: True)  # which does what is owed

    def stats(self) -> dict[str, Any]:
        """Hits, misses, errors, evictions (the server's, of all who use it; None if unknown), and whether it is left alone.

        `open`: it failed, and is left alone for a while. `error`: the last failure. `advice`: what to change on the server.
        """
        server = self._asked(lambda: self._client.info("stats"))
        with self._lock:
            counts = {name: self._tally[name] for name in ("hits", "misses", "errors")}
        return {
            "address": self._address,
            **counts,
            "evictions": None if server is None else server.get("evicted_keys"),
            "open": not self._breaker.healthy,
            "error": self._error,
            "advice": self._advice,
        }

    def close(self) -> None:
        self._client.close()

    def _key(self, partition: str) -> str:
        return f"{self._prefix}{partition}"

    def _seen(self, partition: str, head: str, *, count: int | None = None) -> None:
        with self._lock:
            known = self._heads.get(partition)
            if count is None:
                count = known[1] if known is not None and known[0] == head else 0
            self._heads[partition] = head, count
            self._heads.move_to_end(partition)
            if len(self._heads) > _PARTITIONS:
                self._heads.popitem(last=False)

    def _asked(self, ask: Callable[[], T]) -> T | None:
        """What *ask* returns; None if the server fails, or failed a short while ago."""
        if not self._breaker.enter(time.monotonic()):
            return None
        answered = False
        try:
            if not self._settled:
                self._settle()
                self._settled = True
            while self._owed:
                self._forget()
            found = ask()
            answered = True
        except (self._errors, OSError, ValueError) as error:
            self._error = f"{type(error).__name__}: {error}"
            return None
        finally:
            if answered:
                self._breaker.succeeded()
            else:
                self._settled = False  # the next may be another server
                self._breaker.failed(time.monotonic())
                with self._lock:
                    self._tally["errors"] += 1
        return found

    def _forget(self) -> None:
        with self._lock:
            doomed = list(self._owed)[:100]
        if doomed:
            self._client.unlink(*map(self._key, doomed))
        with self._lock:
            for partition in doomed:
                self._owed.pop(partition, None)

    def _settle(self) -> None:
        """Set the server's memory and policy as the options say; where that is refused, look whether they are so."""
        memory, policy = self._options.max_memory_mb, self._options.max_memory_policy
        wanted: dict[str, str] = {} if memory is None else {"maxmemory": str(memory * 1024 * 1024)}
        wanted |= {} if policy is None else {"maxmemory-policy": policy}
        if not wanted:
            return
        try:
            there = self._client.config_get("maxmemory*")
            for name, value in wanted.items():
                if there.get(name) != value:
                    self._client.config_set(name, value)
            self._advice = None
        except self._refusals:
            self._check(wanted)

    def _check(self, wanted: Mapping[str, str]) -> None:
        try:
            told = self._client.info("memory")
        except self._refusals:
            told = {}
        there = {"maxmemory": told.get("maxmemory"), "maxmemory-policy": told.get("maxmemory_policy")}
        wrong = [f"{name} is {there[name]}, not {value}" for name, value in wanted.items() if str(there[name]) != value]
        before, self._advice = self._advice, None
        if wrong:
            self._advice = (
                f"{self._address} does not let its memory be set from here, and {' and '.join(wrong)}: set it where the server is "
                "managed, or say in redis.max_memory_mb and redis.max_memory_policy how it is (None: whatever it is)"
            )
            if before is None:
                warnings.warn(self._advice, RuntimeWarning, stacklevel=2)


def _plain(url: str) -> str:
    """*url* without user, password and options."""
    parts = urlsplit(url)
    where = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{where}{parts.path}"


__all__ = ["RedisCache"]
