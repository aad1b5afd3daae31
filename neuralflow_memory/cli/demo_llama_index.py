"""The demo's LlamaIndex half: a SimpleChatEngine with our memory and a model that follows a script."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from neuralflow_memory.errors import MissingDependency

try:
    from llama_index.core.chat_engine import SimpleChatEngine
    from llama_index.core.llms import CompletionResponse, CompletionResponseGen, CustomLLM, LLMMetadata
    from llama_index.core.llms.callbacks import llm_completion_callback
except ImportError as error:
    raise MissingDependency("llama-index-core", "llama-index", "The demo's LlamaIndex half") from error

from neuralflow_memory.llama_index import NeuralFlowMemory
from neuralflow_memory.session import Session


class ScriptedLLM(CustomLLM):
    """Answers with what `reply` returns for the prompt."""

    reply: Callable[[str], str]

    @property
    def metadata(self) -> LLMMetadata:
        """What the engine asks a model about itself."""
        return LLMMetadata(model_name="scripted")

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:  # noqa: ARG002
        """The whole answer."""
        return CompletionResponse(text=self.reply(prompt))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """The whole answer, as a stream of one piece."""
        yield self.complete(prompt, formatted, **kwargs)


def llama_index_talk(session: Session, *, reply: Callable[[str], str]) -> Callable[[str], str]:
    """Return a function that sends a text through a SimpleChatEngine on *session* and returns the answer."""
    engine = SimpleChatEngine.from_defaults(llm=ScriptedLLM(reply=reply), memory=NeuralFlowMemory(session=session))
    return lambda text: str(engine.chat(text).response)
