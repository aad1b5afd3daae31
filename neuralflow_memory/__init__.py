"""Conversation memory for LangChain, LangGraph and LlamaIndex: durable, searchable, within its token budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import Settings
from .errors import (
    AccessDenied,
    ArchiveError,
    BackupError,
    BudgetError,
    ClosedError,
    ConfigError,
    ConflictError,
    EmbeddingError,
    ExtractionError,
    FilterError,
    FolderError,
    FolderInUse,
    ForkedError,
    FormatError,
    IndexingError,
    InputError,
    InvalidTransition,
    MessageError,
    MissingDependency,
    ModelMismatch,
    NeuralFlowError,
    NotFound,
    QueryError,
    ScopeError,
    StateError,
    StatePersistenceError,
    StorageError,
    StorageFull,
    SummarizerError,
    TaskError,
)
from .types import (
    BackupReport,
    Candidate,
    CompactionReport,
    Context,
    Entry,
    ExportReport,
    Extraction,
    Finding,
    Hit,
    ImportReport,
    MemoryType,
    Merged,
    Message,
    Move,
    ReindexReport,
    RestoreReport,
    Scope,
    SessionInfo,
    StateDiff,
    StateVersion,
    Summary,
    Superseding,
    SweepReport,
    ToolCall,
    Value,
)

if TYPE_CHECKING:
    from .memory import Memory
    from .rules.states import StateRules
    from .session import Session
    from .settings import aopen_memory, open_memory
    from .state import State
    from .task import Task
    from .thread import Thread
    from .values import Values

_LAZY = {
    "Memory": "memory",
    "Session": "session",
    "State": "state",
    "StateRules": "rules.states",
    "Task": "task",
    "Thread": "thread",
    "Values": "values",
    "aopen_memory": "settings",
    "open_memory": "settings",
}


def __getattr__(name: str) -> Any:
    # What needs numpy, pydantic-settings and the rest is imported on first use.
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("neuralflow-memory")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AccessDenied",
    "ArchiveError",
    "BackupError",
    "BackupReport",
    "BudgetError",
    "Candidate",
    "ClosedError",
    "CompactionReport",
    "ConfigError",
    "ConflictError",
    "Context",
    "EmbeddingError",
    "Entry",
    "ExportReport",
    "Extraction",
    "ExtractionError",
    "FilterError",
    "Finding",
    "FolderError",
    "FolderInUse",
    "ForkedError",
    "FormatError",
    "Hit",
    "ImportReport",
    "IndexingError",
    "InputError",
    "InvalidTransition",
    "Memory",
    "MemoryType",
    "Merged",
    "Message",
    "MessageError",
    "MissingDependency",
    "ModelMismatch",
    "Move",
    "NeuralFlowError",
    "NotFound",
    "QueryError",
    "ReindexReport",
    "RestoreReport",
    "Scope",
    "ScopeError",
    "Session",
    "SessionInfo",
    "Settings",
    "State",
    "StateDiff",
    "StateError",
    "StatePersistenceError",
    "StateRules",
    "StateVersion",
    "StorageError",
    "StorageFull",
    "SummarizerError",
    "Summary",
    "Superseding",
    "SweepReport",
    "Task",
    "TaskError",
    "Thread",
    "ToolCall",
    "Value",
    "Values",
    "aopen_memory",
    "open_memory",
]
