"""Who may do what: the one check at the top of every verb."""

from __future__ import annotations

from ..errors import AccessDenied
from ..protocols import AccessPolicy
from ..types import Scope


class AllowOwn:
    """The default policy: a principal may touch what carries its own user id.

    No principal means the embedding application itself, which has already decided whose session it opened.
    """

    def allows(self, principal: str | None, action: str, scope: Scope) -> bool:  # noqa: ARG002 - own means everything
        return principal is None or principal == scope.user_id


def authorize(policy: AccessPolicy, principal: str | None, *, action: str, scope: Scope) -> None:
    """Raise `AccessDenied` unless *policy* lets *principal* do *action* in *scope*."""
    if not policy.allows(principal, action, scope):
        raise AccessDenied(
            f"{principal!r} may not {action} the memory of user {scope.user_id!r}; open the session with that user's own "
            "principal, or give open_memory a policy that allows it",
            principal=principal,
            action=action,
        )


__all__ = ["AllowOwn", "authorize"]
