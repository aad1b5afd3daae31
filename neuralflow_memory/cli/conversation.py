"""Commands on what was said: `add`, `search`, `context`."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated, Any, Literal

import typer

from neuralflow_memory.types import MemoryType, Message, Role

from . import render
from .options import JsonOption, PathOption, UserOption, opened, somebody

SessionOption = Annotated[str | None, typer.Option("--session", help="Which conversation.", show_default=False)]


def add(
    text: Annotated[str, typer.Argument(help="What was said.", show_default=False)],
    *,
    session: Annotated[str, typer.Option("--session", help="Which conversation.", show_default=False)],
    user: UserOption = None,
    role: Annotated[Role, typer.Option("--role", help="Who said it.")] = "user",
    path: PathOption = None,
    json_: JsonOption = False,
) -> None:
    """Add one message to a conversation, and print its id.

    Words find it at once; it is embedded when the memory is next opened for searching.
    """
    with opened(path, create=True, words_only=True) as memory:
        ids = memory.session(session, user_id=user).add(Message(role, text))
    typer.echo(render.as_json({"ids": ids}) if json_ else ids[0])


def search(
    query: Annotated[str, typer.Argument(help="What to look for, as you would ask it.", show_default=False)],
    *,
    user: UserOption = None,
    session: Annotated[
        str | None, typer.Option("--session", help="Only in this conversation.", show_default=False)
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many at most.")] = 8,
    type_: Annotated[list[MemoryType] | None, typer.Option("--type", help="Only this kind; may be repeated.")] = None,
    since: Annotated[datetime | None, typer.Option("--since", help="Not older than this (UTC).")] = None,
    until: Annotated[datetime | None, typer.Option("--until", help="Not newer than this (UTC).")] = None,
    filter_: Annotated[
        str | None, typer.Option("--filter", help='A filter as JSON, e.g. \'{"role": "user"}\'.', show_default=False)
    ] = None,
    path: PathOption = None,
    json_: JsonOption = False,
) -> None:
    """Search everything a user ever said and was told, or one conversation; best first, and why."""
    somebody(path, user=user, session=session)
    wanted = _json_filter(filter_)
    with opened(path) as memory:
        hits = memory.session(session, user_id=user).search(
            query,
            k=k,
            types=type_ or None,
            filter=wanted,
            since=since,
            until=until,
            within="session" if session else None,
        )
    if json_:
        typer.echo(render.as_json(hits))
        return
    for rank, hit in enumerate(hits, 1):
        render.out().print(render.hit_view(hit, rank=rank))
    if not hits:
        typer.echo("Nothing found.")


def context(
    query: Annotated[
        str | None, typer.Argument(help="The question; otherwise the newest user turn.", show_default=False)
    ] = None,
    *,
    session: SessionOption = None,
    user: UserOption = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="The budget; otherwise budget.total.", show_default=False)
    ] = None,
    overflow: Annotated[
        Literal["raise", "truncate"],
        typer.Option("--overflow", help="What to do with a newest user turn that is too long."),
    ] = "raise",
    path: PathOption = None,
    json_: JsonOption = False,
) -> None:
    """Show what a model would be sent now: the messages, what fills the budget, and what was left out and why."""
    somebody(path, user=user, session=session)
    with opened(path) as memory:
        conversation = memory.session(session, user_id=user)
        if session is not None and not conversation.messages(last=1):
            whose = "without a user" if conversation.user_id is None else f"of {conversation.user_id}"
            (render.err() if json_ else render.out()).print(
                render.said(f"there is no conversation {session} {whose} yet"), soft_wrap=True
            )
            if query is None and not json_:
                return  # with a question there still is something to show: what other conversations know
        result = conversation.context(query, max_tokens=max_tokens, overflow=overflow)
    if json_:
        typer.echo(render.as_json(result))
    elif result.report:
        render.out().print(render.context_view(result))
    else:
        typer.echo("Nothing to show: name a conversation with --session, or ask a question.")


def _json_filter(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"not JSON: {error}", param_hint="--filter") from None
    if not isinstance(value, dict):
        raise typer.BadParameter("must be a JSON object", param_hint="--filter")
    return value
