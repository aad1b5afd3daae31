"""The command line, `neuralflow-memory`. Heavy libraries are imported by the command that needs them, when it runs."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from neuralflow_memory.errors import NeuralFlowError

from . import (
    benchmarking,
    chatting,
    conversation,
    demo,
    doctor,
    evaluating,
    fitting,
    importing,
    overview,
    reindexing,
    render,
    saving,
    sweeping,
)


class _Commands(TyperGroup):
    """Shows an error of ours as what it is: a sentence that says what to do next."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except NeuralFlowError as error:
            render.err().print(render.said(f"Error: {error}", style="red"), soft_wrap=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    name="neuralflow-memory",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (
    demo.demo,
    chatting.chat,
    conversation.add,
    conversation.search,
    conversation.context,
    overview.sessions,
    overview.stats,
    sweeping.sweep,
    doctor.doctor,
):
    app.command()(_command)
app.command()(saving.export)
app.command("import")(importing.import_)
app.command()(saving.backup)
app.command()(saving.restore)
app.command()(reindexing.reindex)
app.command("eval")(evaluating.eval_)
app.command()(fitting.fit)
app.command()(benchmarking.bench)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("neuralflow-memory"))
        raise typer.Exit


@app.callback()
def _about(
    *,
    _show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Conversation memory for LangChain, LangGraph and LlamaIndex: durable, searchable, within its token budget."""


def main() -> None:
    """Run the command line."""
    app()


__all__ = ["app", "main"]
