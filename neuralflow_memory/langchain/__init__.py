"""Memory for LangChain. Each name loads the part of LangChain it needs when it is first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from neuralflow_memory import MissingDependency

try:
    import langchain_core  # noqa: F401  # every part needs it
except ImportError as error:
    raise MissingDependency("langchain-core", "langchain", "Memory for LangChain") from error

if TYPE_CHECKING:
    from .history import NeuralFlowChatMessageHistory
    from .memory import NeuralFlowMemory
    from .messages import from_langchain, to_langchain
    from .middleware import NeuralFlowMiddleware
    from .retriever import NeuralFlowRetriever
    from .store import NeuralFlowStore

_HOMES = {
    "NeuralFlowChatMessageHistory": "history",
    "NeuralFlowMemory": "memory",
    "NeuralFlowMiddleware": "middleware",
    "NeuralFlowRetriever": "retriever",
    "NeuralFlowStore": "store",
    "from_langchain": "messages",
    "to_langchain": "messages",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "NeuralFlowChatMessageHistory",
    "NeuralFlowMemory",
    "NeuralFlowMiddleware",
    "NeuralFlowRetriever",
    "NeuralFlowStore",
    "from_langchain",
    "to_langchain",
]
