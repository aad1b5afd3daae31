"""A circuit breaker: what keeps failing is left alone for a while."""

from __future__ import annotations

import threading

_MOST_DOUBLINGS = 10  # which make more than that


class Breaker:
    """Lets calls through until so many in a row have failed; then one after a pause, which doubles with each failure.

    Times and pauses are seconds, by any clock.
    """

    def __init__(self, *, failures: int = 3, pause: float = 30.0, longest_pause: float = 900.0) -> None:
        self._most, self._pause, self._longest = failures, pause, longest_pause
        self._lock = threading.Lock()
        self._failures = 0
        self._since = self._until = 0.0
        """When the pause began and when it ends. A clock that is put back ends it, too."""

    @property
    def healthy(self) -> bool:
        """Whether the last call succeeded, or none was made."""
        return self._failures == 0

    def allows(self, now: float) -> bool:
        """Whether a call may be made now."""
        return not self._since <= now < self._until

    def enter(self, now: float) -> bool:
        """Whether the caller may make a call now; after a pause only one may, until it has succeeded or failed."""
        with self._lock:
            if not self.allows(now):
                return False
            if self._failures >= self._most:
                self._since, self._until = now, now + self._longest
            return True

    def failed(self, now: float) -> None:
        """Count a failure, which was noticed now."""
        with self._lock:
            self._failures += 1
            if self._failures >= self._most:
                pause = self._pause * 2.0 ** min(self._failures - self._most, _MOST_DOUBLINGS)
                self._since, self._until = now, now + min(self._longest, pause)

    def succeeded(self) -> None:
        """Let everything through again."""
        with self._lock:
            self._failures, self._since, self._until = 0, 0.0, 0.0

    def block(self, now: float, *, until: float) -> None:
        """Let nothing through from now on until then."""
        with self._lock:
            self._since, self._until = now, max(self._until, until)


__all__ = ["Breaker"]
