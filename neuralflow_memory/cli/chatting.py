"""The command `chat`: a conversation with the memory, and with a model where one is configured."""

from __future__ import annotations

from typing import Annotated

import typer

from neuralflow_memory.types import Message

from . import render
from .options import PathOption, UserOption, opened

_HELP = "/context shows what a model would see, /search WORDS what is found, /quit ends."


def chat(
    *,
    session: Annotated[str, typer.Option("--session", help="Which conversation.")] = "chat",
    user: UserOption = None,
    path: PathOption = None,
) -> None:
    """Talk, and see what the memory makes of it. Gemini answers where it is configured; otherwise the prompt is shown.

    A line is a turn; /context, /search WORDS and /quit are commands, and so is the end of the input.
    """
    with opened(path, create=True) as memory:
        conversation = memory.session(session, user_id=user)
        reply = getattr(memory._core.parts.summarizer, "reply", None)
        typer.echo(_HELP, err=True)
        while (said := _asked()) is not None:
            if said == "/context":
                render.out().print(render.context_view(conversation.context()))
            elif said.startswith("/search "):
                for rank, hit in enumerate(conversation.search(said.removeprefix("/search ")), 1):
                    render.out().print(render.hit_view(hit, rank=rank))
            elif said:
                conversation.add(Message("user", said))
                context = conversation.context()
                if reply is None:
                    render.out().print(render.context_view(context))
                else:
                    answer = reply(context.messages)
                    conversation.add(Message("assistant", answer))
                    render.out().print(render.said(answer), soft_wrap=True)


def _asked() -> str | None:
    """The next line, None at the end."""
    try:
        said = input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        typer.echo()
        return None
    return None if said in ("/quit", "/exit") else said
