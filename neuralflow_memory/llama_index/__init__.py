"""Memory for LlamaIndex."""

from __future__ import annotations

from neuralflow_memory import MissingDependency

try:
    import llama_index.core  # noqa: F401  # every part needs it
except ImportError as error:
    raise MissingDependency("llama-index-core", "llama-index", "Memory for LlamaIndex") from error

from .block import NeuralFlowMemoryBlock
from .chat_store import NeuralFlowChatStore
from .memory import NeuralFlowMemory
from .messages import from_llama_index, to_llama_index

__all__ = [
    "NeuralFlowChatStore",
    "NeuralFlowMemory",
    "NeuralFlowMemoryBlock",
    "from_llama_index",
    "to_llama_index",
]
