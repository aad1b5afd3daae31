"""JSON values, as callers give them and as they are kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .errors import MessageError


def dumped(value: Any, *, what: str) -> str:
    """JSON text of *value*; `MessageError`, naming *what* it is, when it is not JSON."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_mapping)
    except (TypeError, ValueError, RecursionError) as error:
        raise MessageError(f"{what} must hold JSON values only ({error}); convert the others to text first") from None


def copied(value: Any, *, what: str) -> Any:
    """*value* as JSON values of its own, so that nobody's later change of the one reaches the other."""
    return json.loads(dumped(value, what=what))


def _mapping(value: Any) -> Any:
    if isinstance(value, Mapping):  # MappingProxyType and the like
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


__all__ = ["copied", "dumped"]
