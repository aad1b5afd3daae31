"""Every error this package raises, in one tree.

NeuralFlowError
├── ConfigError          (ValueError)       an option or a combination of options is wrong
├── MissingDependency    (ImportError)      an optional library is not installed
├── InputError           (ValueError)       what was passed in can't be used
│   ├── MessageError                        a message's content, role or shape
│   ├── FilterError                         a filter expression
│   ├── QueryError                          a search query or its options
│   ├── ScopeError                          ids that don't make a scope
│   ├── FormatError                         a file to be imported is cut, damaged, or of another format
│   ├── BudgetError                         the newest user turn does not fit the budget
│   └── TaskError                           a task was used when it was over, or opened twice
├── StateError           (ValueError)       a session's state would not be valid
│   ├── InvalidTransition                   its transition table, or its life, does not lead there
│   └── StatePersistenceError (OSError)     it could not be written
├── ConflictError        (ValueError)       an id is taken by other content, or a state has changed meanwhile
├── NotFound             (LookupError)      no such entry in this scope
├── AccessDenied         (PermissionError)  the principal may not do this here
├── StorageError         (OSError)          the folder or its files
│   ├── FolderError                         not a memory folder, newer than this version, or damaged
│   ├── FolderInUse                         another process has the folder open
│   ├── BackupError                         not a backup, or one that is damaged, newer, or another memory's
│   ├── StorageFull                         no space left; nothing was written
│   ├── ArchiveError                        a block of the archive is missing or damaged
│   └── IndexingError                       the vector index can't be brought up to date
├── ModelMismatch        (ValueError)       the folder was indexed with another embedding model
├── EmbeddingError       (RuntimeError)     the embedder failed
├── SummarizerError      (RuntimeError)     the summarizer failed
├── ExtractionError      (RuntimeError)     the extractor failed
├── ForkedError          (RuntimeError)     a memory opened before a fork was used in the child
└── ClosedError          (RuntimeError)     the memory was closed

Each class also is the builtin that a Python programmer would catch, carries its facts as
attributes, and says in its message what to do next.
"""

from __future__ import annotations

from typing import Any


def brief(value: object) -> str:
    """*value* as it stands in a message: its repr, in at most 80 characters."""
    try:
        return f"{value!r:.80}"
    except Exception:  # an integer of thousands of digits; a repr that is broken
        return f"a {type(value).__name__}"


class NeuralFlowError(Exception):
    """Base of every error of this package. Keyword arguments become attributes."""

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.__dict__.update(facts)


class ConfigError(NeuralFlowError, ValueError):
    """An option, or a combination of options, is wrong."""


class MissingDependency(NeuralFlowError, ImportError):
    """An optional library is not installed. Attributes: `library`, `extra`."""

    library: str
    extra: str

    def __init__(self, library: str, extra: str, what: str) -> None:
        NeuralFlowError.__init__(
            self,
            f"{what} needs {library}, which is not installed: pip install 'neuralflow-memory[{extra}]'",
            library=library,
            extra=extra,
        )


class InputError(NeuralFlowError, ValueError):
    """What was passed in can't be used; nothing was written."""


class MessageError(InputError):
    """A message's content, role or shape is wrong."""


class FilterError(InputError):
    """A filter expression is wrong."""


class QueryError(InputError):
    """A search query, or one of its options, is wrong."""


class FormatError(InputError):
    """A file can't be imported; nothing of it was written. Attributes: `path`, and `line`, the number of the wrong one."""

    path: str
    line: int


class ScopeError(InputError):
    """The given ids don't make a scope."""


class BudgetError(InputError):
    """The newest user turn alone does not fit. Attributes, in tokens: `needed`, `available`."""

    needed: int
    available: int


class TaskError(InputError):
    """A task was used before it was started or after it was over. Attribute: `name`."""

    name: str


class ConflictError(NeuralFlowError, ValueError):
    """An id is already taken by other content, or a session's state has changed since it was read. Attribute: `id`.

    Of a state also its versions: `expected`, and `found`, which it has.
    """

    id: str
    expected: int | None = None
    found: int | None = None


class NotFound(NeuralFlowError, LookupError):
    """No such entry in this scope. Attribute: `id`."""

    id: str


class AccessDenied(NeuralFlowError, PermissionError):
    """The principal may not do this here. Attributes: `principal`, `action`."""

    principal: str | None
    action: str


class StorageError(NeuralFlowError, OSError):
    """The folder, or a file in it, can't be used. Attribute: `path`."""

    path: str

    def __str__(self) -> str:
        return str(self.args[0])


class FolderError(StorageError):
    """Not a memory folder, one from a newer version, or a damaged one."""


class FolderInUse(StorageError):
    """Another process has the folder open. Attribute: `pid`, the holder's, or None."""

    pid: int | None


class BackupError(StorageError):
    """Not a backup, or one that is damaged, of a newer version or of another memory; nothing was changed."""


class StorageFull(StorageError):
    """No space is left. The call that raised wrote nothing."""


class IndexingError(StorageError):
    """The vector index can't be brought up to date. Nothing is lost: the entries wait in the ledger."""


class StateError(NeuralFlowError, ValueError):
    """A session's state would not be valid; the old one stands. Attribute: `problems`, a text for each."""

    problems: tuple[str, ...] = ()


class InvalidTransition(StateError):
    """A state can't go there from where it is; it stands as it was. Attributes: `before`, `after`, `allowed`."""

    before: str | None
    after: str
    allowed: tuple[str, ...]


class StatePersistenceError(StateError, StorageError):
    """A state could not be written; the old one stands. Its cause is the error of the ledger. Attribute: `path`."""


class ArchiveError(StorageError):
    """A block of the archive is missing or damaged. Attribute: `block`, its name. What is not in it is not touched."""

    block: str


class ModelMismatch(NeuralFlowError, ValueError):
    """The folder was indexed with another embedding model. Attributes: `stored`, `given`."""

    stored: str
    given: str


class EmbeddingError(NeuralFlowError, RuntimeError):
    """The embedder failed, or returned something that is not a vector per text."""


class SummarizerError(NeuralFlowError, RuntimeError):
    """The summarizer failed or returned nothing usable.

    Attributes, what it took all the same: `input_tokens`, `output_tokens`, `cost` (US dollars).
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0


class ExtractionError(NeuralFlowError, RuntimeError):
    """The extractor failed or returned nothing usable; that it found nothing is no error.

    Attributes, what it took all the same: `input_tokens`, `output_tokens`, `cost` (US dollars).
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0


class ForkedError(NeuralFlowError, RuntimeError):
    """A memory opened before `fork` was used in the child process."""


class ClosedError(NeuralFlowError, RuntimeError):
    """The memory was closed."""
