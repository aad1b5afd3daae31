"""Commands that look at a memory as a whole: `sessions` and `stats`."""

from __future__ import annotations

import typer

from . import render
from .options import JsonOption, PathOption, UserOption, opened


def sessions(*, user: UserOption = None, path: PathOption = None, json_: JsonOption = False) -> None:
    """List a user's conversations, latest first; without --user, those that belong to nobody."""
    with opened(path, words_only=True) as memory:
        found = memory.sessions(user_id=user)
        whose = memory.settings.user_id if user is None else user
    if json_:
        typer.echo(render.as_json(found))
    elif found:
        render.out().print(render.sessions_table(found))
    elif whose is None:
        typer.echo("no conversations without a user; pass --user NAME")
    else:
        render.out().print(render.said(f"no conversations of {whose}"), soft_wrap=True)


def stats(*, path: PathOption = None, json_: JsonOption = False) -> None:
    """Show what a memory holds, and what still waits to be indexed."""
    with opened(path) as memory:
        facts = memory.stats()
    if json_:
        typer.echo(render.as_json(facts))
    else:
        render.out().print(render.facts_table(facts))
