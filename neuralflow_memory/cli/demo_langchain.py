"""The demo's LangChain half: a ConversationChain with our memory and a model that follows a script."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from neuralflow_memory.errors import MissingDependency

try:
    from langchain_classic.chains import ConversationChain
    from langchain_core._api import LangChainDeprecationWarning
    from langchain_core.language_models import SimpleChatModel
    from langchain_core.messages import BaseMessage
except ImportError as error:
    raise MissingDependency("langchain-classic", "langchain", "The demo's LangChain half") from error

from neuralflow_memory.langchain import NeuralFlowMemory
from neuralflow_memory.session import Session


class ScriptedChatModel(SimpleChatModel):
    """Answers with what `reply` returns for the prompt."""

    reply: Callable[[str], str]

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def _call(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> str:  # noqa: ARG002
        return self.reply("\n".join(m.text for m in messages))


def langchain_talk(session: Session, *, reply: Callable[[str], str]) -> Callable[[str], str]:
    """Return a function that sends a text through a ConversationChain on *session* and returns the answer."""
    with warnings.catch_warnings():
        # The chain class is deprecated and still what many run; that is theirs to know, not the demo's to repeat.
        warnings.simplefilter("ignore", LangChainDeprecationWarning)
        chain = ConversationChain(llm=ScriptedChatModel(reply=reply), memory=NeuralFlowMemory(session=session))
    return lambda text: str(chain.invoke({"input": text})["response"])
